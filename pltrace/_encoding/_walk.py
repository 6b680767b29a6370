"""Walks through anything that holds other values: containers, and objects of the kinds that are known."""

from __future__ import annotations

import dataclasses
import re
import types
from collections import UserString, deque
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence, Set
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeAlias
from uuid import UUID

from pltrace._encoding._leaves import (
    LONGEST_REPR,
    SHORT,
    TOO_DEEP,
    Bounds,
    Json,
    Leaves,
    Redact,
    broken,
    told,
)
from pltrace._messages import Said, SaidOnce, SaidPrompt, message_of, told_by
from pltrace._redaction import REDACTED, Rules, clean
from pltrace._snapshot import FEW, MORE, PLAIN, Parts, more_items, snapshot, way_for
from pltrace._thawing import id_of, thawed
from pltrace._told import PARTED, by_class, class_name

__all__ = ["Walk", "plain_fields", "plain_notes", "plain_prompt", "plain_text"]

_CYCLE = "[cycle]"
_UNSET = object()
_MAX_NODES = 100_000
#: Of an object that is no data, and what it holds, so many parts are shown; of those in it that are no data, so deep;
#: and of so many such objects in one value.
_MOST_PARTS, _MOST_INSIDE, _MOST_PARTED = 1_000, 2, 200


def _empty(value: object) -> bool:
    """Say whether a value holds nothing worth hiding or showing, without running its code."""
    cls = type(value)
    if value is None or cls is bool:
        return True
    # A class of another metaclass might run code when compared.
    return type(cls) is type and cls in (str, bytes, list, tuple, dict, set, frozenset) and not value


class Walk(Leaves):
    """One value on its way to JSON: what is left of its budgets, and the path walked so far."""

    __slots__ = ("_budget", "_inside", "_items", "_known", "_max_depth", "_parted", "_path")

    def __init__(self, bounds: Bounds, redact: Redact | None, rules: Rules | None, texts: bool) -> None:
        super().__init__(bounds, redact, rules, texts)
        self._known = rules.verdicts if rules is not None else {}
        self._max_depth = bounds.max_depth
        self._items = bounds.max_items
        self._budget = _MAX_NODES
        self._inside = self._parted = 0  # In how many objects that are no data; and how many there were.
        self._path: set[object] = set()

    def value(self, value: Any, key: str, depth: int) -> Json:
        """Convert anything."""
        cls = type(value)
        if cls is str:
            return value if len(value) <= SHORT and value in self._harmless else self.text(value, key, depth)
        if value is None:
            return None
        if cls is bool or cls is int or cls is float:
            return self.number(value, key, depth)
        try:
            build = _EXACT.get(cls)
            if build is None:
                build = _kind_of(cls)
                if build not in _NESTING:
                    return build(self, value, key, depth)
            if depth >= self._max_depth:
                return TOO_DEEP
            # With the class: a twin has the id of what may be gone, and what is made now may have got that memory.
            which: object = id(value) if cls in _EXACT else (id_of(value), cls)
            if which in self._path:
                return _CYCLE
            self._path.add(which)
            try:
                return build(self, value, key, depth + 1)
            finally:
                self._path.discard(which)
        except RecursionError:
            return TOO_DEEP
        # Whatever a user's class raises, SystemExit included, must not end the background thread.
        except BaseException as error:
            return broken(value, error)

    def taken(self, iterate: Callable[[], Iterable[Any]]) -> list[Any]:
        """List as many items as the budgets allow, also while another thread changes the container."""
        most = self._items if self._items < self._budget else self._budget
        try:
            items = list(islice(iterate(), most))
        except _CHANGING:
            items = _retried(iterate, most)
        self._budget -= len(items)
        return items

    def entries(self, pairs: list[tuple[Any, Any]], depth: int, left_out: int = 0) -> dict[str, Json]:
        """Convert the entries of a mapping or the fields of an object."""
        out: dict[str, Json] = {}
        known, harmless = self._known, self._harmless
        for key, value in pairs:
            name, secret = (known.get(key) if type(key) is str else None) or self.name(key)
            if name in out:  # 1 and "1" are two keys.
                name = _unused(name, out)
            # Log-probabilities list the `token`s of the model's answer, which are no secrets.
            if secret and not _empty(value) and not (name == "token" and any(other == "logprob" for other, _ in pairs)):
                out[name] = REDACTED
            elif value is None or (type(value) is str and len(value) <= SHORT and value in harmless):
                out[name] = value  # The commonest, without a call.
            else:
                out[name] = self.value(value, name, depth)
        if left_out > 0:
            out[_unused(MORE, out) if MORE in out else MORE] = more_items(left_out)
        return out

    def name(self, key: Any) -> tuple[str, bool]:
        """Convert a mapping key, and say whether it names a secret."""
        cls = type(key)
        if cls is not str:
            if issubclass(cls, Enum):
                return self.name(key._value_)
            if issubclass(cls, str):
                key = str.__str__(key)
            elif cls is bytes:
                key = key.decode("utf-8", "replace")
            elif cls is tuple or cls is frozenset:
                key = (
                    f"({', '.join(map(self.part_of_name, key))})" if not PLAIN.issuperset(map(type, key)) else repr(key)
                )
            elif (fields := _fields_of_key(cls, key)) is not None:
                key = f"{class_name(cls)}({', '.join(f'{name}={self.part_of_name(part)}' for name, part in fields)})"
            else:
                key = told(key)
        text: str = key
        name, secret = self._rules.verdict(text) if self._rules is not None else (clean(text), False)
        return (name if len(name) <= SHORT else self.cut(name, LONGEST_REPR)), secret

    def part_of_name(self, part: Any) -> str:
        """Convert a part of a mapping key."""
        return repr(part) if type(part) in PLAIN else self.name(part)[0]

    def mapping(self, value: Any, key: str, depth: int) -> Json:
        """Convert a dict without running a subclass's methods, or any other Mapping by its items."""
        if type(value) is dict and len(value) <= self._items and len(value) <= self._budget:
            pairs = list(value.items())
            self._budget -= len(pairs)
            return self.entries(pairs, depth)
        if issubclass(type(value), dict):
            pairs = self.taken(lambda: dict.items(value))
            return self.entries(pairs, depth, dict.__len__(value) - len(pairs))
        pairs = self.taken(lambda: value.items())
        return self.entries(pairs, depth, len(value) - len(pairs))

    def sequence(self, value: Any, key: str, depth: int) -> Json:
        """Convert whatever has items and a length to a list."""
        cls = type(value)
        base: Any = cls
        if cls is list and len(value) <= self._items and len(value) <= self._budget:
            items = value.copy()
            self._budget -= len(items)
            return self.members(items, key, depth)
        if cls not in _EXACT:
            base = next((base for base in (list, tuple, set, frozenset, deque) if issubclass(cls, base)), cls)
        items = self.taken(lambda: base.__iter__(value))
        # Raw headers are pairs of a name and a value.
        if (
            base is tuple
            and len(items) == 2
            and self._rules is not None
            and (type(items[0]) is str or type(items[0]) is bytes)
        ):
            name, secret = self.name(items[0])
            if secret and not _empty(items[1]):
                return [name, REDACTED]
        out = self.members(items, key, depth)
        left_out = base.__len__(value) - len(items)
        if left_out > 0:
            out.append(more_items(left_out))
        return out

    def members(self, items: list[Any], key: str, depth: int) -> list[Json]:
        """Convert the members of a sequence."""
        harmless = self._harmless
        return [
            item if type(item) is str and len(item) <= SHORT and item in harmless else self.value(item, key, depth)
            for item in items
        ]

    def fields(self, value: Any, names: Iterable[str], depth: int) -> Json:
        """Convert an object by its attributes; those not set are left out."""
        pairs = [(name, item) for name in names if (item := _field(value, name)) is not _UNSET]
        self._budget = max(0, self._budget - len(pairs))
        return self.entries(pairs, depth)

    def named_tuple(self, value: Any, key: str, depth: int) -> Json:
        """Convert a NamedTuple."""
        pairs = self.taken(lambda: zip(value._fields, tuple.__iter__(value), strict=False))
        return self.entries(pairs, depth)

    def dataclass(self, value: Any, key: str, depth: int) -> Json:
        """Convert a dataclass; who keeps a field out of the repr means to hide it."""
        return self.fields(value, [field.name for field in dataclasses.fields(value) if field.repr], depth)

    def attrs(self, value: Any, key: str, depth: int) -> Json:
        """Convert an instance of an attrs class."""
        return self.fields(value, [item.name for item in value.__attrs_attrs__ if item.repr], depth)

    def model(self, value: Any, key: str, depth: int) -> Json:
        """Convert a pydantic model by its data: `model_dump` may run the user's serializers, and raise."""
        cls = type(value)
        data = dict(object.__getattribute__(value, "__dict__"))
        # Pydantic 2 warns of the name that pydantic 1 has for them.
        known = getattr(cls, "model_fields" if hasattr(cls, "model_fields") else "__fields__", None) or {}
        for name, field in known.items():
            if getattr(field, "exclude", None) is True or getattr(field, "repr", True) is False:
                data.pop(name, None)
        # Extra fields stand in a slot of their own (pydantic 2).
        data.update(getattr(value, "__pydantic_extra__", None) or {})
        pairs = self.taken(lambda: data.items())
        return self.entries(pairs, depth, len(data) - len(pairs))

    def parted(self, value: Any, key: str, depth: int) -> Json:
        """Convert an object that is no data by its attributes; one that is in others of these, by its class."""
        if self._inside >= _MOST_INSIDE or self._parted >= _MOST_PARTED:
            return self.text(by_class(value), key, depth)
        made = thawed(snapshot(value))
        return self.parts(made, key, depth) if type(made) is Parts else self.unknown(value, key, depth)

    def parts(self, value: Parts, key: str, depth: int) -> Json:
        """Convert the attributes of such an object, within bounds of their own."""
        items, budget, longest = self._items, self._budget, self._max_string
        self._items, self._max_string = min(items, FEW), min(longest, LONGEST_REPR)
        self._budget = given = min(budget, _MOST_PARTS)
        self._inside += 1
        self._parted += 1
        try:
            pairs = list(islice(value.items(), given))
            self._budget -= len(pairs)
            return self.entries(pairs, depth, len(value) - len(pairs))
        finally:
            self._inside -= 1
            self._items, self._max_string = items, longest
            self._budget = budget - (given - self._budget)

    def message(self, value: Any, key: str, depth: int) -> Json:
        """Convert a message of LangChain: what it says, without its empty fields."""
        return self._fields_of(_message_fields(object.__getattribute__(value, "__dict__")), depth)

    def document(self, value: Any, key: str, depth: int) -> Json:
        """Convert a document of LangChain."""
        return self._fields_of(_document_fields(object.__getattribute__(value, "__dict__")), depth)

    def _fields_of(self, fields: dict[str, Any], depth: int) -> Json:
        self._budget = max(0, self._budget - len(fields))
        return self.entries(list(fields.items()), depth)

    def prompt(self, value: Any, key: str, depth: int) -> Json:
        """Convert a prompt value of LangChain: its messages or its text."""
        said = plain_prompt(value)
        return self.model(value, key, depth) if said is None else self.value(said, key, depth)


def _message_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"type": data.get("type"), "content": data.get("content")}
    for name in _MESSAGE_FIELDS:
        if name in data:
            item = data[name]
            if item is not None and not _empty(item):
                fields[name] = item
    return fields


def _document_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"page_content": data.get("page_content"), "metadata": data.get("metadata")}
    if data.get("id") is not None:
        fields["id"] = data["id"]
    return fields


def plain_prompt(value: Any) -> Any:
    """Return the messages or the text of a prompt value of LangChain; None for anything else."""
    if _kind_of(type(value)) is not Walk.prompt:
        return None
    data = object.__getattribute__(value, "__dict__")
    return data["messages"] if "messages" in data else data.get("text")


def plain_fields(value: Any) -> dict[str, Any] | None:
    """Return the fields that are shown of a message or document of LangChain; None for anything else."""
    fields = _FIELDS_OF.get(_kind_of(type(value)))
    return None if fields is None else fields(object.__getattribute__(value, "__dict__"))


def plain_text(value: Any) -> str | None:
    """Return the text of an object of a subclass of `str`; None for anything else."""
    return str.__str__(value) if issubclass(type(value), str) and _kind_of(type(value)) is Walk.subclass else None


def plain_notes(notes: Said) -> Any:
    """Return the fields that are shown of noted messages, as they are: a list, or one; None for anything else."""
    shown: list[dict[str, Any]] = []
    for kind, content, message_id, rest in zip(notes[::4], notes[1::4], notes[2::4], notes[3::4], strict=False):
        if not isinstance(kind, type):
            fields = plain_fields(message_of(kind, content, message_id, rest))
        elif _kind_of(kind) is Walk.message:
            fields = _message_fields({**told_by(kind, rest), "content": content, "id": message_id})
        else:
            return None
        if fields is None:
            return None
        shown.append(fields)
    if type(notes) is SaidPrompt and _kind_of(notes[-1]) is not Walk.prompt:
        return None
    return shown[0] if type(notes) is SaidOnce else shown


_Kind: TypeAlias = Callable[[Walk, Any, str, int], Json]
_FIELDS_OF: dict[_Kind, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    Walk.message: _message_fields,
    Walk.document: _document_fields,
}
_MESSAGE_FIELDS = (
    "name", "role", "id", "tool_calls", "invalid_tool_calls", "tool_call_id", "status", "artifact",
    "usage_metadata", "response_metadata", "additional_kwargs",
)  # fmt: skip
_FAMILIES: tuple[tuple[str, str, _Kind], ...] = (
    ("langchain_core", "BaseMessage", Walk.message),
    ("langchain_core", "Document", Walk.document),
    ("langchain_core", "PromptValue", Walk.prompt),
    ("pydantic", "BaseModel", Walk.model),
)
# In this order: an IntEnum is an Enum first, a datetime a date.
_BASES: tuple[tuple[type | tuple[type, ...], _Kind], ...] = (
    (Enum, Walk.member),
    ((str, int, float), Walk.subclass),
    ((bytes, bytearray, memoryview), Walk.raw),
    (dict, Walk.mapping),
    ((list, tuple, set, frozenset, deque, range), Walk.sequence),
    ((type, types.FunctionType, types.BuiltinFunctionType, types.MethodType), Walk.named),
    (BaseException, Walk.error),
    (re.Pattern, Walk.pattern),
    ((date, time), Walk.moment),
    ((PurePath, UUID, Decimal, Fraction, timedelta, tzinfo, UserString), Walk.shown),
)
# Of these those are left that have their items in C, or are of packages that are known.
_ABSTRACT: tuple[tuple[type | tuple[type, ...], _Kind], ...] = (
    (Mapping, Walk.mapping),
    ((Sequence, Set, MappingView), Walk.sequence),
)
# What reading raises while another thread changes a dict, or a Mapping that looks up key by key.
_CHANGING = (RuntimeError, KeyError)
# Those that hold other values: they count for depth and cycles.
_NESTING = frozenset(
    {Walk.mapping, Walk.sequence, Walk.named_tuple, Walk.dataclass, Walk.attrs, Walk.model, Walk.parted, Walk.parts}
    | {Walk.message, Walk.document, Walk.prompt, Walk.member, Walk.scalar}
)
# The commonest.
_EXACT: dict[type, _Kind] = {dict: Walk.mapping, list: Walk.sequence, tuple: Walk.sequence}
_kinds: dict[type, _Kind] = {}
#: So many types are remembered; who makes types as the program runs must not fill the memory with them.
_MOST_KINDS = 2_000


def _kind_of(cls: type) -> _Kind:
    """Return how instances of a class are converted."""
    kind = _kinds.get(cls)
    if kind is None:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        kind = _kinds[cls] = _kind(cls)
    return kind


def _kind(cls: type) -> _Kind:
    """Choose how instances of a class are converted, by the class alone: `__class__` may lie or raise."""
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return Walk.named_tuple
    if cls is Parts:
        return Walk.parts
    for bases, kind in _BASES:
        if issubclass(cls, bases):
            return kind
    if hasattr(cls, "get_secret_value"):
        return Walk.hidden
    homes = {(str(base.__module__).partition(".")[0], base.__name__) for base in cls.__mro__}
    for package, name, kind in _FAMILIES:
        if (package, name) in homes:
            return kind
    if dataclasses.is_dataclass(cls):
        return Walk.dataclass
    if hasattr(cls, "__attrs_attrs__"):
        return Walk.attrs
    if ("numpy", "generic") in homes:
        return Walk.scalar
    if way_for(cls) in PARTED:
        return Walk.parted
    return next((kind for bases, kind in _ABSTRACT if issubclass(cls, bases)), Walk.unknown)


def _retried(iterate: Callable[[], Iterable[Any]], most: int) -> list[Any]:
    """List items of a container that another thread changes; in the end be content with a part of them."""
    for _ in range(5):
        items: list[Any] = []
        try:
            items += islice(iterate(), most)
            return items
        except _CHANGING as error:
            failure = error
    if not items:
        raise failure
    return items


def _fields_of_key(cls: type, key: Any) -> list[tuple[str, Any]] | None:
    """Return the fields of a named tuple or dataclass that is the key of a mapping; None for all else."""
    kind = _kind_of(cls)
    if kind is Walk.named_tuple:
        return [*zip(key._fields, tuple.__iter__(key), strict=False)]
    if kind is not Walk.dataclass:
        return None
    found = [(field.name, _field(key, field.name)) for field in dataclasses.fields(key) if field.repr]
    return [(name, item) for name, item in found if item is not _UNSET]


def _field(value: Any, name: str) -> Any:
    """Return a field of a data object without running a descriptor of the program's, which may compute or load it."""
    held = _dict_of(value)
    if name in held:
        return held[name]
    found = next((vars(base)[name] for base in type(value).__mro__ if name in vars(base)), _UNSET)
    if type(found) is types.MemberDescriptorType:
        try:
            return found.__get__(value)
        except AttributeError:  # It isn't set.
            return _UNSET
    if type(found) is types.FunctionType or not hasattr(type(found), "__get__"):
        return found
    return held.get(f"_{name}", _UNSET)  # Where a property, or the like, mostly has it.


def _dict_of(value: Any) -> Mapping[str, Any]:
    try:
        held: Mapping[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return held


def _unused(name: str, taken: Mapping[str, object]) -> str:
    """Return a name not taken yet, near this one."""
    number = len(taken) + 1
    while f"{name} ({number})" in taken:
        number += 1
    return f"{name} ({number})"
