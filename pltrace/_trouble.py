"""Tells what went wrong with a SQLite database from what SQLite or the system says."""

from __future__ import annotations

import errno
import os
import sqlite3

from pltrace._greenlets import close_now

__all__ = [
    "CONFLICT", "STORE_TROUBLE", "TOO_LARGE", "UNSTORABLE", "InterruptedUseError", "has_failed", "is_busy", "is_full",
    "is_never_locked", "is_short_of_descriptors",
]  # fmt: skip

#: What is raised while the disk is full or failing, or others keep the file.
STORE_TROUBLE = sqlite3.OperationalError
#: What is raised for an answer of a billion bytes.
TOO_LARGE = sqlite3.DataError
#: What is raised for what is there already.
CONFLICT = sqlite3.IntegrityError
#: What is raised for a value that can't be stored, and never can.
UNSTORABLE = (
    ValueError, OverflowError, TypeError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError,
)  # fmt: skip
#: Of the file, its log, the log's index and their folder, with some more.
_MOST_DESCRIPTORS = 8


class InterruptedUseError(sqlite3.OperationalError):
    """A signal handler or finalizer that came in the middle of using SQLite wants to use it."""


def is_busy(error: BaseException) -> bool:
    """Return whether others had the database locked."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def is_never_locked(error: BaseException) -> bool:
    """Return whether SQLite has tried for ten seconds to lock the file, and it wasn't others who had locked it."""
    return isinstance(error, sqlite3.OperationalError) and "locking protocol" in str(error)


def is_full(error: BaseException) -> bool:
    """Return whether the disk is full."""
    full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
    return full or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def has_failed(error: BaseException) -> bool:
    """Return whether the disk failed SQLite, which says so too where there is no room for the log's index."""
    return isinstance(error, sqlite3.OperationalError) and "disk I/O" in str(error)


def is_short_of_descriptors(error: BaseException) -> bool:
    """Return whether a file couldn't be opened because too many are; SQLite doesn't say so, and needs several."""
    if isinstance(error, sqlite3.OperationalError) and "unable to open" in str(error):
        opened: list[int] = []
        try:
            while len(opened) < _MOST_DESCRIPTORS:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as found:
            error = found
        for descriptor in opened:
            close_now(descriptor)
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
