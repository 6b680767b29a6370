"""Remembers what prompts of the registry rendered to, and finds the one that an LLM call was made from.

A text that is handed on unchanged is the very same object when it reaches the model, however it went: as a message, in
a message of one's own, through a variable of another template, through threads and tasks. So each rendered text is an
object of its own, and a call is made from a rendering if it holds its texts; equal words of another object are somebody
else's. Where a program put more behind one of several texts, the others tell.

Words have to tell in two cases. Where a conversation is read back from a checkpoint, they are those of what was asked
before in the same conversation. Where a program put more behind all there is, they are those of what the running code
is known to have rendered, or the program before anything was traced; what was sent as it is, or with more behind it in
another trace, explains no further text. (A subclass of `str` that knows what was added to it is no way: pydantic makes
a plain copy of it, which nothing but its words could tell.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

from pltrace._collecting import is_collecting
from pltrace._greenlets import new_rlock
from pltrace._health import failed
from pltrace._span import Span
from pltrace._thawing import thawed

__all__ = ["Link", "Rendering", "find", "forget", "forked", "fresh", "is_system", "note", "seen", "texts_in"]

#: What is remembered: the latest renderings, the one that was of no use for longest goes first.
MOST_RENDERINGS = 20_000
MOST_CHARACTERS = 32_000_000
_OVERHEAD = 500  # What a rendering counts beside its texts.
#: So many renderings a context knows for its own.
_MOST_SEEN = 64
#: A shorter text says too little for being known by its words.
_TELLING = 20
#: So many conversations, and renderings in each, are known.
_MOST_CONVERSATIONS, _MOST_IN_ONE = 1_000, 8
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
        leading: How many of them a request has to begin with: the system messages, or all if there are none.
        trace: The trace that it was made in, or 0.
        sent: Whether a request was made from it as it is.
        extended: Whether one was made with more behind it.
    """

    link: Link
    texts: tuple[str | None, ...]
    leading: int
    trace: int = 0
    sent: bool = False
    extended: bool = False

    @property
    def text(self) -> str:
        """Its first own text."""
        return next((text for text in self.texts if text), "")

    @property
    def size(self) -> int:
        """What it counts: variables are about as large as what they were rendered to."""
        return _OVERHEAD + 2 * sum(len(text) for text in self.texts if text)


#: Reentrant: forgetting a rendering may run finalizers of the user's, which may render.
_lock = new_rlock()
_size = 0
#: By their own identity, in the order in which they were last of use.
_renderings: OrderedDict[int, Rendering] = OrderedDict()
#: By the identity of each of their own texts, which live as long as they.
_by_text: dict[int, Rendering] = {}
#: The latest that were made by the main thread outside of any trace: a program's setup, for all its threads.
_setup: tuple[ref[Rendering], ...] = ()
#: What requests of a conversation were made from, by its id.
_conversations: OrderedDict[str, tuple[ref[Rendering], ...]] = OrderedDict()
#: The renderings that the running context made, or that were made before it was copied.
_seen: ContextVar[tuple[ref[Rendering], ...]] = ContextVar("pltrace_renderings", default=())

#: What an LLM call keeps of its context when it starts: a C call.
seen = _seen.get


def fresh(text: str) -> str:
    """Return the same text as an object that nobody else has; Python has but one of each of the shortest."""
    return text[:1] + text[1:]


def is_system(message: Any) -> bool:
    """Return whether it is a system message."""
    return message.type in _SYSTEM


def texts_in(content: Any) -> Iterator[str]:
    """Give the texts in the content of a message."""
    for part in [content] if isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and text:
            yield text


def note(link: Link, texts: Sequence[str | None], system: int, trace: int, run: Span | None) -> None:
    """Remember what a prompt rendered to.

    Args:
        link: The prompt, with its variables.
        texts: What it says, each made by `fresh`; None for each text that it was given.
        system: How many of them are system messages at the beginning.
        trace: The trace that it was rendered in, or 0.
        run: The LangChain run that it was rendered in.
    """
    global _setup
    own = tuple(text if text and len(text) > 1 else None for text in texts)
    if not any(own):
        return
    rendering = Rendering(link, own, system if any(own[:system]) else len(own), trace)
    with _lock:
        _remember(rendering)
        if len(own) > 1:
            return
        if not trace and threading.current_thread() is threading.main_thread():
            _setup = (*_setup, ref(rendering))[-_MOST_SEEN:]
        for step, sequence in _steps_around(run):
            sequence.rendered_in_steps = (*sequence.rendered_in_steps, (step, ref(rendering)))[-_MOST_SEEN:]
    if not is_collecting():
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
    global _size, _setup
    with _lock:
        _setup = ()
        _conversations.clear()
        _renderings.clear()
        _by_text.clear()
        _size = 0


def forked() -> None:
    """Give the child of a fork a lock of its own; another thread of the parent may have held this one."""
    global _lock
    _lock = new_rlock()


def find(span: Span) -> Link | None:
    """Return the prompt that an LLM call was made from, or None if there is none or it can't be told."""
    if span.linked is None:
        link = None
        if _renderings:
            try:
                link = _found(span, *_said(span))
            except Exception:
                failed("finding the registry's prompt of a call")
        span.linked = (link,)  # What comes later must not change it.
    found: Link | None = span.linked[0]
    return found


def _found(span: Span, texts: Sequence[str], system: int) -> Link | None:
    conversation = _conversation_of(span)
    rendering = _handed_on(texts, system) or _read_back(conversation, texts, system)
    if rendering is None:
        return _begun_with(span, texts[: system + 1])
    rendering.sent = True
    _keep([rendering])
    if conversation is not None:
        with _lock:
            others = [it for it in _conversations.pop(conversation, ()) if it() is not rendering]
            _conversations[conversation] = (*others, ref(rendering))[-_MOST_IN_ONE:]
            if len(_conversations) > _MOST_CONVERSATIONS:
                _conversations.popitem(last=False)
    return rendering.link


def _conversation_of(span: Span) -> str | None:
    """Return LangGraph's name for the conversation that a call is part of: what a checkpoint is kept under."""
    run = span.run
    thread = (run.metadata or {}).get("thread_id") if run is not None else None
    return None if thread is None else str(thread)


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
        leading = leading and is_system(message)
        texts += texts_in(message.content)
        system = len(texts) if leading else system
    return texts, system


def _handed_on(texts: Sequence[str], system: int, found: Rendering | None = None) -> Rendering | None:
    """Return the rendering that the texts begin with, system messages of others aside.

    Of several prompts the first counts, which of an agent is the one of its system prompt; of several renderings of one
    prompt the last, which of a conversation is the latest turn.
    """
    for place, text in enumerate(texts):
        rendering = _by_text.get(id(text))
        if rendering is None or rendering is found:
            continue
        start = place - next(index for index, mine in enumerate(rendering.texts) if mine is text)
        if found is None:
            if start <= system and _is_at(rendering, texts, start):
                found = rendering
        elif found.link[:2] == rendering.link[:2] and _is_at(rendering, texts, start):
            found = rendering
    return found


def _read_back(conversation: str | None, texts: Sequence[str], system: int) -> Rendering | None:
    """Return the rendering of earlier in the same conversation whose words the texts begin with, or a later turn's."""
    known = [rendering for it in _conversations.get(conversation or "", ()) if (rendering := it()) is not None]
    begun = [one for one in known if any(_says(one, texts[start:]) for start in range(system + 1))]
    if not begun or len({one.link[:2] for one in begun}) > 1:
        return None
    return _handed_on(texts, system, begun[-1])


def _keep(renderings: Iterable[Rendering]) -> None:
    """Let other renderings be forgotten before these: they are of use."""
    with _lock:
        for key in map(id, renderings):
            if key in _renderings:
                _renderings.move_to_end(key)


def _says(rendering: Rendering, texts: Sequence[str]) -> bool:
    """Return whether texts go on from the words of a whole rendering, and these aren't what anybody may say."""
    own = rendering.texts
    return (
        len(own) < len(texts)
        and (len(own) > 1 or bool(rendering.link.variables) or "\n" in rendering.text)
        and all(mine is None or mine == given for mine, given in zip(own, texts, strict=False))
    )


def _is_at(rendering: Rendering, texts: Sequence[str], start: int) -> bool:
    """Return whether the texts from `start` on are those of a rendering; more may have been put behind them."""
    here = texts[start : start + rendering.leading] if start >= 0 else ()
    return len(here) == rendering.leading and all(
        mine is None or mine is given or _goes_on(given, mine)
        for mine, given in zip(rendering.texts, here, strict=False)
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
    known = [
        rendering
        for it in (*_setup, *span.rendered, *_of_earlier_steps(span))
        if (rendering := it()) is not None
        and not rendering.sent
        and (not rendering.extended or rendering.trace in (0, span.trace_bits))
    ]
    for text in texts if known else ():
        begun = [rendering for rendering in known if _begins(text, rendering)]
        if begun:
            longest = max(len(rendering.text) for rendering in begun)
            meant = [rendering for rendering in begun if len(rendering.text) == longest]
            _keep(meant)
            link = _agreed([rendering.link for rendering in meant])
            if link is not None:
                for rendering in meant:
                    rendering.extended = True
                # An agent keeps its system prompt: from now on it is known for itself, whoever calls.
                with _lock:
                    _remember(Rendering(link, (text,), 1))
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
        for tag in span.run_tags:
            if tag.startswith(_STEP) and tag[len(_STEP) :].isdigit():
                yield int(tag[len(_STEP) :]), around
        span = around


def _of_earlier_steps(span: Span) -> Iterator[ref[Rendering]]:
    for number, sequence in _steps_around(span):
        for step, rendering in sequence.rendered_in_steps:
            if step < number:
                yield rendering
