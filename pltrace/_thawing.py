"""Makes values of snapshots again, for who encodes or reads them: data objects by twins, messages by what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from operator import is_
from typing import Any

from pltrace._health import pass_on
from pltrace._messages import Said, said_by
from pltrace._snapshot import EXTRA, MOST_ITEMS, PLAIN, Frozen, Parts, is_slotted
from pltrace._told import class_name

__all__ = ["id_of", "thawed"]


def thawed(value: Any, levels: int = 2) -> Any:
    """Return what a snapshot stands for, with twins of the data objects.

    It may have others in it, so many levels further down.
    """
    kind = type(value)
    if kind is Frozen:
        kinds, states, ids = value
        if type(kinds) is not list:
            attributes = {name: item if type(item) in PLAIN else thawed(item) for name, item in states.items()}
            return _twin(kinds, attributes, ids)
        return [*map(_twin, kinds, states, ids), *kinds[len(states) :]]
    if issubclass(kind, Said):
        return said_by(value)
    if (kind is dict or kind is list) and len(value) > MOST_ITEMS:
        return value  # Of ours none is so long.
    if kind is Parts:
        return Parts({name: item if type(item) in PLAIN else thawed(item) for name, item in value.items()})
    if kind is dict and levels:
        held = value.copy()  # It may be the user's own, which another thread changes.
        named = {key: thawed(item, levels - 1) for key, item in held.items()}
        return value if all(map(is_, named.values(), held.values())) else named
    if kind is list and levels:
        held = value.copy()
        items = [thawed(item, levels - 1) for item in held]
        return value if all(map(is_, items, held)) else items
    if levels and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        items = [thawed(item, levels - 1) for item in value]
        return value if all(map(is_, items, value)) else tuple.__new__(kind, items)
    return value


class _Attributes(dict[str, Any]):
    """The attributes of a twin, and the `id` of what it stands for: what it holds may refer to that."""

    __slots__ = ("id",)
    id: int


def id_of(value: Any) -> int:
    """Return the `id` of an object, of a twin that of what it stands for."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:  # It has slots.
        return id(value)
    return attributes.id if type(attributes) is _Attributes else id(value)


def _twin(kind: Any, state: Any, of: int) -> Any:
    """Return an object of a class with these attributes; where none can be made so, the attributes that are shown."""
    if state is None or kind is dict:
        return kind if state is None else state
    if is_slotted(kind):  # To fill slots could run a property of a subclass.
        return _shown(kind, state)
    try:
        twin = object.__new__(kind)
        attributes = _Attributes(state)
        attributes.id = of
        if hasattr(kind, "__pydantic_validator__"):
            object.__setattr__(twin, EXTRA, attributes.pop(EXTRA, None))
            object.__setattr__(twin, "__pydantic_fields_set__", _NO_FIELDS)
            object.__setattr__(twin, "__pydantic_private__", None)
        object.__setattr__(twin, "__dict__", attributes)
    except Exception as error:  # The class was changed since.
        pass_on(error)
        return _shown(kind, state) or f"<{class_name(kind)}>"
    return twin


def _shown(kind: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass or a class of attrs; who keeps one out of the repr means to hide it."""
    known = fields(kind) if is_dataclass(kind) else getattr(kind, "__attrs_attrs__", ())
    return {item.name: state[item.name] for item in known if item.repr and item.name in state}


#: Which fields were given to a model isn't shown.
_NO_FIELDS: set[str] = set()
