"""Makes JSON of values that need neither redaction nor a cut, which are nearly all; `Walk` is for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from json import encoder
from typing import Any

from pltrace._encoding._leaves import SHORT, Bounds
from pltrace._encoding._walk import plain_fields, plain_notes, plain_prompt, plain_text
from pltrace._health import pass_on_interrupt
from pltrace._messages import Said, SaidPrompt
from pltrace._redaction import Rules, clean
from pltrace._snapshot import Frozen
from pltrace._thawing import thawed

__all__ = ["CarefulError", "Quick", "json_of", "quoted"]

#: Returns the JSON text of an exact string.
quoted: Callable[[str], str] = encoder.encode_basestring


def _encoder() -> Callable[[object], str]:
    """Return what makes JSON of a tree: `JSONEncoder.encode` without what it prepares anew for each value."""
    kind = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
    prepare: Any = getattr(encoder, "c_make_encoder", None)
    if prepare is None:
        return kind.encode
    make = prepare(None, kind.default, encoder.encode_basestring, None, ":", ",", False, False, False)
    return lambda value: "".join(make(value, 0))


#: Returns the strict, compact JSON text of plain data that is a tree.
json_of = _encoder()

#: What is JSON as it is, but for texts, which are looked at, and integers of more than 64 bits.
_PLAIN = frozenset({type(None), bool, float})
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_MOST_KEYS = 4_096
#: Texts with nothing to hide are remembered, as they come again and again: so many characters of texts of such length.
_MOST_CHARACTERS, _LONGEST = 2_000_000, 20_000
#: What a value counts beside its characters.
_NODE = 10


class CarefulError(Exception):
    """A value that needs a closer look."""


class Quick:
    """Copies a value while it looks at types, keys and texts, and gives up where there is anything to do about it.

    A copy, because another thread may change the value meanwhile.

    Args:
        bounds: How much is kept.
        rules: The default redaction.
    """

    __slots__ = ("_characters", "_harmless", "_keys", "_most_depth", "_most_items", "_most_text", "_rules")

    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self._rules = rules
        self._most_depth = bounds.max_depth
        self._most_items = bounds.max_items
        self._most_text = bounds.max_string
        self._keys: set[str] = set()
        self._harmless: set[str] = set()
        self._characters = 0

    def dumps(self, value: object) -> str:
        """Return the JSON text that a walk would give.

        Raises:
            CarefulError: It takes a walk to tell.
        """
        try:
            kind = type(value)
            if kind is str or kind is int or kind in _PLAIN:
                return json_of(self._copy([value], 0, [self._most_text])[0])
            text = plain_text(value)
            if text is not None:
                return self.text(text)
            return json_of(self._copy(value, 1, [self._most_text]))
        except CarefulError:
            raise
        except BaseException as error:  # NaN, no stack left, or a container that another thread changes.
            if not isinstance(error, RecursionError):
                pass_on_interrupt(error)
            raise CarefulError from error

    def text(self, text: str) -> str:
        """Return the JSON text of an exact string.

        Raises:
            CarefulError: It takes a walk to tell.
        """
        if len(text) > self._most_text:  # First: to look a very long one up takes long.
            raise CarefulError
        if text not in self._harmless:
            self._look_at(text)
        return quoted(text)

    def _copy(self, value: Any, depth: int, room: list[int]) -> Any:
        """Return a container, one level inside of another, as lists and dicts that nobody else can change."""
        kind = type(value)
        made: Any
        if kind is dict or kind is list or kind is tuple:
            if len(value) > self._most_items or depth > self._most_depth:  # First: to copy millions takes long.
                raise CarefulError
            made = value.copy() if kind is not tuple else [*value]
            # Raw headers are pairs of a name and a value.
            if kind is tuple and len(made) == 2 and type(made[0]) is str:
                self._learn(made[0])
        elif kind is Frozen:
            return self._copy(thawed(value), depth, room)
        else:
            made, depth = self._told(value, depth)
            if len(made) > self._most_items or depth > self._most_depth:
                raise CarefulError
        places: Any
        if type(made) is dict:
            places = made.items()
            if not self._keys.issuperset(made):
                for key in made:
                    self._learn(key)
        else:
            places = enumerate(made)
        harmless = self._harmless
        used, most = _NODE * len(made), room[0]
        for place, item in places:
            kind = type(item)
            if kind is str:
                used += len(item)
                if used > most:
                    raise CarefulError
                if item not in harmless:
                    self._look_at(item)
            elif kind is int:
                if not _LEAST <= item <= _MOST:
                    raise CarefulError
            elif kind not in _PLAIN:
                made[place] = self._copy(item, depth + 1, room)
        room[0] -= used
        if room[0] < 0:
            raise CarefulError
        return made

    def _told(self, value: Any, depth: int) -> tuple[Any, int]:
        """Return what is shown of messages or of a data object, and how deep that is."""
        if issubclass(type(value), Said):
            made: Any = plain_notes(value)
            if made is None:
                raise CarefulError
            return made, depth + (type(value) is SaidPrompt)
        made = plain_fields(value)
        if made is not None:
            return made, depth
        made = plain_prompt(value)
        if type(made) is not list:
            raise CarefulError
        return made.copy(), depth + 1

    def _learn(self, key: Any) -> None:
        """Take note of a key that names no secret and is shown as it is."""
        if key in self._keys:
            return
        if type(key) is not str or len(key) > SHORT or self._rules.verdict(key) != (key, False):
            raise CarefulError
        if len(self._keys) >= _MOST_KEYS:
            self._keys.clear()
        self._keys.add(key)

    def _look_at(self, text: str) -> None:
        """Take note of a text that is kept as it is."""
        if clean(text) != text or (len(text) >= self._rules.shortest and self._rules.mask(text) != text):
            raise CarefulError
        if len(text) <= _LONGEST:
            self._characters += len(text) + _NODE
            if self._characters > _MOST_CHARACTERS:
                self._harmless.clear()
                self._characters = 0
            self._harmless.add(text)
