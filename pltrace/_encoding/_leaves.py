"""Converts what holds no other values: texts, numbers and whatever is shown as one."""

from __future__ import annotations

import base64
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from pltrace._health import pass_on_interrupt
from pltrace._redaction import REDACTED, Rules, clean
from pltrace._snapshot import way_for
from pltrace._told import PARTED, TEXTS, by_class, class_name, error_text

__all__ = ["LONGEST_REPR", "SHORT", "TOO_DEEP", "Bounds", "Json", "Leaves", "Redact", "broken", "told"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Redact: TypeAlias = Callable[[str, Any], Any]

TOO_DEEP = "[too deep]"
#: All long strings of one value share a budget of this many times the longest; those up to `SHORT` are free.
_ROOM = 10
SHORT = 200
_FAILED = "[redaction failed]"
LONGEST_REPR = 2_000
_MAX_WHOLE_BYTES = 4_096
_BYTES_START = 1_024

#: Keys of a Prompt Blueprint, and of tool schemas, whose values its published description lists.
_SHAPE = frozenset({"type", "role", "format", "media_type", "template_format", "tool_choice", "function_call"})

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Bounds:
    """How much of a value is kept.

    Attributes:
        max_string: Of a text, in characters.
        max_depth: Of containers in containers.
        max_items: Of a container.
    """

    max_string: int
    max_depth: int
    max_items: int


class Leaves:
    """One value on its way to JSON: what is left of its budget for texts, and how texts are redacted.

    Args:
        bounds: How much is kept.
        redact: The user's redactor, if any.
        rules: The default redaction, if it holds.
        texts: Only texts are redacted, and stay texts: the rest is the shape.
    """

    __slots__ = ("_harmless", "_max_string", "_redact", "_room", "_rules", "_texts")

    def __init__(self, bounds: Bounds, redact: Redact | None, rules: Rules | None, texts: bool) -> None:
        self._redact = redact
        self._texts = texts
        self._rules = rules
        self._harmless = rules.harmless if rules is not None else set()
        self._max_string = bounds.max_string
        self._room = _ROOM * bounds.max_string

    @abstractmethod
    def value(self, value: Any, key: str, depth: int) -> Json:
        """Convert anything; `key` is the nearest mapping key above it."""

    def text(self, text: str, key: str, depth: int, limit: int | None = None) -> Json:
        """Clean, redact and only then cut a text, so that no half of a secret stays."""
        if self._room <= 0 and len(text) > SHORT:
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
        if len(text) > SHORT or len(text) > self._max_string:
            return self.cut(text, limit)
        if self._rules is not None and text == given:
            self._rules.remember(text)
        return text

    def cut(self, text: str, limit: int | None) -> str:
        """Keep head and tail of a text longer than its limit or the room left; of a data URL nothing, or it breaks."""
        limit = min(self._max_string if limit is None else limit, max(self._room, SHORT), self._max_string)
        left_out = len(text) - limit
        if left_out > 0 and text.startswith("data:"):
            text = _left_out(len(text), text[5:SHORT].partition(",")[0])
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
        except RecursionError:
            return _FAILED
        except BaseException as error:
            pass_on_interrupt(error)
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
        return self.text(error_text(value), key, depth)

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
        """Convert by what tells what it is, at most 2,000 characters of it."""
        return self.text(told(value), key, depth, LONGEST_REPR)


def _left_out(characters: int, of: str = "") -> str:
    return f"[… {characters} characters {f'of {of} ' if of else ''}left out …]"


def broken(value: object, error: BaseException) -> str:
    """Return what is kept of a value that can't be read."""
    if not isinstance(error, RecursionError):  # There is no room for a call.
        pass_on_interrupt(error)
    return f"<{class_name(type(value))}: reading it raised {class_name(type(error))}>"


def told(value: object) -> str:
    """Return a text that tells what a value is, without memory addresses and code of the program's; never raises."""
    cls = type(value)
    try:
        way = way_for(cls)
        if way in TEXTS:
            return str(way(value))
        if cls.__repr__ is object.__repr__ or (way in PARTED and way(value) is not value):
            return by_class(value)
        return _ADDRESS.sub("", str.__str__(repr(value)))
    except BaseException as error:
        if not isinstance(error, RecursionError):
            pass_on_interrupt(error)
        return f"<{class_name(cls)}: repr raised {class_name(type(error))}>"
