"""Makes any Python value bounded, redacted and JSON-safe, and never raises."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
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
from weakref import WeakKeyDictionary

from pltrace._redaction import REDACTED, Rules, clean

__all__ = ["Encoder", "Json", "Redact"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Redact: TypeAlias = Callable[[str, Any], Any]

_FAILED = "[redaction failed]"
_CYCLE = "[cycle]"
_TOO_DEEP = "[too deep]"
_MORE = "…"
_UNSET = object()

_MAX_NODES = 100_000
_MAX_REPR = 2_000
_MAX_WHOLE_BYTES = 4_096
_BYTES_START = 1_024
# Walking and `json.dumps` recurse once or twice per level: more would meet Python's own limit.
_DEEPEST = 200
# All long strings of one value share a budget of this many times `max_string`; short ones are free.
_ROOM = 10
_SHORT = 200

#: Keys of a Prompt Blueprint, and of tool schemas, whose values its published description lists.
_SHAPE = frozenset({"type", "role", "format", "media_type", "template_format", "tool_choice", "function_call"})

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _empty(value: object) -> bool:
    """Say whether a value holds nothing worth hiding or showing, without running its code."""
    cls = type(value)
    if value is None or cls is bool:
        return True
    # A class of another metaclass might run code when compared.
    return type(cls) is type and cls in (str, bytes, list, tuple, dict, set, frozenset) and not value


class Encoder:
    """Turns any value into bounded, redacted, JSON-safe data.

    An encoder may be used by many threads at once.

    Args:
        redact: Called as `redact(key, value)` for each text, number and boolean, with the nearest mapping
            key above it (`""` for none); what it returns is kept instead. None: values under names of
            secrets, and whatever looks like an API key in texts and mapping keys, become `[redacted]`.
        extra: More names of secrets (any case) and patterns to remove from texts, on top of the default;
            ignored where `redact` is given.
        max_string: Longer texts keep head and tail, as do mapping keys beyond 200 characters. All long texts of
            one value share ten times as much; where that is used up only their length is told.
        max_depth: Containers nested deeper become `[too deep]`; at most 200.
        max_items: Larger containers keep their first items and say how many were left out.
    """

    def __init__(
        self,
        redact: Redact | None = None,
        extra: Iterable[str | re.Pattern[str]] = (),
        *,
        max_string: int = 1_000_000,
        max_depth: int = 32,
        max_items: int = 10_000,
    ) -> None:
        self._redact = redact
        self._rules = Rules(extra) if redact is None else None
        self._label_rules = Rules(extra, by_name=False)
        self.max_string = max_string
        self.max_depth = min(max_depth, _DEEPEST)
        self.max_items = max_items
        self._json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def jsonable(self, value: object) -> Json:
        """Return the value as JSON-safe data; never raises.

        Args:
            value: Anything.

        Returns:
            New data of None, bool, int (64 bit), finite float, str, list and dict with str keys.
        """
        return self._walked(value, self._redact, self._rules)

    def text(self, value: str) -> str:
        """Return a text as JSON-safe text, whatever the user's `redact` makes of it; never raises."""
        return str(self._walked(value, self._redact, self._rules, texts=True))

    def shaped(self, value: object) -> Json:
        """Return data in the shape of a Prompt Blueprint as JSON-safe data in that shape; never raises.

        Args:
            value: Such data. What its shape consists of, `type` and `role` and numbers and the like, is kept as it is;
                the user's `redact` is asked about the texts in it, which stay texts.
        """
        return self._walked(value, self._redact, self._rules, texts=True)

    def label(self, value: object) -> Json:
        """Return a name or tags as JSON-safe data, without what looks like a secret; never raises.

        Args:
            value: A text, or a list of texts; what the user's `redact` is for is values, so it isn't asked.
        """
        return self._walked(value, None, self._label_rules)

    def schema(self, value: object) -> Json:
        """Return a schema, as of a tool's parameters, as JSON-safe data; never raises.

        Args:
            value: Anything; what stands under the name of a secret describes it and is kept.

        Returns:
            As `shaped`.
        """
        return self._walked(value, self._redact, self._label_rules if self._redact is None else None, texts=True)

    def _walked(self, value: object, redact: Redact | None, rules: Rules | None, *, texts: bool = False) -> Json:
        if value is None or (type(value) is str and rules is not None and value in rules.harmless):
            return value
        try:
            return _Walk(self, redact, rules, texts).value(value, "", 0)
        except BaseException as error:
            return _broken(value, error)

    def dumps(self, value: object) -> str:
        """Return the value as strict, compact JSON text that UTF-8 can carry; never raises.

        Args:
            value: Anything.

        Returns:
            The text of `jsonable(value)`, without NaN, NUL and lone surrogates.
        """
        try:
            return self._json.encode(self.jsonable(value))
        except RecursionError:  # The caller itself stands at the end of the stack.
            return f'"{_TOO_DEEP}"'


class _Walk:
    """One value on its way to JSON: what is left of its budgets, and the path walked so far."""

    __slots__ = (
        "_budget", "_harmless", "_items", "_known", "_max_depth", "_max_string",
        "_path", "_redact", "_room", "_rules", "_texts",
    )  # fmt: skip

    def __init__(self, encoder: Encoder, redact: Redact | None, rules: Rules | None, texts: bool) -> None:
        self._redact = redact
        self._texts = texts  # Only texts are redacted, and stay texts: the rest is the shape.
        self._rules = rules
        self._known = rules.verdicts if rules is not None else {}
        self._harmless = rules.harmless if rules is not None else set()
        self._max_string = encoder.max_string
        self._max_depth = encoder.max_depth
        self._items = encoder.max_items
        self._budget = _MAX_NODES
        self._room = _ROOM * encoder.max_string
        self._path: set[int] = set()

    def value(self, value: Any, key: str, depth: int) -> Json:
        """Convert anything; `key` is the nearest mapping key above it."""
        cls = type(value)
        if cls is str:
            return value if value in self._harmless else self.text(value, key, depth)
        if value is None:
            return None
        if cls is bool or cls is int or cls is float:
            return self.number(value, key, depth)
        try:
            build = _EXACT.get(cls)
            if build is None:
                build = _kinds.get(cls)
                if build is None:
                    build = _kinds[cls] = _kind(cls)
                if build not in _NESTING:
                    return build(self, value, key, depth)
            if depth >= self._max_depth:
                return _TOO_DEEP
            if id(value) in self._path:
                return _CYCLE
            self._path.add(id(value))
            try:
                return build(self, value, key, depth + 1)
            finally:
                self._path.discard(id(value))
        except RecursionError:
            return _TOO_DEEP
        # Whatever a user's class raises, SystemExit included, must not end the background thread.
        except BaseException as error:
            return _broken(value, error)

    # --- Leaves --------------------------------------------------------------------------------------

    def text(self, text: str, key: str, depth: int, limit: int | None = None) -> Json:
        """Clean, redact and only then cut a text, so that no half of a secret stays."""
        if self._room <= 0 and len(text) > _SHORT:
            return _left_out(len(text))
        given = text
        text = clean(text)
        if self._redact is not None:
            if self._texts and key in _SHAPE:
                return text
            kept = self.asked(text, key)
            if type(kept) is not str:
                plain = self.plain(kept, depth)
                return self.as_text(plain) if self._texts else plain
            text = clean(kept)
        elif self._rules is not None and len(text) >= self._rules.shortest:
            text = self._rules.mask(text)
        if len(text) > _SHORT or len(text) > self._max_string:
            return self.cut(text, limit)
        if self._rules is not None and text == given:
            self._rules.remember(text)
        return text

    def cut(self, text: str, limit: int | None) -> str:
        """Keep head and tail of a text longer than its limit or the room left; of a data URL nothing, or it breaks."""
        limit = min(self._max_string if limit is None else limit, max(self._room, _SHORT), self._max_string)
        left_out = len(text) - limit
        if left_out > 0 and text.startswith("data:"):
            text = _left_out(len(text), text[5:_SHORT].partition(",")[0])
        elif left_out > 0:
            tail = limit // 2
            text = f"{text[: limit - tail]}{_left_out(left_out)}{text[len(text) - tail :]}"
        self._room -= len(text)
        return text

    def number(self, value: float, key: str, depth: int) -> Json:
        """Convert an exact int, float or bool."""
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            # Python refuses to print more than some 4,300 digits.
            bits = value.bit_length()
            return self.text(str(value) if bits < 10_000 else f"<int of {bits} bits>", key, depth)
        if type(value) is float and not math.isfinite(value):
            name = "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
            return self.text(name, key, depth)
        if self._redact is None or self._texts:
            return value
        return self.plain(self.asked(value, key), depth)

    def asked(self, value: object, key: str) -> object:
        """Ask the user's redactor; where it raises, nothing of the value stays."""
        assert self._redact is not None
        try:
            return self._redact(key, value)
        except BaseException:
            return _FAILED

    def plain(self, value: object, depth: int) -> Json:
        """Convert what a redactor returned, without asking it again."""
        redact, self._redact = self._redact, None
        try:
            return self.value(value, "", depth)
        finally:
            self._redact = redact

    def as_text(self, value: Json) -> str:
        """Return what a redactor put in a text's place as a text."""
        if isinstance(value, str):
            return value
        return REDACTED if value is None else json.dumps(value, ensure_ascii=False)

    def shown(self, value: object, key: str, depth: int) -> Json:
        """Convert by `str`, which is short and readable for the types it is used for."""
        return self.text(str.__str__(str(value)), key, depth)

    def subclass(self, value: Any, key: str, depth: int) -> Json:
        """Convert an instance of a subclass of str, int or float without running its methods."""
        for base, exact in ((str, str.__str__), (int, int.__index__), (float, float.__float__)):
            if issubclass(type(value), base):
                return self.value(exact(value), key, depth)
        raise TypeError

    def member(self, value: Any, key: str, depth: int) -> Json:
        """Convert a member of an Enum: its plain value."""
        return self.value(value._value_, key, depth)

    def scalar(self, value: Any, key: str, depth: int) -> Json:
        """Convert a number of NumPy."""
        item = value.item() if value.ndim == 0 else value
        return self.unknown(value, key, depth) if type(item) is type(value) else self.value(item, key, depth)

    def moment(self, value: Any, key: str, depth: int) -> Json:
        """Convert a date or time."""
        return self.text(value.isoformat(), key, depth)

    def pattern(self, value: re.Pattern[Any], key: str, depth: int) -> Json:
        """Convert a compiled pattern."""
        return self.value(value.pattern, key, depth)

    def named(self, value: Any, key: str, depth: int) -> Json:
        """Convert a class or function: where it lives."""
        return self.text(f"{value.__module__}.{value.__qualname__}", key, depth)

    def error(self, value: BaseException, key: str, depth: int) -> Json:
        """Convert an exception."""
        message = str(value)
        name = _class_name(type(value))
        return self.text(f"{name}: {message}" if message else name, key, depth)

    def hidden(self, value: object, key: str, depth: int) -> Json:
        """Convert a SecretStr or the like."""
        return REDACTED

    def raw(self, value: Any, key: str, depth: int) -> Json:
        """Convert bytes: `text` if they are UTF-8, else `base64`, or `base64_start` of more than 4 KiB.

        Base64 would hide a secret from every pattern, so redaction looks at the bytes before.
        """
        if self._room <= 0:
            return {"type": "bytes", "length": memoryview(value).nbytes}
        data = bytes(value)
        out: dict[str, Json] = {"type": "bytes", "length": len(data)}
        try:
            return {**out, "text": self.text(data.decode(), key, depth)}
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        kept: object = self.asked(text, key) if self._redact is not None else text
        if self._rules is not None:
            kept = self._rules.mask(text)
        if type(kept) is not str or kept != text:
            return {**out, "text": self.plain(kept, depth)}
        whole = len(data) <= _MAX_WHOLE_BYTES
        start = base64.b64encode(data if whole else data[:_BYTES_START]).decode()
        self._room -= len(start)
        return {**out, "base64" if whole else "base64_start": start}

    def unknown(self, value: object, key: str, depth: int) -> Json:
        """Convert by `repr`, without memory addresses, at most 2,000 characters of it."""
        return self.text(_repr(value), key, depth, _MAX_REPR)

    # --- Containers ----------------------------------------------------------------------------------

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
            elif value is None or (type(value) is str and value in harmless):
                out[name] = value  # The commonest, without a call.
            else:
                out[name] = self.value(value, name, depth)
        if left_out > 0:
            out[_unused(_MORE, out) if _MORE in out else _MORE] = f"[… {left_out} more]"
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
            else:
                key = _repr(key)
        text: str = key
        name, secret = self._rules.verdict(text) if self._rules is not None else (clean(text), False)
        return (name if len(name) <= _SHORT else self.cut(name, _MAX_REPR)), secret

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
            out.append(f"[… {left_out} more]")
        return out

    def members(self, items: list[Any], key: str, depth: int) -> list[Json]:
        """Convert the members of a sequence."""
        harmless = self._harmless
        return [item if type(item) is str and item in harmless else self.value(item, key, depth) for item in items]

    def fields(self, value: Any, names: Iterable[str], depth: int) -> Json:
        """Convert an object by its attributes; those not set are left out."""
        pairs = [(name, item) for name in names if (item := getattr(value, name, _UNSET)) is not _UNSET]
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
        known = getattr(cls, "model_fields", None) or getattr(cls, "__fields__", None) or {}
        for name, field in known.items():
            if getattr(field, "exclude", None) is True or getattr(field, "repr", True) is False:
                data.pop(name, None)
        # Extra fields stand in a slot of their own (pydantic 2).
        data.update(getattr(value, "__pydantic_extra__", None) or {})
        pairs = self.taken(lambda: data.items())
        return self.entries(pairs, depth, len(data) - len(pairs))

    def message(self, value: Any, key: str, depth: int) -> Json:
        """Convert a message of LangChain: what it says, without its empty fields."""
        data = object.__getattribute__(value, "__dict__")
        pairs = [(name, data.get(name)) for name in ("type", "content")]
        pairs += [(name, data[name]) for name in _MESSAGE_FIELDS if not _empty(data.get(name))]
        self._budget = max(0, self._budget - len(pairs))
        return self.entries(pairs, depth)

    def document(self, value: Any, key: str, depth: int) -> Json:
        """Convert a document of LangChain."""
        data = object.__getattribute__(value, "__dict__")
        pairs = [(name, data.get(name)) for name in ("page_content", "metadata")]
        if data.get("id") is not None:
            pairs.append(("id", data["id"]))
        self._budget = max(0, self._budget - len(pairs))
        return self.entries(pairs, depth)

    def prompt(self, value: Any, key: str, depth: int) -> Json:
        """Convert a prompt value of LangChain: its messages or its text."""
        data = object.__getattribute__(value, "__dict__")
        for name in ("messages", "text"):
            if name in data:
                return self.value(data[name], key, depth)
        return self.model(value, key, depth)


_Kind: TypeAlias = Callable[[_Walk, Any, str, int], Json]
_MESSAGE_FIELDS = (
    "name", "role", "id", "tool_calls", "invalid_tool_calls", "tool_call_id", "status", "artifact",
    "usage_metadata", "response_metadata", "additional_kwargs",
)  # fmt: skip
_FAMILIES: tuple[tuple[str, str, _Kind], ...] = (
    ("langchain_core", "BaseMessage", _Walk.message),
    ("langchain_core", "Document", _Walk.document),
    ("langchain_core", "PromptValue", _Walk.prompt),
    ("pydantic", "BaseModel", _Walk.model),
)
# In this order: an IntEnum is an Enum first, a datetime a date.
_BASES: tuple[tuple[type | tuple[type, ...], _Kind], ...] = (
    (Enum, _Walk.member),
    ((str, int, float), _Walk.subclass),
    ((bytes, bytearray, memoryview), _Walk.raw),
    (dict, _Walk.mapping),
    ((list, tuple, set, frozenset, deque, range), _Walk.sequence),
    ((type, types.FunctionType, types.BuiltinFunctionType, types.MethodType), _Walk.named),
    (BaseException, _Walk.error),
    (re.Pattern, _Walk.pattern),
    ((date, time), _Walk.moment),
    ((PurePath, UUID, Decimal, Fraction, timedelta, tzinfo, UserString), _Walk.shown),
)
# The code of users behind these runs only where none of the above is known.
_ABSTRACT: tuple[tuple[type | tuple[type, ...], _Kind], ...] = (
    (Mapping, _Walk.mapping),
    ((Sequence, Set, MappingView), _Walk.sequence),
)
# What reading raises while another thread changes a dict, or a Mapping that looks up key by key.
_CHANGING = (RuntimeError, KeyError)
# Those that hold other values: they count for depth and cycles.
_NESTING = frozenset(
    {_Walk.mapping, _Walk.sequence, _Walk.named_tuple, _Walk.dataclass, _Walk.attrs, _Walk.model}
    | {_Walk.message, _Walk.document, _Walk.prompt, _Walk.member, _Walk.scalar}
)
# The commonest, without the dearer look at a weak dictionary.
_EXACT: dict[type, _Kind] = {dict: _Walk.mapping, list: _Walk.sequence, tuple: _Walk.sequence}
_kinds: WeakKeyDictionary[type, _Kind] = WeakKeyDictionary()


def _kind(cls: type) -> _Kind:
    """Choose how instances of a class are converted, by the class alone: `__class__` may lie or raise."""
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _Walk.named_tuple
    for bases, kind in _BASES:
        if issubclass(cls, bases):
            return kind
    if hasattr(cls, "get_secret_value"):
        return _Walk.hidden
    homes = {(str(base.__module__).partition(".")[0], base.__name__) for base in cls.__mro__}
    for package, name, kind in _FAMILIES:
        if (package, name) in homes:
            return kind
    if dataclasses.is_dataclass(cls):
        return _Walk.dataclass
    if hasattr(cls, "__attrs_attrs__"):
        return _Walk.attrs
    if ("numpy", "generic") in homes:
        return _Walk.scalar
    return next((kind for bases, kind in _ABSTRACT if issubclass(cls, bases)), _Walk.unknown)


# The descriptor itself: no metaclass can get in between.
_class_name: Callable[[type], str] = type.__dict__["__name__"].__get__


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


def _left_out(characters: int, of: str = "") -> str:
    return f"[… {characters} characters {f'of {of} ' if of else ''}left out …]"


def _broken(value: object, error: BaseException) -> str:
    return f"<{_class_name(type(value))}: reading it raised {_class_name(type(error))}>"


def _repr(value: object) -> str:
    cls = type(value)
    try:
        if cls.__repr__ is object.__repr__:
            return f"<{_class_name(cls)}>"
        return _ADDRESS.sub("", str.__str__(repr(value)))
    except BaseException as error:
        return f"<{_class_name(cls)}: repr raised {_class_name(type(error))}>"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    """Return a name not taken yet, near this one."""
    number = len(taken) + 1
    while f"{name} ({number})" in taken:
        number += 1
    return f"{name} ({number})"
