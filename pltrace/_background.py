"""Gives our background work threads of the operating system, also where gevent makes greenlets of threads."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pltrace._clock import monotonic
from pltrace._forks import at_fork
from pltrace._greenlets import before_gevent, idents, new_lock, own_ident
from pltrace._health import warn_once

__all__ = ["Background", "Side", "in_subinterpreter", "limited", "wait_for_threads"]

T = TypeVar("T")

#: What threads may be at when they are told to end, as a request that isn't answered.
_LONGEST_END_S = 30.0
#: Signals of a thread's own faults, which can't be blocked.
_FAULTS = {number for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL") if (number := getattr(signal, name, None))}


class Background:
    """A daemon thread of ours.

    A greenlet wouldn't do: each commit would hold up all others, and a lock that was made before gevent patched the
    program, as under a server that loads the application first, would stop them for good.

    Args:
        work: What it does.
        name: Begins with `pltrace-`.
        is_users: It is code of the user's, which may start processes: they inherit which signals it takes.
    """

    def __init__(self, work: Callable[[], object], name: str, *, is_users: bool = False) -> None:
        self._work = work
        self._name = name
        self._is_users = is_users
        self._alive = False

    def start(self) -> Background:
        """Start it.

        Raises:
            RuntimeError: The interpreter is shutting down and allows no new thread, or the server lets none run.
        """
        if not _may_run():
            raise RuntimeError("threads don't run here")
        self._alive = True
        try:
            native = before_gevent("_thread", "start_new_thread")
            if native is not None:
                native(self._run, ())
            else:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except BaseException:
            self._alive = False
            raise
        return self

    def is_alive(self) -> bool:
        """Whether it was started and hasn't ended."""
        return self._alive

    def _run(self) -> None:
        ident = own_ident()
        idents.add(ident)
        try:
            # A signal that the program blocks, to look at it later, would be given to the first thread that doesn't.
            if not self._is_users and hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
            self._work()
        finally:
            self._alive = False
            idents.discard(ident)


def limited(work: Callable[[], T], name: str, seconds: float) -> T:
    """Return what `work` returns, from a thread of its own, which is left behind when it takes too long.

    Args:
        work: What to do.
        name: Begins with `pltrace-`.
        seconds: The longest wait for it.

    Raises:
        TimeoutError: It took longer.
    """
    results: Any = (before_gevent("queue", "SimpleQueue") or SimpleQueue)()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # One that calls sys.exit() ends itself alone.
            results.put((None, error))

    try:
        Background(run, name).start()
    except RuntimeError:
        run()  # The interpreter is shutting down, and doesn't wait for us.
    result: T
    error: BaseException | None
    try:
        result, error = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return result


class Side:
    """A thread of ours that does one thing after another, and is left behind for another when one takes too long.

    The same one as long as it goes: under gevent a connection is of use to the thread alone that has opened it.

    Args:
        name: The thread's name; begins with `pltrace-`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: Any = None  # Of the thread, if there is one.

    def do(self, work: Callable[[], object], seconds: float) -> None:
        """Do something, which raises nothing, and wait for so long until it is done."""
        done = new_lock()
        done.acquire()

        def run() -> None:
            try:
                work()
            finally:
                done.release()

        if self._tasks is None and not self._start():
            run()  # The interpreter is shutting down, and doesn't wait for us.
            return
        self._tasks.put(run)
        if not done.acquire(timeout=seconds):
            self.leave()

    def leave(self) -> None:
        """Let the thread end after what it is at; what comes next is another's."""
        if self._tasks is not None:
            self._tasks.put(None)
            self._tasks = None

    def _start(self) -> bool:
        tasks: Any = (before_gevent("queue", "SimpleQueue") or SimpleQueue)()

        def work_off() -> None:
            for task in iter(tasks.get, None):
                task()

        try:
            Background(work_off, self._name).start()
        except RuntimeError:
            return False
        self._tasks = tasks
        return True


def in_subinterpreter() -> bool:
    """Return whether this is an interpreter of several in the process, which Python aborts if threads outlive it."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # Since Python 3.13, and before.
        with suppress(ImportError):
            interpreters: Any = import_module(name)
            return bool(interpreters.get_current() != interpreters.get_main())
    return False


def wait_for_threads() -> None:
    """Wait for the threads of ours, which were told to end."""
    deadline = monotonic() + _LONGEST_END_S
    for thread in threading.enumerate():
        if thread.name.startswith("pltrace-"):
            thread.join(max(deadline - monotonic(), 0.0))


at_fork(in_child=idents.clear)


def _may_run() -> bool:
    """Return whether threads run here, and do no harm: in uWSGI there are places where they don't."""
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None:
        return True
    if not getattr(uwsgi, "has_threads", True):
        warn_once(
            "uwsgi",
            "uWSGI runs no threads: pltrace writes spans to the store while the program waits, and leaves delivering "
            "them to `pltrace sync`. Start uWSGI with --enable-threads.",
        )
        return False
    # It forks past Python: its children could never use what a thread of the master is in the middle of.
    return bool(os.getpid() != getattr(uwsgi, "masterpid", int)())
