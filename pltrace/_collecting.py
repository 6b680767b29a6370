"""Tells whether Python's garbage collector is at work: before Python 3.12 it can come inside of `ContextVar.set`."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

__all__ = ["is_collecting", "phases"]

#: The phases of the collector, "start" and "stop", with what was said of each; the latest last.
phases: dict[str, object] = {"start": None, "stop": None}


def _thread_local() -> Any:
    """Return what each thread of the system has its own of, also where gevent or eventlet have one for greenlets."""
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if gevent is not None:
        return gevent.get_original("threading", "local")()
    return (threading if eventlet is None else eventlet.original("threading")).local()


#: The same of the thread that it runs in: others may come in between, as finalizers wait for a network.
_own = _thread_local()

if sys.version_info < (3, 12):
    # All take a phase and what is said of it, and get the same of that. Not Python code: it is where a pending Ctrl+C
    # would come up, to be lost. First, as others' may run traced code.
    gc.callbacks[:0] = [phases.pop, phases.__setitem__, _own.__setattr__]


def is_collecting() -> bool:
    """Return whether the running code may be a finalizer that the collector calls in this thread.

    It must set no context variable then, not even to set it back: the collector may have come in the middle of setting
    one, and Python would go on with memory that is freed, and crash. Since 3.12 the collector comes between two
    instructions of Python code.
    """
    _, latest = phases
    return latest == "start" and getattr(_own, "start", None) is phases["start"]
