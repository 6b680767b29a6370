"""Has what `multiprocessing` ends by SIGTERM, as all workers of a `Pool`, end its work first, as at any ordinary exit.

Those are daemonic processes, in its word. No others are touched, nor one that has a handler of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

from pltrace._background import Background, limited
from pltrace._forks import at_fork
from pltrace._greenlets import close_now, sleep
from pltrace._wrapping import when_imported

__all__ = ["Work", "before_termination", "expect_termination"]

#: The main thread stands still so long while all is written, and no longer: it may be in the middle of what that waits
#: for, as a flush of its own. To write takes no longer than this; what can be delivered in so much time is.
_STANDSTILL_S, _MOST_WRITING_S, _MOST_DELIVERING_S = 0.1, 1.0, 0.5
#: The pipe's descriptors have higher numbers.
_HIGH = 200
#: Modules with code of ours around the user's functions.
_AROUND = {
    f"{__package__}.{name}"
    for name in (
        "_bind", "_cli", "_driving", "_generators", "_program", "_runnables", "_stepping", "_traced", "_wrapping",
    )
}  # fmt: skip

_process: _Terminable | None = None
_work: Work | None = None


class Work(Protocol):
    """What has to be ended before the process is."""

    def write(self) -> None:
        """Put all on disk."""

    def deliver(self, timeout: float) -> None:
        """Deliver what can be in so many seconds, and leave the rest to others."""


def before_termination(work: Work) -> None:
    """Have `work` ended where `multiprocessing` ends a child of this process, or this one, by SIGTERM."""
    global _work
    if hasattr(os, "fork"):  # On Windows nothing comes before the end.
        _work = work
        when_imported("multiprocessing.util", _hook_children)
        expect_termination()


def expect_termination() -> None:
    """Be prepared for the signal, if this is such a process, from now on."""
    global _process
    if (
        _work is not None
        and _process is None
        and _is_daemonic(perhaps=True)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        with suppress(RuntimeError):  # No thread runs here.
            _process = _Terminable(_work)


def _is_daemonic(*, perhaps: bool = False) -> bool:
    """Return whether this is such a process; `perhaps`, where that isn't known yet, as one that was spawned imports."""
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    if multiprocessing is None:
        return False
    process = multiprocessing.current_process()
    return bool(process.daemon or (perhaps and getattr(process, "_inheriting", False)))


def _hook_children(util: Any) -> None:
    # Called in the children of a fork, in the main thread, when they know what they are.
    util.register_after_fork(expect_termination, lambda expect: expect())


class _Terminable:
    """This process, with a handler of SIGTERM.

    Python calls handlers in the main thread alone, and not before what that is at in C is done. The signal's number is
    written to a pipe at once, where a thread reads it: it ends the process in any case.

    Args:
        work: What is done before.

    Raises:
        RuntimeError: No thread runs here.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._is_written = False
        self._pid = os.getpid()
        self._is_over = False  # The handler was called.
        self._reader, self._writer = map(_out_of_the_way, os.pipe())
        self._pipe = os.fstat(self._writer).st_ino
        os.set_blocking(self._writer, False)
        try:
            Background(self._wait, "pltrace-termination").start()
        except BaseException:
            self._close()
            raise
        self.after_fork_in_parent()
        signal.signal(signal.SIGTERM, self._terminated)

    def before_fork(self) -> None:
        """Have signals that come at once to the child of a fork not written to the pipe: it is this process's."""
        with suppress(ValueError):  # Another thread than the main one, which alone may do it, forks.
            if (current := signal.set_wakeup_fd(-1)) != self._writer:
                signal.set_wakeup_fd(current)

    def after_fork_in_parent(self) -> None:
        """Have them written there; what an event loop has set stays, and the handler alone has to do."""
        with suppress(ValueError):
            if (current := signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)) != -1:
                signal.set_wakeup_fd(current)

    def after_fork_in_child(self) -> None:
        """Be as if nothing had been done."""
        self.before_fork()
        if signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._close()

    def _close(self) -> None:
        close_now(self._reader)
        close_now(self._writer)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # It may come to the child of a fork before all else; or this isn't such a process after all.
        if os.getpid() != self._pid or not _is_daemonic() or not self._has_pipe():
            os.kill(os.getpid(), number)
        else:
            self._is_over = True
            os.write(self._writer, bytes([number]))
            sleep(_STANDSTILL_S)
            while self._is_written and not _is_at_our_work(frame):  # The end is near.
                sleep(_STANDSTILL_S)

    def _has_pipe(self) -> bool:
        """Return whether the pipe is there: a program may close all descriptors that it doesn't know."""
        try:
            return os.fstat(self._writer).st_ino == self._pipe
        except OSError:
            return False

    def _wait(self) -> None:
        while True:
            try:
                numbers = os.read(self._reader, 512)
            except OSError:
                return  # The program has closed it.
            if signal.SIGTERM in numbers and (self._is_over or signal.getsignal(signal.SIGTERM) == self._terminated):
                break  # Else the program has a handler of its own by now.
            if not self._has_pipe():
                return
        try:
            if _is_daemonic():
                limited(self._work.write, "pltrace-termination", _MOST_WRITING_S)
                self._is_written = True
                limited(lambda: self._work.deliver(_MOST_DELIVERING_S), "pltrace-termination", _MOST_WRITING_S)
        finally:
            _die()


def _out_of_the_way(descriptor: int) -> int:
    """Return a descriptor by a higher number, which isn't soon another file's if the program closes it."""
    import fcntl  # Not on Windows.

    try:
        higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:  # The process may have none so high.
        return descriptor
    os.close(descriptor)
    return higher


def _is_at_our_work(frame: FrameType | None) -> bool:
    """Return whether a thread is in the middle of something of ours, as a flush, and may hold what others wait for."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(f"{__package__}.") and module not in _AROUND:
            return True
        frame = frame.f_back
    return False


def _die() -> None:
    """End by SIGTERM, whatever the main thread, which alone may take a handler away, is in the middle of."""
    with suppress(Exception):
        import ctypes

        ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, None)
    os.kill(os.getpid(), signal.SIGTERM)


def _before_fork() -> None:
    if _process is not None:
        _process.before_fork()


def _after_fork_in_parent() -> None:
    if _process is not None:
        _process.after_fork_in_parent()


def _after_fork_in_child() -> None:
    global _process
    if _process is not None:
        _process.after_fork_in_child()
        _process = None


at_fork(before=_before_fork, in_parent=_after_fork_in_parent, in_child=_after_fork_in_child)
