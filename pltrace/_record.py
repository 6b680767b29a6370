"""Turns an ended span into what is stored: JSON, bounded, redacted, and all that exporters need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pltrace import _blueprint, _links
from pltrace._arguments import named
from pltrace._attempts import is_retry
from pltrace._checks import INPUTS, OUTPUTS
from pltrace._encoding import Encoder, json_of, quoted
from pltrace._messages import Said, message_of, note
from pltrace._provider_errors import error_type_of
from pltrace._rows import LINE, Row
from pltrace._snapshot import snapshot
from pltrace._span import Span
from pltrace._thawing import thawed
from pltrace._usage import INTERNAL_TAGS, RunKey, model_of, provider_of

__all__ = ["Answer", "Generation", "answer_of", "row_of"]

#: How the metadata keys start that they set for themselves.
_INTERNAL_METADATA = ("ls_", "langgraph_", "lc_", "checkpoint_", "__")
#: Invocation parameters that have a place of their own in a request, and stay here where that can't tell all of them.
_NOT_PARAMETERS = frozenset({"tools", "functions", "tool_choice", "function_call"})
#: Invocation parameters that are schemas: a property in one that is named like a secret is none.
_SCHEMAS = ("response_format", "text", "output_config")
_ELSEWHERE = _NOT_PARAMETERS.union(_SCHEMAS)
_OF_THE_RUN = frozenset({"_langchain_run_id", "_langchain_parent_run_id", "_langchain_tags"})
_TEXT = frozenset({str})
_NO_USAGE = _blueprint.Usage()
#: Token counts beside the usual two.
_DETAILS, _NO_DETAILS = _NO_USAGE._fields[2:], _NO_USAGE[2:]


class Answer(tuple[Any, ...]):
    """What an LLM answered, in one object: its `llm_output`, and for each generation six items.

    These are what its message said, as `_messages` notes it, its text if the message doesn't say it, and its info.
    """

    __slots__ = ()

    @property
    def llm_output(self) -> Mapping[str, Any] | None:
        """What the provider said beside it."""
        found: Mapping[str, Any] | None = self[0]
        return found

    def tokens(self) -> tuple[int, int]:
        """Return input and output tokens; nearly always one message says them, at a tenth of the cost of asking all."""
        if len(self) == 7:
            usage = self[4] and self[4].get("usage_metadata")
            if type(usage) is dict:
                given, answered = usage.get("input_tokens"), usage.get("output_tokens")
                if type(given) is int and type(answered) is int:
                    # LangChain marks an answer from its cache by a cost of nothing: its tokens were counted before.
                    return (0, 0) if usage.get("total_cost") == 0 else (given, answered)
        _, counted = self.counted()
        return counted.input_tokens or 0, counted.output_tokens or 0

    def counted(self) -> tuple[bool, _blueprint.Usage]:
        """Return whether LangChain's cache answered, which it marks by a cost of nothing, and the tokens if not."""
        if len(self) == 7:
            reported = self[4] and self[4].get("usage_metadata")
            if type(reported) is dict:
                if reported.get("total_cost") == 0:
                    return True, _NO_USAGE
                counts = _blueprint.counts_of(reported)
                if counts is not None:
                    return False, counts
        generations = self.named()
        if is_cached(generations):
            return True, _NO_USAGE
        return False, _blueprint.tokens(generations, self.llm_output)

    def says_something(self) -> bool:
        """Return whether there is any text, or a call of a tool, in it."""
        said = ("content", "tool_calls", "tool_call_chunks")
        return any(one.text or any(getattr(one.message, name, None) for name in said) for one in self.named())

    def named(self) -> list[Generation]:
        """Return the generations with their fields named."""
        return [_generation(*self[start : start + 6]) for start in range(1, len(self), 6)]


class Generation(NamedTuple):
    """One generation: its message (chat models) or its text (completion models)."""

    message: Any
    text: str
    generation_info: Mapping[str, Any] | None


_NO_ANSWER, _NO_MESSAGES = Answer((None,)), Said()
_NOTHING: Mapping[str, Any] = {}


def _generation(kind: Any, content: Any, message_id: Any, rest: Any, text: str | None, info: Any) -> Generation:
    message = message_of(kind, content, message_id, rest) if isinstance(kind, type) else thawed(kind)
    return Generation(message, content if text is None else text, info)


def answer_of(generations: Iterable[Any], llm_output: Mapping[str, Any] | None) -> Answer:
    """Return what is kept of an answer; its messages are noted now: a cache hit later puts another in their place."""
    items: list[Any] = [llm_output]
    for generation in generations:
        state = generation.__dict__
        message = state.get("message")
        try:
            note(message, items)
        except Exception:  # None, or something else, or it holds what has no truth.
            items += (snapshot(message), None, None, None)
        items += (None if type(items[-3]) is str else state["text"], state["generation_info"])
    return Answer(items)


def is_cached(generations: Sequence[Generation]) -> bool:
    """Return whether LangChain's cache answered, which says that it cost nothing: the tokens were counted before."""
    for generation in generations:
        usage = getattr(generation.message, "usage_metadata", None)
        if isinstance(usage, dict) and usage.get("total_cost") == 0:
            return True
    return False


def row_of(span: Span, encoder: Encoder, service: str) -> Row:
    """Return what is stored of `span`.

    Args:
        span: Ended, or open: what isn't there yet is None.
        encoder: Bounds and redacts the user's values.
        service: Names the application, whichever process delivers the span.

    Returns:
        The row, in which nothing of the user's objects is referred to.
    """
    inherited = span.inherited
    if span.run_tags and not _TEXT.issuperset(map(type, span.run_tags)):  # LangChain takes any.
        span.run_tags = [str(tag) for tag in span.run_tags]
    own = [] if span.error is None else ['"error":' + quoted(encoder.text(span.error))]
    lineage = '","'.join([around.id for around in span.lineage])
    usage = _NO_USAGE
    if span.kind == "llm":
        usage, repeated, lines = _call(span, own, encoder, service)
    else:
        repeated = _repeated(span, service, None, encoder)
        needed_in, needed_out = _needed_capture(span)
        given = span.raw_input if span.arguments is None else named(span.arguments)
        lines = [
            _value(given, span.input_is_set or _holds(inherited.capture, needed_in), encoder),
            _value(span.raw_output, span.output_is_set or _holds(inherited.capture, needed_out), encoder),
        ]
    # The clock may have been set back meanwhile; a call that ends before it begins would be refused.
    ended_at_ns = max(span.ended_at_ns, span.started_at_ns) if span.ended_at_ns else None
    body = LINE.join(
        (repeated.alike, "{" + ",".join(own) + "}", f'["{lineage}"]' if lineage else "[]", *lines)
    )  # fmt: skip
    return Row(
        span.id, span.trace_id, span.parent_id, str(encoder.label(span.name)), span.kind, span.status,
        span.started_at_ns, ended_at_ns, usage.input_tokens, usage.output_tokens, body,
    )  # fmt: skip


#: What is alike for many LLM calls, beside their tags and metadata: provider, model, attempt, whether the answer came
#: from a cache, the run's own tags, and its parameters; None where these are put down by themselves.
_OfCall = tuple[str, str, int, bool, Sequence[str], "Mapping[str, Any] | None"]


class _Repeated(NamedTuple):
    """What is alike for many spans, as JSON text; all but the first of LLM calls alone.

    Attributes:
        alike: The body's first object.
        request_metadata: What goes with the request, up to the ids of the run,
        langchain_tags: and after them.
        parameters: What the model was called with.
    """

    alike: str
    request_metadata: str = ""
    langchain_tags: str = ""
    parameters: str = ""


def _repeated(span: Span, service: str, call: _OfCall | None, encoder: Encoder) -> _Repeated:
    """Return what is alike for many spans: made once, and kept."""
    inherited = span.inherited
    given = (*span.said(), inherited.user, inherited.session, service, call)
    return encoder.made_of(given, _made)


def _made(
    encoder: Encoder, tags: tuple[str, ...], given: Mapping[str, Any], user: str | None, session: str | None,
    service: str, call: _OfCall | None,
) -> _Repeated:  # fmt: skip
    label, metadata = encoder.dumps_label, encoder.dumps(given)
    user_text, session_text = label(user, "user"), label(session, "session")
    alike = f'{{"user":{user_text},"session":{session_text},"service":{label(service)}'
    alike += f',"tags":{label(tags, "tags")},"metadata":{metadata}'
    if call is None:
        return _Repeated(alike + "}")
    provider, model, attempt, cached, run_tags, parameters = call
    request_tags = tuple(tag for tag in tags if not tag.startswith(INTERNAL_TAGS))
    own = _own_metadata(*map(json.loads, (metadata, user_text, session_text)))
    return _Repeated(
        f'{alike},"provider":{label(provider)},"model":{label(model)}'
        f',"attempt":{attempt},"cached":{"true" if cached else "false"}'
        f',"request_tags":{label(request_tags, "tags")}}}',
        own[:-1] if own == "{}" else own[:-1] + ",",
        quoted(str(json.loads(label(tuple(run_tags), "tags")))),
        "" if parameters is None else encoder.dumps(parameters),
    )


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
    if span.kind == "chain" and isinstance(around, Span) and around.run_key is not None:
        return INPUTS | OUTPUTS, INPUTS | OUTPUTS
    return INPUTS, OUTPUTS


def _holds(captured: int, needed: int) -> bool:
    return captured & needed == needed


def _value(raw: Any, captured: bool, encoder: Encoder) -> str:
    if raw is None or not captured:
        return "null"
    return encoder.dumps(raw)


def _call(span: Span, own: list[str], encoder: Encoder, service: str) -> tuple[_blueprint.Usage, _Repeated, list[str]]:
    """Return what an LLM call has: its token counts, what it shares with many, and its lines; `own` is added to."""
    captured = span.inherited.capture
    answer = _answered(span)
    cached, usage = (False, _NO_USAGE) if answer is None else answer.counted()
    metadata, parameters = span.run_metadata, span.invocation_params or _NOTHING
    plain = parameters.keys().isdisjoint(_ELSEWHERE)
    details = usage[2:]
    if details != _NO_DETAILS:
        own += [f'"{name}":{count}' for name, count in zip(_DETAILS, details, strict=True) if count is not None]
    if span.first_token_at_ns:
        own.append(f'"first_token_at_ns":{span.first_token_at_ns}')
    if span.status != "ok":
        # A stream that its task's end cut off is to who looks at requests what one is that its reader left.
        partial = span.status == "cancelled" and answer is not None and answer.says_something()
        status = "partial" if partial else span.status
        own.append('"error_type":' + json_of(error_type_of(status, span.error_types, span.error or "")))
    own += _prompt_link(span, encoder)
    model = model_of(span.serialized, metadata, parameters)
    of_call = (
        provider_of(metadata, parameters), model, _attempt(span), cached, span.run_tags, parameters if plain else None
    )  # fmt: skip
    repeated = _repeated(span, service, of_call, encoder)
    assert span.run_key is not None  # An LLM span is made by the handler alone.
    called, tooling = (
        (repeated.parameters, "{}") if plain else encoder.made_of((parameters, captured & INPUTS), _called)
    )
    lines = [
        _prompt(span, tooling, encoder),
        _answer(span.is_chat, answer if answer is not None and captured & OUTPUTS else _NO_ANSWER, encoder),
        called,
        f'{repeated.request_metadata}"_langchain_run_id":"{_id(span.run_key, encoder)}","_langchain_parent_run_id":'
        f'"{span.parent_run_key and _id(span.parent_run_key, encoder)}","_langchain_tags":{repeated.langchain_tags}}}',
    ]
    return usage, repeated, lines


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
    return answer_of([whole], None)


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


def _prompt(span: Span, tooling: str, encoder: Encoder) -> str:
    raw = span.raw_input if span.inherited.capture & INPUTS else _NO_MESSAGES
    if not span.is_chat:
        return encoder.dumps_shaped(_blueprint.completion_prompt(thawed(raw), encoder))
    text = _blueprint.plain_chat(raw[::4], raw[1::4], raw[3::4], encoder) if type(raw) is Said else None
    if text is None:
        text = encoder.dumps_shaped(_blueprint.chat_prompt(thawed(raw), encoder))
    return text if tooling == "{}" or not raw else _joined(text, tooling)


def _called(encoder: Encoder, parameters: Mapping[str, Any], captured: int) -> tuple[str, str]:
    """Return what a model was called with, as two objects: what the prompt doesn't say, and what belongs to it."""
    rest = {key: value for key, value in parameters.items() if key not in _NOT_PARAMETERS}
    schemas = {key: _schema_of(rest.pop(key)) for key in _SCHEMAS if key in rest}
    if not captured:
        return _joined(encoder.dumps(rest), _schemas(schemas, encoder)), "{}"
    schemas.update(_blueprint.untold_of(parameters))
    tooling = _blueprint.tooling_of(parameters, encoder)
    tools = {key: tooling.pop(key) for key in ("tools", "functions") if key in tooling}
    return (
        _joined(encoder.dumps(rest), _schemas(schemas, encoder)),
        _joined(encoder.dumps_shaped(tooling), _schemas(tools, encoder)),
    )


def _schemas(values: Mapping[Any, Any], encoder: Encoder) -> str:
    return "{" + ",".join([f"{quoted(key)}:{encoder.dumps_schema(value)}" for key, value in values.items()]) + "}"


def _joined(one: str, other: str) -> str:
    """Return the text of a JSON object with the members of another, which are others, at the end."""
    return one if other == "{}" else other if one == "{}" else f"{one[:-1]},{other[1:]}"


def _schema_of(value: Any) -> Any:
    """Return a structured output's schema as the provider gets it; LangChain keeps a pydantic class as it is."""
    make = getattr(value, "model_json_schema", None)
    if not isinstance(value, type) or make is None:
        return value
    return {"type": "json_schema", "json_schema": {"name": value.__name__, "schema": make()}}


def _answer(chat: bool, answer: Answer, encoder: Encoder) -> str:
    if not chat:
        return encoder.dumps_shaped(_blueprint.completion_answer(answer.named(), encoder))
    plain = _blueprint.plain_chat(answer[1::6], answer[2::6], answer[4::6], encoder, "assistant")
    return plain if plain is not None else encoder.dumps_shaped(_blueprint.chat_answer(answer.named(), encoder))


def _own_metadata(metadata: Mapping[str, Any], user: Any, session: Any) -> str:
    """Return the metadata that goes with a request: strings only, without LangChain's internal keys.

    The keys `_langchain_*` are those of LangChain's own former PromptLayer handler: saved searches use them.
    """
    own = {
        key: value if isinstance(value, str) else json_of(value)
        for key, value in metadata.items()
        if not key.startswith(_INTERNAL_METADATA)
    }
    for key, value in (("user_id", user), ("conversation_id", session)):
        if value is not None:
            own[key] = value if isinstance(value, str) else json_of(value)
    return json_of({key: value for key, value in own.items() if key not in _OF_THE_RUN})


def _id(key: RunKey, encoder: Encoder) -> str:
    """Return a run's id, as it stands between the quotes of JSON."""
    if isinstance(key, str):
        return quoted(encoder.text(key))[1:-1]
    digits = key.to_bytes(16, "big").hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _attempt(span: Span) -> int:
    """Return which attempt a call is: 1, and one more for each time that it, or what is around it, was tried before."""
    attempt = 1
    around: Any = span
    while isinstance(around, Span):
        tags = around.run_tags
        if around.tried_before or around.noted_attempt is not None or (tags and any(map(is_retry, tags))):
            attempt += around.attempt.number - 1
        around = around.parent
    return attempt
