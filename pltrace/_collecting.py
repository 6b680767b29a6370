"""Tells whether Python's garbage collector is at work: before Python 3.12 it can come inside of `ContextVar.set`."""

from __future__ import annotations

import gc
import sys

__all__ = ["is_collecting"]

#: The phases of the collector, the latest last: "start" or "stop".
_phases: dict[str, object] = {}

if sys.version_info < (3, 12):
    # Both take a phase and what is said of it. Not Python code: it is where a pending Ctrl+C would come up, to be lost.
    gc.callbacks += [_phases.pop, _phases.__setitem__]


def is_collecting() -> bool:
    """Return whether the running code may be a finalizer that the collector calls.

    It must set no context variable then, not even to set it back: the collector may have come in the middle of setting
    one, and Python would go on with memory that is freed, and crash. Since 3.12 the collector comes between two
    instructions of Python code.
    """
    return next(reversed(_phases), "") == "start"
