"""Has us called around forks: by Python, and where a server forks past it, by the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["at_fork", "forked_past_python", "hook_uwsgi"]

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
