"""Tells whether Python's garbage collector is at work: before Python 3.12 it can come inside of `ContextVar.set`."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

__all__ = ["at_work", "is_collecting"]


class _AtWork(set[str]):
    """Has something in it from the start of a collection, in any thread, to its stop: what is told of it."""

    start: Any = property(None, set.update)
    stop: Any = property(None, set.difference_update)


def _thread_local() -> Any:
    """Return what each thread of the system has its own of, also where gevent or eventlet have one for greenlets."""
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if gevent is not None:
        return gevent.get_original("threading", "local")()
    return (threading if eventlet is None else eventlet.original("threading")).local()


#: Tested for truth before `is_collecting` is called, where nanoseconds count.
at_work = _AtWork()
#: What was told of the latest start and stop; the same of the thread that it runs in: others may come in between, as
#: finalizers wait for a network.
_latest: dict[str, object] = {}
_own = _thread_local()

if sys.version_info < (3, 12):
    # All take a phase and what is told of it. Not Python code: it is where a pending Ctrl+C would come up, to be lost.
    # First, as others' may run traced code.
    gc.callbacks[:0] = [_latest.__setitem__, _own.__setattr__, at_work.__setattr__]


def is_collecting() -> bool:
    """Return whether the running code may be a finalizer that the collector calls in this thread.

    It must set no context variable then, not even to set it back: the collector may have come in the middle of setting
    one, and Python would go on with memory that is freed, and crash. Since 3.12 the collector comes between two
    instructions of Python code.
    """
    return bool(at_work) and getattr(_own, "start", None) is _latest["start"]
