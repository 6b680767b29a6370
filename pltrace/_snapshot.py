"""Copies the containers of a value, so that it is recorded as it was at the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Arguments", "arguments_of", "snapshot"]

#: What is copied of one container; more isn't kept anyway.
_MOST_ITEMS = 10_000


def snapshot(value: Any) -> Any:
    """Return `value` with its dicts and lists, and those directly in them, copied; all else by reference.

    Two levels deep is where programs change what they pass on (an agent's list of messages in its state), at a tenth
    of the cost of a deep copy.
    """
    kind = type(value)
    try:
        if kind is dict:
            if len(value) > _MOST_ITEMS:
                return _shallow(value)
            return {key: _shallow(item) if type(item) in _CONTAINERS else item for key, item in value.items()}
        if kind is list or kind is tuple:
            return [_shallow(item) if type(item) in _CONTAINERS else item for item in value[:_MOST_ITEMS]]
        if kind is set:
            return _shallow(value)
    except RuntimeError:  # Another thread is changing it right now.
        pass
    return value


def _shallow(value: Any) -> Any:
    if len(value) <= _MOST_ITEMS:
        return value.copy()
    if type(value) is list:
        return value[:_MOST_ITEMS]
    kept = [item for item, _ in zip(value.items() if type(value) is dict else value, range(_MOST_ITEMS), strict=False)]
    return type(value)(kept)


_CONTAINERS = frozenset({dict, list, set})
_NESTING = _CONTAINERS | {tuple}


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return snapshots of the arguments of a call; the tuple and the dict are the call's own."""
    return Arguments(
        function,
        [snapshot(item) if type(item) in _NESTING else item for item in args],
        {key: snapshot(item) if type(item) in _NESTING else item for key, item in kwargs.items()} if kwargs else kwargs,
    )


class Arguments(NamedTuple):
    """The arguments of a call as they were, to be named when the span is written."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def named(self) -> dict[str, Any]:
        """Return them by parameter name, without `self` or `cls`."""
        try:
            bound = inspect.signature(self.function).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):  # A builtin without a signature, or a call that fails anyway.
            return {**{str(position): value for position, value in enumerate(self.args)}, **self.kwargs}
        named: dict[str, Any] = {}
        for position, (name, value) in enumerate(bound.arguments.items()):
            if position == 0 and name in ("self", "cls") and _is_method(self.function):
                continue
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named


def _is_method(function: Any) -> bool:
    """Return whether a function was defined in the body of a class."""
    defined_in, _, _ = str(getattr(function, "__qualname__", "")).rpartition(".")
    return bool(defined_in) and not defined_in.endswith("<locals>")
