"""Watches the room on the store's disk, and keeps a little of it back for when there is none."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path

__all__ = ["FEWEST_LOG_BYTES", "Room", "is_nearly_full"]

#: What is kept back, in bytes: at most, and the part of a small disk.
_MOST_RESERVED, _PART_RESERVED = 2**20, 8
#: Made again when there is so many times its size: those who wait for room shouldn't take it at once.
_ENOUGH = 2
#: The part of the disk's room that the log may take, and one commit; where that is less, it takes so much in any case,
#: for notes of deliveries: when the disk is full, what it has is written over. So much is left for what it has, too.
_PART_OF_ROOM, FEWEST_LOG_BYTES = 1 / 4, 2**18
#: With no more than that on the disk, it is looked at before each commit.
_LITTLE = 2**23
#: What pltrace's own files leave free for the program: the part of a small disk, and at most.
_PART_FREE, _MOST_FREE = 4, 2**26


class Room:
    """The room for one file: its disk's, and a reserve beside the file.

    On a full disk the reserve is given up for notes of what is delivered. Whatever makes the store larger waits until
    it is there again.
    """

    def __init__(self) -> None:
        self._is_reserved = True
        self._free = 0  # At the last look.

    def look(self, path: Path) -> None:
        """Look how much the disk of a file has left, and after the reserve."""
        self._free = 0
        with suppress(OSError):
            disk = shutil.disk_usage(path.parent)
            self._is_reserved = self._reserve(path, disk.free, _reserve_size(disk.total))
            self._free = disk.free

    def for_log(self, path: Path) -> int:
        """Return how many bytes the log of a file may take, and one commit.

        What takes more can't be moved into the file on a disk that it has filled itself.
        """
        if self._free <= _LITTLE:
            self.look(path)
        return int(max(self._free * _PART_OF_ROOM, FEWEST_LOG_BYTES))

    def is_little(self, path: Path) -> bool:
        """Return whether the disk of a file is as good as full."""
        try:
            return shutil.disk_usage(path.parent).free < _MOST_RESERVED
        except OSError:
            return False

    def most(self, path: Path, *, is_full: bool) -> int | None:
        """Return how large a file may be for its disk to keep some room for others, or None if nobody knows.

        A file that takes no more than that room may stay as it is.

        Args:
            path: The file.
            is_full: It couldn't be written to for want of room: then it may stay only if it can't make room for the
                reserve.
        """
        try:
            disk, taken = shutil.disk_usage(path.parent), path.stat().st_size
        except OSError:
            return None
        if not disk.total:  # As some file systems say that are no disks.
            return None
        reserve, for_others = _reserve_size(disk.total), _for_others(disk.total)
        room = taken + disk.free - for_others - (0 if self._is_reserved else reserve)
        return max(room, _ENOUGH * reserve if is_full else for_others)

    def _reserve(self, path: Path, free: int, size: int) -> bool:
        """Return whether the reserve is there, and make it if there is room for it."""
        reserve = _reserve_of(path)
        with suppress(OSError):
            if reserve.stat().st_size >= size:
                return True
        if free < _ENOUGH * size:
            return False
        try:
            descriptor = os.open(reserve, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
                else:
                    os.write(descriptor, bytes(size))
            finally:
                os.close(descriptor)
        except OSError:  # Others were faster, or the folder can't be written to any more.
            self.spend(path)
            return False
        return True

    def spend(self, path: Path) -> bool:
        """Give the reserve up; return whether there was one."""
        self._is_reserved = False
        try:
            _reserve_of(path).unlink()
        except OSError:
            return False
        return True

    def require(self, path: Path, grows: int) -> None:
        """See that the reserve wasn't given up, and that the disk isn't full after so many bytes more.

        Raises:
            sqlite3.OperationalError: It was, and there is no room yet for another; or it is.
        """
        if not self._is_reserved or self._free <= _LITTLE + grows:
            self.look(path)
            # With 0 nobody knows: what is kept for root isn't counted. SQLite says then.
            if not self._is_reserved or 0 < self._free < FEWEST_LOG_BYTES + grows:
                raise sqlite3.OperationalError("database or disk is full")


def is_nearly_full(path: Path) -> tuple[bool, int]:
    """Return whether little is left of the disk of a file, and how many bytes are."""
    try:
        disk = shutil.disk_usage(path.parent)
    except OSError:
        return False, 0
    return disk.free < _for_others(disk.total) / 2, disk.free


def _reserve_size(total: int) -> int:
    return min(_MOST_RESERVED, total // _PART_RESERVED)


def _for_others(total: int) -> int:
    return min(_MOST_FREE, total // _PART_FREE)


def _reserve_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-reserve")
