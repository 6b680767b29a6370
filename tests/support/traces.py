"""Reads back what was recorded, as trees that a test can spell out, and makes clients of the doubles."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from langchain_openai import ChatOpenAI, OpenAI

import pltrace
from pltrace._queries import matching_traces, trace_records

_timeouts: WeakKeyDictionary[asyncio.AbstractEventLoop, float] = WeakKeyDictionary()
_counter = itertools.count(1)
_DEFAULTS = {"api_key": "none", "model": "tiny", "max_retries": 0}


def chat(server: Any, **settings: Any) -> ChatOpenAI:
    """Makes a chat model that speaks to a double, without retries of its own."""
    return ChatOpenAI(**{**_DEFAULTS, "base_url": _address(server), "timeout": _timeout(), **settings})


def completion(server: Any, **settings: Any) -> OpenAI:
    """Makes a completion model that speaks to a double, without retries of its own."""
    return OpenAI(**{**_DEFAULTS, "base_url": _address(server), "timeout": _timeout(), **settings})


def _timeout() -> float:
    """Gives each event loop a timeout of its own.

    langchain-openai shares one async client among all models of one address and timeout, also across event loops,
    and the client of a loop that has ended fails in the next.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return 60.0
    return _timeouts.setdefault(loop, timeout_of_its_own())


def timeout_of_its_own() -> float:
    """Gives a timeout that no other model has, for one that is made outside the event loop it is used in."""
    return 60.0 + next(_counter)


def _address(server: Any) -> str:
    return getattr(server, "base_url", None) or str(server.url)


def spans(path: Path) -> list[dict[str, Any]]:
    """Gives all that was recorded so far, trace by trace, in the order it started."""
    assert pltrace.flush(10.0)
    found = [record for trace_id in matching_traces(path, "") for record in trace_records(path, trace_id)]
    return sorted(found, key=lambda record: int(record["started_at_ns"]))


def calls(path: Path) -> list[dict[str, Any]]:
    """Gives the LLM calls that were recorded so far."""
    return [record for record in spans(path) if record["kind"] == "llm"]


def the_span(path: Path, name: str) -> dict[str, Any]:
    """Gives the one span of that name."""
    (found,) = [record for record in spans(path) if record["name"] == name]
    return found


def tree(path: Path) -> str:
    """Gives the recorded traces as lines `name kind`, with the status where it isn't ok.

    Siblings stand in the order of their lines where they may run at once, that is alphabetically.
    """
    return drawn(spans(path))


def drawn(records: Iterable[Mapping[str, Any]], *, ordered: bool = False) -> str:
    """Gives records as an indented tree."""
    records = list(records)
    known = {record["span_id"] for record in records}
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for record in records:
        children.setdefault(record["parent_id"] if record["parent_id"] in known else None, []).append(record)

    def under(parent: str | None, indent: str) -> str:
        parts = [
            f"{indent}{_line(record)}\n" + under(record["span_id"], indent + "  ")
            for record in children.get(parent, [])
        ]
        return "".join(parts if ordered else sorted(parts))

    return under(None, "")


def _line(record: Mapping[str, Any]) -> str:
    return f"{record['name']} {record['kind']}" + (f" {record['status']}" if record["status"] != "ok" else "")


def said(request: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a request's metadata without what is about LangChain's run."""
    return {key: value for key, value in request.items() if not key.startswith("_langchain_")}
