"""Wraps a callable so that nothing of it changes but what happens when it is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__all__ = [
    "ObjectProxy",
    "Wrapped",
    "is_async_generator",
    "is_coroutine",
    "is_generator",
    "patched",
    "rewrap",
    "when_imported",
]

#: `wrapper(wrapped, instance, args, kwargs)`, as wrapt calls it.
Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


if TYPE_CHECKING:
    # wrapt's own types are generic in newer versions and absent in older ones; this is what we use of them.
    class ObjectProxy:
        __wrapped__: Any

        def __init__(self, wrapped: Any) -> None: ...

    class FunctionWrapper(ObjectProxy):
        def __init__(self, wrapped: Any, wrapper: Wrapper, enabled: Any = None) -> None: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    from wrapt import FunctionWrapper, ObjectProxy


class Wrapped(FunctionWrapper):
    """A function that calls a wrapper when the gate is open, and else the function itself.

    Args:
        wrapped: The function.
        wrapper: Called in its place.
        gate: Empty while it is to be called itself; wrapt tests it in C.
        declaration: What it was decorated with, for who asks.
    """

    def __init__(self, wrapped: Any, wrapper: Wrapper, gate: list[Any], declaration: Any) -> None:
        super().__init__(wrapped, wrapper, enabled=gate)
        self._self_wrapper_of = (wrapper, gate)
        self._self_declaration = declaration
        self._self_binding_kind = _binding_of(wrapped)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as the function does: to a real method, whose function is this wrapper."""
        kind = self._self_binding_kind
        if kind == "method":
            # wrapt's own binding costs three times as much, and its result is no real method.
            return self if instance is None else MethodType(self, instance)
        if kind == "none":
            return self
        bound = self.__wrapped__.__get__(instance, owner)
        return self if bound is self.__wrapped__ else Wrapped(bound, *self._self_wrapper_of, self._self_declaration)

    def __reduce_ex__(self, protocol: Any) -> str:
        """Pickle by name, as functions are."""
        return str(self.__wrapped__.__qualname__)

    def __copy__(self) -> Wrapped:
        """Return itself, as copying a function does."""
        return self

    def __deepcopy__(self, memo: Any) -> Wrapped:
        """Return itself, as copying a function does."""
        return self


def _binding_of(wrapped: Any) -> str:
    """Return how a callable binds when it is looked up on an instance: as a `method`, not at all, or its own way."""
    if type(wrapped) is FunctionType:
        return "method"
    return "own" if hasattr(type(wrapped), "__get__") else "none"


def rewrap(function: Any, decorate: Callable[[Any], Any]) -> Any:
    """Return a `classmethod` or `staticmethod` with the function in it decorated, or None if it is neither."""
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(decorate(function.__func__))
    return None


def is_generator(function: Any) -> bool:
    """Return whether calling it makes a generator."""
    return _is(inspect.isgeneratorfunction, function)


def is_coroutine(function: Any) -> bool:
    """Return whether calling it makes a coroutine."""
    return _is(inspect.iscoroutinefunction, function)


def is_async_generator(function: Any) -> bool:
    """Return whether calling it makes an async generator."""
    return _is(inspect.isasyncgenfunction, function)


def _is(test: Callable[[Any], bool], function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return test(function) or (not inspect.isroutine(function) and test(getattr(type(function), "__call__", None)))  # noqa: B004


def patched(owner: Any, name: str, wrapper: Wrapper) -> Callable[[], None]:
    """Put a wrapper around an attribute of `owner`; return what takes it off again."""
    original = getattr(owner, name)
    setattr(owner, name, FunctionWrapper(original, wrapper))
    return lambda: setattr(owner, name, original)


def when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call` with the module of that name: now if it is imported already, else when it is."""
    wrapt.register_post_import_hook(call, name)
