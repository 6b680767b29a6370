"""`Encoder`: what the rest of pltrace makes JSON with."""

from __future__ import annotations

import marshal
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pltrace._encoding._leaves import SHORT, TOO_DEEP, Bounds, Json, Redact, broken
from pltrace._encoding._quick import CarefulError, Quick, json_of
from pltrace._encoding._walk import Walk
from pltrace._redaction import Rules
from pltrace._thawing import thawed

__all__ = ["Encoder"]

T = TypeVar("T", bound=tuple[str, ...])

# Walking and `json.dumps` recurse once or twice per level: more would meet Python's own limit.
_DEEPEST = 200
#: Tags, users and the like come again and again: so many JSON texts of such are kept, up to a length.
_MOST_REPEATED, _LONGEST_REPEATED = 1_000, 2_000
#: And so many characters of what is made of several such, the tools of an agent among them, again up to a length.
_MOST_CHARACTERS, _LONGEST_MADE = 2_000_000, 100_000
_PLAIN = frozenset({str, int, float, bool, type(None)})
#: Nothing is kept of what has a longer text or a larger container in it: for a large set `marshal` takes seconds.
_LONGEST_PART = 10_000
_PARTS = frozenset({str, bytes, bytearray, list, tuple, dict, set, frozenset})
#: The version of `marshal`'s format. Those before it follow for ever what has itself in it. In this one a value may be
#: told in several ways, by which objects in it are the same or held elsewhere; but no two are told in the same way.
_FORMAT = 4


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
        #: Whether it calls a redactor of the user's.
        self.is_users = redact is not None
        self._rules = Rules(extra) if redact is None else None
        self._label_rules = Rules(extra, by_name=False)
        self._bounds = Bounds(max_string, min(max_depth, _DEEPEST), max_items)
        self._made: dict[tuple[Callable[..., Any], bytes], Any] = {}
        self._characters = 0
        self._labels: dict[str | tuple[str, ...] | None, str] = {}
        self._quick = None if self._rules is None else Quick(self._bounds, self._rules)
        self._quick_label = None if self._rules is None else Quick(self._bounds, self._label_rules)

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

    def label(self, value: object, key: str = "") -> Json:
        """Return a name, a user or tags as JSON-safe data, without what looks like a secret; never raises.

        Args:
            value: A text, a list of texts, or None.
            key: What the user's `redact` is asked with; a name of ours for a span is nothing to ask about.
        """
        if not key or self._redact is None:
            return self._walked(value, None, self._label_rules)
        return self._walked(value, self._redact, None, texts=True, key=key)

    def schema(self, value: object) -> Json:
        """Return a schema, as of a tool's parameters, as JSON-safe data; never raises.

        Args:
            value: Anything; what stands under the name of a secret describes it and is kept.

        Returns:
            As `shaped`.
        """
        return self._walked(value, self._redact, self._label_rules if self._redact is None else None, texts=True)

    def _walked(
        self, value: object, redact: Redact | None, rules: Rules | None, *, texts: bool = False, key: str = ""
    ) -> Json:
        if value is None or (
            type(value) is str and len(value) <= SHORT and rules is not None and value in rules.harmless
        ):
            return value
        try:
            return Walk(self._bounds, redact, rules, texts).value(value, key, 0)
        except BaseException as error:
            return broken(value, error)

    # The same as JSON text: strict, compact, without NaN, NUL and lone surrogates.

    def dumps(self, value: object) -> str:
        """Return the JSON text of `jsonable(value)`, or of what a snapshot stands for; never raises."""
        return self._dumped(self._quick, self._thawed, value)

    def _thawed(self, value: object) -> Json:
        return self.jsonable(thawed(value))

    def dumps_shaped(self, value: object) -> str:
        """Return the JSON text of `shaped(value)`; never raises."""
        return self._dumped(self._quick, self.shaped, value)

    def dumps_schema(self, value: object) -> str:
        """Return the JSON text of `schema(value)`; never raises."""
        return self._dumped(self._quick_label, self.schema, value)

    def dumps_label(self, value: str | tuple[str, ...] | None, key: str = "") -> str:
        """Return the JSON text of `label(value, key)`; never raises."""
        if self._redact is not None:
            return json_of(self.label(value, key))
        found = self._labels.get(value)
        if found is None:
            found = json_of(self.label(value, key))
            if len(found) <= _LONGEST_REPEATED:
                if len(self._labels) >= _MOST_REPEATED:
                    self._labels.clear()
                self._labels[value] = found
        return found

    def made_of(self, given: tuple[Any, ...], make: Callable[..., T]) -> T:
        """Return the texts that `make(encoder, *given)` gives; made once for what comes again and again, and kept.

        Args:
            given: What they are made from, and nothing else.
            make: Makes them.
        """
        key = _told_by(given) if self._redact is None else b""
        found: T | None = self._made.get((make, key))
        if found is not None:
            return found
        # Of the key, as another thread may change what was given meanwhile.
        told = marshal.loads(key) if 0 < len(key) <= _LONGEST_MADE else None
        if told is None or not _is_plain(told, len(key)):
            return make(self, *given)
        found = make(self, *told)
        size = len(key) + sum(map(len, found))
        if size <= _LONGEST_MADE:
            self._characters += size
            if self._characters > _MOST_CHARACTERS:
                self._made.clear()
                self._characters = size
            self._made[make, key] = found
        return found

    def dumps_plain(self, text: str) -> str | None:
        """Return the JSON text of a text that needs no redaction and no cut; None for any other."""
        try:
            return None if self._quick is None else self._quick.text(text)
        except CarefulError:
            return None

    def _dumped(self, quick: Quick | None, walk: Callable[[object], Json], value: object) -> str:
        try:
            if quick is not None:
                try:
                    return quick.text(value) if type(value) is str else quick.dumps(value)
                except CarefulError:
                    pass
            return json_of(walk(value))
        except RecursionError:  # The caller itself stands at the end of the stack.
            return f'"{TOO_DEEP}"'


def _told_by(value: tuple[Any, ...]) -> bytes:
    """Return what tells plain values from all others, 1 from 1.0 and True too; nothing of what can't be told so."""
    for one in value:
        if type(one) is dict:
            for part in [*one.values()]:  # Another thread may change it meanwhile.
                if type(part) in _PARTS and len(part) > _LONGEST_PART:
                    return b""
    try:
        return marshal.dumps(value, _FORMAT)
    except ValueError:
        return b""


def _is_plain(value: object, most: int) -> bool:
    """Say whether a value holds nothing but so many texts and numbers: `marshal` makes bytes of buffers of any type."""
    found = [value]
    for one in found:  # It grows meanwhile.
        kind = type(one)
        inside: Any = one
        if kind is dict:
            found += [*inside, *inside.values()]
        elif kind is list or kind is tuple:
            found += inside
        elif kind not in _PLAIN:
            return False
        if len(found) > most:  # The same containers again and again.
            return False
    return True
