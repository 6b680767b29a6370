"""Has us called around forks: by Python, and where a server forks past it, by the server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pltrace._greenlets import new_rlock

__all__ = ["LONGEST_FORK_S", "ForkLock", "at_fork", "forked_past_python", "hook_uwsgi"]

#: A fork waits so long for what must not be cut in two by it.
LONGEST_FORK_S = 1.0


class _Hooks(NamedTuple):
    before: Callable[[], object] | None
    in_parent: Callable[[], object] | None
    in_child: Callable[[], object] | None


#: Those in `_first` are called before all others, and let go last: who is waited for there may add others meanwhile.
_first: list[_Hooks] = []
_others: list[_Hooks] = []
_forking = threading.local()
_pid = os.getpid()


def at_fork(
    *,
    before: Callable[[], object] | None = None,
    in_parent: Callable[[], object] | None = None,
    in_child: Callable[[], object] | None = None,
    first: bool = False,
) -> None:
    """Have functions called just before a fork, and just after it in the parent and in the child.

    Before a fork those that were added last come first, unless one is to be the `first`; after it the others way round.
    """
    (_first if first else _others).append(_Hooks(before, in_parent, in_child))


def _before_fork() -> None:
    _forking.hooks = first = [*_first]
    _call([hooks.before for hooks in first])
    others = [*_others]
    _forking.hooks = [*others, *first]
    _call([hooks.before for hooks in reversed(others)])


def _after_fork_in_parent() -> None:
    _call([hooks.in_parent for hooks in _forking.hooks])


def _after_fork_in_child() -> None:
    _call([hooks.in_child for hooks in (*_others, *_first)])


def _call(functions: Iterable[Callable[[], object] | None]) -> None:
    error = None
    for function in functions:
        try:
            if function is not None:
                function()
        except BaseException as raised:
            error = raised
    if error is not None:
        raise error  # Python tells of it, and goes on.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class ForkLock:
    """A lock for a module's life that a fork takes too, so that none comes while it is held.

    Args:
        first: A fork takes it before any other: who holds it may want those.
        is_short: No greenlet that holds it lets others run, so that our threads can share it.

    Attributes:
        lock: Re-entrant, to be held by `with`: not the object itself, whose entering would be Python code, after which
            Ctrl+C could leave the lock held for good. The child of a fork begins with a free one, also where the fork
            gave up waiting.
    """

    def __init__(self, *, first: bool = False, is_short: bool = True) -> None:
        self._make = new_rlock if is_short else threading.RLock
        self.lock = self._make()
        self._forking = threading.local()
        at_fork(
            before=self._before_fork,
            in_parent=self._after_fork_in_parent,
            in_child=self._after_fork_in_child,
            first=first,
        )

    def _before_fork(self) -> None:
        self._forking.holds = self.lock.acquire(timeout=LONGEST_FORK_S)

    def _after_fork_in_parent(self) -> None:
        if self._forking.holds:
            self.lock.release()

    def _after_fork_in_child(self) -> None:
        self.lock = self._make()


def forked_past_python() -> None:
    """Start afresh in the child of a fork that Python was told nothing of, if this is one."""
    if os.getpid() == _pid:
        return
    _after_fork_in_child()


def hook_uwsgi() -> None:
    """Be called in uWSGI's workers, which it forks without Python's hooks, unless it is told to use them."""
    uwsgi: Any = sys.modules.get("uwsgi")  # It is there from the start in such a process, and in no other.
    if uwsgi is None:
        return
    earlier = getattr(uwsgi, "post_fork_hook", None)

    def forked() -> None:
        forked_past_python()
        if earlier is not None:
            earlier()

    uwsgi.post_fork_hook = forked


def _note_process() -> None:
    global _pid
    _pid = os.getpid()


at_fork(in_child=_note_process)
