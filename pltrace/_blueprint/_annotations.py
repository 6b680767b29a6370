"""Converts the annotations of a text: what of the web, of files and of maps it cites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pltrace._blueprint._base import Block, MisfitError, add_known, dict_of, first_of, str_of


def annotation_of(raw: Any) -> Block | None:
    """The blueprint's annotation, None if it has no shape for this one."""
    try:
        if raw["type"] == "non_standard_annotation":
            raw = raw["value"]
        return _ANNOTATIONS[raw["type"]](raw)
    except Exception:
        return None


def _index(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise MisfitError


def _web_citation(raw: Block) -> Block:
    nested = raw.get("url_citation")
    if isinstance(nested, dict):
        raw = nested
    made: Block = {
        "type": "url_citation",
        "title": str_of(raw.get("title") or ""),
        "url": str_of(first_of(raw, "url", "source")),
        # Anthropic cites text, not places; PromptLayer's own client writes 0 there.
        "start_index": _index(raw.get("start_index")),
        "end_index": _index(raw.get("end_index")),
    }
    add_known(made, cited_text=raw.get("cited_text"), encrypted_index=raw.get("encrypted_index"))
    return made


def _file_citation(raw: Block) -> Block:
    made: Block = {
        "type": "file_citation",
        "index": _index(first_of(raw, "index", "document_index")),
        "file_id": str_of(raw.get("file_id") or ""),
        "filename": str_of(first_of(raw, "filename", "document_title", "title") or ""),
    }
    # Not in the schema, which allows more members: the quotation is text, and text is not lost.
    add_known(made, cited_text=raw.get("cited_text"))
    return made


def _container_citation(raw: Block) -> Block:
    made: Block = {
        "type": "container_file_citation",
        "container_id": str_of(raw["container_id"]),
        "start_index": _index(raw.get("start_index")),
        "end_index": _index(raw.get("end_index")),
    }
    add_known(made, filename=raw.get("filename"), file_id=raw.get("file_id"))
    return made


def _map_citation(raw: Block) -> Block:
    made = {**_web_citation(raw), "type": "map_citation"}
    made.pop("encrypted_index", None)
    add_known(made, place_id=raw.get("place_id"))
    return made


def _standard_citation(raw: Block) -> Block:
    """LangChain's citation, which keeps what is particular to a provider in `extras`."""
    raw = {**dict_of(raw.get("extras")), **raw}
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
