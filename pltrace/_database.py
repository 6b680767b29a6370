"""Opens the SQLite file of the store: its schema, its permissions, its lock, and what to do when it can't be used."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pltrace._errors import StoreError
from pltrace._health import warn_once

__all__ = ["SCHEMA_VERSION", "Database"]

APPLICATION_ID = 0x706C7472  # "pltr"
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE spans (
    seq             INTEGER PRIMARY KEY,   -- order of recording; with no PromptLayer, the id of a request
    span_id         TEXT NOT NULL UNIQUE,  -- 16 hexadecimal digits
    trace_id        TEXT NOT NULL,         -- 32 hexadecimal digits
    parent_id       TEXT,                  -- null for the root of a trace
    name            TEXT NOT NULL,
    kind            TEXT NOT NULL,
    status          TEXT,                  -- ok, error, cancelled or partial
    started_at_ns   INTEGER NOT NULL,      -- Unix time
    ended_at_ns     INTEGER,
    input_tokens    INTEGER,               -- LLM calls only
    output_tokens   INTEGER,
    request_id      INTEGER,               -- LLM calls only: PromptLayer's id, or seq; null until it is known
    body            TEXT NOT NULL          -- the rest of the record, as a JSON object
);
CREATE INDEX spans_by_trace ON spans (trace_id);
CREATE INDEX spans_by_request ON spans (request_id) WHERE request_id IS NOT NULL;
CREATE TABLE deliveries (
    exporter        TEXT NOT NULL,
    seq             INTEGER NOT NULL,      -- the span
    state           INTEGER NOT NULL,      -- 0 pending, 1 delivered, 2 quarantined
    owner           TEXT NOT NULL,         -- the process that delivers it: the one that recorded it, while it lives
    uncertain       INTEGER NOT NULL DEFAULT 0, -- it was sent, and no whole answer has come
    tries           INTEGER NOT NULL DEFAULT 0,
    error           TEXT,                  -- why it is in quarantine
    PRIMARY KEY (exporter, seq)
) WITHOUT ROWID;
CREATE INDEX deliveries_pending ON deliveries (exporter, owner, seq) WHERE state = 0;
CREATE TABLE operations (                  -- what was asked of requests: scores, metadata, prompt links, groups
    id              INTEGER PRIMARY KEY,   -- order of asking
    span_id         TEXT NOT NULL,         -- the request's span; the span above the requests, if subtree; '' if unknown
    trace_id        TEXT NOT NULL,
    request_id      INTEGER,               -- the request, where it was named by its id
    subtree         INTEGER NOT NULL,      -- 1: stands for one operation on each request under the span
    source          INTEGER,               -- the subtree operation that this one was made from
    kind            TEXT NOT NULL,         -- score, metadata, prompt or group
    arguments       TEXT NOT NULL,         -- JSON object
    state           INTEGER NOT NULL,      -- 0 pending, 1 delivered, 2 refused, 3 local: there is nobody to send it to
    owner           TEXT NOT NULL,
    error           TEXT,
    UNIQUE (source, span_id)
);
CREATE INDEX operations_by_span ON operations (span_id);
CREATE INDEX operations_by_trace ON operations (trace_id) WHERE subtree = 1;
CREATE INDEX operations_pending ON operations (owner, id) WHERE state = 0;
CREATE TABLE owners (                      -- the processes that have something to deliver
    owner           TEXT PRIMARY KEY,
    host            TEXT NOT NULL,         -- machine and process namespace, where pid means something
    pid             INTEGER NOT NULL,
    seen_at_ns      INTEGER NOT NULL       -- its lease: past it, others take over
);
CREATE TABLE counters (                    -- what happened to runs and spans, for `doctor`
    reason          TEXT PRIMARY KEY,
    count           INTEGER NOT NULL
);
"""
#: How long SQLite itself waits for another process's transaction; after it, we wait with jitter and try again, since
#: its own waiting is not fair among processes.
_BUSY_TIMEOUT_MS = 250
_MOST_BUSY_S = 30.0
_MOST_BUSY_AT_OPENING_S = 5.0
#: Connections inherited through a fork: closing one in the child would drop the parent's file locks.
_inherited: list[sqlite3.Connection] = []


class Database:
    """One SQLite connection of this process, behind one lock; closed, it opens again at its next use.

    Args:
        path: The file; None keeps it in memory.

    Raises:
        StoreError: The file can't be opened, or was written by a newer version.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        # Every use of SQLite in this process holds it, and so does a fork: a child of a fork that happened while a
        # thread was inside SQLite would hang in SQLite's own mutexes.
        self.lock = threading.Lock()
        self._connection: sqlite3.Connection | None = self._open()

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            connection = _connect(":memory:")
            connection.executescript(f"PRAGMA user_version = {SCHEMA_VERSION};" + SCHEMA)
            return connection
        try:
            _create_private(self.path)
            try:
                return _prepared(self.path)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                _move_aside(self.path, error)
                _create_private(self.path)
                return _prepared(self.path)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"Can't use the store {str(self.path)!r}: {error}") from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for some short reads."""
        with self.lock:
            yield self._connected()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection inside a transaction, which is committed at the end or rolled back on an exception.

        Raises:
            sqlite3.OperationalError: The disk is full or failing, or other processes kept the file for 30 seconds.
            StoreError: It was closed, and can't be opened any more.
        """
        with self.lock:
            connection = self._connected()
            self._begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a write transaction at once: one that reads first can fail with no chance to wait."""
        give_up_at = time.monotonic() + _MOST_BUSY_S
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise
                time.sleep(random.uniform(0.001, 0.02))

    def forked(self) -> None:
        """Start afresh in the child of a fork, leaving the parent's connection alone."""
        if self._connection is not None:
            _inherited.append(self._connection)
        self.lock = threading.Lock()
        self._connection = None

    def __del__(self) -> None:
        """Close what nobody uses any more; a parent process's connection is not forgotten but kept, see `forked`."""
        connection: sqlite3.Connection | None = getattr(self, "_connection", None)
        # At the end of the process the writer may have been stopped in the middle of using it.
        if connection is not None and not sys.is_finalizing():
            connection.close()

    def close(self) -> None:
        """Close the connection; the file's log is merged into it if no other process uses it. Memory stays open."""
        with self.lock:
            if self._connection is not None and self.path is not None:
                self._connection.close()
                self._connection = None


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
    )
    connection.row_factory = sqlite3.Row
    return connection


def _prepared(path: Path) -> sqlite3.Connection:
    """Return a connection that is set up, waiting for other processes that make the file at the same time."""
    give_up_at = time.monotonic() + _MOST_BUSY_AT_OPENING_S
    while True:
        connection = _connect(str(path))
        try:
            _prepare(connection, path)
            return connection
        except BaseException as error:
            connection.close()
            if "database is locked" not in str(error) or time.monotonic() > give_up_at:
                raise
        time.sleep(random.uniform(0.001, 0.02))


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set up the connection, and the file if it is new; one that isn't ours to write is left as it is."""
    _check_ours(connection, path)
    for pragma in (
        "PRAGMA auto_vacuum = INCREMENTAL",  # Has an effect in a new file only: pruning gives space back.
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",  # Survives the death of the process; a power cut can take the last commits.
        "PRAGMA journal_size_limit = 16777216",
        "PRAGMA secure_delete = ON",
    ):
        connection.execute(pragma)
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:  # Looked at again: another process may have been faster.
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _check_ours(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `StoreError` if the file is of a newer version, or another program's."""
    connection.execute("BEGIN")  # One look: another process may be making the file.
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    finally:
        connection.execute("ROLLBACK")
    if application != APPLICATION_ID and (application or version or tables):
        raise StoreError(
            f"Can't use the store {str(path)!r}: it is a database of another program; set another path with "
            "PLTRACE_STORE"
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"Can't use the store {str(path)!r}: its schema version is {version} and this pltrace knows "
            f"{SCHEMA_VERSION}; upgrade pltrace, or set another path with PLTRACE_STORE"
        )


def _create_private(path: Path) -> None:
    """Make sure that the file exists, that only its owner can read it, and that it is no link to somewhere else."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Private from its first byte on; SQLite gives its other two files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        # Only looked at, never opened: closing a descriptor of the file would drop this process's locks on it.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file") from None
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            raise OSError("it belongs to another user") from None


def _move_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file and what belongs to it, so that a fresh one can take its place."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    warn_once(
        f"corrupt:{path}",
        "The store %r is damaged (%s). It was renamed to %r and a new one begun; what was still to be sent "
        "is in the old one.",
        str(path),
        error,
        str(aside),
    )
