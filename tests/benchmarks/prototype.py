"""A simple tracer with a store: it appends references, and writes SQLite from a thread, every few milliseconds.

No scopes, tags or metadata of its own, no redaction, no bounds, no requests, no delivery: beside it one sees what these
take, and what comes of a thread that writes. It isn't the least that such a tracer could take; `NOTES.md` has another.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from langchain_core.callbacks.base import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from tests.benchmarks.tracers import Tracer, Variable

__all__ = ["Prototype"]

#: How long the thread gathers, as pltrace's writer does; how many events it takes before others may run; in one commit.
_GATHER_S, _SLICE, _MOST = 0.002, 32, 1_000

_SCHEMA = """
CREATE TABLE spans (run_id TEXT, parent_run_id TEXT, name TEXT, started_at_ns INTEGER, ended_at_ns INTEGER, body TEXT);
CREATE INDEX spans_by_run ON spans (run_id);
"""

Event = tuple[Any, ...]


class _Handler(BaseCallbackHandler):
    """Appends what it is told."""

    run_inline = True

    def __init__(self, events: deque[Event]) -> None:
        self._append = events.append

    def on_chain_start(self, serialized: Any, said: Any, *, run_id: UUID, **options: Any) -> None:
        self._append((run_id, time.time_ns(), said, options))

    on_chat_model_start = on_retriever_start = on_chain_start

    def on_tool_start(self, serialized: Any, said: Any, *, run_id: UUID, **options: Any) -> None:
        self._append((run_id, time.time_ns(), said, options))

    def on_chain_end(self, said: Any, *, run_id: UUID, **options: Any) -> None:
        self._append((run_id, time.time_ns(), said, None))

    on_llm_end = on_tool_end = on_retriever_end = on_chain_end

    def on_llm_new_token(self, token: Any, **options: Any) -> None:
        pass


class Prototype(Tracer):
    """Measured beside pltrace."""

    name = "prototype"

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        self._events: deque[Event] = deque()
        self._handler = _Handler(self._events)
        self._variable: Any = Variable()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        register_configure_hook(self._variable, inheritable=True)
        with sqlite3.connect(folder / "prototype.db") as database:
            database.executescript("PRAGMA journal_mode=WAL;" + _SCHEMA)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on; there is no thread while others are measured."""
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()
        self._variable.value = self._handler
        try:
            yield
        finally:
            self._variable.value = None

    def settle(self) -> None:
        """Wait until all is stored."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        database = sqlite3.connect(self.folder / "prototype.db", isolation_level=None)
        database.execute("PRAGMA synchronous=OFF")
        started: dict[UUID, Event] = {}
        while self._events or not self._over.is_set():
            time.sleep(_GATHER_S)
            rows = []
            for number in range(min(len(self._events), _MOST)):
                if number % _SLICE == _SLICE - 1:
                    time.sleep(0)
                event = self._events.popleft()
                if event[3] is not None:
                    started[event[0]] = event
                else:
                    rows.append(_row(started.pop(event[0]), event))
            if rows:
                database.execute("BEGIN")
                database.executemany("INSERT INTO spans VALUES (?, ?, ?, ?, ?, ?)", rows)
                database.execute("COMMIT")
        database.close()


def _row(start: Event, end: Event) -> Event:
    run_id, started_at_ns, given, options = start
    body = {
        "input": given, "output": end[2], "tags": options["tags"], "metadata": options["metadata"],
        "parameters": options.get("invocation_params"),
    }  # fmt: skip
    text = json.dumps(body, default=_said)
    return run_id.hex, str(options["parent_run_id"]), options["name"], started_at_ns, end[1], text


def _said(value: Any) -> Any:
    """Return what JSON is made of for an answer or a message; of all else its text."""
    generations = getattr(value, "generations", None)
    if generations is not None:
        return [one.message for one in generations[0]]
    content = getattr(value, "content", None)
    return str(value) if content is None else {"type": value.type, "content": content}
