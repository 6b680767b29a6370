"""Turns an ended span into the record that is stored: JSON-like, bounded, redacted, and all that exporters need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from pltrace import _blueprint, _links
from pltrace._checks import INPUTS, OUTPUTS
from pltrace._encoding import Encoder
from pltrace._provider_errors import error_type_of
from pltrace._snapshot import Arguments, thawed
from pltrace._span import Span
from pltrace._usage import INTERNAL_TAGS, Run

__all__ = ["Answer", "Generation", "record_of"]

#: How the metadata keys start that they set for themselves.
_INTERNAL_METADATA = ("ls_", "langgraph_", "lc_", "checkpoint_", "__")
#: Invocation parameters that have a place of their own in a request, and stay here where that can't tell all of them.
_NOT_PARAMETERS = frozenset({"tools", "functions", "tool_choice", "function_call"})
#: Invocation parameters that are schemas: a property in one that is named like a secret is none.
_SCHEMAS = ("response_format", "text", "output_config")


class Answer(NamedTuple):
    """What an LLM answered, by reference to the messages as they were when the run ended."""

    generations: Sequence[tuple[Any, ...]]  # The fields of a Generation each.
    llm_output: Mapping[str, Any] | None

    def named(self) -> list[Generation]:
        """Return the generations with their fields named."""
        return [Generation(thawed(message), text, info) for message, text, info in self.generations]

    @property
    def cached(self) -> bool:
        """Whether LangChain's cache answered, which says that it cost nothing: the tokens were counted before."""
        usages = (getattr(generation.message, "usage_metadata", None) for generation in self.named())
        return any(isinstance(usage, dict) and usage.get("total_cost") == 0 for usage in usages)


class Generation(NamedTuple):
    """One generation: its message (chat models) or its text (completion models)."""

    message: Any
    text: str
    generation_info: Mapping[str, Any] | None


def record_of(span: Span, encoder: Encoder, service: str) -> dict[str, Any]:
    """Return the record of `span`.

    Args:
        span: Ended, or open: what isn't there yet is None.
        encoder: Bounds and redacts the user's values.
        service: Names the application, whichever process delivers the span.

    Returns:
        JSON-like data; nothing of the user's objects is referred to.
    """
    scope = span.scope
    metadata = encoder.jsonable(span.metadata)
    record: dict[str, Any] = {
        "span_id": span.id,
        "trace_id": span.trace_id,
        "parent_id": span.parent_id,
        "name": encoder.label(span.name),
        "kind": span.kind,
        "status": span.status,
        "error": None if span.error is None else encoder.text(span.error),
        "started_at_ns": span.started_at_ns,
        "ended_at_ns": span.ended_at_ns or None,
        "tags": encoder.label(span.tags, "tags"),
        "metadata": metadata,
        "user": encoder.label(scope.user, "user"),
        "session": encoder.label(scope.session, "session"),
        "service": service,
        "lineage": [around.id for around in scope.lineage],
    }
    if span.kind == "llm":
        record.update(_llm_fields(span, record, encoder))
    else:
        needed_in, needed_out = _needed_capture(span)
        record["input"] = _value(span.raw_input, span.input_is_set or _holds(scope.capture, needed_in), encoder)
        record["output"] = _value(span.raw_output, span.output_is_set or _holds(scope.capture, needed_out), encoder)
    return record


def _needed_capture(span: Span) -> tuple[int, int]:
    """Return what has to be captured for a span's input and its output to be kept.

    What a prompt template gives is what a model will be asked, and what a parser takes is what one has answered.
    Between the steps of a chain nobody knows which of the two it is.
    """
    if span.kind == "prompt":
        return INPUTS, INPUTS
    if span.kind == "parser":
        return OUTPUTS, OUTPUTS
    around = span.run_around or span.parent
    if span.kind == "chain" and isinstance(around, Span) and around.run_fields is not None:
        return INPUTS | OUTPUTS, INPUTS | OUTPUTS
    return INPUTS, OUTPUTS


def _holds(captured: int, needed: int) -> bool:
    return captured & needed == needed


def _value(raw: Any, captured: bool, encoder: Encoder) -> Any:
    if raw is None or not captured:
        return None
    return encoder.jsonable(raw.named() if type(raw) is Arguments else thawed(raw))


def _llm_fields(span: Span, record: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
    """Return what the record of an LLM call has beyond others'."""
    run = span.run
    assert run is not None  # An LLM span is made by the handler alone.
    parameters = run.parameters
    answer = _answered(span)
    cached = answer is not None and answer.cached
    usage = _blueprint.tokens(answer.named(), answer.llm_output) if answer is not None and not cached else None
    chat = run.chat
    prompt = _prompt(span, chat, parameters, encoder)
    return {
        "provider": run.provider,
        "model": run.model,
        "parameters": _parameters(parameters, span.scope.capture, encoder),
        "input": prompt,
        "output": encoder.shaped(_answer(span, chat, answer, encoder)),
        "input_tokens": usage.input_tokens if usage is not None else None,
        "output_tokens": usage.output_tokens if usage is not None else None,
        "cached_input_tokens": usage.cached_input_tokens if usage is not None else None,
        "cache_creation_input_tokens": usage.cache_creation_input_tokens if usage is not None else None,
        "reasoning_tokens": usage.reasoning_tokens if usage is not None else None,
        "first_token_at_ns": span.first_token_at_ns or None,
        "error_type": error_type_of(span.status, span.error_types, span.error or ""),
        "attempt": _attempt(span),
        "cached": cached,
        "request_tags": [tag for tag in record["tags"] if not tag.startswith(INTERNAL_TAGS)],
        "request_metadata": _request_metadata(span, run, record["metadata"], encoder),
        **_prompt_link(span, encoder),
    }


def _answered(span: Span) -> Answer | None:
    """Return what a model answered; or the pieces that had come, put together, where it was cut off."""
    if isinstance(span.raw_output, Answer):
        return span.raw_output
    if not span.pieces:
        return None
    first, *others = span.pieces
    try:
        whole = first + others if others else first
    except Exception:  # LangChain can't put them together, for it or for us.
        return None
    return Answer([(whole.message, whole.text, whole.generation_info)], None)


def _prompt_link(span: Span, encoder: Encoder) -> dict[str, Any]:
    """Return which prompt of the registry the call was made from."""
    link = _links.find(span)
    if link is None:
        return {}
    return {
        "prompt_name": link.name,
        "prompt_version": link.version,
        "prompt_label": link.label,
        "prompt_input_variables": encoder.jsonable(link.variables) if span.scope.capture & INPUTS else {},
    }


def _prompt(span: Span, chat: bool, parameters: Mapping[str, Any], encoder: Encoder) -> Any:
    captured = thawed(span.raw_input) if span.scope.capture & INPUTS else ()
    if not chat:
        return encoder.shaped(_blueprint.completion_prompt(captured, encoder))
    prompt = _blueprint.chat_prompt(captured, encoder, parameters=parameters if captured else None)
    tools = {key: encoder.schema(prompt.pop(key)) for key in ("tools", "functions") if prompt.get(key)}
    safe = encoder.shaped(prompt)
    assert isinstance(safe, dict)
    return {**safe, **tools}


def _parameters(parameters: Mapping[str, Any], captured: int, encoder: Encoder) -> Any:
    """Return what a model was called with, beside what the prompt says already."""
    rest = {key: value for key, value in parameters.items() if key not in _NOT_PARAMETERS}
    schemas = {key: encoder.schema(_schema_of(rest.pop(key))) for key in _SCHEMAS if key in rest}
    if captured & INPUTS:
        schemas.update({key: encoder.schema(value) for key, value in _blueprint.untold_of(parameters).items()})
    safe = encoder.jsonable(rest)
    assert isinstance(safe, dict)
    return {**safe, **schemas}


def _schema_of(value: Any) -> Any:
    """Return a structured output's schema as the provider gets it; LangChain keeps a pydantic class as it is."""
    make = getattr(value, "model_json_schema", None)
    if not isinstance(value, type) or make is None:
        return value
    return {"type": "json_schema", "json_schema": {"name": value.__name__, "schema": make()}}


def _answer(span: Span, chat: bool, answer: Answer | None, encoder: Encoder) -> Any:
    generations = answer.named() if answer is not None and span.scope.capture & OUTPUTS else ()
    if chat:
        return _blueprint.chat_answer(generations, encoder)
    return _blueprint.completion_answer(generations, encoder)


def _request_metadata(span: Span, run: Run, metadata: Mapping[str, Any], encoder: Encoder) -> dict[str, str]:
    """Return the metadata that goes with a request: strings only, without LangChain's internal keys.

    The keys `_langchain_*` are those of LangChain's own former PromptLayer handler: saved searches use them.
    """
    own = {
        key: value if isinstance(value, str) else _json(value)
        for key, value in metadata.items()
        if not key.startswith(_INTERNAL_METADATA)
    }
    for key, value in (("user_id", span.scope.user), ("conversation_id", span.scope.session)):
        if value is not None:
            safe = encoder.jsonable(value)
            own[key] = safe if isinstance(safe, str) else _json(safe)
    own["_langchain_run_id"] = str(UUID(int=run.run_id))
    own["_langchain_parent_run_id"] = str(run.parent_run_id and UUID(int=run.parent_run_id))
    own["_langchain_tags"] = str(encoder.label(run.tags or [], "tags"))
    return own


#: For what is JSON-safe already.
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _attempt(span: Span) -> int:
    """Return which attempt a call is: 1, and one more for each time that it, or what is around it, was tried before."""
    attempt = 1
    around: Any = span
    while isinstance(around, Span):
        attempt += around.attempt.number - 1
        around = around.parent
    return attempt
