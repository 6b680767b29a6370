"""Moves the log of the store's file into the file, on a thread that may wait for the disk, as no commit may."""

from __future__ import annotations

import contextvars
import os
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from pltrace._background import Background
from pltrace._clock import monotonic
from pltrace._greenlets import new_lock, new_rlock, taken
from pltrace._health import failed
from pltrace._room import FEWEST_LOG_BYTES, Room
from pltrace._store_file import MOST_WAL_BYTES, close_quickly, opened_beside

__all__ = ["Checkpoints", "after_fork_in_child", "after_fork_in_parent", "before_fork"]

#: A log that has grown so large, as a part of its bound, is moved into the file, so often; and goes on growing, since
#: the commit that starts it over waits for the disk. One beyond its bound is started over, and one far beyond it is
#: waited for.
_LARGE, _FAR, _EVERY_S = 1 / 4, 2, 0.2
#: How often it is looked at, at most, and at least; in between as soon as it has grown by so much, be it by commits
#: alone: each look lets go of the interpreter five times, and has to get it back.
_LOOK_EVERY_S, _LOOK_AT_LEAST_EVERY_S, _GROWN_BYTES, _COMMIT_BYTES = 0.05, 1.0, 2**18, 2**15
#: A commit waits so long for that.
_LONGEST_WAIT_S = 1.0
_INTERRUPT_EVERY_S = 0.0005

#: What the log begins with, and each page in it, in bytes.
_LOG_HEADER, _FRAME_HEADER = 32, 24

#: Held while a checkpoint's connection is open, and by a fork: a child must inherit no connection.
_connecting = new_rlock()
_connection: sqlite3.Connection | None = None
_fork_waits = False
#: What came through a fork in the middle of it: closing it would end what the parent is at.
_inherited: list[sqlite3.Connection | None] = []
_all: WeakSet[Checkpoints] = WeakSet()


class Checkpoints:
    """Keeps the log of a file small. By itself SQLite does so within a commit, which waits for the disk then.

    Args:
        room: What the disk has left.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._forked()
        _all.add(self)

    def _forked(self) -> None:
        self._running = new_lock()
        self._next_at = self._looked_at = 0.0
        self._grown = 0  # About how much was written since it was looked at, in bytes.

    def committed(
        self, path: Path, file: tuple[int, int] | None, characters: int = 0, *, at_once: bool = False
    ) -> None:
        """Begin a checkpoint if the log has grown large; wait for it if the log is far beyond its bound.

        Args:
            path: Where the file is.
            file: Which file it is.
            characters: About how much the commit has added.
            at_once: Also when it was looked at a moment ago.
        """
        now = monotonic()
        self._grown += characters + _COMMIT_BYTES
        every_s = _LOOK_EVERY_S if self._grown >= _GROWN_BYTES else _LOOK_AT_LEAST_EVERY_S
        if now < self._looked_at + every_s and not at_once and self._grown < self._room.for_log(path):
            return
        if sys.is_finalizing():  # The log isn't looked at: the function `open` is gone before the last finalizers run.
            return
        self._looked_at, self._grown = now, 0
        self._room.look(path)
        most = min(MOST_WAL_BYTES, self._room.for_log(path))
        if most < MOST_WAL_BYTES:
            _lengthen_log(path)
        is_far = _log_takes(path, most * _FAR)
        if not (is_far or _log_holds(path, int(most * _LARGE))):
            return
        if monotonic() >= self._next_at and self._running.acquire(blocking=False):
            self._next_at = monotonic() + (_EVERY_S if most == MOST_WAL_BYTES else 0.0)
            work = contextvars.copy_context()  # Silent as our own threads are, where `sqlite3` is instrumented.
            try:
                Background(lambda: work.run(self._run, path, file, most), "pltrace-checkpoint").start()
            except RuntimeError:  # No thread runs here, or none any more.
                self._run(path, file, most)
        if is_far:
            self.end()

    def end(self) -> None:
        """Wait for the one that is going on, if there is one."""
        if taken(self._running, _LONGEST_WAIT_S):
            self._running.release()

    def _run(self, path: Path, file: tuple[int, int] | None, most: int) -> None:
        global _connection
        try:
            with _connecting:
                _connection = opened_beside(path, file)
                try:
                    # The second moves what was committed during the first, so that little is left for the third, which
                    # keeps others from committing.
                    is_far = _log_takes(path, most * _FAR)
                    last = "TRUNCATE" if is_far else "RESTART"
                    for how in ("PASSIVE", "PASSIVE", last)[: 3 if is_far or _log_holds(path, most) else 1]:
                        if not _fork_waits:
                            _connection.execute(f"PRAGMA wal_checkpoint({how})").fetchall()
                    if most < MOST_WAL_BYTES:
                        _lengthen_log(path)
                finally:
                    connection, _connection = _connection, None
                    close_quickly(connection)
        except (sqlite3.Error, OSError):
            pass  # Something is in the way, or a fork; a later commit begins another.
        except Exception:
            failed("moving the store's log into its file")
        finally:
            self._running.release()


def _log_holds(path: Path, size: int) -> bool:
    """Return whether so many bytes are in the log; when it is started over, its file stays as large as it was.

    Each of its frames bears the two numbers that its header got then (https://sqlite.org/fileformat2.html).
    """
    try:
        with open(f"{path}-wal", "rb", buffering=0) as log:
            header = log.read(_LOG_HEADER)
            frame = int.from_bytes(header[8:12], "big") + _FRAME_HEADER
            log.seek(_LOG_HEADER + size // frame * frame)
            return any(header) and header[16:24] == log.read(_FRAME_HEADER)[8:16]
    except OSError:
        return False


def _log_takes(path: Path, size: int) -> bool:
    """Return whether the log's file is larger than so many bytes, with what is in it and what was."""
    try:
        return os.path.getsize(f"{path}-wal") > size
    except OSError:
        return False


def _lengthen_log(path: Path) -> None:
    """Give the log the least that it takes; SQLite writes over what doesn't bear its header's numbers."""
    if hasattr(os, "posix_fallocate") and not _log_takes(path, FEWEST_LOG_BYTES - 1):
        with suppress(OSError):
            descriptor = os.open(f"{path}-wal", os.O_WRONLY)
            try:
                os.posix_fallocate(descriptor, 0, FEWEST_LOG_BYTES)
            finally:
                os.close(descriptor)


def before_fork(give_up_at: float) -> bool:
    """Interrupt the checkpoint that is going on and keep others from beginning; return whether that could be done.

    It is waited for as long as it waits for the disk.
    """
    global _fork_waits
    _fork_waits = True
    while not _connecting.acquire(timeout=_INTERRUPT_EVERY_S):
        if monotonic() > give_up_at:
            return False
        connection = _connection
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.interrupt()
    return True


def after_fork_in_parent() -> None:
    """Let checkpoints begin again."""
    global _fork_waits
    _fork_waits = False
    _connecting.release()


def after_fork_in_child() -> bool:
    """Start afresh; return whether no checkpoint was going on after all, in the middle of SQLite."""
    global _connecting, _connection, _fork_waits
    # Held by this thread since before the fork, or by none; else by one that isn't here any more.
    usable: bool = _connecting.acquire(blocking=False)
    _inherited.append(_connection)
    _connecting, _connection, _fork_waits = new_rlock(), None, False
    for checkpoints in _all:
        checkpoints._forked()
    return usable
