"""The one LangChain callback handler of the process: it turns runs into spans of the scope that is current."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks.base import BaseCallbackHandler
from langchain_core.callbacks.manager import AsyncCallbackManager

from pltrace import _runs
from pltrace._checks import OUTPUTS, checked_tags
from pltrace._errors import ConfigError
from pltrace._health import counts, failed, warn_once
from pltrace._links import seen as rendered_here
from pltrace._record import Answer, answer_of
from pltrace._request import Request
from pltrace._runs import RunId, key_of, open_runs, vanished
from pltrace._scope import Callback, Scope, current, outermost
from pltrace._snapshot import snapshot, whole
from pltrace._span import Span, SpanKind
from pltrace._usage import RunKey

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["PromptLayerCallbackHandler", "SpanHandler"]

_CHAIN_KINDS: dict[str | None, SpanKind] = {"prompt": "prompt", "parser": "parser"}
_ON_LLM_START = AsyncCallbackManager.on_llm_start.__code__


class SpanHandler(BaseCallbackHandler):
    """Records runs by reference, inline and in microseconds; it reads the scope and never sets it."""

    raise_error = False
    # Class attributes instead of the base's properties: LangChain asks for one of them at each event.
    ignore_llm = ignore_chat_model = ignore_chain = ignore_agent = ignore_retriever = False
    ignore_retry = ignore_custom_event = True

    @property
    def run_inline(self) -> bool:  # type: ignore[override]
        """Whether events come on the caller's own path: yes, but for one place.

        `AsyncCallbackManager.on_llm_start` gives nothing to handlers that aren't inline when one that is is there.
        Answering no in that place alone keeps the start of completion models for other people's handlers; LangChain
        asks again when it dispatches.
        """
        caller = sys._getframe(1)
        if caller.f_code is not _ON_LLM_START:
            # Before Python 3.12 a list comprehension is a frame of its own.
            if caller.f_back is None or caller.f_back.f_code is not _ON_LLM_START:
                return True
            caller = caller.f_back
        handlers = caller.f_locals["self"].handlers
        return any(not isinstance(other, SpanHandler) and other.run_inline for other in handlers)

    # Starts.

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open a span for a chain, a prompt or a parser."""
        kind = _CHAIN_KINDS.get(options.get("run_type"), "chain")
        run = (parent_run_id, serialized, tags, metadata, None, False)
        self._open(kind, inputs, run_id, run, options.get("name"))

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open a span for a call of a chat model."""
        # The list is LangChain's own and fresh; what is in it isn't changed.
        prompt = messages[0] if messages else []
        run = (parent_run_id, serialized, tags, metadata, options.get("invocation_params"), True)
        self._open("llm", prompt, run_id, run, options.get("name"))

    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open a span for a call of a completion model."""
        run = (parent_run_id, serialized, tags, metadata, options.get("invocation_params"), False)
        self._open("llm", prompts, run_id, run, options.get("name"))

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open a span for a call of a tool."""
        given = input_str if inputs is None else inputs
        run = (parent_run_id, serialized, tags, metadata, None, False)
        self._open("tool", given, run_id, run, options.get("name"))

    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open a span for a retriever's query."""
        run = (parent_run_id, serialized, tags, metadata, None, False)
        self._open("retriever", query, run_id, run, options.get("name"))

    def _open(
        self, kind: SpanKind, raw_input: Any, run_id: UUID, run: tuple[Any, ...], name: str | None
    ) -> Span | None:
        try:
            parent_run_id, serialized, tags, metadata, invocation_params, is_chat = run
            key: RunKey
            parent_key: RunKey | None
            try:
                key, parent_key = run_id.int, None if parent_run_id is None else parent_run_id.int
            except AttributeError:
                key, parent_key = key_of(run_id), None if parent_run_id is None else key_of(parent_run_id)
            seen = open_runs.get(key)
            if seen is not None:
                counts["runs_merged"] += 1
                return seen  # Another of our handlers was first: one run is one span.
            parent_run = None if parent_key is None else open_runs.get(parent_key)
            scope = current()
            if scope is None or scope.left_elsewhere:
                scope = self._scope(parent_run)
            if scope is None:
                if parent_key is None:
                    _note_unscoped()
                return None
            if parent_run is None:
                parent: Any = scope.parent_inside
            elif parent_run.scope is scope:
                parent = parent_run
            else:
                parent = _parent_of_run(scope, parent_run)
                if parent is parent_run:
                    scope = scope.inside(parent_run.scope)
            inherited = scope.inherited
            recorder = inherited.recorder
            trace_bits = parent.trace_bits or recorder.new_trace_bits()
            if not name:
                name = _class_name(serialized)
            span = Span(name, kind, inherited, parent or None, trace_bits, recorder.new_span_bits(), recorder.now_ns())
            span.scope = scope
            span.run_key, span.parent_run_key, span.serialized = key, parent_key, serialized
            if tags:
                span.run_tags = _shared(tags)
            if metadata:
                span.run_metadata = metadata
            if kind == "llm":
                span.invocation_params, span.is_chat = invocation_params, is_chat
            if parent is not parent_run:
                span.run_around = parent_run
            if parent.tried:
                span.tried_before = parent.tried
            if inherited.capture or kind == "llm":  # A call is linked to its prompt by what it says.
                span.raw_input = whole(raw_input) if is_chat else snapshot(raw_input)
            try:
                span.run_id = run_ref = RunId(run_id, vanished)
                run_ref.key = key
            except TypeError:  # A text. It ends with its block or task, or by age, if LangChain doesn't end it.
                span.run_id = None
            if kind not in _CHAINS:
                _runs.remember_starter(span, key)
                if kind == "llm":
                    span.rendered = rendered_here()
                    totals = scope.totals
                    while totals is not None:
                        totals.append(span.span_bits)
                        totals = totals.above
            if len(open_runs) >= _runs._MANY:
                _runs.sweep()
            open_runs[key] = span
        except Exception:
            failed("starting a span of a LangChain run")
            return None
        return span

    def _scope(self, parent_run: Span | None) -> Scope | None:
        return _runs.current_scope_or(parent_run)

    # Tokens.

    def on_llm_new_token(self, token: Any, *, run_id: UUID, chunk: Any = None, **options: Any) -> None:
        """Note when the first token came, and keep those that LangChain doesn't give to a reader."""
        try:
            span = open_runs.get(run_id.int)
        except AttributeError:
            span = open_runs.get(key_of(run_id))
        if span is None:
            return
        if not span.first_token_at_ns:
            span.first_token_at_ns = span.inherited.recorder.now_ns()
            if not _runs.is_in_ainvoke():
                span.is_stream = True
            elif span.inherited.capture & OUTPUTS:
                span.pieces = []
        if span.pieces is not None and chunk is not None:
            span.pieces.append(chunk)

    # Ends.

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **options: Any) -> None:
        """End the span of a chain, prompt or parser."""
        try:
            span = open_runs.pop(run_id.int, None)
        except AttributeError:
            span = open_runs.pop(key_of(run_id), None)
        if span is not None:
            span.run_id = None
            self._end(span, outputs)

    def on_tool_end(self, output: Any, *, run_id: UUID, **options: Any) -> None:
        """End the span of a tool."""
        self._end_leaf(run_id, output)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **options: Any) -> None:
        """End the span of a retriever."""
        self._end_leaf(run_id, documents)

    def on_llm_end(self, response: Any, *, run_id: UUID, **options: Any) -> None:
        """End the span of a model's call, and add its tokens to the totals of the spans around it."""
        try:
            key: RunKey = run_id.int
        except AttributeError:
            key = key_of(run_id)
        span = open_runs.pop(key, None)
        if span is None:
            return
        try:
            _runs.finish(span, key)
            answer = _answer(response)
            span.raw_output = answer
            span.status = "ok"
            span.ended_at_ns = span.inherited.recorder.now_ns()
            span.count_call()
            if span.tried_before:
                _runs.note_attempt(span)
            span.inherited.recorder.record(span)
        except Exception:
            failed("ending a span of a model's call")

    def _end_leaf(self, run_id: UUID, output: Any) -> None:
        try:
            key: RunKey = run_id.int
        except AttributeError:
            key = key_of(run_id)
        span = open_runs.pop(key, None)
        if span is not None:
            _runs.finish(span, key)
            self._end(span, output)

    def _end(self, span: Span, output: Any) -> None:
        try:
            if span.inherited.capture:  # Which side of it is kept, `_record` says.
                span.raw_output = snapshot(output)
            span.status = "ok"
            span.ended_at_ns = span.inherited.recorder.now_ns()
            if span.tried_before:
                _runs.note_attempt(span)
            span.inherited.recorder.record(span)
        except Exception:
            failed("ending a span of a LangChain run")

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **options: Any) -> None:
        """End the span of a chain, prompt or parser that failed."""
        self._fail(run_id, error)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **options: Any) -> None:
        """End the span of a tool that failed."""
        self._fail(run_id, error)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **options: Any) -> None:
        """End the span of a retriever that failed."""
        self._fail(run_id, error)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **options: Any) -> None:
        """End the span of a model's call that failed or was left, with what it had answered until then."""
        self._fail(run_id, error, options.get("response"))

    def _fail(self, run_id: UUID, error: BaseException, response: Any = None) -> None:
        key = key_of(run_id)
        span = open_runs.pop(key, None)
        if span is None:
            return
        try:
            _runs.finish(span, key)
            span.set_error(error)
            _runs.note_attempt(span)
            answer = None if response is None else _answer(response)
            if answer is not None and (len(answer) > 1 or span.pieces is None):
                span.raw_output = answer
            span.ended_at_ns = span.inherited.recorder.now_ns()
            if span.kind == "llm":
                span.count_call()
            span.inherited.recorder.record(span)
        except Exception:
            failed("ending a span of a failed LangChain run")


_CHAINS = frozenset({"chain", "prompt", "parser"})

#: A single tag is one of few, as the number of a chain's step; more are as LangChain gives them, a list for each run.
_single_tags: dict[str, tuple[str]] = {}
_MOST_TAGS = 1_000


def _shared(tags: list[str]) -> Sequence[str]:
    """Return a run's tags, as one object for all runs alike: what waits is gone over by Python's garbage collector."""
    if len(tags) != 1 or type(tags[0]) is not str:
        return tags
    tag = tags[0]
    found = _single_tags.get(tag)
    if found is None:
        if len(_single_tags) >= _MOST_TAGS:
            _single_tags.clear()
        found = _single_tags[tag] = (tag,)
    return found


class PromptLayerCallbackHandler(SpanHandler):
    """Traces the calls that it is handed to in a `callbacks` list, as LangChain's former PromptLayer handler did.

    Args:
        pl_id_callback: Called with the integer id of each LLM request.
        pl_tags: Tags of what is traced.

    Raises:
        ConfigError: An argument has a wrong type.
    """

    def __init__(
        self, pl_id_callback: Callable[[int], Any] | None = None, pl_tags: Sequence[str] | None = None
    ) -> None:
        """Take the two arguments of the former handler."""
        self.pl_tags = checked_tags("pl_tags", () if pl_tags is None else pl_tags)
        if pl_id_callback is not None and not callable(pl_id_callback):
            raise ConfigError(f"pl_id_callback={pl_id_callback!r}: expected a function that takes an id")
        self.pl_id_callback = pl_id_callback
        self._callback = None if pl_id_callback is None else Callback(self._pass_id, None)

    def _pass_id(self, request: Request) -> Any:
        assert self.pl_id_callback is not None
        return self.pl_id_callback(int(request))

    def _open(
        self, kind: SpanKind, raw_input: Any, run_id: UUID, run: tuple[Any, ...], name: str | None
    ) -> Span | None:
        span = super()._open(kind, raw_input, run_id, run, name)
        if span is not None:
            span.scope = scope = self._added_to(span.scope)
            span.inherited = scope.inherited
        return span

    def _scope(self, parent_run: Span | None) -> Scope | None:
        """Return the scope to record under: a handler that is handed over needs no block around it."""
        scope = super()._scope(parent_run)
        if scope is None:
            scope = outermost()
            if scope is not None and not scope.inherited.recorder.sampled():
                scope = scope.with_(sampled=False)
        return scope

    def _added_to(self, scope: Scope) -> Scope:
        """Return `scope` with this handler's tags and callback, once."""
        tags, callbacks = scope.inherited.tags, scope.inherited.callbacks
        if set(self.pl_tags) <= set(tags) and (self._callback is None or self._callback in callbacks):
            return scope
        if self._callback is not None and self._callback not in callbacks:
            callbacks = (self._callback, *callbacks)
        return scope.with_(tags=tuple(dict.fromkeys((*tags, *self.pl_tags))), callbacks=callbacks)


def _answer(response: Any) -> Answer:
    generations = response.generations
    # By far the most are one, at half the cost.
    flat = generations[0] if len(generations) == 1 else [one for several in generations for one in several]
    return answer_of(flat, response.llm_output)


def _class_name(serialized: Any) -> str:
    """Return what LangChain calls a run's object, where the run has no name of its own."""
    serialized = serialized or {}
    return str(serialized.get("name") or (serialized.get("id") or ["run"])[-1])


def _parent_of_run(scope: Scope, parent_run: Span) -> Span:
    """Return the parent of a run whose parent run began under another scope.

    What is the scope's own, if the scope's span descends from the parent run, or if the scope was entered or resumed
    inside of it, and isn't around it; else the parent run.
    """
    for start in (scope.span, scope.entered_in):
        node: Any = start
        while isinstance(node, Span):
            if node is parent_run:
                return scope.parent_inside
            node = node.parent
    return parent_run


def _note_unscoped() -> None:
    """Count a run outside any block; in a thread that should have had one, say so once."""
    counts["runs_seen"] += 1
    counts["runs_without_scope"] += 1
    thread = threading.current_thread()
    if thread is threading.main_thread() or not Scope.roots:
        return
    counts["runs_without_scope_in_threads"] += 1
    warn_once(
        "lost_scope",
        "A LangChain call in thread %r is not recorded: a traced block is open, but not in this thread, because new "
        "threads start with an empty context. Hand the thread its function as pltrace.bind(function).",
        thread.name,
    )
