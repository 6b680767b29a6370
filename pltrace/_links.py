"""Remembers what prompts of the registry rendered to, and finds the one that an LLM call was made from."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from pltrace._fingerprints import as_bytes, beginnings, digest_of, of_string, said_in
from pltrace._health import failed
from pltrace._snapshot import snapshot
from pltrace._span import Span

__all__ = ["Link", "Place", "find", "forget", "forked", "gathered", "note", "seen"]

#: What is remembered: the latest renderings, so many inside traces and so many outside, and so much of their variables.
MOST_RENDERINGS = 20_000
MOST_CHARACTERS = 32_000_000
#: So many renderings a context knows for its own, and so many may look the same.
_MOST_SEEN = 64
_OVERHEAD = 500  # What a rendering without variables counts.


class Link(NamedTuple):
    """A prompt of the registry, and what its variables were given."""

    name: str
    version: int | None
    label: str | None
    variables: Mapping[str, Any]


#: Who may have been made from a rendering, of the calls in its trace that its run is not around: any; any that is not
#: in an asyncio task, for tasks inherit what was known where they were made; those alone that know it.
_ANY, _NO_TASK, _WHO_KNOWS = 0, 1, 2


class _Rendering(NamedTuple):
    link: Link
    noted_at_ns: int
    reach: int
    size: int


#: A rendering is kept by its trace, the run that it was made for, and the fingerprint of what it says.
_Key = tuple[int, int, bytes]


class _Table:
    """The latest renderings, the one that was of no use for longest first.

    Args:
        most: How many keys are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._entries: OrderedDict[_Key, list[_Rendering]] = OrderedDict()
        self._lengths: dict[int, dict[int, int]] = {}  # Trace → length of a rendered string → how many there are.
        self._string_lengths: dict[_Key, int] = {}
        self._size = 0

    def add(self, key: _Key, rendering: _Rendering, string_length: int | None) -> None:
        """Keep a rendering; `string_length` if it is a string, which may begin a longer one."""
        known = self._entries.setdefault(key, [])
        known.append(rendering)
        self._size += rendering.size
        if len(known) > _MOST_SEEN:
            self._size -= known.pop(0).size
        self._entries.move_to_end(key)
        if string_length is not None and key not in self._string_lengths:
            self._string_lengths[key] = string_length
            lengths = self._lengths.setdefault(key[0], {})
            lengths[string_length] = lengths.get(string_length, 0) + 1
        while self._entries and (len(self._entries) > self._most or self._size > MOST_CHARACTERS):
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        key, renderings = self._entries.popitem(last=False)
        self._size -= sum(rendering.size for rendering in renderings)
        length = self._string_lengths.pop(key, None)
        if length is not None:
            lengths = self._lengths[key[0]]
            lengths[length] -= 1
            if not lengths[length]:
                del lengths[length]
            if not lengths:
                del self._lengths[key[0]]

    def get(self, key: _Key) -> list[_Rendering]:
        """Return the renderings of that key; they count as used."""
        found = self._entries.get(key)
        if found is None:
            return []
        self._entries.move_to_end(key)
        return list(found)

    def lengths(self, trace_bits: int) -> Iterable[int]:
        """Return the lengths of the strings that were rendered in a trace, each once."""
        return list(self._lengths.get(trace_bits, ()))

    def __bool__(self) -> bool:
        return bool(self._entries)


_lock = threading.Lock()
_inside = _Table(MOST_RENDERINGS)
#: A prompt that is rendered before any trace, as a module is imported, must not be pushed out by those in traces.
_outside = _Table(MOST_RENDERINGS // 4)


def forget() -> None:
    """Forget all renderings: tracing has ended."""
    with _lock:
        _inside.clear()
        _outside.clear()


#: The renderings that the running context knows of: its own, and those that were made before it was copied. A call
#: that shares a trace with a rendering, but not this, was not made from it though it may say the same.
_seen: ContextVar[tuple[_Rendering, ...]] = ContextVar("pltrace_renderings", default=())
#: Where a call of the template's own `invoke` gathers what was rendered in copies of its context.
_gathering: ContextVar[list[_Rendering] | None] = ContextVar("pltrace_gathering", default=None)

#: What an LLM call keeps of its context when it starts: a C call.
seen = _seen.get


class Place(NamedTuple):
    """Where a prompt was rendered.

    Attributes:
        trace_bits: The trace, or 0.
        run_bits: The LangChain run that it was rendered for, or 0.
        in_task: It was in an asyncio task.
    """

    trace_bits: int
    run_bits: int
    in_task: bool


def note(link: Link, messages: Sequence[Any], strings: Iterable[str], place: Place) -> None:
    """Remember what a prompt rendered to.

    Args:
        link: The prompt, with its variables.
        messages: LangChain messages; none if it is a string prompt.
        strings: The forms it has, or may be given, as one string.
        place: Where.
    """
    size = _OVERHEAD + sum(len(value) for value in link.variables.values() if isinstance(value, str))
    link = link._replace(variables=snapshot(dict(link.variables)))
    reach = _WHO_KNOWS if place.run_bits else _NO_TASK if place.in_task else _ANY
    rendering = _Rendering(link, time.time_ns(), reach, size)
    said = [said_in(message) for message in messages]
    keys: list[tuple[bytes, int | None]] = [(of_string(text), len(text)) for text in {*strings} if text]
    if any(text for _, text in said):
        keys.append((list(beginnings(said))[-1], None))
    table = _inside if place.trace_bits else _outside
    with _lock:
        for fingerprint, length in keys:
            for run_bits in {0, place.run_bits}:
                table.add((place.trace_bits, run_bits, fingerprint), rendering, length)
    _see([rendering])


def _see(renderings: Sequence[_Rendering]) -> None:
    if renderings:
        _seen.set((*_seen.get(), *renderings)[-_MOST_SEEN:])
        gathering = _gathering.get()
        if gathering is not None:
            gathering.extend(renderings)


@contextmanager
def gathered() -> Iterator[None]:
    """Make the caller's context know what is rendered inside, in whatever copies of it."""
    made: list[_Rendering] = []
    outer = _gathering.get()
    _gathering.set(made)
    try:
        yield
    finally:
        _gathering.set(outer)
        _see(made[-_MOST_SEEN:])


def find(span: Span) -> Link | None:
    """Return the prompt that an LLM call was made from, or None if there is none or it can't be told."""
    if not _inside and not _outside:
        return None
    try:
        prompt = span.raw_input
        if not isinstance(prompt, (list, tuple)) or not prompt or span.run is None:
            return None
        for fingerprints in _ranks(span, prompt):
            with _lock:
                candidates = _candidates(span, fingerprints)
            if candidates:
                return _agreed(candidates)
    except Exception:
        failed("finding the registry's prompt of a call")
    return None


def _ranks(span: Span, prompt: Sequence[Any]) -> Iterator[list[bytes]]:
    """Give the fingerprints that the call's prompt may have been noted under, the most telling first."""
    assert span.run is not None
    if not span.run.chat:
        if len(prompt) == 1 and isinstance(prompt[0], str):
            yield [of_string(prompt[0])]
        return
    said = [said_in(message) for message in prompt]
    for length, fingerprint in reversed(list(enumerate(beginnings(said), 1))):
        yield [fingerprint, of_string(said[0][1])] if length == 1 else [fingerprint]
    if said[0][0] == "system":
        yield from _string_beginnings(span.trace_bits, said[0][1])
        others = [text for role, text in said if role != "system"]
        if others:
            yield [of_string(others[0])]


def _string_beginnings(trace_bits: int, text: str) -> Iterator[list[bytes]]:
    """Give the fingerprints of what `text` begins with, of the lengths that were rendered, the longest first."""
    with _lock:
        lengths = sorted({*_inside.lengths(trace_bits), *_outside.lengths(0)})
    digest, done, found = digest_of(b"string"), 0, []
    for length in lengths:
        if length >= len(text):
            break
        digest.update(as_bytes(text[done:length]))
        done = length
        if not (text[length - 1].isalnum() and text[length].isalnum()):  # Not in the middle of a word.
            found.append(digest.copy().digest())
    for fingerprint in reversed(found):
        yield [fingerprint]


def _candidates(span: Span, fingerprints: Sequence[bytes]) -> list[_Rendering]:
    """Return the renderings that look like the call's prompt and that it can have been made from."""
    known = {id(rendering) for rendering in span.rendered}
    reaches = {_ANY, _NO_TASK} if isinstance(span.starter, int) else {_ANY}
    sure: list[_Rendering] = []
    likely: list[_Rendering] = []
    outside: list[_Rendering] = []
    for fingerprint in fingerprints:
        for run_bits in _runs_around(span):
            sure += _inside.get((span.trace_bits, run_bits, fingerprint))
        for rendering in _inside.get((span.trace_bits, 0, fingerprint)):
            if id(rendering) in known:
                sure.append(rendering)
            elif rendering.reach in reaches:
                # A thread starts with an empty context: that it doesn't know the rendering says nothing.
                likely.append(rendering)
        outside += _outside.get((0, 0, fingerprint))
    for candidates in (sure, likely, outside):
        before = [rendering for rendering in candidates if rendering.noted_at_ns <= span.started_at_ns]
        if before:
            return before
    return []


def _runs_around(span: Span) -> Iterator[int]:
    node: Any = span
    while isinstance(node, Span):
        around = node.run_around
        if around is not None:
            yield around.span_bits
        node = node.parent
        if isinstance(node, Span) and node.run is not None:
            yield node.span_bits


def _agreed(renderings: Sequence[_Rendering]) -> Link | None:
    """Return what all of them say; None if they don't name one version of one prompt."""
    links = [rendering.link for rendering in renderings]
    if len({(link.name, link.version) for link in links}) > 1:
        return None
    link = links[-1]
    if len({one.label for one in links}) > 1:
        link = link._replace(label=None)
    if not all(_same(link.variables, one.variables) for one in links):
        link = link._replace(variables={})
    return link


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    try:
        return bool(one == other)
    except Exception:  # Values like arrays can't be compared as a whole.
        return False


def forked() -> None:
    """Give the child of a fork a lock of its own; another thread of the parent may have held this one."""
    global _lock
    _lock = threading.Lock()
