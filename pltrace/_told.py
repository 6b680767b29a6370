"""Notes objects that are no data without running code of theirs: by their class, by a name, or by their attributes.

Those of packages that are known are kept, and tell of themselves when they are written. The code of others may read a
database, wait for a lock, or change what the program sees; on the writer's thread at any time. And what has its end
isn't held: that would come on the writer's thread, later than the program expects.
"""

from __future__ import annotations

import sys
from collections import UserString
from collections.abc import Callable, Mapping, MappingView, Sequence, Set
from datetime import date, datetime, time, timedelta, tzinfo
from enum import Enum
from functools import lru_cache, partial
from io import IOBase
from itertools import islice
from pathlib import PurePath
from re import Pattern
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any
from uuid import UUID

from pltrace._health import pass_on

__all__ = ["PARTED", "TEXTS", "as_it_is", "by_class", "class_name", "error_text", "message_of", "outline", "way_of"]

#: The descriptor itself: no metaclass can get in between.
class_name: Callable[[type], str] = type.__dict__["__name__"].__get__

#: What can't change, and has no code of the program's in it.
_SIMPLE = frozenset({
    type(None), str, int, float, bool, bytes, complex, date, datetime, time, timedelta, UUID,
})  # fmt: skip
#: Of these more is shown than their class, by what shows values of them.
_SHOWN = (
    str, int, float, bytes, complex, tuple, frozenset, range, type, Enum, tzinfo, date, time, timedelta, PurePath, UUID,
    Pattern, UserString,
)  # fmt: skip
#: And of these, be they imported or not: numbers, and models of pydantic 1.
_SHOWN_BY_NAME = {("decimal", "Decimal"), ("fractions", "Fraction"), ("numpy", "generic"), ("pydantic", "BaseModel")}
_CONTAINERS = (Mapping, Sequence, Set, MappingView)
_FUNCTIONS = frozenset({FunctionType, BuiltinFunctionType, MethodType})
_STEPS = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType})
#: What has its end, or runs by itself.
_ENDING = ("__del__", "__exit__", "__aexit__", "_asyncio_future_blocking")
#: Packages whose classes tell of themselves by what they hold, and read nothing.
_KNOWN = sys.stdlib_module_names | {
    "aiohttp", "anyio", "bson", "dateutil", "fastapi", "httpx", "langchain_core", "multidict",
    "numpy", "openai", "packaging", "pandas", "pendulum", "pydantic", "pydantic_core", "requests", "starlette",
    "urllib3", "werkzeug", "yarl",
}  # fmt: skip
#: Those with arrays of their own.
_OF_ARRAYS = frozenset({"cupy", "dask", "h5py", "jax", "jaxlib", "polars", "tensorflow", "torch", "xarray", "zarr"})
#: These may hold anything, and ask it for its text.
_NAMESPACES = {("types", "SimpleNamespace"), ("argparse", "Namespace")}
#: So many attributes are looked at.
_MOST_ATTRIBUTES = 100
#: So many classes with slots are remembered.
_MOST_CLASSES = 2_000


def as_it_is(value: Any) -> Any:
    """Return the object itself."""
    return value


def by_class(value: Any) -> str:
    """Return the name of an object's class."""
    return f"<{class_name(type(value))}>"


def _by_name(value: Any) -> str:
    try:
        return f"{value.__module__}.{value.__qualname__}"
    except Exception:  # A method of a callable object, which has no such names.
        return by_class(value)


def _partial(value: Any) -> str:
    function: Any = partial.func.__get__(value)
    return f"<partial of {_by_name(function) if type(function) in _FUNCTIONS else by_class(function)}>"


def _steps(value: Any) -> str:
    return f"<{class_name(type(value))} object {value.__qualname__}>"


def _module(value: Any) -> str:
    return f"<module {object.__getattribute__(value, '__dict__').get('__name__')!r}>"


def _file(value: Any) -> str:
    try:
        name = value.name
    except Exception:  # It has none, or lost it with what it wrote to.
        name = None
    return f"<{class_name(type(value))} name={name!r}>" if isinstance(name, (str, int)) else by_class(value)


def error_text(error: BaseException) -> str:
    """Return an exception's class and message: it holds the frames that it came through, with all that is in them."""
    name, message = class_name(type(error)), message_of(error)
    return f"{name}: {message}" if message else name


def message_of(error: BaseException) -> str:
    """Return an exception's message; never raises."""
    try:
        return str(error)
    except Exception as second:
        pass_on(second)
        return f"<its __str__ raised {class_name(type(second))}>"


def outline(value: Any) -> str:
    """Return what is noted of an array, or of a buffer that is too long to be copied."""
    try:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        text = f"{len(value):,} items" if shape is None else f"shape {tuple(shape)}"
        return f"<{class_name(type(value))} of {text}{'' if dtype is None else f', {dtype}'}>"
    except Exception as error:  # It is closed, or has yet to be computed.
        pass_on(error)
        return by_class(value)


def _attributes(value: Any) -> Any:
    """Return an object's public attributes; of one that has none, the class: who makes all private shows nothing."""
    held = dict(islice(object.__getattribute__(value, "__dict__").items(), _MOST_ATTRIBUTES))
    return _public({**_in_slots(value), **held}) or by_class(value)


def _slots(value: Any) -> Any:
    """Return what is in an object's slots; itself, if they are private and simple: then its text says it, and stays."""
    held = _in_slots(value)
    return _public(held) or (value if _SIMPLE.issuperset(map(type, held.values())) else by_class(value))


def _in_slots(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    held = {}
    for name, read in _members(kind):
        try:
            held[name] = read(value)
        except AttributeError:  # It isn't set.
            continue
    return held


def _public(held: dict[Any, Any]) -> dict[Any, Any]:
    return {name: item for name, item in held.items() if type(name) is not str or name[:1] != "_"}


@lru_cache(_MOST_CLASSES)
def _members(kind: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    return [
        (name, item.__get__)
        for base in reversed(kind.__mro__)
        if "__slots__" in vars(base)
        for name, item in vars(base).items()
        if type(item) is MemberDescriptorType
    ]


_OF_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (partial, _partial), (IOBase, _file), (BaseException, error_text), (ModuleType, _module),
)  # fmt: skip
#: What gives a text.
TEXTS: frozenset[Callable[[Any], Any]] = frozenset({
    by_class, _by_name, _partial, _steps, _module, _file, error_text, outline,
})  # fmt: skip
#: What gives an object's attributes, as a dict, if there are any.
PARTED: frozenset[Callable[[Any], Any]] = frozenset({_attributes, _slots})


def way_of(kind: Any, *, data: bool) -> Callable[[Any], Any]:
    """Return what notes objects of a class.

    Args:
        kind: The class; of values that aren't copied otherwise.
        data: Whether its fields are known, and shown.
    """
    if kind in _FUNCTIONS:
        return _by_name
    if kind in _STEPS:
        return _steps
    for base, way in _OF_BASES:
        if issubclass(kind, base):
            return way
    homes = {(_package(base), base.__name__) for base in kind.__mro__}
    if data or hasattr(kind, "get_secret_value") or homes & _SHOWN_BY_NAME or issubclass(kind, _SHOWN):
        return as_it_is
    if any(hasattr(kind, name) for name in _ENDING):
        return by_class
    if issubclass(kind, _CONTAINERS):
        if _package(kind) in _KNOWN:
            return as_it_is
    elif kind.__repr__ is object.__repr__:  # Its text says no more.
        return by_class
    elif _package(kind) in _OF_ARRAYS and hasattr(kind, "shape"):
        return outline
    elif not homes & _NAMESPACES and _tells_of_itself(kind):
        return as_it_is
    if _has_dict(kind):
        return _attributes
    return _slots if _members(kind) else as_it_is


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _tells_of_itself(kind: type) -> bool:
    """Return whether its text is made in C, or by a package that is known."""
    of = next(base for base in kind.__mro__ if "__repr__" in vars(base))
    return type(vars(of)["__repr__"]) is not FunctionType or _package(of) in _KNOWN


def _has_dict(kind: type) -> bool:
    """Return whether attributes are in a dict that is read without code of the program's."""
    found = next((vars(base)["__dict__"] for base in kind.__mro__ if "__dict__" in vars(base)), None)
    return type(found) in (GetSetDescriptorType, MemberDescriptorType)
