"""Watches the room on the store's disk, and keeps a little of it back for when there is none."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path

__all__ = ["Room"]

#: What is kept back, in bytes: at most, and the part of a small disk.
_MOST_RESERVED, _PART_RESERVED = 2**20, 8
#: Made again when there is so many times its size: those who wait for room shouldn't take it at once.
_ENOUGH = 2


class Room:
    """The room for one file: its disk's, and a reserve beside the file.

    On a full disk the reserve is given up for notes of what is delivered. Whatever makes the store larger waits until
    it is there again.
    """

    def __init__(self) -> None:
        self._is_reserved = True

    def left(self, path: Path) -> int:
        """Return how many bytes the disk of a file has left, after looking after the reserve."""
        try:
            disk = shutil.disk_usage(path.parent)
        except OSError:
            return 0
        self._is_reserved = self._reserve(path, disk.free, min(_MOST_RESERVED, disk.total // _PART_RESERVED))
        return disk.free

    def is_little(self, path: Path) -> bool:
        """Return whether the disk of a file is as good as full."""
        try:
            return shutil.disk_usage(path.parent).free < _MOST_RESERVED
        except OSError:
            return False

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

    def require(self, path: Path) -> None:
        """See that the reserve wasn't given up.

        Raises:
            sqlite3.OperationalError: It was, and there is no room yet for another.
        """
        if not self._is_reserved:
            self.left(path)
            if not self._is_reserved:
                raise sqlite3.OperationalError("database or disk is full")


def _reserve_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-reserve")
