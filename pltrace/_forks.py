"""Has us called around forks: by Python, and where a server forks past it, by the server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["LONGEST_FORK_S", "ForkLock", "at_fork", "forked_past_python", "hook_uwsgi"]

#: A fork waits so long for what must not be cut in two by it.
LONGEST_FORK_S = 1.0

_in_child: list[Callable[[], object]] = []
_pid = os.getpid()


def at_fork(
    *,
    before: Callable[[], object] | None = None,
    in_parent: Callable[[], object] | None = None,
    in_child: Callable[[], object] | None = None,
) -> None:
    """Have functions called just before a fork, and just after it in the parent and in the child."""
    if in_child is not None:
        _in_child.append(in_child)
    if hasattr(os, "register_at_fork"):
        given = {"before": before, "after_in_parent": in_parent, "after_in_child": in_child}
        os.register_at_fork(**{name: call for name, call in given.items() if call is not None})


class ForkLock:
    """A lock for a module's life that a fork takes too, so that none comes while it is held.

    Attributes:
        lock: Re-entrant, to be held by `with`: not the object itself, whose entering would be Python code, after which
            Ctrl+C could leave the lock held for good. The child of a fork begins with a free one, also where the fork
            gave up waiting.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._forking = threading.local()
        at_fork(before=self._before_fork, in_parent=self._after_fork_in_parent, in_child=self._after_fork_in_child)

    def _before_fork(self) -> None:
        self._forking.holds = self.lock.acquire(timeout=LONGEST_FORK_S)

    def _after_fork_in_parent(self) -> None:
        if self._forking.holds:
            self.lock.release()

    def _after_fork_in_child(self) -> None:
        self.lock = threading.RLock()


def forked_past_python() -> None:
    """Start afresh in the child of a fork that Python was told nothing of, if this is one."""
    if os.getpid() == _pid:
        return
    for call in _in_child:
        call()


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
