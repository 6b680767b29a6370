"""What drains the store from the background: threads that go round when their pace lets them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pltrace._background import Background
from pltrace._exporter import ExportResult
from pltrace._greenlets import new_lock
from pltrace._health import failed
from pltrace._outbox import Outbox
from pltrace._pace import Pace
from pltrace._silence import be_silent
from pltrace._trouble import STORE_TROUBLE

__all__ = ["Worker"]

#: How often processes that ended are looked for, and the lease is renewed.
_LOOK_ROUND_EVERY_S = 15.0


class Worker(ABC):
    """A thread, started by its first work, that goes round when its pace lets it.

    Args:
        name: What it is called in warnings and lists of threads.
        linger_s: Work waits so long for more of it.
        is_users: It runs code of the user's.
    """

    _outbox: Outbox

    def __init__(self, name: str, linger_s: float, *, is_users: bool = False) -> None:
        self._name = name
        self._linger_s = linger_s
        self._is_users = is_users
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        self.pace = Pace(self._name, self._linger_s, _LOOK_ROUND_EVERY_S)
        self._thread: Background | None = None
        self._starting = new_lock()

    def work(self) -> None:
        """Take note of new work."""
        self.pace.work()
        self.start()

    def start(self) -> bool:
        """Start the thread if there is none; return whether there is one."""
        if not self._starting.acquire(blocking=False):
            return True  # Another caller does; two threads would send all twice.
        try:
            if self._thread is None or not self._thread.is_alive():
                self._thread = Background(self._run, f"pltrace-{self._name}", is_users=self._is_users).start()
            return True
        except RuntimeError:
            return False  # The interpreter is shutting down; the next process delivers.
        finally:
            self._starting.release()

    def _run(self) -> None:
        be_silent()
        while self.pace.wait():
            try:
                self._round()
            except STORE_TROUBLE as error:
                self._back_off(ExportResult("retry", f"waits for the store: {error}"))
            except Exception as error:
                failed(f"delivering to {self._name}")  # All is still in the store.
                self._back_off(ExportResult("retry", str(error)))

    def _back_off(self, result: ExportResult) -> None:
        self.pace.back_off(result, self._outbox.where)

    @abstractmethod
    def _round(self) -> None:
        """Deliver what is due."""

    @abstractmethod
    def _is_left(self, up_to: int) -> bool:
        """Return whether something of what is to be flushed isn't delivered yet."""

    def stop(self) -> None:
        """Let the thread end after what it is at: what is left is another's to deliver."""
        self.pace.stop()

    def flush(self, up_to: int, deadline: float, *, patient: bool) -> bool:
        """Deliver what is in the store up to a span's number.

        Args:
            up_to: The number of the last span.
            deadline: Monotonic time to give up at.
            patient: Goes on after a try has failed.

        Returns:
            Whether all of it was delivered or set aside.
        """
        if not self._is_left(up_to):
            return True
        failed_tries = None if patient else self.pace.failed_tries
        self.pace.hurry()
        if not self.start():
            return False
        while self._is_left(up_to):
            if not self.pace.wait_for_round(deadline, failed_tries):
                return False
        return True
