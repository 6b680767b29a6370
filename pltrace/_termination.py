"""Has what `multiprocessing` ends by SIGTERM, as all workers of a `Pool`, end its work first, as at any ordinary exit.

Those are daemonic processes, in its word. No others are touched, nor one that has a handler of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pltrace._background import Background, close_now, sleep
from pltrace._forks import at_fork
from pltrace._wrapping import when_imported

__all__ = ["before_termination", "expect_termination"]

#: The main thread stands still so long while the work is ended, and no longer: it may be in the middle of what that
#: waits for, as a flush of its own.
_STANDSTILL_S = 0.1

_end: Callable[[], object] | None = None
_process: _Terminable | None = None


def before_termination(end: Callable[[], object]) -> None:
    """Have `end` called where `multiprocessing` ends a child of this process, or this one, by SIGTERM."""
    global _end
    if hasattr(os, "fork"):  # On Windows nothing comes before the end.
        _end = end
        when_imported("multiprocessing.util", _hook_children)


def expect_termination() -> None:
    """Be prepared for the signal, if this is such a process, from now on."""
    global _process
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    if (
        _end is not None
        and _process is None
        and multiprocessing is not None
        and multiprocessing.current_process().daemon
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        with suppress(RuntimeError):  # No thread runs here.
            _process = _Terminable(_end)


def _hook_children(util: Any) -> None:
    # Called in the children of a fork, in the main thread, when they know what they are. Those that are spawned know it
    # when they first record, and can do something then if it is in the main thread.
    util.register_after_fork(expect_termination, lambda expect: expect())


class _Terminable:
    """This process, with a handler of SIGTERM.

    Python calls handlers in the main thread alone, and not before what that is at in C is done. The signal's number is
    written to a pipe at once, where a thread reads it: it ends the process in any case.

    Args:
        end: What is done before.

    Raises:
        RuntimeError: No thread runs here.
    """

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end
        self._pid = os.getpid()
        self._reader, self._writer = os.pipe()
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

    def _terminated(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._pid:  # It may come to the child of a fork before all else.
            os.kill(os.getpid(), number)
        else:
            os.write(self._writer, bytes([number]))
            sleep(_STANDSTILL_S)

    def _wait(self) -> None:
        while signal.SIGTERM not in os.read(self._reader, 512):
            pass
        try:
            self._end()
        finally:
            _die()


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
