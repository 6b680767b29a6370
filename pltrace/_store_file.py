"""Makes, checks and, when it is damaged, sets aside the SQLite file of the store: schema, permissions, folder."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pltrace._clock import monotonic
from pltrace._greenlets import close_now, rest
from pltrace._health import warn_once

__all__ = [
    "MOST_BUSY_FOLDER_S", "MOST_WAL_BYTES", "SCHEMA_VERSION", "BeingMadeError", "can_lock", "check_ours",
    "close_quickly", "looked_at", "opened_beside", "opened_file", "opened_memory", "set_aside",
]  # fmt: skip

_SUFFIXES = (".db", ".sqlite", ".sqlite3")
APPLICATION_ID = 0x706C7472  # "pltr"
SCHEMA_VERSION = 2  # 1 was before the first release.
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
    body            TEXT NOT NULL          -- the rest of the record: lines of JSON (_rows.Row)
);
CREATE INDEX spans_by_trace ON spans (trace_id);
CREATE TABLE requests (                    -- of spans, since a page that holds bodies isn't written again for an id
    seq             INTEGER PRIMARY KEY,   -- the LLM call's span
    request_id      INTEGER NOT NULL       -- PromptLayer's id, or seq
);
CREATE INDEX requests_by_id ON requests (request_id);
CREATE TABLE delivery_ranges (             -- spans that follow one another, and are alike in what it says
    exporter        TEXT NOT NULL,
    first           INTEGER NOT NULL,      -- numbers of spans; no two ranges of an exporter have one in common
    last            INTEGER NOT NULL,
    state           INTEGER NOT NULL,      -- 0 pending, 1 delivered, 2 quarantined
    owner           TEXT NOT NULL,         -- the process that delivers them: the one that recorded them, while it lives
    uncertain       INTEGER NOT NULL,      -- 1 they were sent, and no whole answer has come; 2 an earlier version was
    error           TEXT,                  -- why they are in quarantine
    PRIMARY KEY (exporter, first)
) WITHOUT ROWID;
CREATE INDEX delivery_ranges_pending ON delivery_ranges (exporter, owner, first) WHERE state = 0;
CREATE VIEW exporters AS WITH RECURSIVE found (exporter) AS (
    SELECT min(exporter) FROM delivery_ranges
    UNION ALL
    SELECT (SELECT min(exporter) FROM delivery_ranges WHERE exporter > found.exporter) FROM found
    WHERE found.exporter IS NOT NULL
) SELECT exporter FROM found WHERE exporter IS NOT NULL;
CREATE VIEW deliveries AS                  -- a row for each span and exporter, for looking up those of some spans
SELECT spans.seq, delivery_ranges.exporter, state, owner, uncertain, error
FROM spans CROSS JOIN exporters CROSS JOIN delivery_ranges
WHERE delivery_ranges.exporter = exporters.exporter AND last >= spans.seq AND first = (
    SELECT max(first) FROM delivery_ranges WHERE exporter = exporters.exporter AND first <= spans.seq
);
CREATE TABLE operations (                  -- what was asked of requests: scores, metadata, prompt links, groups
    id              INTEGER PRIMARY KEY,   -- order of asking
    span_id         TEXT NOT NULL,         -- the request's span; the span above the requests, if subtree; '' if unknown
    trace_id        TEXT NOT NULL,
    request_id      INTEGER,               -- the request, where its id was known
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
CREATE VIEW commits AS                     -- what a commit adds: rows of spans, and one with no number for what goes
SELECT * FROM spans                        -- with them, which is in its body (_store.Store._of_commit)
;
CREATE TRIGGER commits_span INSTEAD OF INSERT ON commits WHEN NEW.seq IS NOT NULL BEGIN
    INSERT INTO spans VALUES (
        NEW.seq, NEW.span_id, NEW.trace_id, NEW.parent_id, NEW.name, NEW.kind, NEW.status, NEW.started_at_ns,
        NEW.ended_at_ns, NEW.input_tokens, NEW.output_tokens, NEW.body
    );
END;
CREATE TRIGGER commits_rest INSTEAD OF INSERT ON commits WHEN NEW.seq IS NULL AND NEW.body IS NOT NULL BEGIN
    SELECT RAISE(ABORT, 'it is another file, or others have written') WHERE json_extract(NEW.body, '$.first') - 1 <> (
        SELECT coalesce(max(seq), 0) FROM spans WHERE seq < json_extract(NEW.body, '$.first')
    );
    SELECT RAISE(ABORT, 'something is asked of whole subtrees') WHERE EXISTS (
        SELECT 1 FROM operations
        WHERE subtree = 1 AND trace_id IN (SELECT value FROM json_each(NEW.body, '$.traces'))
    );
    UPDATE delivery_ranges SET last = json_extract(NEW.body, '$.last') WHERE (exporter, first) IN (
        SELECT value, (SELECT max(first) FROM delivery_ranges WHERE exporter = value)
        FROM json_each(NEW.body, '$.exporters')
    ) AND last = json_extract(NEW.body, '$.first') - 1
    AND owner = json_extract(NEW.body, '$.owner') AND state = 0 AND uncertain = 0;
    INSERT INTO delivery_ranges SELECT
        value, json_extract(NEW.body, '$.first'), json_extract(NEW.body, '$.last'), 0,
        json_extract(NEW.body, '$.owner'), 0, NULL
    FROM json_each(NEW.body, '$.exporters') WHERE json_extract(NEW.body, '$.first') > coalesce(
        (SELECT last FROM delivery_ranges WHERE exporter = value ORDER BY first DESC LIMIT 1), 0
    );
    INSERT INTO requests SELECT seq, seq FROM spans WHERE json_extract(NEW.body, '$.local_ids')
    AND seq BETWEEN json_extract(NEW.body, '$.first') AND json_extract(NEW.body, '$.last') AND kind = 'llm';
    INSERT INTO counters SELECT key, value FROM json_each(NEW.body, '$.counts') WHERE true
    ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count;
END;
CREATE TABLE owners (                      -- the processes that have something to deliver
    owner           TEXT PRIMARY KEY,
    host            TEXT NOT NULL,         -- machine and process namespace, where pid means something
    pid             INTEGER NOT NULL,
    seen_at_ns      INTEGER NOT NULL       -- its lease, by the machine's clock that never jumps (monotonic)
);
CREATE TABLE counters (                    -- what happened to runs and spans, for `doctor`
    reason          TEXT PRIMARY KEY,
    count           INTEGER NOT NULL
);
"""
#: Past it the file's log is started over as soon as no reader is in the way.
MOST_WAL_BYTES = 2**24
#: Memory takes no more than this: then writing fails as on a full disk.
_MOST_MEMORY_BYTES = 3 * 2**27
#: How long SQLite itself waits for another process, where that is rare: once the file is open it reads without waiting,
#: and to write, we wait.
_BUSY_TIMEOUT_MS = 20
#: How long a process waits for another that is making or renaming the file, and looks whether it still is.
MOST_BUSY_FOLDER_S, _LOOK_EVERY_S = 2.0, 0.001


#: What says that others have a lock, and that nobody can have one: the file system has none, or its service is gone.
_HELD, _WITHOUT_LOCKS = (errno.EWOULDBLOCK, errno.EACCES), (errno.ENOLCK, errno.EIO)


class BeingMadeError(sqlite3.OperationalError):
    """Another process is making or renaming the file."""


def opened_memory() -> sqlite3.Connection:
    """Return a connection to a store in memory."""
    connection = _connect(":memory:")
    connection.executescript(f"PRAGMA user_version = {SCHEMA_VERSION};" + SCHEMA)
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.execute(f"PRAGMA max_page_count = {_MOST_MEMORY_BYTES // page_size}")
    return connection


def opened_file(path: Path, *, regardless: bool) -> sqlite3.Connection:
    """Return a connection to the file, which is made if there is none and replaced if it is damaged.

    Args:
        path: Where it is.
        regardless: Whether it is opened although another process is making or renaming it: that one was stopped in the
            middle, or the folder is locked for something else.

    Raises:
        OSError: It can't be made, isn't ours, or was written by a newer version.
        BeingMadeError: Another process is making or renaming it.
        sqlite3.Error: It can't be used, or not now.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Those that open what is there don't wait for each other.
        with _locked(path.parent, alone=False, regardless=regardless) as can_lock, _told_apart(can_lock=can_lock):
            _check_private(path)
            return _prepared(path)
    except FileNotFoundError:
        pass
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
    with _locked(path.parent, alone=True, regardless=regardless) as can_lock, _told_apart(can_lock=can_lock):
        _create_private(path)
        try:
            return _prepared(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            if not _may_be_ours(path):
                raise OSError("it is a file of another kind; set another path with PLTRACE_STORE") from error
            _move_aside(path, error)
            _create_private(path)
            return _prepared(path)


def opened_beside(path: Path, file: tuple[int, int] | None) -> sqlite3.Connection:
    """Return another connection to the file that this process has open.

    Raises:
        OSError: Another file is there now.
        sqlite3.Error: It can't be used, or not now.
    """
    with _locked(path.parent, alone=False):
        if looked_at(path)[0] != file:
            raise OSError("another file is at its place")
        connection = _connect(str(path))
        try:
            connection.execute("PRAGMA user_version").fetchone()  # From here on it has the file's log.
        except BaseException:
            connection.close()
            raise
    return connection


def close_quickly(connection: sqlite3.Connection) -> None:
    """Close a connection without moving the file's log into the file first, as SQLite does when nobody else has it."""
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
    else:
        connection.interrupt()  # Holds until the next statement, and there is none.
    connection.close()


def _may_be_ours(path: Path) -> bool:
    """Return whether a file that SQLite can't read may be a damaged store, by its name, or by a log beside it."""
    return path.suffix in _SUFFIXES or path.with_name(path.name + "-wal").exists()


def set_aside(path: Path, error: Exception) -> None:
    """Rename a file that has turned out to be damaged."""
    with _locked(path.parent, alone=True, patience_s=MOST_BUSY_FOLDER_S, regardless=True):
        _move_aside(path, error)


def looked_at(path: str | Path) -> tuple[tuple[int, int] | None, bool]:
    """Return which file is at a path, or None, as it can be deleted or replaced while it is in use; and if it's empty.

    A store has something in it from the start.
    """
    try:
        status = os.lstat(path)
        size = os.stat(path).st_size if stat.S_ISLNK(status.st_mode) else status.st_size
    except OSError:
        return None, True
    return (status.st_dev, status.st_ino), not size


@contextmanager
def _locked(folder: Path, *, alone: bool, patience_s: float = 0.0, regardless: bool = False) -> Iterator[bool]:
    """Keep other processes from making or renaming the file: its log belongs to it by name alone.

    Args:
        folder: Where the file is.
        alone: Keep them from opening it too.
        patience_s: The longest wait for them.
        regardless: Go on without it when they don't let go.

    Yields:
        Whether files can be locked there.

    Raises:
        BeingMadeError: They didn't let go.
    """
    try:
        import fcntl
    except ImportError:  # Windows doesn't let a file be renamed that is in use.
        yield True
        return
    can_lock = True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        give_up_at = monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if monotonic() >= give_up_at:
                    # A file system without such locks is no reason to fail either.
                    if regardless or error.errno not in _HELD:
                        can_lock = error.errno not in _WITHOUT_LOCKS
                        break
                    raise BeingMadeError("the store's folder is locked by another process") from error
            rest(_LOOK_EVERY_S)
        yield can_lock
    finally:
        close_now(descriptor)


def can_lock(folder: Path) -> bool:
    """Return whether files in a folder can be locked, be it that others have locked them."""
    try:
        with _locked(folder, alone=False, regardless=True) as can:
            return can
    except OSError:  # It was renamed, or the process has too many files open.
        return True


@contextmanager
def _told_apart(*, can_lock: bool) -> Iterator[None]:
    """Tell a file that can't be locked from one that others have locked, for which SQLite takes it."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if can_lock or "locked" not in str(error):
            raise
        raise OSError("it can't be locked, as on NFS without its lock service") from error


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
    connection = _connect(str(path))
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Set up the connection, and the file if it is new; one that isn't ours to write is left as it is."""
    is_new = check_ours(connection) == 0
    if is_new:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # Pruning gives space back.
    for pragma in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",  # Survives the death of the process; a power cut can take the last commits.
        "PRAGMA wal_autocheckpoint = 0",  # Not in a commit: that would wait for the disk.
        f"PRAGMA journal_size_limit = {MOST_WAL_BYTES}",
        "PRAGMA secure_delete = ON",
        "PRAGMA temp_store = MEMORY",  # What a commit adds passes through a temporary table: no file elsewhere.
    ):
        connection.execute(pragma)
    if is_new:  # An old file is opened without a wait for who writes to it.
        _make(connection)
    # From now on we wait ourselves: SQLite does it in long steps, and keeps this process's threads and forks too.
    connection.execute("PRAGMA busy_timeout = 0")


def _make(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:  # Looked at again: another process may have been faster.
            for statement in re.split(r";\n(?=CREATE )", SCHEMA):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check_ours(connection: sqlite3.Connection) -> int:
    """Return the version of the file's schema, 0 for a new file.

    Raises:
        OSError: It is another program's, or of a newer version.
        sqlite3.Error: It is damaged or of an older version, or can't be read now.
    """
    connection.execute("BEGIN")  # One look: another process may be making the file.
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    finally:
        connection.execute("ROLLBACK")
    if application != APPLICATION_ID and (application or version or tables):
        raise OSError("it is a database of another program; set another path with PLTRACE_STORE")
    if 0 < version < SCHEMA_VERSION:
        raise sqlite3.DatabaseError("it is of a version before the first release")
    if version > SCHEMA_VERSION:
        raise OSError(
            f"its schema version is {version} and this pltrace knows {SCHEMA_VERSION}; upgrade pltrace, or set another "
            "path with PLTRACE_STORE"
        )
    return int(version)


def _create_private(path: Path) -> None:
    """Make sure that the file exists, that only its owner can read it, and that it is no link to somewhere else."""
    try:
        # Private from its first byte on; SQLite gives its other two files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        _check_private(path)
        return
    # The log of a file that was deleted is not this one's.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _check_private(path: Path) -> None:
    # Only looked at, never opened: closing a descriptor of the file would drop this process's locks on it.
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise OSError("it belongs to another user")
    if not os.access(path, os.W_OK):
        raise OSError("it is read-only")
    if not status.st_size and status.st_mode & 0o077:
        os.chmod(path, 0o600)  # An empty file that somebody made for it.


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
