"""Numbers the attempts at one thing: retries and fallbacks, LangChain's or by hand, nested in any way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pltrace._thawing import thawed
from pltrace._usage import INTERNAL_TAGS

__all__ = ["Attempt", "and_another", "is_retry"]

#: So many attempts under one span are remembered, the latest.
_MOST = 32

#: LangChain numbers its retries by this tag.
_RETRY = "retry:attempt:"
#: A fallback from a model to a retried model is one from an LLM run to a chain.
_ALIKE = frozenset({"chain", "llm"})


class Attempt:
    """A LangChain run, as far as others that attempt the same are told by it.

    What is to be known of it is found when it is asked for, in the background.

    Args:
        kind: What the run is.
        name: Its name.
        tags: Those that LangChain gave it.
        raw_input: What it was given.
        error: What went wrong, or None.
        before: The attempts that had ended under the same parent when it started.
        inside: Those that ended under it.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        tags: Sequence[str],
        raw_input: Any,
        error: str | None,
        before: tuple[Attempt, ...],
        inside: tuple[Attempt, ...],
    ) -> None:
        self.kind = kind
        self.name = name
        self.tags = tags
        self.raw_input = raw_input
        self.error = error
        self.before = before
        self.inside = inside

    @cached_property
    def number(self) -> int:
        """Which attempt it is under its parent, from 1: one more than what failed before, since the last success.

        Those before may lie in one another: LangChain starts what is in a fallback beside it.
        """
        number = 1
        for other in self.before:
            if self._is_alike(other):
                number = max(number, other.number + other.count) if other.error is not None else 1
        # What LangChain says counts where inputs can't be compared.
        return max([number, *(int(tag[len(_RETRY) :]) for tag in self.tags if tag.startswith(_RETRY))])

    @cached_property
    def count(self) -> int:
        """How many attempts it was: those made in it, one after the other, or itself."""
        return max((one.number - 1 + one.count for one in self.inside), default=1)

    def forget(self) -> None:
        """Let go of what it is told by: of attempts without end the latest are enough."""
        self.before = self.inside = ()
        self.raw_input = None

    def _is_alike(self, other: Attempt) -> bool:
        """Return whether both are attempts at the same: given the same, at the same place.

        Branches of one step are given the same too; they differ in LangChain's tags, or nodes of a graph in their name.
        """
        if self.kind != other.kind and not {self.kind, other.kind} <= _ALIKE:
            return False
        place = _place(self.tags)
        if place != _place(other.tags) or (place and self.name != other.name):
            return False
        try:
            return self.raw_input is not None and bool(self._given(self) == self._given(other))
        except Exception:  # Arrays can't be compared so, nor can all that users make.
            return False

    def _given(self, attempt: Attempt) -> Any:
        """Return what an attempt was given, without what had gone wrong before: `exception_key` adds that."""
        said = _said(attempt.raw_input)
        if not isinstance(said, dict):
            return said
        errors = [other.error for other in self.before]
        return {key: item for key, item in said.items() if type(item) is not str or item not in errors}


def is_retry(tag: str) -> bool:
    """Say whether LangChain numbers a retry by this tag."""
    return tag.startswith(_RETRY)


def and_another(attempts: tuple[Attempt, ...], attempt: Attempt) -> tuple[Attempt, ...]:
    """Return the attempts and one more; the latest of them, if they are very many."""
    if len(attempts) >= _MOST:
        attempts[0].forget()
    return (*attempts[1 - _MOST :], attempt)


def _place(tags: Sequence[str]) -> list[str]:
    """Return the tags that LangChain says with which step or branch it is."""
    return [tag for tag in tags if tag.startswith(INTERNAL_TAGS) and not tag.startswith(_RETRY)]


def _said(raw: Any) -> Any:
    """Return what a run was given in one form: a model's messages come as texts, tuples, dicts, or a prompt's value."""
    value = thawed(raw)
    if hasattr(value, "to_messages"):
        value = value.to_messages()
    if isinstance(value, str):
        return [value]
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def _content(item: Any) -> Any:
    if isinstance(item, tuple) and len(item) == 2:
        return item[1]
    if isinstance(item, dict):
        return item.get("content", item)
    return getattr(item, "content", item)
