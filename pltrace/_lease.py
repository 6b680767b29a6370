"""Says which process delivers what: each owns what it recorded, on a lease, and takes over what others left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from pltrace._background import sleep
from pltrace._database import Database

__all__ = ["LEASE_S", "Lease"]

#: An owner that hasn't been seen for so long has lost its lease, even if its process is still there (stopped, hung).
LEASE_S = 60.0
#: The most rows that one transaction takes over: others wait meanwhile.
_MOST_IN_STEP = 100
_LEAVING_PATIENCE_S = 1.0
#: The owners of what is pending, found by leaps through the index: there can be a hundred thousand rows of each.
_OWNERS = """
WITH RECURSIVE found (owner) AS (
    SELECT min(owner) FROM {table} WHERE state = 0{only}
    UNION ALL
    SELECT (SELECT min({table}.owner) FROM {table} WHERE state = 0{only} AND {table}.owner > found.owner)
    FROM found WHERE found.owner IS NOT NULL
) SELECT owner FROM found WHERE owner IS NOT NULL
"""


class Lease:
    """What gives this process the right to deliver what it recorded.

    Args:
        database: Where the leases are kept.
        exporters: Names of the exporters that spans are delivered to; with none, there is nothing to own.
    """

    def __init__(self, database: Database, exporters: Sequence[str]) -> None:
        self._database = database
        self._exporters = tuple(exporters)
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork: a new owner."""
        self.owner = uuid4().hex
        self._seen_at = 0.0  # When this process last renewed its lease,
        self._seen_in = 0  # and at which opening of the file.

    def renew(self) -> None:
        """Renew it, when it is getting old."""
        if self.is_old:
            with self._database.writing() as connection:
                self.renew_in(connection)

    def renew_in(self, connection: Any) -> None:
        """Renew it in a transaction that is open anyway."""
        if self.is_old:
            connection.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)",
                (self.owner, _host(), os.getpid(), time.monotonic_ns()),
            )
            self._seen_at, self._seen_in = time.monotonic(), self._database.openings

    @property
    def is_old(self) -> bool:
        """Whether it has to be renewed; with no exporters there is none."""
        elsewhere = self._seen_in != self._database.openings
        old = not self._seen_at or elsewhere or time.monotonic() - self._seen_at > LEASE_S / 4
        return old and bool(self._exporters)

    def adopt(self) -> int:
        """Take over what processes left that ended or lost their lease; return how many spans and operations."""
        with self._database.reading() as connection:
            gone = self._gone(connection)
        return sum(self._adopt_from(owner) for owner in gone)

    def _gone(self, connection: Any) -> list[str]:
        """Return the owners of something that is pending here whose processes have ended or lost their lease."""
        # Looked at first: a process that comes in between has its row by then, which it commits with its first span.
        owners = {
            row[0]
            for table, only in (
                *(("delivery_ranges", exporter) for exporter in self._exporters),
                ("operations", None),
            )
            for row in connection.execute(
                _OWNERS.format(table=table, only="" if only is None else " AND exporter = :only"),
                {"only": only},
            )
        }
        known = {row["owner"]: self._is_gone(row) for row in connection.execute("SELECT * FROM owners")}
        pending = [owner for owner in owners if owner != self.owner and known.get(owner, True)]
        return pending + [owner for owner, is_gone in known.items() if is_gone and owner not in owners]

    def _adopt_from(self, owner: str) -> int:
        """Take over a process's spans and operations, in steps: nobody should wait for a large backlog."""
        adopted, taken = 0, [_MOST_IN_STEP]
        while max(taken) == _MOST_IN_STEP:
            with self._database.writing() as connection:
                began = time.monotonic()
                taken = [
                    connection.execute(
                        f"UPDATE {table} SET owner = :ours WHERE {key} IN"
                        f" (SELECT {key} FROM {table} WHERE owner = :gone AND state = 0{only} ORDER BY {key}"
                        f" LIMIT {_MOST_IN_STEP}){only}",
                        {"ours": self.owner, "gone": owner, "exporter": exporter},
                    ).rowcount
                    for table, key, exporter, only in (
                        *(
                            ("delivery_ranges", "first", exporter, " AND exporter = :exporter")
                            for exporter in self._exporters
                        ),
                        ("operations", "id", None, ""),
                    )
                ]
                if max(taken) < _MOST_IN_STEP:
                    connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
            adopted += sum(taken)
            sleep(time.monotonic() - began)  # For others to write.
        return adopted

    def _is_gone(self, row: Any) -> bool:
        if row["owner"] == self.owner:
            return False
        age_s = (time.monotonic_ns() - row["seen_at_ns"]) / 1e9
        if not -LEASE_S <= age_s <= LEASE_S:  # A lease from the future is from before the machine started.
            return True
        return row["host"] == _host() and not _is_alive(row["pid"])

    def leave(self) -> None:
        """Give it up: the next process takes over what is left, at once."""
        self._seen_at = 0.0
        with self._database.writing(_LEAVING_PATIENCE_S) as connection:
            connection.execute("DELETE FROM owners WHERE owner = ?", (self.owner,))


def _host() -> str:
    """Return what a process id is unique in: the machine, and the container if there is one."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{os.uname().nodename if hasattr(os, 'uname') else os.environ.get('COMPUTERNAME', '')} {namespace}"


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # Only the lease tells.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        # Killed, and nobody has asked for its exit code yet; in a container maybe nobody ever does.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (OSError, IndexError):
        return True
