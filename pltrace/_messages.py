"""Notes what messages of LangChain's said when they were passed on, in as few objects as can be.

What is noted is held until it is written, and of hundreds that wait Python's garbage collector goes over each object,
in whoever's call it runs. A message is a dozen objects, and the list of a prompt many more: here they are one tuple.
The messages themselves aren't held, but their texts are: the registry's prompts are told by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Said", "SaidOnce", "SaidPrompt", "is_noted", "message_of", "note", "said", "said_by", "told_by"]


class Said(tuple[Any, ...]):
    """What a list of messages said, each in four items: its class, its content, its id, and what else or None.

    In place of the class the message itself may stand, where only its content is noted. `said_by` makes messages of it.
    """

    __slots__ = ()


class SaidOnce(Said):
    """What one message said."""

    __slots__ = ()


class SaidPrompt(Said):
    """What the messages of a prompt's value said; its class is the last item."""

    __slots__ = ()


#: Stands for the default of a field that is an empty container.
_EMPTY: Any = object()
#: What is kept beside a message's attributes.
_EXTRA = "__pydantic_extra__"
#: Of a class of messages the fields with their defaults, but for content and id; none of one that can't be made again.
_fields: dict[type, tuple[tuple[str, Any], ...]] = {}
#: The defaults themselves, the empty containers among them.
_defaults: dict[type, dict[str, Any]] = {}
#: Those of them that say something, which are few: a message's `type`.
_telling: dict[type, dict[str, Any]] = {}
#: So many classes are remembered; who makes classes as the program runs must not fill the memory with them.
_MOST_TYPES = 2_000


def is_noted(kind: type) -> bool:
    """Return whether messages of a class can be noted here."""
    return bool(_fields[kind] if kind in _fields else _learn(kind))


def said(messages: Sequence[Any], early: int = 0) -> Said:
    """Return what messages say; of so many at the beginning only the content is noted, and they are held.

    Raises:
        Exception: There are other things among them, or what has no truth.
    """
    items: list[Any] = []
    for message in messages[:early]:
        items += (message, _content(message.content), None, None)
    for message in messages[early:] if early else messages:
        note(message, items)
    return Said(items)


def note(message: Any, items: list[Any]) -> None:
    """Add what a message says to a list.

    Raises:
        Exception: It is something else, or holds what has no truth.
    """
    kind = type(message)
    fields = _fields.get(kind)
    if fields is None:
        fields = _learn(kind)
    if not fields:
        raise AttributeError("not a message that can be noted")
    state = message.__dict__
    rest: dict[str, Any] | None = None
    for name, default in fields:
        value = state[name]
        if value is not default and (default is not _EMPTY or value):
            if rest is None:
                rest = {}
            if type(value) is dict:
                value = value.copy()
            elif name == "tool_calls":
                value = [call.copy() for call in value]
            rest[name] = value
    if message.__pydantic_extra__:
        rest = {**(rest or {}), _EXTRA: message.__pydantic_extra__.copy()}
    content = state["content"]
    items += (kind, content if type(content) is str else _content(content), state["id"], rest)


def _content(content: Any) -> Any:
    """Return a message's content, its blocks copied."""
    return [block.copy() if type(block) is dict else block for block in content] if type(content) is list else content


def _learn(kind: Any) -> tuple[tuple[str, Any], ...]:
    if len(_fields) >= _MOST_TYPES:
        _fields.clear()
        _defaults.clear()
        _telling.clear()
    found: tuple[tuple[str, Any], ...] = ()
    if _can_be_made_again(kind):
        fields = kind.model_fields
        defaults = _defaults[kind] = {
            name: field.get_default(call_default_factory=True) for name, field in fields.items()
        }
        found = tuple(
            (name, _EMPTY if type(default) in (dict, list) and not default else default)
            for name, default in defaults.items()
            if name not in ("content", "id")
        )
        _telling[kind] = {name: default for name, default in found if default is not None and default is not _EMPTY}
    _fields[kind] = found
    return found


def _can_be_made_again(kind: Any) -> bool:
    is_message = any(base.__name__ == "BaseMessage" for base in kind.__mro__)
    if not is_message or not hasattr(kind, "__pydantic_validator__") or hasattr(kind, "__del__"):
        return False
    fields = kind.model_fields
    # The factories of users aren't ours to call.
    known = all(field.default_factory in (None, list, dict) for field in fields.values())
    return known and {"content", "id"} <= fields.keys() and not kind.__private_attributes__


def said_by(items: Said) -> Any:
    """Return twins of the messages that were noted: a list, the message, or the prompt's value."""
    kind = type(items)
    messages = [message_of(*items[start : start + 4]) for start in range(0, len(items) - 3, 4)]
    if kind is SaidPrompt:
        return _made(items[-1], {"messages": messages})
    return messages[0] if kind is SaidOnce else messages


def message_of(kind: Any, content: Any, message_id: str | None, rest: dict[str, Any] | None) -> Any:
    """Return a twin of a message; or itself, if it is held and hasn't changed."""
    if not isinstance(kind, type):
        try:
            if kind.content == content:
                return kind
        except Exception:  # There is something in it that can't be compared.
            pass
        return _made(type(kind), {**kind.__dict__, "content": content})
    if kind not in _defaults:
        _learn(kind)
    return _made(kind, {**_defaults[kind], **(rest or {}), "content": content, "id": message_id})


def told_by(kind: type, rest: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return what a noted message says beside content and id: the attributes it had, without such as say nothing."""
    telling = _telling.get(kind)
    if telling is None:
        _learn(kind)
        telling = _telling[kind]
    return telling if rest is None else {**telling, **rest}


def _made(kind: type, state: dict[str, Any]) -> Any:
    twin: Any = object.__new__(kind)
    beside = {_EXTRA: state.pop(_EXTRA, {}), "__pydantic_fields_set__": set(), "__pydantic_private__": None}
    for name, value in {"__dict__": state, **beside}.items():
        object.__setattr__(twin, name, value)
    return twin
