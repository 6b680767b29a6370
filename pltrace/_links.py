"""Remembers what prompts of the registry rendered to, and finds the one that an LLM call was made from.

A text that is handed on unchanged is the very same object when it reaches the model, however it went: as a message, in
a message of one's own, through a variable of another template, through threads and tasks. So each rendered text is an
object of its own, and a call is made from a rendering if it holds its texts; equal words of another object are somebody
else's. Where a program put more behind one of several texts, the others tell. Only where it put more behind all there
is, words have to tell, and then only those of what the running code is known to have rendered. (A subclass of `str`
that knows what was added to it is no way: pydantic makes a plain copy of it, which nothing but its words could tell.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

from pltrace._health import failed
from pltrace._snapshot import thawed
from pltrace._span import Span

__all__ = ["Link", "Rendering", "find", "forget", "forked", "fresh", "note", "seen", "texts_in"]

#: What is remembered: the latest renderings, the one that was of no use for longest goes first.
MOST_RENDERINGS = 20_000
MOST_CHARACTERS = 32_000_000
_OVERHEAD = 500  # What a rendering counts beside its texts.
#: So many renderings a context knows for its own.
_MOST_SEEN = 64
#: A shorter text says too little for being known by its words.
_TELLING = 20
_STEP = "seq:step:"
_SYSTEM = ("system", "SystemMessageChunk", "developer")


class Link(NamedTuple):
    """A prompt of the registry, and what its variables were given."""

    name: str
    version: int | None
    label: str | None
    variables: Mapping[str, Any]

    def __deepcopy__(self, memo: Any) -> Link:
        """Return itself: what is in the variables is the user's, and may not like to be copied."""
        return self

    def __reduce__(self) -> Any:
        """Leave the variables behind: they may not like to be pickled either."""
        return Link, (self.name, self.version, self.label, {})


@dataclass(eq=False)
class Rendering:
    """What a prompt rendered to; held by the table below alone, so that forgetting it frees it.

    Attributes:
        link: The prompt.
        texts: Its texts in order, each an object of its own; None for those that it was given, as history.
        first: Which of them is the first of its own.
    """

    link: Link
    texts: tuple[str | None, ...]
    first: int

    @property
    def text(self) -> str:
        """Its first own text."""
        return self.texts[self.first] or ""

    @property
    def size(self) -> int:
        """What it counts: variables are about as large as what they were rendered to."""
        return _OVERHEAD + 2 * sum(len(text) for text in self.texts if text)


#: Reentrant: forgetting a rendering may run finalizers of the user's, which may render.
_lock = threading.RLock()
_size = 0
#: By their own identity, in the order in which they were last of use.
_renderings: OrderedDict[int, Rendering] = OrderedDict()
#: By the identity of each of their own texts, which live as long as they.
_by_text: dict[int, Rendering] = {}
#: The renderings that the running context made, or that were made before it was copied.
_seen: ContextVar[tuple[ref[Rendering], ...]] = ContextVar("pltrace_renderings", default=())

#: What an LLM call keeps of its context when it starts: a C call.
seen = _seen.get


def fresh(text: str) -> str:
    """Return the same text as an object that nobody else has; Python has but one of each of the shortest."""
    return text[:1] + text[1:]


def texts_in(content: Any) -> Iterator[str]:
    """Give the texts in the content of a message."""
    for part in [content] if isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and text:
            yield text


def note(link: Link, texts: Sequence[str | None], run: Span | None) -> None:
    """Remember what a prompt rendered to.

    Args:
        link: The prompt, with its variables.
        texts: What it says, each made by `fresh`; None for each text that it was given.
        run: The LangChain run that it was rendered in.
    """
    own = tuple(text if text and len(text) > 1 else None for text in texts)
    first = next((index for index, text in enumerate(own) if text), None)
    if first is None:
        return
    rendering = Rendering(link, own, first)
    with _lock:
        _remember(rendering)
        if len(own) > 1:
            return
        for step, sequence in _steps_around(run):
            sequence.rendered_in_steps = (*sequence.rendered_in_steps, (step, ref(rendering)))[-_MOST_SEEN:]
    _seen.set((*_seen.get(), ref(rendering))[-_MOST_SEEN:])


def _remember(rendering: Rendering) -> None:
    """Add a rendering, under the lock; forget others if there are too many now."""
    global _size
    _renderings[id(rendering)] = rendering
    _by_text.update((id(text), rendering) for text in rendering.texts if text)
    _size += rendering.size
    while len(_renderings) > 1 and (len(_renderings) > MOST_RENDERINGS or _size > MOST_CHARACTERS):
        _, oldest = _renderings.popitem(last=False)
        _size -= oldest.size
        for text in oldest.texts:
            if text and _by_text.get(id(text)) is oldest:
                del _by_text[id(text)]


def forget() -> None:
    """Forget all renderings: tracing has ended."""
    global _size
    with _lock:
        _renderings.clear()
        _by_text.clear()
        _size = 0


def forked() -> None:
    """Give the child of a fork a lock of its own; another thread of the parent may have held this one."""
    global _lock
    _lock = threading.RLock()


def find(span: Span) -> Link | None:
    """Return the prompt that an LLM call was made from, or None if there is none or it can't be told."""
    if not _renderings:
        return None
    try:
        texts, system = _said(span)
        return _handed_on(texts, system) or _begun_with(span, texts[: system + 1])
    except Exception:
        failed("finding the registry's prompt of a call")
        return None


def _said(span: Span) -> tuple[list[str], int]:
    """Return the texts that a model was given, and how many of them are system messages at the beginning."""
    prompt = thawed(span.raw_input)
    if not isinstance(prompt, (list, tuple)) or span.run is None:
        return [], 0
    if not span.run.chat:
        return [text for text in prompt if isinstance(text, str)], 0
    texts: list[str] = []
    system, leading = 0, True
    for message in prompt:
        leading = leading and message.type in _SYSTEM
        texts += texts_in(message.content)
        system = len(texts) if leading else system
    return texts, system


def _handed_on(texts: Sequence[str], system: int) -> Link | None:
    """Return the link of the rendering that the texts begin with, system messages of others aside.

    Of several prompts the first counts, which of an agent is the one of its system prompt; of several renderings of one
    prompt the last, which of a conversation is the latest turn.
    """
    found: Rendering | None = None
    for place, text in enumerate(texts):
        rendering = _by_text.get(id(text))
        if rendering is None or rendering is found:
            continue
        if found is None:
            if _is_at(rendering, texts, place, system):
                found = rendering
        elif found.link[:2] == rendering.link[:2] and _is_at(rendering, texts, place, len(texts)):
            found = rendering
    if found is None:
        return None
    _keep([found])
    return found.link


def _keep(renderings: Iterable[Rendering]) -> None:
    """Let other renderings be forgotten before these: they are of use."""
    with _lock:
        for key in map(id, renderings):
            if key in _renderings:
                _renderings.move_to_end(key)


def _is_at(rendering: Rendering, texts: Sequence[str], place: int, latest: int) -> bool:
    """Return whether the texts are those of `rendering`, one of which is at `place`, from `latest` on at the latest.

    More may have been put behind the others.
    """
    start = place - next(index for index, mine in enumerate(rendering.texts) if mine is texts[place])
    here = texts[start : start + len(rendering.texts)] if 0 <= start <= latest else ()
    return len(here) == len(rendering.texts) and all(
        mine is None or mine is given or _goes_on(given, mine)
        for mine, given in zip(rendering.texts, here, strict=True)
    )


def _goes_on(text: str, beginning: str) -> bool:
    """Return whether a text is `beginning` with more behind it, which begins no sooner than with a word of its own."""
    return (
        len(beginning) < len(text)
        and text.startswith(beginning)
        and not (beginning[-1].isalnum() and text[len(beginning)].isalnum())
    )


def _begun_with(span: Span, texts: Sequence[str]) -> Link | None:
    """Return the link of the rendering that one of `texts` says more than, the first of them that does."""
    known = [rendering for it in (*span.rendered, *_of_earlier_steps(span)) if (rendering := it()) is not None]
    for text in texts if known else ():
        begun = [rendering for rendering in known if _begins(text, rendering)]
        if begun:
            longest = max(len(rendering.text) for rendering in begun)
            meant = [rendering for rendering in begun if len(rendering.text) == longest]
            _keep(meant)
            link = _agreed([rendering.link for rendering in meant])
            if link is not None:
                # An agent keeps its system prompt: from now on it is known for itself, whoever calls.
                with _lock:
                    _remember(Rendering(link, (text,), 0))
            return link
    return None


def _begins(text: str, rendering: Rendering) -> bool:
    """Return whether a text says what a rendering does, with more behind it or without the blanks around it.

    More has to follow a whole sentence or line. A sentence without variables is what anybody may begin with, as "You
    are a helpful assistant.": behind it a line has to end.
    """
    said, beginning = text.strip(), rendering.text.strip()
    if text == rendering.text or len(beginning) < _TELLING or not said.startswith(beginning):
        return False
    more = said[len(beginning) :]
    if not more or more[0] in "\r\n":
        return True
    return not beginning[-1].isalnum() and (bool(rendering.link.variables) or "\n" in beginning)


def _agreed(links: Sequence[Link]) -> Link | None:
    """Return what all of them say; None if they don't name one version of one prompt."""
    if len({(link.name, link.version) for link in links}) > 1:
        return None
    link = links[-1]
    if any(one.label != link.label for one in links):
        link = link._replace(label=None)
    if not all(_same(link.variables, one.variables) for one in links):
        link = link._replace(variables={})
    return link


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # Values like arrays can't be compared as a whole.
        return False


def _steps_around(span: Span | None) -> Iterator[tuple[int, Span]]:
    """Give the steps of sequences that a run is or is in: number, and the sequence's span.

    LangChain runs each step in a context of its own, so what one rendered isn't known to the next.
    """
    while span is not None:
        around = span.run_around or span.parent
        if not isinstance(around, Span):
            return
        for tag in (span.run_fields[3] if span.run_fields is not None else None) or ():
            if tag.startswith(_STEP) and tag[len(_STEP) :].isdigit():
                yield int(tag[len(_STEP) :]), around
        span = around


def _of_earlier_steps(span: Span) -> Iterator[ref[Rendering]]:
    for number, sequence in _steps_around(span):
        for step, rendering in sequence.rendered_in_steps:
            if step < number:
                yield rendering
