"""Checks what users pass: wrong types and values are named where they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pltrace._errors import ConfigError
from pltrace._snapshot import MOST_ITEMS, PLAIN, copied

__all__ = [
    "CAPTURE_ALL", "INPUTS", "OUTPUTS", "checked_capture", "checked_group", "checked_metadata", "checked_name",
    "checked_optional_name", "checked_release", "checked_request_id", "checked_sample", "checked_score",
    "checked_tags", "checked_timeout",
]  # fmt: skip

#: What is kept of a span, as bits: an inner block can only clear them.
INPUTS, OUTPUTS = 1, 2
CAPTURE_ALL = INPUTS | OUTPUTS
_YEAR_S = 365 * 86_400.0  # A lock refuses to be waited for much longer than a century.
_CAPTURES = {"inputs": INPUTS, "outputs": OUTPUTS}


def checked_name(argument: str, value: object) -> str:
    """Return `value` if it is a non-empty string; raise `ConfigError` naming `argument` otherwise."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{argument}={value!r}: expected a non-empty string, got {type(value).__name__}")
    return value


def checked_optional_name(argument: str, value: object) -> str | None:
    """Return `value` if it is a non-empty string or None; raise `ConfigError` naming `argument` otherwise."""
    return None if value is None else checked_name(argument, value)


def checked_tags(argument: str, value: object) -> tuple[str, ...]:
    """Return `value` as a tuple of strings; raise `ConfigError` naming `argument` if it isn't an iterable of them."""
    # First the usual types: to ask whether another one is iterable takes longer than all the rest.
    if not isinstance(value, (list, tuple)) and (isinstance(value, str) or not isinstance(value, Iterable)):
        raise ConfigError(f"{argument}={value!r}: expected strings in a list or tuple, got {type(value).__name__}")
    tags = tuple(value)
    for tag in tags:
        if not isinstance(tag, str) or not tag:
            raise ConfigError(f"{argument}={value!r}: expected non-empty strings, got {tag!r} among them")
    return tags


def checked_metadata(argument: str, value: object) -> dict[str, Any]:
    """Return `value` as a dict with string keys, the containers in it copied, of very long ones as much as is stored.

    Raises:
        ConfigError: It is something else, which the message tells by `argument`.
    """
    if not isinstance(value, dict) and not isinstance(value, Mapping):
        raise ConfigError(f"{argument}={value!r}: expected a dict with string keys, got {type(value).__name__}")
    given: Mapping[Any, Any] = value
    if len(given) > MOST_ITEMS:
        given = copied(given if type(given) is dict else dict(given))
    for key in given:
        if not isinstance(key, str):
            raise ConfigError(f"{argument}={value!r}: expected string keys, got the key {key!r}")
    # What the caller does with them afterwards is no part of what was said.
    return {key: item if type(item) in PLAIN else copied(item) for key, item in given.items()}


def checked_score(value: object) -> int:
    """Return `value` if it is a whole number from 0 to 100 (PromptLayer's rule); raise `ConfigError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise ConfigError(f"score={value!r}: expected a whole number from 0 to 100")
    return value


def checked_release(version: object, label: object) -> dict[str, Any]:
    """Return which release of a prompt is meant: by version, from 1 on, or by label; raise `ConfigError` otherwise."""
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
        raise ConfigError(f"version={version!r}: expected a whole number from 1 on")
    checked_optional_name("label", label)
    if version is not None and label is not None:
        raise ConfigError(f"version={version!r} and label={label!r}: give one of them")
    return {"version": version, "label": label}


def checked_group(value: object) -> int:
    """Return `value` if it is a group's id, a whole number; raise `ConfigError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"group_id={value!r}: expected a whole number")
    return value


def checked_request_id(value: object) -> int:
    """Return `value` if it is a request's id, from 1 on; raise `ConfigError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"request_id={value!r}: expected a whole number from 1 on; a Request has score(), add_metadata(), "
            "link_prompt() and add_to_group() of its own"
        )
    return value


def checked_timeout(value: object) -> float | None:
    """Return `value` if it is a number of seconds or None, a year at most; raise `ConfigError` otherwise."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ConfigError(f"timeout={value!r}: expected a number of seconds, or None")
    return min(float(value), _YEAR_S)


def checked_capture(argument: str, value: object) -> int:
    """Return `True`, `False`, `"inputs"` or `"outputs"` as bits; raise `ConfigError` naming `argument` otherwise."""
    if isinstance(value, bool):
        return CAPTURE_ALL if value else 0
    if isinstance(value, str) and value in _CAPTURES:
        return _CAPTURES[value]
    raise ConfigError(f'{argument}={value!r}: expected True, False, "inputs" or "outputs"')


def checked_sample(argument: str, value: object) -> float:
    """Return `value` if it is a number from 0 to 1; raise `ConfigError` naming `argument` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{argument}={value!r}: expected a number from 0.0 to 1.0")
    return float(value)
