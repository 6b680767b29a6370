"""Gives this process its connection to the store's SQLite file, one user at a time, across forks and mishaps."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

from pltrace import _checkpoints
from pltrace._checkpoints import Checkpoints
from pltrace._clock import monotonic
from pltrace._errors import StoreError
from pltrace._forks import LONGEST_FORK_S, at_fork
from pltrace._greenlets import new_rlock, rest, taken
from pltrace._health import warn_once
from pltrace._room import Room
from pltrace._store_file import (
    MOST_BUSY_FOLDER_S,
    BeingMadeError,
    can_lock,
    close_quickly,
    looked_at,
    opened_file,
    opened_memory,
    set_aside,
)  # fmt: skip
from pltrace._trouble import (
    InterruptedUseError,
    has_failed,
    is_busy,
    is_full,
    is_never_locked,
    is_short_of_descriptors,
)

__all__ = ["MANY_VALUES", "Database", "close_at_exit"]

#: Whether a statement may have 32,766 values; before SQLite 3.32 it may have 999.
MANY_VALUES = sqlite3.sqlite_version_info >= (3, 32)
_MOST_BUSY_S = 30.0
#: Whoever reads, or gives the file up, waits so long at most; who switches tracing on hardly at all: the writer opens
#: the file then.
_MOST_BUSY_READING_S, _MOST_BUSY_AT_FIRST_S = 5.0, 0.02
#: How long to wait before the next look at whether others have let go of the file, as a part of the wait so far: they
#: hold it for half a millisecond, unless something is wrong. Whoever looks more seldom than others finds it held again.
_PART_OF_WAIT, _SHORTEST_TRY_S, _LONGEST_TRY_S = 1 / 16, 0.0003, 0.004
_BYTES_OF_PAGE = 2**12

#: Every use of SQLite in this process holds it, whatever the database, and so does a fork: SQLite's own mutexes are
#: the process's, and a child of a fork that happened while a thread was inside SQLite would hang in them.
_lock = new_rlock()
_user = 0  # Which thread or greenlet holds it; 0 is none.
_forking = threading.local()
_databases: WeakSet[Database] = WeakSet()
#: Connections inherited through a fork that came while they were in use: closing one would end what the parent is at.
_inherited: list[sqlite3.Connection] = []
#: Connections of databases that nobody uses any more, for the next user to close.
_unused: list[sqlite3.Connection] = []
#: False in a child of a fork that came while SQLite was in use after all.
_usable = True


class Database:
    """One SQLite connection of this process, opened again after a fork, or when the file was deleted or damaged.

    Args:
        path: The file; None keeps it in memory.

    Raises:
        StoreError: The file can't be opened, or was written by a newer version.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        #: Where it was to be; `path` is None too where that couldn't be used any more.
        self.place = path
        #: Counts the times it was opened: what was written before may not be there any more.
        self.openings = 0
        #: Counts the files that took the place of one that was lost: the numbers of spans start over.
        self.files = 0
        #: Counts those of them that were deleted, replaced or damaged, with all that was in them.
        self.losses = 0
        self._connection: sqlite3.Connection | None = None
        self._collected: Any = None  # What has the connection closed when this is collected.
        self._parted = False  # For a fork; it is opened again when it is needed.
        self._file: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None
        self._log_path = ""
        self._room = Room()
        self._checkpoints = Checkpoints(self._room)
        self._being_made_since: float | None = None  # When others were first seen making or renaming the file.
        self._is_begun = False  # From then on nobody is told by an exception that the file is of no use.
        _databases.add(self)
        try:
            self._take("", _MOST_BUSY_AT_FIRST_S)
        except (sqlite3.Error, OSError) as error:
            if not (is_full(error) or is_busy(error) or is_short_of_descriptors(error)):
                raise StoreError(f"Can't use the store {str(path)!r}: {error}") from error
            # The writer tries again: there may be room or descriptors then, or others have let go of it.
        else:
            _give_back()
        self._is_begun = True

    @property
    def is_open(self) -> bool:
        """Whether this process has a connection; the child of a fork has none before it needs one."""
        return self._connection is not None or self._parted

    @contextmanager
    def reading(self, patience_s: float = _MOST_BUSY_READING_S) -> Iterator[sqlite3.Connection]:
        """Give the connection for some short reads.

        Args:
            patience_s: The longest wait for other threads, and for processes that are making the file.
        """
        connection = self._take("", patience_s)
        try:
            yield connection
        except sqlite3.DatabaseError as error:
            if self._replace_if_useless(error):
                raise sqlite3.OperationalError(f"it is of no use any more: {error}") from error
            raise
        finally:
            _give_back()

    @contextmanager
    def writing(self, patience_s: float = _MOST_BUSY_S, *, grows: int = 0) -> Iterator[sqlite3.Connection]:
        """Give the connection inside a transaction, which is committed at the end or rolled back on an exception.

        Args:
            patience_s: The longest wait for other threads and processes.
            grows: About how many characters of spans it adds: none while a full disk has room for notes of deliveries
                alone.

        Raises:
            sqlite3.OperationalError: The disk is full or failing, or others kept the file for so long.
        """
        if grows and self.path is not None:
            self._room.require(self.path, grows)
        # At once for writing: a transaction that reads first can fail with no chance to wait.
        connection = self._take("BEGIN IMMEDIATE", patience_s)
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            if not grows:
                self._make_room_after(error)
            if self._replace_if_useless(error):
                raise sqlite3.OperationalError(f"it is of no use any more: {error}") from error
            raise
        finally:
            _give_back()
        if self.path is not None:
            self._checkpoints.committed(self.path, self._file, grows)

    @contextmanager
    def written(self, statement: str, values: Sequence[Any], characters: int, patience_s: float) -> Iterator[None]:
        """Commit one statement; in the body it is done, and no other thread of this process has used the file yet.

        Each statement lets go of the interpreter, and has to get it back from threads that never wait.

        Args:
            statement: A transaction of its own, which adds spans.
            values: Its parameters.
            characters: About how long they are together.
            patience_s: The longest wait for other threads and processes.

        Raises:
            sqlite3.OperationalError: The disk is full or failing, or others kept the file for so long.
        """
        if self.path is not None:
            self._room.require(self.path, characters)
        self._take(statement, patience_s, values)
        try:
            yield
        finally:
            _give_back()
        if self.path is not None:
            self._checkpoints.committed(self.path, self._file, characters)

    def shrink(self, most_pages: int, patience_s: float) -> bool:
        """Make the file smaller by pages that hold nothing any more.

        Args:
            most_pages: So many at most.
            patience_s: The longest wait for other threads.

        Returns:
            Whether there are more.
        """
        if self.path is None:
            return False
        try:
            with self.reading(patience_s) as connection:
                (empty,) = connection.execute("PRAGMA freelist_count").fetchone()
                if empty:  # As a script: `execute` stops after the first page.
                    connection.executescript(f"PRAGMA incremental_vacuum({most_pages})")
        except sqlite3.OperationalError as error:
            self._make_room_after(error)
            raise
        if empty and self.path is not None:
            self._checkpoints.committed(self.path, self._file, _BYTES_OF_PAGE * min(empty, most_pages))
        return bool(empty > most_pages)

    def most_at_once(self, most: int) -> int:
        """Return how many bytes one commit may have: so many at most, and what its disk has room for."""
        return most if self.path is None else min(most, self._room.for_log(self.path))

    def most_bytes(self, most: int, *, is_full: bool) -> int:
        """Return how many bytes it may take: so many at most, and what leaves its disk some room for others.

        Args:
            most: The most there may be of it anywhere.
            is_full: It couldn't be written to for want of room.
        """
        of_disk = None if self.path is None else self._room.most(self.path, is_full=is_full)
        return most if of_disk is None else min(most, of_disk)

    def _make_room_after(self, error: BaseException) -> None:
        """Give the reserve up if the disk was too full for what needs it, and write over what the log has."""
        if self.path is not None and is_full(error):
            self._room.spend(self.path)
            # The next try has room, which others may take; the log's is its own once it is moved into the file.
            self._checkpoints.committed(self.path, self._file, at_once=True)

    def _take(self, begin: str, patience_s: float, values: Sequence[Any] = ()) -> sqlite3.Connection:
        """Return the connection with the lock held, which is free while other processes are waited for."""
        began = monotonic()
        give_up_at = began + patience_s
        while True:
            _wait_for_lock(give_up_at)
            try:
                connection = self._connected()
                if begin:
                    connection.execute(begin, values)
                return connection
            except BaseException as error:
                replaced = self._replace_if_useless(error)
                _give_back()
                if not replaced and (not is_busy(error) or monotonic() > give_up_at):
                    raise
            longest = min(max((monotonic() - began) * _PART_OF_WAIT, _SHORTEST_TRY_S), _LONGEST_TRY_S)
            rest(random.uniform(longest / 2, longest))

    def _connected(self) -> sqlite3.Connection:
        if not _usable:
            raise sqlite3.OperationalError("the process was forked in the middle of using SQLite")
        _close_unused()
        if self._connection is not None and not self._collected.alive:
            self._connection = None  # A finalizer that was collected together with this records yet.
        if self.is_open and self.path is not None:
            self._look_for(self.path)
        if self._connection is None:
            self._connection = self._opened()
            # Closed by the next who uses SQLite, as this may be collected in the middle of it; and held until then, or
            # it could be collected at the same time, which Python warns of.
            self._collected = finalize(self, _unused.append, self._connection)
            self._collected.atexit = False
            self._parted = False
            self.openings += 1
        return self._connection

    def _look_for(self, path: Path) -> None:
        """Let go of the file if it, or its log, was deleted or replaced, or the file emptied, while it was in use."""
        found, is_empty = looked_at(path)
        is_lost = found != self._file or is_empty
        if not is_lost and (self._connection is None or looked_at(self._log_path)[0] == self._log):
            return
        warn_once(
            f"moved:{path}",
            "The store %r, or its log beside it, was deleted or replaced while it was in use; pltrace goes on with the "
            "one that is there now, or a new one.",
            str(path),
        )
        self._disconnect()
        # Who closes a file last puts into it what its log has, though it was deleted, and deletes the log's index.
        if is_lost or os.path.exists(f"{path}-shm"):
            self.files += 1
            self.losses += 1

    def _opened(self) -> sqlite3.Connection:
        if self.path is None:
            return opened_memory()
        since = self._being_made_since
        try:
            connection = opened_file(
                self.path, regardless=since is not None and monotonic() > since + MOST_BUSY_FOLDER_S
            )
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, BeingMadeError) and since is None:
                self._being_made_since = monotonic()
            if is_full(error) or (has_failed(error) and self._room.is_little(self.path)):
                self._room.spend(self.path)
                raise sqlite3.OperationalError(str(error)) from error
            if is_short_of_descriptors(error):
                raise sqlite3.OperationalError(f"{error}: the process has too many files open") from error
            if not self._is_begun or is_busy(error):
                raise
            self._use_memory(error)
            return opened_memory()
        self._being_made_since = None
        self._log_path = f"{self.path}-wal"
        self._file, self._log = looked_at(self.path)[0], looked_at(self._log_path)[0]
        return connection

    def _use_memory(self, why: object) -> None:
        """Go on in memory, with the lock held, after telling why; what is in the file stays for other processes."""
        warn_once(
            "no_store",
            "Can't use the store %r: %s. From now on spans are kept in memory, and lost with the process unless "
            "they are delivered before.",
            str(self.path),
            why,
        )
        self._disconnect()
        self.path = None
        self.files += 1

    def give_up_file(self) -> None:
        """Go on in memory: at the end of a process whose disk is full, what can be delivered needs no disk."""
        _wait_for_lock(monotonic() + _MOST_BUSY_READING_S)
        try:
            self._disconnect()
            self.path = None
            self.files += 1
        finally:
            _give_back()

    def part(self) -> None:
        """Close the file, with the lock held, before a fork.

        Else SQLite takes the child's own connection for one that shares the locks of the inherited one, and a child has
        no locks: another process would delete the file's log under it.
        """
        if self.path is not None and self._connection is not None:
            close_quickly(self._connection)
            self._connection, self._parted = None, True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._parted = False
        if connection is not None:
            self._collected.detach()
            connection.close()

    def _replace_if_useless(self, error: BaseException) -> bool:
        """Have a new file begun, with the lock held, if this one has turned out to be damaged; return whether.

        Where files can't be locked any more, it is memory that takes its place.
        """
        if self.path is None or self._connection is None:
            return False
        if is_never_locked(error) and not can_lock(self.path.parent):
            self._use_memory("it can't be locked any more, as on NFS whose lock service is gone")
            return True
        if type(error) is not sqlite3.DatabaseError:
            return False
        self._disconnect()
        self.files += 1
        self.losses += 1
        if looked_at(self.path)[0] == self._file:  # Else another process did.
            set_aside(self.path, error)
        return True

    def close(self) -> None:
        """Close the connection; the file's log is merged into it if no other process uses it. Memory stays open."""
        self._checkpoints.end()
        _wait_for_lock(monotonic() + _MOST_BUSY_S)
        try:
            if self.path is not None:
                self._disconnect()
        finally:
            _give_back()


def _wait_for_lock(give_up_at: float) -> None:
    """Take the lock.

    Raises:
        sqlite3.OperationalError: Others held it until then.
        InterruptedUseError: This very thread holds it: a signal handler runs in the middle of what it interrupted.
    """
    global _user
    own = threading.get_ident()
    if _user == own:
        raise InterruptedUseError("the store is locked: what uses it was interrupted")
    while taken(_lock, max(give_up_at - monotonic(), 0.0)):
        if not _user:
            _user = own
            return
        _lock.release()  # It is another greenlet's of this thread, which let others run, as to log.
        if monotonic() > give_up_at:
            break
        rest(_SHORTEST_TRY_S)
    raise sqlite3.OperationalError("the store is locked by a thread of this process")


def _give_back() -> None:
    global _user
    _user = 0
    with suppress(RuntimeError):  # A signal handler forked meanwhile, and this is the child.
        _lock.release()


def close_at_exit(databases: Iterable[Database]) -> None:
    """Close these, in memory too, and what nobody uses any more: Python warns of what the end of a process finds open.

    Args:
        databases: Nothing is recorded into them any more.
    """
    with suppress(sqlite3.Error):
        _wait_for_lock(monotonic() + _MOST_BUSY_AT_FIRST_S)
        try:
            _close_unused()
            for database in databases:
                database._disconnect()
        finally:
            _give_back()


def _close_unused() -> None:
    while _unused:
        _unused.pop().close()


def _before_fork() -> None:
    # A signal handler that forks may have interrupted this thread while it holds the lock, but not inside SQLite.
    give_up_at = monotonic() + LONGEST_FORK_S
    _forking.holds = _lock.acquire(timeout=LONGEST_FORK_S)
    _forking.holds_checkpoints = _checkpoints.before_fork(give_up_at)
    if _forking.holds and not _user:
        with suppress(sqlite3.Error):
            _close_unused()
            for database in _databases:
                database.part()


def _after_fork_in_parent() -> None:
    if _forking.holds_checkpoints:
        _checkpoints.after_fork_in_parent()
    if _forking.holds:
        _lock.release()


def _after_fork_in_child() -> None:
    """Start afresh: a new connection is opened when it is needed."""
    global _lock, _user, _usable
    # Held by this thread since before the fork, or by none; else by one that isn't here any more.
    _usable = _checkpoints.after_fork_in_child() and _usable and _lock.acquire(blocking=False)
    _lock, _user = new_rlock(), 0
    _inherited.extend(_unused)
    _unused.clear()
    for database in _databases:
        database._parted = False
        if database._connection is not None:
            _inherited.append(database._connection)
            database._collected.detach()
            database._connection = None


at_fork(before=_before_fork, in_parent=_after_fork_in_parent, in_child=_after_fork_in_child)
