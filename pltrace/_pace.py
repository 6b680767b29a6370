"""Says when a background worker may try next: at once, after gathering, or after a back-off with jitter."""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from contextlib import suppress

from pltrace._clock import monotonic
from pltrace._exporter import ExportResult
from pltrace._greenlets import new_lock, taken
from pltrace._health import warn_sometimes

__all__ = ["LONGEST_BACKOFF_S", "Pace", "PutOff"]

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
UNAUTHORIZED_PAUSE_S = 60.0
#: A worker looks round so long after it began: a process that has just started has other things to do, and many start
#: at once, as the children of a server.
_FIRST_LOOK_S = 0.5
#: How long a thread waits for a word that never comes before it looks again by itself.
_LOOK_AGAIN_S = 0.1


def _backoff_s(failures: int) -> float:
    longest: float = min(FIRST_BACKOFF_S * 2 ** min(failures, 10), LONGEST_BACKOFF_S)
    return longest * random.uniform(0.5, 1)


class PutOff:
    """Says when something that failed is due again, while other things go on."""

    def __init__(self) -> None:
        #: Whether it has failed just now: other things are to show whether it alone does.
        self.just_now = False
        #: Monotonic time.
        self.due_at = 0.0
        self._failures = 0

    def failed(self, retry_after_s: float | None) -> None:
        """Take note that it failed."""
        self.just_now = True
        self.due_at = monotonic() + max(_backoff_s(self._failures), retry_after_s or 0.0)
        self._failures += 1

    @property
    def remaining_s(self) -> float:
        """How long it isn't due yet."""
        return max(self.due_at - monotonic(), 0.0)


class Pace:
    """The schedule of one worker thread.

    Nothing here holds a lock: a signal handler may interrupt whoever does, and wait for the writer, which tells of new
    work. Each attribute is one value, which is changed as a whole.

    Args:
        name: The thread's name, and what the worker is called in warnings.
        linger_s: Work waits so long for more of it to share one request.
        every_s: The worker is let go so often even without work.
    """

    def __init__(self, name: str, linger_s: float, every_s: float) -> None:
        self.name = name
        self._linger_s = linger_s
        self._every_s = every_s
        self._wake = new_lock()  # Free when the worker is to look at once.
        self._wake.acquire()
        self._waiting: deque[threading.Lock] = deque()  # Held by those who wait for the worker, each its own.
        self._since: float | None = None  # When the work came that is waiting.
        self._hurry = False
        self._not_before = 0.0
        self._obey = False  # The other side asked for the pause: nobody's hurry cuts it short.
        self._looked_at = monotonic() + _FIRST_LOOK_S - every_s
        self._stopped = False
        self.failures = 0  # Since the other side took something.
        self.failed_tries = 0  # In all.
        self.last_error: str | None = None

    def work(self) -> None:
        """Take note of new work."""
        if self._since is None:  # Else the worker knows when it is due, or has yet to look.
            self._since = monotonic()
            self._rouse()

    def hurry(self) -> None:
        """Let the worker try at once, once: after a failure the back-off holds again."""
        self._since = self._since or monotonic()
        self._hurry = True
        self._rouse()

    def stop(self) -> None:
        """Let the worker's thread end, after what it is at."""
        self._stopped = True
        self._rouse()

    def _rouse(self) -> None:
        with suppress(RuntimeError):  # Another caller did.
            self._wake.release()

    def wait(self) -> bool:
        """Wait, on the worker's thread, until there is something to do and it may be done; False when it is to end."""
        self._tell()
        while not self._stopped:
            now = monotonic()
            idle_until = self._looked_at + self._every_s
            due_at = idle_until
            since = self._since
            if since is not None:
                due_at = self._not_before
                if self._hurry and not self._obey:
                    due_at = 0.0
                elif not self._hurry:
                    due_at = max(due_at, since + self._linger_s)
            if now >= min(due_at, idle_until):
                self._looked_at = now
                # Taken off before the worker looks: what comes while it works is new work.
                if now >= due_at:
                    self._since = None
                return True
            self._wake.acquire(timeout=min(due_at, idle_until) - now)
        return False

    def _tell(self) -> None:
        """Let those go on who wait for the worker."""
        with suppress(IndexError):
            while True:
                self._waiting.popleft().release()

    @property
    def pausing(self) -> bool:
        """Whether the worker has to leave the other side alone now."""
        return self._stopped or (monotonic() < self._not_before and (self._obey or not self._hurry))

    def succeeded(self) -> None:
        """Take note that the other side works."""
        self.failures = 0
        self.last_error = None
        self._not_before = 0.0
        self._obey = False

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for all that there is to do."""
        return self._hurry

    def finished(self, look_again_s: float = math.inf) -> None:
        """Take note that nothing is left to do, for so many seconds."""
        if self._since is None:  # Else somebody may have hurried after the worker looked.
            self._hurry = False
        self._looked_at -= max(self._every_s - look_again_s, 0.0)

    def hold(self, seconds: float) -> None:
        """Take note that the other side has asked to wait so long with what somebody waits for: it is hurried then."""
        self._looked_at -= max(self._every_s - seconds, 0.0)
        self.failed_tries += 1

    def back_off(self, result: ExportResult, where: str) -> None:
        """Schedule the next try after a failure, and say what is the matter, at most once a minute.

        Args:
            result: The failure.
            where: What there is to do is kept meanwhile.
        """
        if result.outcome == "unauthorized":
            delay = UNAUTHORIZED_PAUSE_S
            warn_sometimes(
                f"unauthorized:{self.name}",
                "%s refuses the API key (%s). All is kept in %s; set a valid key and it is sent.",
                self.name,
                result.reason,
                where,
            )
        else:
            delay = _backoff_s(self.failures)
            warn_sometimes(
                f"retry:{self.name}",
                "%s can't be delivered to: it %s. All is kept in %s and sent when it works again.",
                self.name,
                result.reason,
                where,
            )
        if result.retry_after_s is not None:  # With jitter too: others were told the same.
            delay = result.retry_after_s + random.uniform(0, FIRST_BACKOFF_S)
        self._not_before = monotonic() + delay
        self._obey = result.retry_after_s is not None or result.outcome == "unauthorized"
        self._since = self._since or monotonic()
        self.failures += 1
        self.put_off(result)

    def put_off(self, result: ExportResult) -> None:
        """Take note of a failure after which all goes on but for what has failed."""
        self._hurry = False
        self.last_error = result.reason
        self.failed_tries += 1

    def wait_for_round(self, deadline: float, failed_tries: int | None) -> bool:
        """Wait, on another thread, until the worker has been round once more.

        Args:
            deadline: Monotonic time to give up at.
            failed_tries: Those when the waiting began, to give up when one failed since; None goes on waiting.

        Returns:
            False when it is time to give up.
        """
        now = monotonic()
        # A back-off of our own doesn't count: the hurry cuts it short.
        paused = self._obey and now < self._not_before
        stuck = failed_tries is not None and (self.failed_tries > failed_tries or paused)
        if stuck or now >= deadline:
            return False
        word = new_lock()
        word.acquire()
        self._waiting.append(word)
        if not taken(word, min(_LOOK_AGAIN_S, deadline - now)):
            with suppress(ValueError):  # It came just now.
                self._waiting.remove(word)
        return True
