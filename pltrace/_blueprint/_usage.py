"""Finds the token counts of an LLM call in what providers and LangChain report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pltrace._blueprint._base import items_of, member_of

_PATHS: dict[str, tuple[tuple[str, ...], ...]] = {
    "input_tokens": (("input_tokens",), ("prompt_tokens",)),
    "output_tokens": (("output_tokens",), ("completion_tokens",)),
    "cached_input_tokens": (
        ("input_token_details", "cache_read"),
        ("prompt_tokens_details", "cached_tokens"),
        ("input_tokens_details", "cached_tokens"),
        ("cache_read_input_tokens",),
    ),
    "cache_creation_input_tokens": (
        ("input_token_details", "cache_creation"),
        ("cache_creation_input_tokens",),
    ),
    "reasoning_tokens": (
        ("output_token_details", "reasoning"),
        ("completion_tokens_details", "reasoning_tokens"),
        ("output_tokens_details", "reasoning_tokens"),
    ),
}
#: LangChain's own report, which is read at once: nobody else's names are in it.
_STANDARD = {"input_tokens", "output_tokens", "total_tokens", "input_token_details", "output_token_details"}
_NOTHING: dict[str, Any] = {}
#: Anthropic's classes count what was written to the cache by how long it is kept, and then tell 0 for the whole.
_CREATED = tuple(("input_token_details", f"ephemeral_{kept}_input_tokens") for kept in ("5m", "1h"))


_CREATED_KEYS = frozenset(path[1] for path in _CREATED)


class Usage(NamedTuple):
    """Token counts of one LLM call; None is what nobody reported."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_input_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


def tokens(generations: Sequence[object], llm_output: object) -> Usage:
    """Find the token counts of one LLM call.

    Args:
        generations: The generations of the call; providers repeat the call's total on each candidate.
        llm_output: `LLMResult.llm_output`, asked when no message knows.

    Returns:
        The counts, None for each that nobody reported.
    """
    for generation in items_of(generations):
        usage = counts_of(member_of(member_of(generation, "message"), "usage_metadata"))
        if usage is not None:
            return usage
    for key in ("token_usage", "usage"):
        usage = counts_of(member_of(llm_output, key))
        if usage is not None:
            return usage
    return Usage()


def counts_of(reported: object) -> Usage | None:
    """The counts in one report; None if it tells neither input nor output."""
    if reported is None:
        return None
    if type(reported) is dict and reported.keys() <= _STANDARD:
        usage = _standard(reported)
        if usage is not None:
            return usage
    usage = Usage(**{field: _count(reported, paths) for field, paths in _PATHS.items()})
    if usage.input_tokens is None and usage.output_tokens is None:
        return None
    created = sum(_count(reported, [path]) or 0 for path in _CREATED)
    if created > (usage.cache_creation_input_tokens or 0):
        usage = usage._replace(cache_creation_input_tokens=created)
    return usage


def _standard(reported: dict[str, Any]) -> Usage | None:
    """The counts in LangChain's own report; None where they need a closer look."""
    given, answered = reported.get("input_tokens"), reported.get("output_tokens")
    if type(given) is not int or type(answered) is not int or given < 0 or answered < 0:
        return None
    inside, outside = reported.get("input_token_details"), reported.get("output_token_details")
    if not inside and not outside:
        return Usage(given, answered)
    inside, outside = inside or _NOTHING, outside or _NOTHING
    if type(inside) is not dict or type(outside) is not dict or not _CREATED_KEYS.isdisjoint(inside):
        return None
    details = (inside.get("cache_read"), outside.get("reasoning"), inside.get("cache_creation"))
    for count in details:
        if count is not None and (type(count) is not int or count < 0):
            return None
    return Usage(given, answered, *details)


def _count(reported: object, paths: Iterable[tuple[str, ...]]) -> int | None:
    for path in paths:
        value: Any = reported
        for key in path:
            value = None if value is None else value.get(key) if type(value) is dict else member_of(value, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value % 1 == 0:
            return int(value)
    return None
