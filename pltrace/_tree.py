"""Prints a trace as a tree for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["duration", "printable", "text_of", "tree"]

_LONGEST_TEXT = 72


def tree(records: Sequence[Mapping[str, Any]], *, texts: bool = True) -> str:
    """Return the spans of a trace as indented lines.

    Args:
        records: As stored, in the order they started; a span whose parent isn't among them stands at the top.
        texts: With a line for what went in and what came out of LLM calls and tools.
    """
    known = {record["span_id"] for record in records}
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for record in records:
        parent = record["parent_id"] if record["parent_id"] in known else None
        children.setdefault(parent, []).append(record)
    lines: list[str] = []
    waiting: list[tuple[Mapping[str, Any], str, bool, bool]] = [
        (record, "", True, True) for record in reversed(children.get(None, []))
    ]
    while waiting:
        record, indent, last, top = waiting.pop()
        branch = "" if top else indent + ("└─ " if last else "├─ ")
        below = indent if top else indent + ("   " if last else "│  ")
        lines.append(branch + _line(record))
        inside = children.get(record["span_id"], [])
        if texts and record["kind"] in ("llm", "tool"):
            bar = "│  " if inside else "   "
            lines += [f"{below}{bar}{text}" for text in _texts(record)]
        waiting += [(child, below, child is inside[-1], False) for child in reversed(inside)]
    return "\n".join(lines)


def _line(record: Mapping[str, Any]) -> str:
    parts = [record["name"], f"[{record['kind']}]"]
    if record["ended_at_ns"] is not None:
        parts.append(duration(record["ended_at_ns"] - record["started_at_ns"]))
    if record["kind"] == "llm":
        parts.append(record["model"])
        if record["input_tokens"] is not None:
            parts.append(f"{record['input_tokens']} → {record['output_tokens']} tokens")
        if record["request_id"] is not None:
            parts.append(f"request {record['request_id']}")
        if record["cached"]:
            parts.append("from cache")
        parts += [f"#{tag}" for tag in record["request_tags"]]
    if record["status"] != "ok":
        parts.append(record["status"] or "open")
    if record["error"]:
        parts.append(record["error"][:_LONGEST_TEXT])
    return printable("  ".join(parts))


def _texts(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{mark} {printable(text)[:_LONGEST_TEXT]}"
        for mark, text in (("<", text_of(record["input"])), (">", text_of(record["output"])))
        if text
    ]


def text_of(value: Any) -> str:
    """Return what is to be read of an input or output: the last message's text and calls of a prompt, else JSON."""
    if value is None:
        return ""
    if isinstance(value, dict) and value.get("type") == "chat":
        return _message_text(value["messages"][-1]) if value.get("messages") else ""
    if isinstance(value, dict) and value.get("type") == "completion":
        return _blocks_text(value.get("content"))
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return str(value["content"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _message_text(message: Mapping[str, Any]) -> str:
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls") or ()]
    return " ".join(part for part in (_blocks_text(message.get("content")), *calls) if part)


def _blocks_text(blocks: Any) -> str:
    return " ".join(
        str(block.get("text") or block.get("thinking") or f"<{block.get('type')}>") for block in blocks or ()
    )


def printable(text: str) -> str:
    """Return `text` on one line and without control characters: a model's answer must not drive the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def duration(nanoseconds: int) -> str:
    """Return a time span for people."""
    seconds = nanoseconds / 1e9
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
