"""Turns an ended span into what is stored: JSON, bounded, redacted, and all that exporters need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pltrace import _blueprint, _links
from pltrace._attempts import is_retry
from pltrace._checks import INPUTS, OUTPUTS
from pltrace._encoding import Encoder, json_of, quoted
from pltrace._provider_errors import error_type_of
from pltrace._rows import LINE, Row
from pltrace._snapshot import named, thawed
from pltrace._span import Span
from pltrace._usage import INTERNAL_TAGS, Run

__all__ = ["Answer", "Generation", "row_of"]

#: How the metadata keys start that they set for themselves.
_INTERNAL_METADATA = ("ls_", "langgraph_", "lc_", "checkpoint_", "__")
#: Invocation parameters that have a place of their own in a request, and stay here where that can't tell all of them.
_NOT_PARAMETERS = frozenset({"tools", "functions", "tool_choice", "function_call"})
#: Invocation parameters that are schemas: a property in one that is named like a secret is none.
_SCHEMAS = ("response_format", "text", "output_config")
_ELSEWHERE = _NOT_PARAMETERS.union(_SCHEMAS)
_OF_THE_RUN = frozenset({"_langchain_run_id", "_langchain_parent_run_id", "_langchain_tags"})
_NO_USAGE = _blueprint.Usage()
#: Token counts beside the usual two.
_DETAILS, _NO_DETAILS = _NO_USAGE._fields[2:], _NO_USAGE[2:]


class Answer(NamedTuple):
    """What an LLM answered, by reference to the messages as they were when the run ended."""

    generations: Sequence[tuple[Any, ...]]  # The fields of a Generation each.
    llm_output: Mapping[str, Any] | None

    def named(self) -> list[Generation]:
        """Return the generations with their fields named."""
        return [Generation(thawed(message), text, info) for message, text, info in self.generations]


class Generation(NamedTuple):
    """One generation: its message (chat models) or its text (completion models)."""

    message: Any
    text: str
    generation_info: Mapping[str, Any] | None


def is_cached(generations: Sequence[Generation]) -> bool:
    """Return whether LangChain's cache answered, which says that it cost nothing: the tokens were counted before."""
    usages = [getattr(generation.message, "usage_metadata", None) for generation in generations]
    return any(isinstance(usage, dict) and usage.get("total_cost") == 0 for usage in usages)


def row_of(span: Span, encoder: Encoder, service: str) -> Row:
    """Return what is stored of `span`.

    Args:
        span: Ended, or open: what isn't there yet is None.
        encoder: Bounds and redacts the user's values.
        service: Names the application, whichever process delivers the span.

    Returns:
        The row, in which nothing of the user's objects is referred to.
    """
    inherited, label = span.inherited, encoder.dumps_label
    tags, metadata = span.tags, encoder.dumps_again(span.metadata)
    around = f'"user":{label(inherited.user, "user")},"session":{label(inherited.session, "session")}'
    alike = f'{{{around},"service":{label(service)}'
    own = [] if span.error is None else ['"error":' + quoted(encoder.text(span.error))]
    lineage = '","'.join([f"{one.span_bits:016x}" for one in span.lineage])
    lines = [f'["{lineage}"]' if lineage else "[]", label(tags, "tags"), metadata]
    usage = _NO_USAGE
    if span.kind == "llm":
        usage, of_call = _add_llm(span, tags, metadata, own, lines, encoder)
        alike += of_call
    else:
        needed_in, needed_out = _needed_capture(span)
        given = span.raw_input if span.arguments is None else named(span.arguments)
        lines.append(_value(given, span.input_is_set or _holds(inherited.capture, needed_in), encoder))
        lines.append(_value(span.raw_output, span.output_is_set or _holds(inherited.capture, needed_out), encoder))
    # The clock may have been set back meanwhile; a call that ends before it begins would be refused.
    ended_at_ns = max(span.ended_at_ns, span.started_at_ns) if span.ended_at_ns else None
    return Row(
        span.id, span.trace_id, span.parent_id, str(encoder.label(span.name)), span.kind, span.status,
        span.started_at_ns, ended_at_ns, usage.input_tokens, usage.output_tokens,
        LINE.join((alike + "}", "{" + ",".join(own) + "}", *lines)),
    )  # fmt: skip


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


def _value(raw: Any, captured: bool, encoder: Encoder) -> str:
    if raw is None or not captured:
        return "null"
    return encoder.dumps(thawed(raw))


def _add_llm(
    span: Span, tags: tuple[str, ...], metadata: str, own: list[str], lines: list[str], encoder: Encoder
) -> tuple[_blueprint.Usage, str]:
    """Add what the body of an LLM call has beyond others'; return its token counts, and what it shares with many."""
    run = span.run
    assert run is not None  # An LLM span is made by the handler alone.
    captured = span.inherited.capture
    answer = _answered(span)
    generations = answer.named() if answer is not None else []
    cached = is_cached(generations)
    usage = _blueprint.tokens(generations, answer.llm_output) if answer is not None and not cached else _NO_USAGE
    parameters = run.parameters
    details = usage[2:]
    if details != _NO_DETAILS:
        own += [f'"{name}":{count}' for name, count in zip(_DETAILS, details, strict=True) if count is not None]
    if span.first_token_at_ns:
        own.append(f'"first_token_at_ns":{span.first_token_at_ns}')
    if span.status != "ok":
        own.append('"error_type":' + json_of(error_type_of(span.status, span.error_types, span.error or "")))
    own += _prompt_link(span, encoder)
    lines += [
        _prompt(span, run.chat, parameters, encoder),
        _answer(run.chat, generations if captured & OUTPUTS else (), encoder),
        _parameters(parameters, captured, encoder),
        encoder.dumps_label(_without_internal(tags), "tags"),
        _request_metadata(span, run, metadata, encoder),
    ]
    return usage, (
        f',"provider":{encoder.dumps_label(run.provider)},"model":{encoder.dumps_label(run.model)}'
        f',"attempt":{_attempt(span)},"cached":{"true" if cached else "false"}'
    )


@lru_cache(256)
def _without_internal(tags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(tag for tag in tags if not tag.startswith(INTERNAL_TAGS))


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


def _prompt_link(span: Span, encoder: Encoder) -> list[str]:
    """Return which prompt of the registry the call was made from."""
    link = _links.find(span)
    if link is None:
        return []
    variables = encoder.dumps(link.variables) if span.inherited.capture & INPUTS else "{}"
    return [
        '"prompt_name":' + quoted(link.name),
        '"prompt_version":' + json_of(link.version),
        '"prompt_label":' + json_of(link.label),
        '"prompt_input_variables":' + variables,
    ]


def _prompt(span: Span, chat: bool, parameters: Mapping[str, Any], encoder: Encoder) -> str:
    captured = thawed(span.raw_input) if span.inherited.capture & INPUTS else ()
    if not chat:
        return encoder.dumps_shaped(_blueprint.completion_prompt(captured, encoder))
    if parameters.keys().isdisjoint(_NOT_PARAMETERS):
        plain = _blueprint.plain_chat(captured, encoder)
        if plain is not None:
            return plain
    prompt = _blueprint.chat_prompt(captured, encoder, parameters=parameters if captured else None)
    tools = {key: prompt.pop(key) for key in ("tools", "functions") if prompt.get(key)}
    return _joined(encoder.dumps_shaped(prompt), {key: encoder.dumps_schema(value) for key, value in tools.items()})


def _joined(text: str, members: Mapping[str, str]) -> str:
    """Return the text of a JSON object with members added to it, which it has none of."""
    added = ",".join(f"{quoted(key)}:{value}" for key, value in members.items())
    return text if not added else f"{{{added}}}" if text == "{}" else f"{text[:-1]},{added}}}"


def _parameters(parameters: Mapping[str, Any], captured: int, encoder: Encoder) -> str:
    """Return what a model was called with, beside what the prompt says already."""
    if parameters.keys().isdisjoint(_ELSEWHERE):
        return encoder.dumps_again(parameters)
    rest = {key: value for key, value in parameters.items() if key not in _NOT_PARAMETERS}
    schemas = {key: encoder.dumps_schema(_schema_of(rest.pop(key))) for key in _SCHEMAS if key in rest}
    if captured & INPUTS:
        untold = _blueprint.untold_of(parameters)
        schemas.update({key: encoder.dumps_schema(value) for key, value in untold.items()})
    return _joined(encoder.dumps(rest), schemas)


def _schema_of(value: Any) -> Any:
    """Return a structured output's schema as the provider gets it; LangChain keeps a pydantic class as it is."""
    make = getattr(value, "model_json_schema", None)
    if not isinstance(value, type) or make is None:
        return value
    return {"type": "json_schema", "json_schema": {"name": value.__name__, "schema": make()}}


def _answer(chat: bool, generations: Sequence[Generation], encoder: Encoder) -> str:
    if not chat:
        return encoder.dumps_shaped(_blueprint.completion_answer(generations, encoder))
    plain = _blueprint.plain_chat([generation.message for generation in generations], encoder, "assistant")
    return plain if plain is not None else encoder.dumps_shaped(_blueprint.chat_answer(generations, encoder))


#: By what it is made from: the metadata of a request but for what tells its run. The same come again and again.
_known_metadata: dict[tuple[str, str, str], str] = {}
_MOST_KNOWN, _LONGEST_KNOWN = 1_000, 4_000


def _request_metadata(span: Span, run: Run, metadata: str, encoder: Encoder) -> str:
    """Return the metadata that goes with a request: strings only, without LangChain's internal keys.

    The keys `_langchain_*` are those of LangChain's own former PromptLayer handler: saved searches use them.
    """
    user, session = span.inherited.user, span.inherited.session
    key = (
        metadata,
        encoder.dumps_label(user, "user"),
        encoder.dumps_label(session, "session"),
    )
    known = _known_metadata.get(key)
    if known is None:
        known = _own_metadata(*map(json.loads, key))
        if len(metadata) <= _LONGEST_KNOWN:
            if len(_known_metadata) >= _MOST_KNOWN:
                _known_metadata.clear()
            _known_metadata[key] = known
    parent = run.parent_run_id and _uuid(run.parent_run_id)
    about_run = f'"_langchain_run_id":"{_uuid(run.run_id)}","_langchain_parent_run_id":"{parent}"'
    text = encoder.dumps_label(tuple(run.tags or ()), "tags")
    tags = _shown_list(text) if len(text) <= _LONGEST_KNOWN else _shown_list.__wrapped__(text)
    return f'{known[:-1]}{"" if known == "{}" else ","}{about_run},"_langchain_tags":{tags}}}'


@lru_cache(256)
def _shown_list(text: str) -> str:
    return quoted(str(json.loads(text)))


def _own_metadata(metadata: Mapping[str, Any], user: Any, session: Any) -> str:
    own = {
        key: value if isinstance(value, str) else json_of(value)
        for key, value in metadata.items()
        if not key.startswith(_INTERNAL_METADATA)
    }
    for key, value in (("user_id", user), ("conversation_id", session)):
        if value is not None:
            own[key] = value if isinstance(value, str) else json_of(value)
    return json_of({key: value for key, value in own.items() if key not in _OF_THE_RUN})


def _uuid(bits: int) -> str:
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _attempt(span: Span) -> int:
    """Return which attempt a call is: 1, and one more for each time that it, or what is around it, was tried before."""
    attempt = 1
    around: Any = span
    while isinstance(around, Span):
        if around.tried_before or around.noted_attempt is not None or any(map(is_retry, around.run_tags)):
            attempt += around.attempt.number - 1
        around = around.parent
    return attempt
