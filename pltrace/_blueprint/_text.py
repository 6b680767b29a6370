"""Converts what a model or a person said in words: text with its annotations, refusals, reasoning."""

from __future__ import annotations

from pltrace._blueprint._annotations import annotation_of
from pltrace._blueprint._base import (
    Block,
    Converter,
    JsonEncoder,
    MisfitError,
    add_known,
    dict_of,
    first_of,
    items_of,
    json_block,
    str_of,
    text_block,
)


def thinking(block: Block, _encoder: JsonEncoder) -> list[Block]:
    """Reasoning in anyone's words: a string, a nested block, or a list of summaries and contents."""
    inner = block.get("reasoning_content")
    if isinstance(inner, dict):
        block = {**inner, "thinking": first_of(inner, "text", "thinking", "reasoning")}
    parts = [first_of(block, "thinking", "reasoning", "reasoning_content")]
    parts += [str_of(part["text"]) for key in ("summary", "content") for part in items_of(block.get(key))]
    texts = [str_of(part) for part in parts if part is not None]
    if not texts and not block.keys() & {"summary", "signature", "encrypted_content", "id", "data"}:
        raise MisfitError
    made: Block = {"type": "thinking", "thinking": "\n\n".join(text for text in texts if text)}
    signature = _signature(block, "signature", "encrypted_content", "data")
    add_known(made, id=block.get("id"), signature=signature)
    return [made]


def _written(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Text with its annotations; of those the blueprint has no shape for, the JSON follows."""
    annotations = [*items_of(block.get("annotations")), *items_of(block.get("citations"))]
    made = text_block(str_of(block.get("text", "" if annotations else None)))
    add_known(made, id=block.get("id"), thought_signature=_signature(block, "thought_signature"))
    shaped = [(annotation, annotation_of(annotation)) for annotation in annotations]
    fitting = [shape for _, shape in shaped if shape]
    rest = [json_block(annotation, encoder) for annotation, shape in shaped if not shape]
    if fitting:
        made["annotations"] = fitting
    # An empty text is how providers mark the place of a tool call.
    return [made, *rest] if made["text"] or fitting else rest


def _refused(block: Block, _encoder: JsonEncoder) -> list[Block]:
    return [text_block(str_of(block["refusal"]))]


def _signature(block: Block, *keys: str) -> object:
    return first_of(block, *keys) or dict_of(block.get("extras")).get("signature")


CONVERTERS: dict[str, Converter] = {
    "text": _written,
    "input_text": _written,
    "output_text": _written,
    "refusal": _refused,
    "thinking": thinking,
    "redacted_thinking": thinking,
    "reasoning": thinking,
    "reasoning_content": thinking,
}
