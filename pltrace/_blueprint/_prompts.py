"""Makes the prompts and the answers of LLM calls, which is what the rest of pltrace asks the blueprint for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pltrace._blueprint._base import Block, JsonEncoder, items_of, member_of, text_block, text_blocks, text_of
from pltrace._blueprint._messages import messages_of, plain_message
from pltrace._blueprint._tools import tooling_of

#: What is longer in all is left to the encoder, which bounds it.
_LONGEST_PLAIN = 1_000_000


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
    for message in items_of(messages):
        converted += messages_of(message, encoder)
    prompt: Block = {"type": "chat", "messages": converted}
    if parameters:
        prompt.update(tooling_of(parameters, encoder))
    return prompt


def plain_chat(
    kinds: Sequence[Any], contents: Sequence[Any], rests: Sequence[Any], encoder: JsonEncoder, role: str | None = None
) -> str | None:
    """Make the JSON text of a ChatPrompt of messages of texts and simple tool calls, as most are.

    Args:
        kinds: Of each message its class, as `_messages` notes it,
        contents: its content,
        rests: and what else it said.
        encoder: Says what needs a closer look.
        role: Of all of them; None for each its own.

    Returns:
        The text, the same as of what `chat_prompt` or `chat_answer` gives; None where one of them holds more.
    """
    texts: list[str] = []
    for kind, content, rest in zip(kinds, contents, rests, strict=True):
        text = plain_message(kind, content, rest, encoder, role)
        if text is None:
            return None
        texts.append(text)
    whole = f'{{"type":"chat","messages":[{",".join(texts)}]}}'
    return whole if len(whole) <= _LONGEST_PLAIN else None


def completion_prompt(prompts: Sequence[str], encoder: JsonEncoder) -> Block:
    """Make the CompletionPrompt that describes what a text model was given.

    Args:
        prompts: The prompts of the call.
        encoder: Makes JSON of a prompt that is no string.

    Returns:
        A dict valid as `CompletionPrompt`, one text block per prompt.
    """
    return {"type": "completion", "content": [text_block(text_of(p, encoder)) for p in items_of(prompts)]}


def chat_answer(generations: Sequence[object], encoder: JsonEncoder) -> Block:
    """Make the ChatPrompt that describes what a chat model answered.

    Args:
        generations: The generations of one prompt; several are several candidates.
        encoder: Makes JSON of what the blueprint has no shape for.

    Returns:
        A dict valid as `ChatPrompt`, one assistant message per generation.
    """
    converted: list[Block] = []
    for generation in items_of(generations):
        message = member_of(generation, "message")
        if message is None:
            message = ("assistant", _generated_text(generation, encoder))
        converted += messages_of(message, encoder, "assistant")
    return {"type": "chat", "messages": converted}


def completion_answer(generations: Sequence[object], encoder: JsonEncoder) -> Block:
    """Make the CompletionPrompt that describes what a text model answered.

    Args:
        generations: The generations of one prompt.
        encoder: Makes JSON of a generation that has no text.

    Returns:
        A dict valid as `CompletionPrompt`, one text block per generation.
    """
    content = [text_block(_generated_text(generation, encoder)) for generation in items_of(generations)]
    return {"type": "completion", "content": content}


def text_answer(text: str) -> Block:
    """Make the ChatPrompt of an answer that was cut off.

    Args:
        text: What had arrived so far.

    Returns:
        A dict valid as `ChatPrompt`, its content empty if nothing had arrived.
    """
    return {"type": "chat", "messages": [{"role": "assistant", "content": text_blocks(text)}]}


def _generated_text(generation: object, encoder: JsonEncoder) -> str:
    text = member_of(generation, "text")
    return text_of(text if isinstance(text, str) else generation, encoder)
