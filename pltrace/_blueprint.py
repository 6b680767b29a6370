"""Turns LangChain messages, generations and tool definitions into PromptLayer's Prompt Blueprint."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

Block = dict[str, Any]


class JsonEncoder(Protocol):
    """What this module needs of `pltrace._encoding.Encoder`; neither method ever raises."""

    def dumps(self, value: object, /) -> str:
        """The value as strict JSON text, redacted and bounded."""

    def jsonable(self, value: object, /) -> object:
        """The value as plain JSON data, redacted and bounded."""


class Usage(NamedTuple):
    """Token counts of one LLM call; None is what nobody reported."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_input_tokens: int | None = None
    reasoning_tokens: int | None = None


class _MisfitError(Exception):
    """A value has no place in the schema; it becomes a text block holding its JSON."""


# --- public functions ---------------------------------------------------------------------------------------


def chat_prompt(
    messages: Sequence[object], encoder: JsonEncoder, *, parameters: Mapping[str, object] | None = None
) -> Block:
    """Make the ChatPrompt that describes what a chat model was given.

    Args:
        messages: LangChain messages, or what LangChain accepts for one: strings, pairs, dicts.
        encoder: Makes JSON of what the blueprint has no shape for.
        parameters: LangChain's `invocation_params`; tools and their choice are read from there.

    Returns:
        A dict valid as `ChatPrompt`; tools it has no shape for are left out, as they stay in the parameters.
    """
    converted: list[Block] = []
    for message in _items(messages):
        converted += _messages(message, encoder)
    prompt: Block = {"type": "chat", "messages": converted}
    if parameters:
        prompt.update(_tooling(parameters, encoder))
    return prompt


def completion_prompt(prompts: Sequence[str], encoder: JsonEncoder) -> Block:
    """Make the CompletionPrompt that describes what a text model was given.

    Args:
        prompts: The prompts of the call.
        encoder: Makes JSON of a prompt that is no string.

    Returns:
        A dict valid as `CompletionPrompt`, one text block per prompt.
    """
    return {"type": "completion", "content": [_text_block(p, encoder) for p in _items(prompts)]}


def chat_answer(generations: Sequence[object], encoder: JsonEncoder) -> Block:
    """Make the ChatPrompt that describes what a chat model answered.

    Args:
        generations: The generations of one prompt; several are several candidates.
        encoder: Makes JSON of what the blueprint has no shape for.

    Returns:
        A dict valid as `ChatPrompt`, one assistant message per generation.
    """
    converted: list[Block] = []
    for generation in _items(generations):
        message = _get(generation, "message")
        if message is None:
            message = ("assistant", _generated_text(generation, encoder))
        converted += _messages(message, encoder, "assistant")
    return {"type": "chat", "messages": converted}


def completion_answer(generations: Sequence[object], encoder: JsonEncoder) -> Block:
    """Make the CompletionPrompt that describes what a text model answered.

    Args:
        generations: The generations of one prompt.
        encoder: Makes JSON of a generation that has no text.

    Returns:
        A dict valid as `CompletionPrompt`, one text block per generation.
    """
    texts = [_generated_text(generation, encoder) for generation in _items(generations)]
    return {"type": "completion", "content": [{"type": "text", "text": text} for text in texts]}


def text_answer(text: str) -> Block:
    """Make the ChatPrompt of an answer that was cut off.

    Args:
        text: What had arrived so far.

    Returns:
        A dict valid as `ChatPrompt`, its content empty if nothing had arrived.
    """
    content = [{"type": "text", "text": text}] if text else []
    return {"type": "chat", "messages": [{"role": "assistant", "content": content}]}


def tokens(generations: Sequence[object], llm_output: object) -> Usage:
    """Find the token counts of one LLM call.

    Args:
        generations: The generations of the call; providers repeat the call's total on each candidate.
        llm_output: `LLMResult.llm_output`, asked when no message knows.

    Returns:
        The counts, None for each that nobody reported.
    """
    for generation in _items(generations):
        usage = _usage(_get(_get(generation, "message"), "usage_metadata"))
        if usage is not None:
            return usage
    for key in ("token_usage", "usage"):
        usage = _usage(_get(llm_output, key))
        if usage is not None:
            return usage
    return Usage()


# --- reading values of unknown kind -------------------------------------------------------------------------


_WHOLE = (str, bytes, bytearray)


def _items(values: object) -> list[Any]:
    """The members of a sequence; anything that is none counts as its own only member."""
    if values is None:
        return []
    # Not every iterable: a message is one too, of its fields.
    if isinstance(values, (list, tuple)) or (isinstance(values, Sequence) and not isinstance(values, _WHOLE)):
        try:
            return list(values)
        except Exception:
            return [values]
    return [values]


def _get(holder: object, key: str) -> Any:
    """The member of a dict or attribute of an object, None if there is none or it can't be read."""
    try:
        return holder.get(key) if isinstance(holder, dict) else getattr(holder, key, None)
    except Exception:
        return None


def _first(holder: Block, *keys: str) -> Any:
    """The first value that is not None."""
    for key in keys:
        value = holder.get(key)
        if value is not None:
            return value
    return None


def _dict(value: object) -> Block:
    return value if isinstance(value, dict) else {}


def _str(value: object, _encoder: object = None) -> str:
    if isinstance(value, str):
        # Of a subclass (an enum, a markup string) only the characters count.
        return value if type(value) is str else str.__str__(value)
    raise _MisfitError


def _maybe_str(value: object) -> str | None:
    return _str(value) if isinstance(value, str) and value else None


def _bool(value: object, _encoder: object = None) -> bool:
    if isinstance(value, bool):
        return value
    raise _MisfitError


def _int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise _MisfitError


def _index(value: object) -> int:
    return 0 if value is None else _int(value)


def _text(value: object, encoder: JsonEncoder) -> str:
    return _str(value) if isinstance(value, str) else encoder.dumps(value)


def _object(value: object, encoder: JsonEncoder) -> Block:
    plain = encoder.jsonable(value)
    if isinstance(plain, dict):
        return plain
    raise _MisfitError


def _objects(value: object, encoder: JsonEncoder) -> list[Block]:
    if isinstance(value, (list, tuple)):
        return [_object(item, encoder) for item in value]
    raise _MisfitError


def _text_or_object(value: object, encoder: JsonEncoder) -> str | Block:
    return _object(value, encoder) if isinstance(value, dict) else _text(value, encoder)


def _json_block(value: object, encoder: JsonEncoder) -> Block:
    return {"type": "text", "text": encoder.dumps(value)}


def _text_block(value: object, encoder: JsonEncoder) -> Block:
    return {"type": "text", "text": _text(value, encoder)}


def _generated_text(generation: object, encoder: JsonEncoder) -> str:
    text = _get(generation, "text")
    return _str(text) if isinstance(text, str) else _text(generation, encoder)


# --- messages -----------------------------------------------------------------------------------------------

_ROLES = {
    "human": "user",
    "user": "user",
    "HumanMessageChunk": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "AIMessageChunk": "assistant",
    "system": "system",
    "SystemMessageChunk": "system",
    "developer": "developer",
    "tool": "tool",
    "ToolMessageChunk": "tool",
    "function": "function",
    "FunctionMessageChunk": "function",
}
_MESSAGE_KEYS = {"content", "tool_calls", "function_call"}
_ERROR_NOTE: Block = {"type": "text", "text": "status: error"}


def _messages(message: object, encoder: JsonEncoder, forced_role: str | None = None) -> list[Block]:
    """The blueprint messages for one of LangChain's, mostly one."""
    try:
        return _converted(message, encoder, forced_role)
    except Exception:
        return [{"role": forced_role or "user", "content": [_json_block(message, encoder)]}]


def _converted(message: Any, encoder: JsonEncoder, forced_role: str | None) -> list[Block]:
    kind: Any = getattr(message, "type", None)
    if kind is None:
        message = _as_chat_message(message)
    role, label = forced_role or _ROLES.get(kind), None
    if role is None:
        role, label = _free_role(message)
    extras = _dict(getattr(message, "additional_kwargs", None))
    if role == "system" and extras.get("__openai_role__") == "developer":
        role = "developer"
    content = message.content
    results: list[Block] = []
    if role == "assistant":
        made = _answer(message, content, extras, encoder)
    elif type(content) is str:
        made = {"role": role, "content": [{"type": "text", "text": content}] if content else []}
    else:
        draft = _Draft(role, encoder)
        draft.add_all(content)
        made = {"role": role, "content": draft.blocks}
        results = draft.results
    _add_names(made, message, label)
    # A user message that only carried tool results is those tool messages, and nothing more.
    return [*results, made] if made["content"] or not results else results


def _as_chat_message(message: Any) -> SimpleNamespace:
    """A view of a string, a (role, content) pair or a dict with the attributes of a ChatMessage."""
    if isinstance(message, str):
        message = {"role": "user", "content": message}
    elif isinstance(message, (tuple, list)) and len(message) == 2:
        message = {"role": _str(message[0]), "content": message[1]}
    elif not isinstance(message, dict) or not message.keys() & _MESSAGE_KEYS:
        raise _MisfitError
    message = {**message, **_dict(message.get("additional_kwargs"))}
    return SimpleNamespace(
        role=_first(message, "role", "type"),
        content=message.get("content"),
        additional_kwargs=message,
        name=message.get("name"),
        tool_call_id=message.get("tool_call_id"),
        status=message.get("status"),
        invalid_tool_calls=message.get("invalid_tool_calls"),
    )


def _free_role(message: Any) -> tuple[str, str | None]:
    """The role a ChatMessage says it has; one the blueprint doesn't know is a user named so."""
    said = _str(message.role)
    role = _ROLES.get(said)
    return (role, None) if role else ("user", said)


def _add_names(made: Block, message: object, label: str | None) -> None:
    """Add whom a message is from or about, and that a tool failed."""
    name = _maybe_str(getattr(message, "name", None))
    if label:
        name = f"{label} ({name})" if name else label
    role = made["role"]
    if name or role == "function":
        made["name"] = name or ""
    if role == "tool":
        call_id = getattr(message, "tool_call_id", None)
        made["tool_call_id"] = "" if call_id is None else _str(call_id)
        if getattr(message, "status", None) == "error":
            made["content"].append(dict(_ERROR_NOTE))


def _answer(message: object, content: object, extras: Block, encoder: JsonEncoder) -> Block:
    """An assistant message, with what providers put beside the content."""
    calls = getattr(message, "tool_calls", None)
    invalid = getattr(message, "invalid_tool_calls", None)
    if type(content) is str and not (calls or invalid or extras):
        return {"role": "assistant", "content": [{"type": "text", "text": content}] if content else []}
    draft = _Draft("assistant", encoder)
    for call in [*_items(calls), *_items(invalid)] or _items(extras.get("tool_calls")):
        draft.add_call(call)
    draft.told = draft.calls[:]
    draft.add_all(content)
    # What only the extras know is put where it happened: reasoning and server tools first, refusals last.
    told, draft.blocks = draft.blocks, []
    for key in ("reasoning_content", "reasoning"):
        draft.blocks += _new(_reasoning_of(extras.get(key), key, encoder), told + draft.blocks, "thinking")
    for output in _items(extras.get("tool_outputs")):
        draft.add(output)
    draft.blocks += told
    for key in ("refusal", "audio"):
        if extras.get(key) and not any(block.get("text") == extras[key] for block in told):
            draft.add({"type": key, key: extras[key]})
    made: Block = {"role": "assistant", "content": draft.blocks}
    if draft.calls:
        made["tool_calls"] = draft.calls
    function_call = extras.get("function_call")
    if isinstance(function_call, dict):
        function = _call(function_call, 0, encoder)["function"]
        # Google's classes repeat a tool call here; told once is enough.
        if function["name"] not in {call["function"]["name"] for call in draft.calls}:
            made["function_call"] = function
    return made


def _new(blocks: list[Block], told: list[Block], key: str) -> list[Block]:
    """Those blocks whose text no other block tells already."""
    known = {block.get(key) for block in told}
    return [block for block in blocks if block[key] not in known]


def _reasoning_of(value: object, key: str, encoder: JsonEncoder) -> list[Block]:
    """The thinking blocks for reasoning that stands beside the content, as a string or as a block."""
    if not value:
        return []
    try:
        whole = key == "reasoning" and isinstance(value, dict)
        return _thinking(_dict(value) if whole else {key: value}, encoder)
    except Exception:
        return [{"type": "thinking", "thinking": encoder.dumps(value)}]


class _Draft:
    """The content of one message while it is being put together.

    Args:
        role: The blueprint role; only an assistant makes tool calls and media.
        encoder: Makes JSON of what has no shape.
    """

    __slots__ = ("blocks", "calls", "encoder", "results", "role", "told")

    def __init__(self, role: str, encoder: JsonEncoder) -> None:
        self.role = role
        self.encoder = encoder
        self.blocks: list[Block] = []
        self.calls: list[Block] = []
        self.told: list[Block] = []
        self.results: list[Block] = []

    def add_all(self, content: object) -> None:
        """Add a message's content: a string, blocks, or nothing."""
        for block in _items(content):
            self.add(block)

    def add(self, block: object) -> None:
        """Add one block; what can't be understood is added as its JSON."""
        try:
            made = self._convert(block)
        except Exception:
            made = [_json_block(block, self.encoder)]
        self.blocks += made

    def add_call(self, raw: object) -> None:
        """Add a tool call of any provider's shape."""
        try:
            self.calls.append(_call(raw, len(self.calls), self.encoder))
        except Exception:
            self.blocks.append(_json_block(raw, self.encoder))

    def _convert(self, block: Any) -> list[Block]:
        if isinstance(block, str):
            return [{"type": "text", "text": _str(block)}] if block else []
        kind = block.get("type")
        if kind == "non_standard":
            block = block["value"]
            kind = block.get("type")
        if block.keys() == {"text"}:
            kind = "text"
        if kind == "tool_result" and self.role == "user":
            self.results.append(self._tool_result(block))
            return []
        if self.role != "assistant":
            return _HANDLERS[kind](block, self.encoder)
        if kind in _CALL_KINDS:
            self._add_call_once(block)
            return []
        return [_produced(made) for made in _HANDLERS[kind](block, self.encoder)]

    def _add_call_once(self, block: Block) -> None:
        """Add a call told in the content, unless the message's tool calls tell it too."""
        call = _call(block, len(self.calls), self.encoder)
        key = "id" if _call_id(block) else "function"
        if all(call[key] != known[key] for known in self.told):
            self.calls.append(call)

    def _tool_result(self, block: Block) -> Block:
        """The tool message for a result that Anthropic's format puts into a user message."""
        inner = _Draft("tool", self.encoder)
        inner.add_all(block.get("content"))
        if block.get("is_error") is True:
            inner.blocks.append(dict(_ERROR_NOTE))
        return {"role": "tool", "tool_call_id": _str(block["tool_use_id"]), "content": inner.blocks}


# --- tool calls ---------------------------------------------------------------------------------------------

_CALL_KINDS = {
    "tool_use",
    "tool_call",
    "tool_call_chunk",
    "invalid_tool_call",
    "function_call",
    "custom_tool_call",
}


def _call_id(raw: Block) -> str | None:
    # OpenAI's Responses API has both; `call_id` is the one that results refer to.
    return _maybe_str(raw.get("call_id")) or _maybe_str(raw.get("id"))


def _call(raw: object, index: int, encoder: JsonEncoder) -> Block:
    """A tool call from LangChain's, OpenAI's, Anthropic's or Google's shape."""
    if not isinstance(raw, dict):
        raise _MisfitError
    function = raw.get("function")
    if not isinstance(function, dict):
        function = raw
    arguments = _first(function, "args", "arguments", "input")
    if not arguments and function.get("partial_json"):
        arguments = function["partial_json"]
    return {
        "id": _call_id(raw) or f"call_{index}",
        "type": "function",
        "function": {
            "name": _maybe_str(function.get("name")) or "",
            "arguments": "" if arguments is None else _text(arguments, encoder),
        },
    }


# --- content blocks -----------------------------------------------------------------------------------------

Handler = Callable[[Block, JsonEncoder], list[Block]]
Check = Callable[[Any, JsonEncoder], object]


def _fields(kind: str, strings: str, required: str = "", /, **checks: Check) -> Handler:
    """A handler for blocks whose members only need checking; those in `strings` are strings."""
    needed = set(required.split())
    plan = {**dict.fromkeys(strings.split(), _str), **checks}

    def handle(block: Block, encoder: JsonEncoder) -> list[Block]:
        made: Block = {"type": kind}
        for name, check in plan.items():
            value = block.get(name)
            if value is not None:
                made[name] = check(value, encoder)
            elif name in needed:
                raise _MisfitError
        return [made]

    return handle


def _written(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Text with its annotations; of those the blueprint has no shape for, the JSON follows."""
    annotations = [*_items(block.get("annotations")), *_items(block.get("citations"))]
    made: Block = {"type": "text", "text": _str(block.get("text", "" if annotations else None))}
    _add_known(made, id=block.get("id"), thought_signature=_signature(block, "thought_signature"))
    shaped = [(annotation, _annotation(annotation)) for annotation in annotations]
    fitting = [shape for _, shape in shaped if shape]
    rest = [_json_block(annotation, encoder) for annotation, shape in shaped if not shape]
    if fitting:
        made["annotations"] = fitting
    # An empty text is how providers mark the place of a tool call.
    return [made, *rest] if made["text"] or fitting else rest


def _refused(block: Block, _encoder: JsonEncoder) -> list[Block]:
    return [{"type": "text", "text": _str(block["refusal"])}]


def _signature(block: Block, *keys: str) -> object:
    return _first(block, *keys) or _dict(block.get("extras")).get("signature")


def _add_known(made: Block, **values: object) -> None:
    """Add optional strings; one of another type says nothing anyone could read."""
    for key, value in values.items():
        text = _maybe_str(value)
        if text is not None:
            made[key] = text


def _thinking(block: Block, _encoder: JsonEncoder) -> list[Block]:
    """Reasoning in anyone's words: a string, a nested block, or a list of summaries and contents."""
    inner = block.get("reasoning_content")
    if isinstance(inner, dict):
        block = {**inner, "thinking": _first(inner, "text", "thinking", "reasoning")}
    parts = [_first(block, "thinking", "reasoning", "reasoning_content")]
    parts += [_str(part["text"]) for key in ("summary", "content") for part in _items(block.get(key))]
    texts = [_str(part) for part in parts if part is not None]
    if not texts and not block.keys() & {"summary", "signature", "encrypted_content", "id", "data"}:
        raise _MisfitError
    made: Block = {"type": "thinking", "thinking": "\n\n".join(text for text in texts if text)}
    signature = _signature(block, "signature", "encrypted_content", "data")
    _add_known(made, id=block.get("id"), signature=signature)
    return [made]


# --- images, audio, video, files ----------------------------------------------------------------------------

_HOLDERS = ("source", "file", "input_audio", "image_url", "audio", "video")


class _Source(NamedTuple):
    """Where the bytes of a medium are."""

    url: str
    mime: str | None
    form: str


def _holder(block: Block) -> Block:
    """The dict that says where the bytes are; each provider nests it under a name of its own."""
    for key in _HOLDERS:
        value = block.get(key)
        if isinstance(value, dict):
            return value
    return block


def _source(block: Block, default_mime: str) -> _Source:
    holder = _holder(block)
    mime = _first(holder, "mime_type", "media_type") or _first(block, "mime_type", "media_type")
    if mime is None and isinstance(holder.get("format"), str):
        mime = f"{default_mime.split('/')[0]}/{holder['format']}"
    mime = None if mime is None else _str(mime)
    data = _first(holder, "base64", "data", "file_data")
    if isinstance(data, (bytes, bytearray)):
        data = b64encode(data).decode()
    if data is not None:
        url = _str(data)
        if not url.startswith("data:"):
            mime = mime or default_mime
            url = f"data:{mime};base64,{url}"
    else:
        url = _first(holder, "url", "file_url", "file_uri", "image_url")
        if url is None:
            return _Source(_str(_first(holder, "file_id", "id")), mime, "neither")
        url = _str(url)
    if url.startswith("data:"):
        return _Source(url, mime or re.split("[;,]", url[5:256], maxsplit=1)[0] or default_mime, "base64")
    return _Source(url, mime, "url")


def _image(block: Block, _encoder: JsonEncoder) -> list[Block]:
    source = _source(block, "image/png")
    if source.form == "neither":
        return [_media_block(source, block, "image")]
    image: Block = {"url": source.url}
    _add_known(image, detail=_holder(block).get("detail"))
    return [{"type": "image_url", "image_url": image}]


def _media(title: str, default_mime: str, block: Block, _encoder: JsonEncoder) -> list[Block]:
    made = [_media_block(_source(block, default_mime), block, title)]
    transcript = _holder(block).get("transcript")
    if transcript is not None:
        made.append({"type": "text", "text": _str(transcript)})
    return made


def _media_block(source: _Source, block: Block, title: str) -> Block:
    for place in (_holder(block), block, _dict(block.get("extras")), _dict(block.get("metadata"))):
        title = _maybe_str(_first(place, "filename", "title")) or title
    return {
        "type": "media",
        "media": {"title": title, "type": source.mime, "url": source.url, "format": source.form},
    }


def _spoken(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Audio, which Google's classes give as bare bytes."""
    data = block.get("audio")
    return _media("audio", "audio/wav", {"data": data} if isinstance(data, bytes) else block, encoder)


def _document(block: Block, encoder: JsonEncoder) -> list[Block]:
    """A file or document: text where it is text, else media."""
    source = _holder(block)
    if "text" in (source.get("type"), block.get("source_type")):
        body = _first(source, "data", "text")
    elif source.get("type") == "content":
        parts = source.get("content")
        body = "\n".join(part if isinstance(part, str) else _str(part["text"]) for part in _items(parts))
    else:
        body = block.get("text")
    made = [] if body is not None else _media("file", "application/octet-stream", block, encoder)
    heading = (block.get("title") if body is not None else None, block.get("context"), body)
    texts = [_str(text) for text in heading if text is not None]
    return [{"type": "text", "text": text} for text in texts if text] + made


def _produced(block: Block) -> Block:
    """The same block as a model's product: media an assistant sends are its own work."""
    if block["type"] == "image_url":
        source = _source(block, "image/png")
    elif block["type"] == "media" and block["media"]["format"] != "neither" and block["media"]["type"]:
        source = _Source(block["media"]["url"], block["media"]["type"], "")
    else:
        return block
    mime = source.mime or "image/png"
    family = mime.split("/", 1)[0]
    if family not in {"image", "audio", "video"}:
        return block
    return {"type": "output_media", "url": source.url, "mime_type": mime, "media_type": family}


# --- tools that run at the provider -------------------------------------------------------------------------

_OUTCOMES = {1: "OUTCOME_OK", 2: "OUTCOME_FAILED", 3: "OUTCOME_DEADLINE_EXCEEDED"}
_BOOKKEEPING = {"type", "id", "index", "status"}


def _ran(output: str, ok: bool) -> Block:
    outcome = _OUTCOMES[1 if ok else 2]
    return {"type": "code_execution_result", "output": output, "outcome": outcome}


def _server_call(name: str, block: Block, encoder: JsonEncoder) -> list[Block]:
    """A call of OpenAI's own tools, whose input is whatever else the block holds."""
    given = {key: value for key, value in block.items() if key not in _BOOKKEEPING}
    if given.keys() == {"action"} and isinstance(given["action"], dict):
        given = given["action"]
    return [{"type": "server_tool_use", "id": _str(block["id"]), "name": name, "input": _object(given, encoder)}]


def _server_use(block: Block, encoder: JsonEncoder) -> list[Block]:
    """A call in Anthropic's or LangChain's shape; the input may still be a piece of JSON text."""
    given = _first(block, "input", "args")
    if not given and block.get("partial_json"):
        given = block["partial_json"]
    if isinstance(given, str):
        given = {"arguments": given} if given else {}
    return [
        {
            "type": "server_tool_use",
            "id": _str(block["id"]),
            "name": _str(block["name"]),
            "input": _object(given or {}, encoder),
        }
    ]


def _server_result(block: Block, encoder: JsonEncoder) -> list[Block]:
    """LangChain's standard result: the provider's own block again, if it says which that was."""
    output, failed = block["output"], block.get("status") == "error"
    kind = _dict(block.get("extras")).get("block_type")
    if isinstance(kind, str) and kind.endswith("_tool_result"):
        given = {"tool_use_id": block["tool_call_id"], "content": output, "is_error": failed}
        return _HANDLERS[kind](given, encoder)
    return [_ran(_str(output), not failed)]


def _web_results(block: Block, _encoder: JsonEncoder) -> list[Block]:
    results = block.get("content")
    if not isinstance(results, list):
        raise _MisfitError
    found = []
    for result in results:
        made: Block = {"type": "web_search_result"}
        for key in ("url", "title", "encrypted_content", "page_age"):
            if result.get(key) is not None:
                made[key] = _str(result[key])
        found.append(made)
    return [{"type": "web_search_tool_result", "tool_use_id": _str(block["tool_use_id"]), "content": found}]


def _anthropic_ran(block: Block, encoder: JsonEncoder) -> list[Block]:
    content = block["content"]
    if not isinstance(content, dict) or "stdout" not in content or content.get("content"):
        return [_ran(_text(content, encoder), "error_code" not in _dict(content))]
    output = _str(content["stdout"]) + _str(content.get("stderr") or "")
    return [_ran(output, content.get("return_code") == 0)]


def _google_ran(block: Block, _encoder: JsonEncoder) -> list[Block]:
    output = _str(_first(block, "code_execution_result", "output"))
    outcome = block.get("outcome", 1)
    return [
        {
            "type": "code_execution_result",
            "output": output,
            "outcome": _str(outcome) if isinstance(outcome, str) else _OUTCOMES[outcome],
        }
    ]


def _google_code(block: Block, _encoder: JsonEncoder) -> list[Block]:
    code = block["executable_code"]
    made: Block = {"type": "code", "code": _str(code["code"] if isinstance(code, dict) else code)}
    _add_known(made, id=block.get("id"))
    return [made]


def _interpreted(block: Block, encoder: JsonEncoder) -> list[Block]:
    """OpenAI's code interpreter: the code, then what it printed and drew."""
    code: Block = {"type": "code", "code": _str(block["code"])}
    _add_known(code, id=block.get("id"), container_id=block.get("container_id"))
    made = [code]
    for output in _items(block.get("outputs")):
        if output.get("type") == "image":
            made += _image(output, encoder)
        else:
            made.append(_ran(_str(output["logs"]), block.get("status") != "failed"))
    return made


def _drawn(block: Block, encoder: JsonEncoder) -> list[Block]:
    """OpenAI's image generation."""
    mime = f"image/{_maybe_str(block.get('output_format')) or 'png'}"
    about = {key: value for key, value in block.items() if key not in {*_BOOKKEEPING, "result"}}
    made: Block = {
        "type": "output_media",
        "url": f"data:{mime};base64,{_str(block['result'])}",
        "mime_type": mime,
        "media_type": "image",
    }
    _add_known(made, id=block.get("id"))
    if about:
        made["provider_metadata"] = _object(about, encoder)
    return [made]


def _mcp_result(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Anthropic's answer of an MCP server, told as the outcome of the call with that id."""
    content = block.get("content")
    try:
        output = "\n".join(part if isinstance(part, str) else _str(part["text"]) for part in _items(content))
    except Exception:
        output = encoder.dumps(content)
    key = "error" if block.get("is_error") is True else "output"
    return [{"type": "mcp_call", "id": _str(block["tool_use_id"]), key: output}]


_mcp_call = _fields(
    "mcp_call",
    "id name server_label approval_request_id",
    arguments=_text,
    output=_text,
    error=_text_or_object,
)


def _mcp_use(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Anthropic's call of an MCP server."""
    given = {"id": block["id"], "name": block["name"], "server_label": block.get("server_name")}
    return _mcp_call({**given, "arguments": _first(block, "input", "partial_json")}, encoder)


_HANDLERS: dict[str, Handler] = {
    "text": _written,
    "input_text": _written,
    "output_text": _written,
    "refusal": _refused,
    "thinking": _thinking,
    "redacted_thinking": _thinking,
    "reasoning": _thinking,
    "reasoning_content": _thinking,
    "image": _image,
    "image_url": _image,
    "input_image": _image,
    "audio": _spoken,
    "input_audio": _spoken,
    "video": partial(_media, "video", "video/mp4"),
    "media": partial(_media, "media", "application/octet-stream"),
    "file_data": partial(_media, "file", "application/octet-stream"),
    "file": _document,
    "input_file": _document,
    "text-plain": _document,
    "document": _document,
    "server_tool_use": _server_use,
    "server_tool_call": _server_use,
    "server_tool_call_chunk": _server_use,
    "server_tool_result": _server_result,
    "web_search_call": partial(_server_call, "web_search"),
    "file_search_call": partial(_server_call, "file_search"),
    "tool_search_call": partial(_server_call, "tool_search"),
    "web_search_tool_result": _web_results,
    "code_execution_tool_result": _anthropic_ran,
    "code_execution_result": _google_ran,
    "executable_code": _google_code,
    "code_interpreter_call": _interpreted,
    "image_generation_call": _drawn,
    "mcp_tool_result": _mcp_result,
    "mcp_tool_use": _mcp_use,
    "mcp_call": _mcp_call,
    "mcp_list_tools": _fields("mcp_list_tools", "id server_label", tools=_objects, error=_text_or_object),
    "mcp_approval_request": _fields("mcp_approval_request", "id name server_label", arguments=_text),
    "mcp_approval_response": _fields(
        "mcp_approval_response", "approval_request_id", "approval_request_id approve", approve=_bool
    ),
    "shell_call": _fields("shell_call", "id call_id status", action=_object),
    "local_shell_call": _fields("shell_call", "id call_id status", action=_object),
    "shell_call_output": _fields("shell_call_output", "id call_id status", output=_objects),
    "apply_patch_call": _fields("apply_patch_call", "id call_id status", operation=_object),
    "apply_patch_call_output": _fields("apply_patch_call_output", "id call_id status", output=_text),
    **{
        kind: _fields(kind, "tool_use_id", "tool_use_id", content=_object)
        for kind in ("bash_code_execution_tool_result", "text_editor_code_execution_tool_result")
    },
}

# --- annotations --------------------------------------------------------------------------------------------


def _annotation(raw: Any) -> Block | None:
    """The blueprint's annotation, None if it has no shape for this one."""
    try:
        if raw["type"] == "non_standard_annotation":
            raw = raw["value"]
        return _ANNOTATIONS[raw["type"]](raw)
    except Exception:
        return None


def _web_citation(raw: Block) -> Block:
    nested = raw.get("url_citation")
    if isinstance(nested, dict):
        raw = nested
    made: Block = {
        "type": "url_citation",
        "title": _str(raw.get("title") or ""),
        "url": _str(_first(raw, "url", "source")),
        # Anthropic cites text, not places; PromptLayer's own client writes 0 there.
        "start_index": _index(raw.get("start_index")),
        "end_index": _index(raw.get("end_index")),
    }
    _add_known(made, cited_text=raw.get("cited_text"), encrypted_index=raw.get("encrypted_index"))
    return made


def _file_citation(raw: Block) -> Block:
    made: Block = {
        "type": "file_citation",
        "index": _index(_first(raw, "index", "document_index")),
        "file_id": _str(raw.get("file_id") or ""),
        "filename": _str(_first(raw, "filename", "document_title", "title") or ""),
    }
    # Not in the schema, which allows more members: the quotation is text, and text is not lost.
    _add_known(made, cited_text=raw.get("cited_text"))
    return made


def _container_citation(raw: Block) -> Block:
    made: Block = {
        "type": "container_file_citation",
        "container_id": _str(raw["container_id"]),
        "start_index": _index(raw.get("start_index")),
        "end_index": _index(raw.get("end_index")),
    }
    _add_known(made, filename=raw.get("filename"), file_id=raw.get("file_id"))
    return made


def _map_citation(raw: Block) -> Block:
    made = {**_web_citation(raw), "type": "map_citation"}
    made.pop("encrypted_index", None)
    _add_known(made, place_id=raw.get("place_id"))
    return made


def _standard_citation(raw: Block) -> Block:
    """LangChain's citation, which keeps what is particular to a provider in `extras`."""
    raw = {**_dict(raw.get("extras")), **raw}
    return _web_citation(raw) if raw.get("url") is not None else _file_citation(raw)


_ANNOTATIONS: dict[str, Callable[[Block], Block]] = {
    "url_citation": _web_citation,
    "web_search_result_location": _web_citation,
    "search_result_location": _web_citation,
    "file_citation": _file_citation,
    "char_location": _file_citation,
    "page_location": _file_citation,
    "content_block_location": _file_citation,
    "container_file_citation": _container_citation,
    "map_citation": _map_citation,
    "citation": _standard_citation,
}

# --- tool definitions ---------------------------------------------------------------------------------------

_BUILT_IN = {
    "web_search": "web_search",
    "web_search_preview": "web_search",
    "google_search": "web_search",
    "google_search_retrieval": "web_search",
    "file_search": "file_search",
    "code_interpreter": "code_interpreter",
    "code_execution": "code_interpreter",
    "image_generation": "image_generation",
    "google_maps": "google_maps",
    "url_context": "url_context",
    "mcp": "mcp",
    "bash": "bash",
    "shell": "shell",
    "local_shell": "shell",
    "apply_patch": "apply_patch",
    "text_editor": "text_editor",
}
_DATED = re.compile(r"_(\d{8}|\d{4}_\d{2}_\d{2})$")
_NO_ARGUMENT_MODES = {"auto", "any", "none", "required"}


def _tooling(parameters: Mapping[str, object], encoder: JsonEncoder) -> Block:
    """What the invocation parameters say of tools; what has no shape is left out."""
    made: Block = {}
    for key, make in _TOOLING.items():
        try:
            value = parameters.get(key)
            shaped = None if value is None else make(value, encoder)
        except Exception:
            continue
        if shaped:
            made[key] = shaped
    return made


def _fitting(make: Handler, values: object, encoder: JsonEncoder) -> list[Block]:
    return [made for value in _items(values) for made in _made_or_none(make, value, encoder)]


def _made_or_none(make: Handler, value: Any, encoder: JsonEncoder) -> list[Block]:
    try:
        return make(value, encoder)
    except Exception:
        return []


def _function(raw: Block, encoder: JsonEncoder) -> list[Block]:
    """A function's name and signature, under whichever name its provider gives the schema."""
    made: Block = {"name": _str(raw["name"])}
    _add_known(made, description=raw.get("description"))
    if isinstance(raw.get("strict"), bool):
        made["strict"] = raw["strict"]
    schema = _first(raw, "parameters", "input_schema", "parameters_json_schema", "inputSchema")
    if isinstance(schema, dict):
        made["parameters"] = _object(schema.get("json", schema), encoder)
    return [made]


def _tool(raw: Block, encoder: JsonEncoder) -> list[Block]:
    """The blueprint tools for one of the model's; Google's classes put many functions into one."""
    nested = _first(raw, "function", "toolSpec")
    if isinstance(nested, dict):
        return _function_tools([nested], encoder)
    kind = raw.get("type")
    if kind not in (None, "function", "custom"):
        return [_built_in(_str(kind), "", raw, encoder)]
    if "name" in raw:
        return _function_tools([raw], encoder)
    declared = _function_tools(_first(raw, "function_declarations", "functionDeclarations"), encoder)
    return declared + [_built_in(key, "google", {key: raw[key]}, encoder) for key in raw if key in _BUILT_IN]


def _function_tools(declared: object, encoder: JsonEncoder) -> list[Block]:
    functions = _fitting(_function, declared, encoder)
    return [{"type": "function", "function": function} for function in functions]


def _built_in(kind: str, provider: str, raw: Block, encoder: JsonEncoder) -> Block:
    """A tool the provider runs; Anthropic dates its types without dashes, OpenAI with."""
    dated = _DATED.search(kind)
    if not provider:
        provider = "anthropic" if dated and "_" not in dated[1] else "openai"
    return {
        "id": kind,
        "name": _maybe_str(raw.get("name")) or kind,
        "description": _maybe_str(raw.get("description")) or "",
        "provider": provider,
        "type": _BUILT_IN[_DATED.sub("", kind)],
        "config": _object(raw, encoder),
    }


def _tool_choice(raw: object, _encoder: JsonEncoder) -> str | Block:
    if isinstance(raw, str):
        return _str(raw)
    choice = _dict(raw)
    name = _first(choice, "name") or _dict(choice.get("function")).get("name")
    if isinstance(name, str):
        return {"type": "function", "function": {"name": _str(name)}}
    kind = _str(choice["type"])
    if kind in _NO_ARGUMENT_MODES or kind in _BUILT_IN:
        return kind
    raise _MisfitError


def _function_call(raw: object, _encoder: JsonEncoder) -> str | Block:
    return _str(raw) if isinstance(raw, str) else {"name": _str(_dict(raw).get("name"))}


_TOOLING: dict[str, Callable[[object, JsonEncoder], object]] = {
    "tools": partial(_fitting, _tool),
    "functions": partial(_fitting, _function),
    "tool_choice": _tool_choice,
    "function_call": _function_call,
}

# --- token counts -------------------------------------------------------------------------------------------

_USAGE_NAMES: dict[str, tuple[str, ...]] = {
    "input_tokens": ("input_tokens", "prompt_tokens"),
    "output_tokens": ("output_tokens", "completion_tokens"),
    "cached_input_tokens": (
        "input_token_details.cache_read",
        "prompt_tokens_details.cached_tokens",
        "input_tokens_details.cached_tokens",
        "cache_read_input_tokens",
    ),
    "reasoning_tokens": (
        "output_token_details.reasoning",
        "completion_tokens_details.reasoning_tokens",
        "output_tokens_details.reasoning_tokens",
    ),
}


def _usage(reported: object) -> Usage | None:
    """The counts in one report; None if it tells neither input nor output."""
    usage = Usage(**{field: _count(reported, paths) for field, paths in _USAGE_NAMES.items()})
    return None if usage.input_tokens is None and usage.output_tokens is None else usage


def _count(reported: object, paths: Iterable[str]) -> int | None:
    for path in paths:
        value: Any = reported
        for key in path.split("."):
            value = _get(value, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value % 1 == 0:
            return int(value)
    return None
