"""Notes the arguments of a call as they were, and names them when its span is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

from pltrace._snapshot import PLAIN, snapshot
from pltrace._thawing import thawed
from pltrace._wrapping import Wrapped

__all__ = ["Arguments", "arguments_of", "is_method", "named", "namesake"]

#: What names them, the function that was called or its `namesake`, and snapshots of its arguments.
Arguments = tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]
_NO_KEYWORDS: Mapping[str, Any] = {}
#: Stands for the object of a method among its arguments.
_SELF = "<the method's object>"


def namesake(function: Any) -> Any:
    """Return what names the arguments of a function or method, and holds nothing of what that holds; else itself.

    A span may be held for long, by a run inside it that isn't read to its end. It must not be what holds that run's
    stream in turn, by way of the function's variables or the method's object.
    """
    while issubclass(type(function), Wrapped):  # It is traced twice.
        function = function.__wrapped__
    if type(function) is MethodType:
        inner = namesake(function.__func__)
        return function if inner is function.__func__ else MethodType(inner, _SELF)
    if type(function) is not FunctionType or function.__dict__:  # It may be what `functools.wraps` made.
        return function
    code = function.__code__
    closure = tuple([CellType() for _ in code.co_freevars])
    made = FunctionType(code, {}, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    return made


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return snapshots of the arguments of a call, to be named when the span is written.

    The tuple and the dict are the call's own. Of a method without its object: that is not recorded, and kept for the
    writer's thread it could come to its end there.
    """
    try:
        if args and type(args[0]) not in PLAIN and _takes_its_object(function):
            args = (_SELF, *args[1:])
        for item in args:
            if type(item) not in PLAIN:
                break
        else:
            if not kwargs:
                return function, args, _NO_KEYWORDS
            for item in kwargs.values():
                if type(item) not in PLAIN:
                    break
            else:
                return function, args, kwargs
    except TypeError:  # A class whose metaclass defines `__eq__` alone has no hash.
        pass
    return function, [snapshot(one) for one in args], {key: snapshot(one) for key, one in kwargs.items()}


def _takes_its_object(function: Any) -> bool:
    """Return whether it is a method that the object is given to, as the first argument."""
    if type(function) is not FunctionType:
        return False
    code = function.__code__
    return bool(code.co_argcount) and code.co_varnames[0] in ("self", "cls") and is_method(function)


def named(arguments: Arguments) -> dict[str, Any]:
    """Return the arguments of a call by parameter name, without `self` or `cls`."""
    function, given, by_name = arguments
    is_bound = bool(given) and given[0] is _SELF
    args, kwargs = [thawed(item) for item in given], {key: thawed(item) for key, item in by_name.items()}
    simply = _simply_named(function, args, kwargs, is_bound)
    if simply is not None:
        return simply
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except Exception:  # A builtin without a signature, a call that fails anyway, an object that answers in its own way.
        return {**{str(position): value for position, value in enumerate(args[is_bound:])}, **kwargs}
    found: dict[str, Any] = {}
    for position, (name, value) in enumerate(bound.arguments.items()):
        if position == 0 and (is_bound or (name in ("self", "cls") and is_method(function))):
            continue
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


_STARRED = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def _simply_named(function: Any, args: list[Any], kwargs: dict[str, Any], is_bound: bool) -> dict[str, Any] | None:
    """Return the arguments of a plain function by name, at a tenth of the cost of a signature; None of any other."""
    if type(function) is not FunctionType or function.__dict__:
        return None
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    # More that are given than there are, or a default between them, leave a call that fails or needs a closer look.
    if code.co_flags & _STARRED or code.co_kwonlyargcount or code.co_posonlyargcount or len(args) > len(names):
        return None
    if names[:1] in (("self",), ("cls",)) and not is_bound:
        return None
    named = dict(zip(names, args, strict=False))
    for name in names[len(args) :]:
        if name in kwargs:
            named[name] = kwargs[name]
    required = len(names) - len(function.__defaults__ or ())
    complete = named.keys() >= {*names[:required]} and len(named) == len(args) + len(kwargs)
    if is_bound and complete:
        del named[names[0]]
    return named if complete else None


def is_method(function: Any) -> bool:
    """Return whether a function was defined in the body of a class."""
    defined_in, _, _ = str(getattr(function, "__qualname__", "")).rpartition(".")
    return bool(defined_in) and not defined_in.endswith("<locals>")
