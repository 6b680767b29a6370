"""Carries scopes into threads and thread pools everywhere, for applications that ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pltrace._bind import bind
from pltrace._wrapping import patched

__all__ = ["instrument_threads", "uninstrument_threads"]

_undo: list[Callable[[], None]] = []


def instrument_threads() -> None:
    """Let every thread, and everything submitted to a thread pool, run inside the scope of who started it.

    It changes `threading.Thread.start` and `ThreadPoolExecutor.submit` for the whole process, so it is the
    application's to call, not a library's; `bind` does the same for one function. Called again, it does nothing.
    """
    if not _undo:
        _undo.append(patched(threading.Thread, "start", _start))
        _undo.append(patched(ThreadPoolExecutor, "submit", _submit))


def uninstrument_threads() -> None:
    """Undo `instrument_threads`."""
    while _undo:
        _undo.pop()()


def _start(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    run = bind(instance.run)
    if run is not instance.run:
        instance.run = run
    return wrapped(*args, **kwargs)


def _submit(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    if args:
        args = (bind(args[0]), *args[1:])
    return wrapped(*args, **kwargs)
