"""Puts the content of one message together, block by block: blocks, tool calls, and results that stand among them."""

from __future__ import annotations

from typing import Any

from pltrace._blueprint import _media, _server_tools, _text
from pltrace._blueprint._base import (
    Block,
    Converter,
    JsonEncoder,
    items_of,
    json_block,
    maybe_str,
    str_of,
    text_block,
    text_blocks,
)
from pltrace._blueprint._calls import CALL_KINDS, call_id_of, call_of

_CONVERTERS: dict[str, Converter] = {**_text.CONVERTERS, **_media.CONVERTERS, **_server_tools.CONVERTERS}


def error_note() -> Block:
    """What says that a tool failed; a tool message has no other place for it."""
    return text_block("status: error")


class Draft:
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
        for block in items_of(content):
            self.add(block)

    def add(self, block: object) -> None:
        """Add one block; what can't be understood is added as its JSON."""
        try:
            made = self._convert(block)
        except Exception:
            made = [json_block(block, self.encoder)]
        self.blocks += made

    def add_call(self, raw: object) -> None:
        """Add a tool call of any provider's shape."""
        try:
            self._keep(call_of(raw, len(self.calls), self.encoder), raw)
        except Exception:
            self.blocks.append(json_block(raw, self.encoder))

    def _convert(self, block: Any) -> list[Block]:
        if isinstance(block, str):
            return text_blocks(str_of(block))
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
            return _CONVERTERS[kind](block, self.encoder)
        if kind in CALL_KINDS:
            self._add_call_once(block)
            return []
        return [_media.produced(made) for made in _CONVERTERS[kind](block, self.encoder)]

    def _add_call_once(self, block: Block) -> None:
        """Add a call told in the content, unless the message's tool calls tell it too."""
        call = call_of(block, len(self.calls), self.encoder)
        key = "id" if call_id_of(block) else "function"
        if all(call[key] != known[key] for known in self.told):
            self._keep(call, block)

    def _keep(self, call: Block, raw: Any) -> None:
        """Keep a call, and why it is invalid if it is; a tool call has no place for that."""
        self.calls.append(call)
        error = maybe_str(raw.get("error"))
        if error:
            self.blocks.append(text_block(f"error of the tool call {call['id']}: {error}"))

    def _tool_result(self, block: Block) -> Block:
        """The tool message for a result that Anthropic's format puts into a user message."""
        inner = Draft("tool", self.encoder)
        inner.add_all(block.get("content"))
        if block.get("is_error") is True:
            inner.blocks.append(error_note())
        return {"role": "tool", "tool_call_id": str_of(block["tool_use_id"]), "content": inner.blocks}
