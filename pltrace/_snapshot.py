"""Copies the containers of a value, and what its data objects hold, so that it is recorded as it was at the call.

`_thawing` makes a value of it again.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import islice
from sys import getsizeof
from types import GetSetDescriptorType, MappingProxyType, MemberDescriptorType
from typing import Any

from pltrace._health import pass_on
from pltrace._messages import SaidOnce, SaidPrompt, is_noted, note, said
from pltrace._told import PARTED, TEXTS, as_it_is, by_class, class_name, outline, way_of

__all__ = [
    "EXTRA", "FEW", "MORE", "MOST_ITEMS", "PLAIN", "Frozen", "Parts", "copied", "is_slotted", "more_items", "snapshot",
    "way_for", "whole",
]  # fmt: skip

#: What is copied of one container, with a mark in the last place if there is more; more isn't kept anyway. Of a list of
#: objects, so many are copied too.
MOST_ITEMS = 10_000
_MOST_OBJECTS = 1_000
#: Of a longer buffer, only its size is noted: copying it would take longer than the rest of the call.
_MOST_BYTES = 100_000
#: Of what is in a long list or dict, so many bytes are copied; one of up to `FEW` items has no such limit.
_MOST_COPIED = 250_000
_STATE_BYTES = 232  # About what the attributes of an object in a list take.
FEW = 20
#: Of a list of messages, so many are noted with all their attributes, the latest; of those before, what they say.
_MOST_MESSAGES = 8
#: So many types are remembered; who makes types as the program runs must not fill the memory with them.
_MOST_TYPES = 2_000

#: The key under which a long dict tells how many more entries there were.
MORE = "…"
#: Where an object of pydantic has what its class has no field for.
EXTRA = "__pydantic_extra__"
_NOTHING: Mapping[str, Any] = {}

#: Of these the length is told where they are in an object that is no data, and long.
_LONG: tuple[Any, ...] = (dict, list, tuple, set, frozenset, deque)
#: Of short ones of these, what is in them and has its end is told by a text, as their own containers' is.
_FEW_TOLD = frozenset({dict, list})
#: What can't change, by far the most: told by one look-up.
PLAIN = frozenset({type(None), str, int, float, bool, bytes})
_NUMBERS = PLAIN - {str, bytes}


class Parts(dict[str, Any]):
    """The attributes of an object that is no data, as `_told` notes them: of less interest than data, and shown so."""

    __slots__ = ()


class Frozen(tuple[Any, Any, Any]):
    """The class of a data object, its attributes and its `id`; or a list of each, for the items of a list.

    Of an item that is no such object the second is None, and the first is the item itself. `thawed` makes a value of it
    again. The objects aren't held: what they hold, or come to hold later, has its end where the program lets go of it.
    """

    __slots__ = ()


def snapshot(value: Any) -> Any:
    """Return `value` with its containers, and those directly in them, copied; all else by reference or as a text.

    What messages say is noted too, and the attributes of the latest of them and of other data objects (documents,
    dataclasses, models of pydantic and attrs), also in a list one level further down. That is where programs change
    what they pass on (an agent's list of messages in its state), at a tenth of the cost of a deep copy. `thawed` makes
    a value of it again.
    """
    kind = type(value)
    try:
        if kind is dict and len(value) <= FEW:
            return {key: item if type(item) in PLAIN else _copied(item) for key, item in value.items()}
        if kind is list or kind is tuple:
            way = _way_of_items(value)
            if way in _LISTED or way in PARTED:
                return _list(value)
            if len(value) > FEW:
                return _copied_while_there_is_room(_first(value))
            return [item if type(item) in PLAIN else _copied(item) for item in value]
        return value if kind in PLAIN else _copied(value, within=True)
    except Exception as error:  # Another thread is changing it right now, or its class is a strange one.
        pass_on(error)
        return value


def _copied(value: Any, *, within: bool = False) -> Any:
    """Return one container or data object copied; `within` for the containers directly in it too."""
    kind = type(value)
    copy = _copies.get(kind) or _learn(kind)
    made = copy(value)
    if copy is _view:
        return snapshot(made) if within else made
    if copy in PARTED:
        return _parts(made, within=True) if type(made) is dict else made
    if copy in _OBJECTS:
        if not within:
            made = _told(made)
        elif len(made) > FEW:
            made = dict(zip(made, _copied_while_there_is_room([*made.values()]), strict=True))
        else:
            made = {key: item if type(item) in PLAIN else _copied(item) for key, item in made.items()}
        return Frozen((kind, made, id(value)))
    if copy is _boxed:
        data = snapshot(value.data) if within else _copied(value.data)
        return Frozen((kind, {**_told(made), "data": data}, id(value)))
    if within and (copy is _dict or copy is _proxied):
        return dict(zip(made, _copied_while_there_is_room([*made.values()]), strict=True))
    if type(made) in _FEW_TOLD and len(made) <= FEW:
        return _told(made) if type(made) is dict else _told_items(made)
    return made


def _parts(attributes: dict[str, Any], *, within: bool) -> Parts:
    """Return attributes with short containers copied, and of others their length; of further objects their class.

    Args:
        attributes: What there is.
        within: Whether data objects are copied too: not without an end, as they may hold such objects in turn.
    """
    return Parts({
        name: item if type(item) in _NUMBERS else _part(item, within=within) for name, item in attributes.items()
    })  # fmt: skip


def _part(item: Any, *, within: bool) -> Any:
    kind = type(item)
    if kind is str or kind is bytes:
        return item if len(item) <= _MOST_BYTES else _how_many(kind, len(item))
    if kind is not list and kind is not dict:
        way = _copies.get(kind) or _learn(kind)
        if way in TEXTS:
            return way(item)
        if way in PARTED:
            return item if way(item) is item else by_class(item)
        base = next((base for base in _LONG if issubclass(kind, base)), None)
        if base is None:
            return _copied(item) if within else item
        return item if base.__len__(item) <= FEW else _how_many(kind, base.__len__(item))
    if len(item) > FEW:
        return _how_many(kind, len(item))
    made = item.copy()
    if kind is list:
        return made if PLAIN.issuperset(map(type, made)) else [*map(_text_of, made)]
    return {key: one if type(one) in PLAIN else _text_of(one) for key, one in made.items()}


def _how_many(kind: type, count: int) -> str:
    return f"<{class_name(kind)} of {count:,} items>"


def _text_of(item: Any) -> Any:
    """Return a text for what has its end, a copy of a short container, and else the item."""
    kind = type(item)
    if kind in PLAIN:
        return item
    way = _copies.get(kind) or _learn(kind)
    if way in TEXTS:
        return way(item)
    return copied(item) if kind in _FEW_TOLD and len(item) <= FEW else item


def _told(state: dict[str, Any], *, brief: bool = False) -> dict[str, Any]:
    """Return attributes, or a dict, with a text for each that has its end."""
    if _lasting.issuperset(map(type, state.values())):
        return state
    return dict(zip(state, _told_items([*state.values()], brief=brief), strict=True))


def _told_items(items: list[Any], *, brief: bool = False) -> list[Any]:
    """Return items with a text for each that has its end, and the attributes of those that are no data.

    Args:
        items: Of any kinds.
        brief: Of the latter, the class is enough.
    """
    if _lasting.issuperset(map(type, items)):
        return items
    return [_told_item(item, brief=brief) for item in items]


def _told_item(item: Any, *, brief: bool) -> Any:
    kind = type(item)
    way = _copies.get(kind) or _learn(kind)
    if way in TEXTS:
        return way(item)
    if way not in PARTED or brief:
        return by_class(item) if way in PARTED else item
    made = way(item)
    return _parts(made, within=False) if type(made) is dict else made


def _copied_while_there_is_room(items: Sequence[Any]) -> list[Any]:
    """Return the items of a long list, the first of them copied: so many as take no longer than is fit for a call."""
    if PLAIN.issuperset(map(type, items)):
        return [*items]
    room, made = _MOST_COPIED, []
    for item in items:
        if type(item) not in PLAIN:
            item = _copied(item)
            room -= getsizeof(item)
            if type(item) is Frozen and type(item[1]) is list:
                room -= _STATE_BYTES * len(item[1])
            elif type(item) is Parts:  # It takes its time.
                room -= _STATE_BYTES * FEW
            if room < 0:
                break
        made.append(item)
    return [*made, *items[len(made) :]]


def copied(value: Any) -> Any:
    """Return a dict, list or set copied, of a long one the first items and a mark; all else as it is."""
    beginning = _BEGINNINGS.get(type(value))
    if beginning is None:
        return value
    return value.copy() if len(value) <= MOST_ITEMS else beginning(value)


def more_items(count: int) -> str:
    """Return what stands for so many items of a long container."""
    return f"[… {count} more]"


def whole(messages: Sequence[Any]) -> Any:
    """Return what a model's messages say, each with all that it says."""
    try:
        return said(messages)
    except Exception as error:  # They are something else, or hold what has no truth.
        pass_on(error)
        return snapshot(messages)


def _list(value: Any) -> Any:
    """Return a copy of a list, with what the objects in it hold."""
    items = value.copy() if type(value) is list and len(value) <= MOST_ITEMS else _first(value)
    way = _way_of_items(items)
    if way not in _HELD and way not in TEXTS and way not in PARTED:
        return items
    most = FEW if way in PARTED else _MOST_OBJECTS
    held = items if len(items) <= most else items[:most]
    if way is _message:
        try:
            return said(items, max(len(items) - _MOST_MESSAGES, 0))
        except Exception as error:  # There are other things among them.
            pass_on(error)
    if way is _message or way in TEXTS or way in PARTED:
        return [item if type(item) in PLAIN else _copied(item) for item in held] + items[len(held) :]
    states = [item.__dict__.copy() if type(item) in _data else _state(item) for item in held]
    # Whether any of them holds what has its end is told by the ends here, too.
    if any(state is not None and _told(state) is not state for state in (states[0], states[-1])):
        states = [state and _told(state, brief=place >= FEW) for place, state in enumerate(states)]
    kinds = [item if state is None else type(item) for item, state in zip(held, states, strict=True)]
    return Frozen(([*kinds, *items[len(held) :]], states, [*map(id, held)]))


def _first(value: Any) -> list[Any]:
    """Return the items of a list, tuple or deque, without running the methods of a subclass."""
    kind = type(value)
    base: Any = (
        kind if kind in (list, tuple) else next(base for base in (list, tuple, deque) if isinstance(value, base))
    )
    count = base.__len__(value)
    return list(base.__iter__(value)) if count <= MOST_ITEMS else _beginning(base.__iter__(value), count)


def _beginning(items: Iterable[Any], count: int) -> list[Any]:
    """Return the first of very many items, and in the last place how many more there are."""
    kept = MOST_ITEMS - 1
    return [*islice(items, kept), more_items(count - kept)]


def _way_of_items(items: Any) -> Any:
    """Return how the items of a list are copied, None for not at all: by its ends, as lists are mostly of one kind."""
    if not items:
        return None
    kind = type(items[0])
    if kind in PLAIN:
        kind = type(items[-1])
        if kind in PLAIN:
            return None
    return _copies.get(kind) or _learn(kind)


def _state(item: Any) -> Any:
    kind = type(item)
    if kind is dict:
        return _dict(item)
    copy = _copies.get(kind) or _learn(kind)
    if copy is _message:
        return {**item.__dict__, EXTRA: item.__pydantic_extra__}
    return copy(item) if copy in _OBJECTS else None


def _dict(value: Any) -> Any:
    count = dict.__len__(value)
    if count <= MOST_ITEMS:
        return dict.copy(value)
    kept = MOST_ITEMS - 1
    return {**dict(islice(dict.items(value), kept)), MORE: more_items(count - kept)}


def _proxied(value: Any) -> Any:
    count = len(value)
    return (
        dict(value)
        if count <= MOST_ITEMS
        else {**dict(islice(value.items(), MOST_ITEMS - 1)), MORE: more_items(count - MOST_ITEMS + 1)}
    )


def _view(value: Any) -> Any:
    return [*value] if len(value) <= MOST_ITEMS else _beginning(value, len(value))


def _named_tuple(value: Any) -> Any:
    return tuple.__new__(type(value), [item if type(item) in PLAIN else _copied(item) for item in value])


def _set(value: Any) -> Any:
    count = set.__len__(value)
    return set(set.__iter__(value)) if count <= MOST_ITEMS else _beginning(set.__iter__(value), count)


#: The views of dicts, which others can't be derived from.
_VIEWS = frozenset(
    type(view) for it in (dict[Any, Any](), OrderedDict[Any, Any]()) for view in (it.keys(), it.values(), it.items())
)
_BEGINNINGS: dict[type, Callable[[Any], Any]] = {dict: _dict, list: _first, set: _set}


def _object(value: Any) -> Any:
    return value.__dict__.copy()


def _extended(value: Any) -> Any:
    return {**value.__dict__, **(value.__pydantic_extra__ or {})}  # They are shown as one.


def _message(value: Any) -> Any:
    items: list[Any] = []
    note(value, items)
    return SaidOnce(items)


def _prompt(value: Any) -> Any:
    items: list[Any] = []
    try:
        for message in value.messages:
            note(message, items)
    except Exception:
        return value
    items.append(type(value))
    return SaidPrompt(items)


def _slotted(value: Any) -> Any:
    names = getattr(value, "__dataclass_fields__", None) or [item.name for item in value.__attrs_attrs__]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _boxed(value: Any) -> Any:
    return value.__dict__.copy()


def _buffered(copy: Callable[[Any], Any], size: Callable[[Any], int]) -> Callable[[Any], Any]:
    return lambda value: copy(value) if size(value) <= _MOST_BYTES else outline(value)


#: Mutable buffers by package and name, be they imported or not: the method that copies one, and its size in bytes.
_BUFFERS: dict[tuple[str, str], tuple[str, Callable[[Any], int]]] = {
    ("builtins", "bytearray"): ("copy", len),
    ("builtins", "memoryview"): ("tobytes", lambda value: int(value.nbytes)),
    ("array", "array"): ("__copy__", lambda value: len(value) * int(value.itemsize)),
    ("numpy", "ndarray"): ("copy", lambda value: int(value.nbytes)),
    ("pandas", "DataFrame"): ("copy", lambda value: 8 * int(value.size)),
    ("pandas", "Series"): ("copy", lambda value: 8 * int(value.size)),
}
#: What gives the attributes of an object.
_OBJECTS = frozenset({_object, _extended, _slotted})
_LISTED = _OBJECTS | {_message}
_HELD = _LISTED | {_dict}
#: What copies a value of a type.
_copies: dict[type, Callable[[Any], Any]] = {}
#: Of them those whose objects have a dict of attributes, which is all that they hold.
_data: set[type] = set()
#: And those whose objects may be held.
_lasting: set[type] = set()


def _learn(kind: type) -> Callable[[Any], Any]:
    """Choose how values of a type are copied."""
    if len(_copies) >= _MOST_TYPES:
        _copies.clear()
        _data.clear()
        _lasting.clear()
    copy = _copies[kind] = _way_of(kind)
    if copy is _object:
        _data.add(kind)
    if copy not in TEXTS and copy not in PARTED:
        _lasting.add(kind)
    return copy


def way_for(kind: type) -> Callable[[Any], Any]:
    """Return what notes values of a type."""
    return _copies.get(kind) or _learn(kind)


def _way_of(kind: type) -> Callable[[Any], Any]:
    if kind is MappingProxyType or kind is ChainMap:
        return _proxied
    if kind in _VIEWS:
        return _view
    if issubclass(kind, dict):
        return _dict
    if issubclass(kind, (list, deque)):
        return _list
    if issubclass(kind, set):
        return _set
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _named_tuple
    for base in kind.__mro__:
        copy, size = _BUFFERS.get((base.__module__.partition(".")[0], base.__name__), ("", len))
        if hasattr(base, copy):
            return _buffered(getattr(base, copy), size)
    # A second object of a class that cleans up after its objects would do so twice.
    boxed = issubclass(kind, (UserDict, UserList))
    data = any(hasattr(kind, mark) for mark in ("__dataclass_fields__", "__attrs_attrs__", "__pydantic_validator__"))
    if not (boxed or data) or hasattr(kind, "__del__") or _has_one_value(kind) or not _can_be_made(kind):
        return way_of(kind, data=data)
    if boxed:
        return _boxed
    if hasattr(kind, "__pydantic_validator__"):
        if not kind.__dictoffset__:
            return as_it_is
    elif _keeps_fields_elsewhere(kind):
        return _slotted
    if is_noted(kind):
        return _message
    if getattr(kind, "model_config", _NOTHING).get("extra") == "allow":
        return _extended
    # Nobody changes what a prompt was rendered to.
    if any(base.__name__ == "PromptValue" for base in kind.__mro__):
        return _prompt if kind.__name__ == "ChatPromptValue" else as_it_is
    return _object


def _has_one_value(kind: type) -> bool:
    """Return whether its objects are shown otherwise than by their fields: as a member of an enum, or not at all."""
    return issubclass(kind, Enum) or hasattr(kind, "get_secret_value")


def _keeps_fields_elsewhere(kind: type) -> bool:
    """Return whether not all fields need be in the dict of attributes: in slots, or where a `__dict__` is computed."""
    return any(
        type(item) is MemberDescriptorType or (name == "__dict__" and type(item) is not GetSetDescriptorType)
        for base in kind.__mro__
        for name, item in vars(base).items()
    )


def _can_be_made(kind: type) -> bool:
    try:
        object.__new__(kind)
    except TypeError:  # Built upon a class in C.
        return False
    return True


def is_slotted(kind: type) -> bool:
    """Return whether the fields of a data object are read one by one, as some may be in slots."""
    return (_copies.get(kind) or _learn(kind)) is _slotted
