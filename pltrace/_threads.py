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

#: How to undo what was changed, by class and method.
_undo: dict[tuple[type[Any], str], Callable[[], None]] = {}

#: What gives work to a pool of `multiprocessing`, of threads or of processes: its first argument is the function.
_POOL_METHODS = ("apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered")


def instrument_threads() -> None:
    """Let every thread, and everything submitted to an executor or pool, run inside the scope of who started it.

    It changes `threading.Thread.start`, the `submit` of `concurrent.futures`' executors, and the pools of
    `multiprocessing`, threads' and processes', for the whole process, so it is the application's to call, not a
    library's; `bind` does the same for one function. Called again, it does nothing.
    """
    _patch(threading.Thread, "start", _start)
    _patch(ThreadPoolExecutor, "submit", _submit)
    # Not imported for this: they bring multiprocessing along.
    when_imported("concurrent.futures.process", _patch_process_executors)
    when_imported("multiprocessing.pool", _patch_pools)


def uninstrument_threads() -> None:
    """Undo `instrument_threads`; what was started keeps its scope."""
    while _undo:
        _, undo = _undo.popitem()
        undo()


def _patch(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    if (owner, name) not in _undo:
        _undo[owner, name] = patched(owner, name, wrapper)


def _patch_process_executors(module: ModuleType) -> None:
    if _undo:  # Else it was undone before the module came.
        _patch(module.ProcessPoolExecutor, "submit", _submit)


def _patch_pools(module: ModuleType) -> None:
    if _undo:
        _patch(module.Pool, "__init__", _without_scope)
        for name in _POOL_METHODS:
            _patch(module.Pool, name, _give)


def _start(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    # Ours have no scope but their own.
    if current() is None or instance.name.startswith("pltrace-"):
        return wrapped(*args, **kwargs)
    own = vars(instance)
    given = own.get("run")
    inside = bind(instance.run)

    def as_before() -> None:
        if given is None:
            own.pop("run", None)
        else:
            own["run"] = given

    def run() -> None:
        as_before()  # What is bound holds the thread, which would hold itself.
        inside()

    own["run"] = run
    try:
        return wrapped(*args, **kwargs)
    except Exception:  # It wasn't started. Where an interrupt comes out, it may have been.
        as_before()
        raise


def _submit(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    # The executor may start a thread now.
    return _without_scope(wrapped, instance, *_bound(args, kwargs))


def _give(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = _bound(args, kwargs)
    return wrapped(*args, **kwargs)


def _bound(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with the function among them bound to the current scope."""
    if args:
        return (bind(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "func": bind(kwargs["func"])} if "func" in kwargs else kwargs


def _without_scope(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """Call what may start threads that live on with other people's work: they get no scope."""
    outside = current()
    if outside is None:
        return wrapped(*args, **kwargs)
    attach(None)
    try:
        return wrapped(*args, **kwargs)
    finally:
        attach(outside)
