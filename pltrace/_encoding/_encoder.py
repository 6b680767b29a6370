"""`Encoder`: what the rest of pltrace makes JSON with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from pltrace._encoding._leaves import TOO_DEEP, Bounds, Json, Redact, broken
from pltrace._encoding._walk import Walk
from pltrace._redaction import Rules

__all__ = ["Encoder"]

# Walking and `json.dumps` recurse once or twice per level: more would meet Python's own limit.
_DEEPEST = 200


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
        self._bounds = Bounds(max_string, min(max_depth, _DEEPEST), max_items)
        self._json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))

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
        if value is None or (type(value) is str and rules is not None and value in rules.harmless):
            return value
        try:
            return Walk(self._bounds, redact, rules, texts).value(value, key, 0)
        except BaseException as error:
            return broken(value, error)

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
            return f'"{TOO_DEEP}"'
