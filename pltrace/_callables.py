"""Tells what a callable is: what a call of it makes, and what of it can be decorated."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import CodeType, DynamicClassAttribute, FunctionType
from typing import Any

from pltrace._wrapping import Wrapped

__all__ = [
    "code_flags", "has_to_stay_a_class", "held_in", "in_class", "is_coroutine", "is_decorable", "is_own_class",
    "rewrap",
]  # fmt: skip

#: What lies in a class and isn't called, but gives something to call when it is bound.
_BINDING = (functools.partialmethod, functools.singledispatchmethod)
#: What a class makes by itself of functions that it finds under these names.
_MADE_BY_CLASSES: dict[str, Any] = {
    "__init_subclass__": classmethod,
    "__class_getitem__": classmethod,
    "__new__": staticmethod,
}

#: Python's flag for classes whose attributes can't be set.
_IMMUTABLE = 1 << 8


def is_own_class(value: Any) -> bool:
    """Return whether it is a class that was written in Python: it can be changed, others are callables like any."""
    return issubclass(type(value), type) and not value.__flags__ & _IMMUTABLE


def has_to_stay_a_class(value: Any) -> bool:
    """Return whether it is a class that may get an `__init__` yet, as by `@dataclass`, or is of no use wrapped.

    An exception is caught by its class, and an enum's class is iterated over.
    """
    if not is_own_class(value) or "__init__" in vars(value):
        return False
    fields = type(value) is type and not issubclass(value, tuple) and value.__annotations__
    return bool(fields) or issubclass(value, BaseException) or hasattr(type(value), "__iter__")


#: Objects of other packages that run a function they hold, by package and name of their classes, and where it is. What
#: runs them looks for the object itself, and calls more of it than the object.
_HOLDERS = {
    ("click", "Command"): "callback",
    ("typer", "Command"): "callback",
    ("_pytest", "FixtureFunctionDefinition"): "_fixture_function",
}


def held_in(value: Any) -> str | None:
    """Return the name of the attribute with the function that an object runs; None for what is called itself."""
    for base in type(value).__mro__:
        held = _HOLDERS.get((str(base.__module__).partition(".")[0], base.__name__))
        if held is not None and callable(vars(value).get(held)):
            return held
    return None


def is_decorable(function: Any) -> bool:
    """Return whether it can be called, or is a descriptor that calls a function."""
    return callable(function) or isinstance(
        function,
        (classmethod, staticmethod, property, functools.cached_property, DynamicClassAttribute, *_BINDING),
    )


def rewrap(function: Any, decorate: Callable[[Any], Any]) -> Any:
    """Return a descriptor of the same kind with the functions in it decorated; None for all else.

    Args:
        function: What is to be decorated.
        decorate: Decorates a function.
    """
    # By what it is itself: a proxy of one, as another decorator makes, is bound as that binds it.
    kind = type(function)
    if issubclass(kind, (classmethod, staticmethod)):
        made: Any = kind(decorate(function.__func__))
        vars(made).update(vars(function))  # What was put on it.
        return made
    if issubclass(kind, functools.cached_property):
        made = copy.copy(function)  # It keeps the name that a class gave it, which is given only once.
        made.func = decorate(function.func)
        return made
    if issubclass(kind, (property, DynamicClassAttribute)):  # The latter is the `property` of an Enum.
        made = function
        for name, part in (("getter", made.fget), ("setter", made.fset), ("deleter", made.fdel)):
            # A setter is added to a copy of what the getter made, which may be decorated already.
            if part is not None and not issubclass(type(part), Wrapped):
                made = getattr(made, name)(decorate(part))
        return made
    return None


def in_class(wrapper: Any, function: Any) -> Any:
    """Return the wrapper of a function as what a class makes of the function itself, because of its name."""
    kind = _MADE_BY_CLASSES.get(function.__name__) if type(function) is FunctionType else None
    return wrapper if kind is None else kind(wrapper)


def is_coroutine(function: Any) -> bool:
    """Return whether it says that calling it makes something to await."""
    while isinstance(function, functools.partial):
        function = function.func
    test = inspect.iscoroutinefunction
    return test(function) or (not inspect.isroutine(function) and test(getattr(type(function), "__call__", None)))  # noqa: B004


def code_flags(function: Any) -> int:
    """Return the flags of the code that a call runs: what kind of thing it makes; 0 if it isn't Python code.

    A function can also be marked as a coroutine function; what it then makes shows only when it is called.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = getattr(type(function), "__call__", None)  # noqa: B004
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code.co_flags if isinstance(code, CodeType) else 0
