"""Goes round gevent, where it makes greenlets of threads: our own threads are the system's, and so is what they share.

A lock of gevent's is handed from one thread of the system to another by the event loop of either, and ours run none.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from pltrace._clock import monotonic

__all__ = [
    "Condition", "before_gevent", "close_now", "idents", "is_ours", "new_lock", "new_rlock", "own_ident", "rest",
    "sleep", "taken",
]  # fmt: skip

#: The running threads of ours.
idents: set[int] = set()
#: A greenlet that waits for what our threads hold keeps its thread so long, which is mostly enough, and then lets
#: others run for as long, in turn.
_TURN_S = 0.001


def before_gevent(module: str, name: str) -> Any:
    """Return a function or class as it was before gevent patched it, or None if it didn't."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    return monkey.get_original(module, name)


def new_lock() -> threading.Lock:
    """Return a lock that our threads share with others; a greenlet takes it by `taken`."""
    lock: threading.Lock = (before_gevent("_thread", "allocate_lock") or threading.Lock)()
    return lock


def new_rlock() -> Any:
    """Return a re-entrant lock that our threads share with others.

    It is the thread's that holds it, with all its greenlets: who holds it must let no others run, or tell them apart.
    """
    return (before_gevent("_thread", "RLock") or threading.RLock)()


def own_ident() -> int:
    """Return what the running thread of the system is known by."""
    ident: int = (before_gevent("_thread", "get_ident") or threading.get_ident)()
    return ident


def is_ours() -> bool:
    """Return whether the running thread is one of ours."""
    return own_ident() in idents


def sleep(seconds: float) -> None:
    """Sleep, and no greenlet in the meantime: it is the thread that sleeps."""
    (before_gevent("time", "sleep") or time.sleep)(seconds)


def rest(seconds: float) -> None:
    """Sleep, and let other greenlets run, where there are some."""
    if is_ours():
        sleep(seconds)
        return
    try:
        time.sleep(seconds)
    except AssertionError:  # In gevent's own loop, as in a signal handler, nobody may.
        sleep(seconds)


def close_now(descriptor: int) -> None:
    """Close a file descriptor, and let go of its lock, at once: gevent does so when its loop comes to it."""
    (before_gevent("os", "close") or os.close)(descriptor)


def taken(lock: Any, timeout: float) -> bool:
    """Take a lock that our threads share; other greenlets run while it is waited for.

    Args:
        lock: Made here.
        timeout: The longest wait in seconds.

    Returns:
        Whether it was taken.
    """
    if before_gevent("time", "sleep") is None or is_ours():
        return bool(lock.acquire(timeout=timeout))
    give_up_at = monotonic() + timeout
    while not lock.acquire(timeout=min(timeout, _TURN_S)):
        if monotonic() >= give_up_at:
            return False
        rest(_TURN_S)
    return True


class Condition:
    """As that of `threading`: of threads of the system, and of greenlets, which let others run while they wait."""

    def __init__(self) -> None:
        self._lock = new_rlock()
        self._waiting: deque[threading.Lock] = deque()  # Held by those who wait, each its own.

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float = threading.TIMEOUT_MAX) -> bool:
        """Let go until others notify, for so many seconds at most; return whether they did."""
        word = new_lock()
        word.acquire()
        self._waiting.append(word)
        held = self._lock._release_save()  # However often: a signal handler may have come in between.
        try:
            return taken(word, timeout)
        finally:
            self._lock._acquire_restore(held)
            with suppress(ValueError):
                self._waiting.remove(word)

    def notify_all(self) -> None:
        """Let all go on who wait."""
        with suppress(IndexError):
            while True:
                self._waiting.popleft().release()
