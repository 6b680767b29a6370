"""What every part of the blueprint needs: its types, how values of unknown kind are read, and text blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Block = dict[str, Any]


class JsonEncoder(Protocol):
    """What the blueprint needs of `pltrace._encoding.Encoder`; no method ever raises."""

    def dumps(self, value: object, /) -> str:
        """The value as strict JSON text, redacted and bounded."""

    def dumps_plain(self, text: str, /) -> str | None:
        """The JSON text of a text in which nothing is redacted or cut, None for any other."""

    def jsonable(self, value: object, /) -> object:
        """The value as plain JSON data, redacted and bounded."""

    def schema(self, value: object, /) -> object:
        """The same for a schema, in which names are no secrets."""


class MisfitError(Exception):
    """A value has no place in the schema; it becomes a text block holding its JSON."""


#: Makes blueprint blocks of one of LangChain's or a provider's; raises whatever it likes if it can't.
Converter = Callable[[Block, JsonEncoder], list[Block]]

_WHOLE = (str, bytes, bytearray)


def items_of(values: object) -> list[Any]:
    """The members of a sequence; anything that is none counts as its own only member."""
    if values is None:
        return []
    # Not every iterable: a message is one too, of its fields.
    if isinstance(values, (list, tuple)) or (isinstance(values, Sequence) and not isinstance(values, _WHOLE)):
        try:
            return list(values)
        except Exception:
            return [values]
    return [values]


def member_of(holder: object, key: str) -> Any:
    """The member of a dict or attribute of an object, None if there is none or it can't be read."""
    try:
        return holder.get(key) if isinstance(holder, dict) else getattr(holder, key, None)
    except Exception:
        return None


def first_of(holder: Block, *keys: str) -> Any:
    """The first value that is not None."""
    for key in keys:
        value = holder.get(key)
        if value is not None:
            return value
    return None


def dict_of(value: object) -> Block:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def str_of(value: object) -> str:
    """The value if it is a string; anything else is a misfit."""
    if isinstance(value, str):
        # Of a subclass (an enum, a markup string) only the characters count.
        return value if type(value) is str else str.__str__(value)
    raise MisfitError


def maybe_str(value: object) -> str | None:
    """The value if it is a string that says something."""
    return str_of(value) if isinstance(value, str) and value else None


def text_of(value: object, encoder: JsonEncoder) -> str:
    """The value if it is a string, else its JSON."""
    return str_of(value) if isinstance(value, str) else encoder.dumps(value)


def joined_text(parts: object) -> str:
    """The text of a list of strings and text blocks, a line each."""
    return "\n".join(part if isinstance(part, str) else str_of(part["text"]) for part in items_of(parts))


def object_of(value: object, encoder: JsonEncoder) -> Block:
    """The value as a JSON object; what is none is a misfit."""
    plain = encoder.jsonable(value)
    if isinstance(plain, dict):
        return plain
    raise MisfitError


def add_known(made: Block, **values: object) -> None:
    """Add optional strings; one of another type says nothing anyone could read."""
    for key, value in values.items():
        text = maybe_str(value)
        if text is not None:
            made[key] = text


def text_block(text: str) -> Block:
    """A block that holds a text."""
    return {"type": "text", "text": text}


def text_blocks(*texts: str) -> list[Block]:
    """A block for each text but the empty ones."""
    return [text_block(text) for text in texts if text]


def json_block(value: object, encoder: JsonEncoder) -> Block:
    """A block that holds the JSON of what the blueprint has no shape for."""
    return text_block(encoder.dumps(value))
