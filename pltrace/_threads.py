"""Carries scopes into threads and executors everywhere, for applications that ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from pltrace._bind import bind
from pltrace._scope import attach, current
from pltrace._wrapping import patched, when_imported

__all__ = ["instrument_threads", "uninstrument_threads"]

#: How to undo what was changed, by the class it was changed in.
_undo: dict[type[Any], Callable[[], None]] = {}


def instrument_threads() -> None:
    """Let every thread, and everything submitted to an executor, run inside the scope of who started it.

    It changes `threading.Thread.start` and the `submit` of `concurrent.futures`' executors, threads' and processes',
    for the whole process, so it is the application's to call, not a library's; `bind` does the same for one function.
    Called again, it does nothing.
    """
    _patch(threading.Thread, "start", _start)
    _patch(ThreadPoolExecutor, "submit", _submit)
    # Not imported for this: it brings multiprocessing along.
    when_imported("concurrent.futures.process", _patch_process_pools)


def uninstrument_threads() -> None:
    """Undo `instrument_threads`; what was started keeps its scope."""
    while _undo:
        _, undo = _undo.popitem()
        undo()


def _patch(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    if owner not in _undo:
        _undo[owner] = patched(owner, name, wrapper)


def _patch_process_pools(module: ModuleType) -> None:
    if _undo:  # Else it was undone before the module came.
        _patch(module.ProcessPoolExecutor, "submit", _submit)


def _start(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    # Ours have no scope but their own.
    if current() is not None and not instance.name.startswith("pltrace-"):
        instance.run = bind(instance.run)
    return wrapped(*args, **kwargs)


def _submit(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    outside = current()
    if outside is None or not args:
        return wrapped(*args, **kwargs)
    function = bind(args[0])
    # The executor may start a thread now, which lives on with other people's work: it gets no scope.
    attach(None)
    try:
        return wrapped(function, *args[1:], **kwargs)
    finally:
        attach(outside)
