"""Says which process delivers what: each owns what it recorded, on a lease, and takes over what others left."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from pltrace._clock import monotonic, monotonic_ns
from pltrace._database import Database
from pltrace._forks import at_fork
from pltrace._greenlets import sleep
from pltrace._health import warn_once

__all__ = ["LEASE_S", "Lease"]

#: An owner that hasn't been seen for so long has lost its lease, even if its process is still there (stopped, hung).
LEASE_S = 60.0
#: The most rows that one transaction takes over: others wait meanwhile.
_MOST_IN_STEP = 100
#: The longest waits for other processes.
_LONG_PATIENCE_S, _SHORT_PATIENCE_S = 30.0, 1.0
#: The exporter whose spans are an account's of PromptLayer's, as what is asked of requests is; other exporters go by
#: their names alone.
_OF_ACCOUNT = "promptlayer"
#: What is asked of requests that have no id yet: they get one with their spans, in whatever account that is.
_WITHOUT_ID = """ AND request_id IS NULL AND NOT EXISTS (
    SELECT 1 FROM spans JOIN requests USING (seq) WHERE spans.span_id = operations.span_id
)"""
#: All that this process has been in the store; the accounts of its own it changes with its settings.
_own: set[str] = set()
#: The owners of what is pending, found by leaps through the index: there can be a hundred thousand rows of each.
_OWNERS = """
WITH RECURSIVE found (owner) AS (
    SELECT min(owner) FROM {table} WHERE state = 0{only}
    UNION ALL
    SELECT (SELECT min({table}.owner) FROM {table} WHERE state = 0{only} AND {table}.owner > found.owner)
    FROM found WHERE found.owner IS NOT NULL
) SELECT owner FROM found WHERE owner IS NOT NULL
"""


def _image() -> str:
    """Return what tells this program from those that its process was before `exec`; empty where nothing does.

    All interpreters in the process have it in common: where the kernel has put things in memory, this time.
    """
    try:
        return sha256(Path("/proc/self/auxv").read_bytes()).hexdigest()[:8]
    except OSError:
        return ""


_IMAGE = _image()


class _Part(NamedTuple):
    """Some of what processes leave.

    Attributes:
        table: Where it is.
        key: The column that its rows are known by.
        exporter: For whom its spans are; None for what is asked of requests.
        only: Which of the table's rows, as a condition.
    """

    table: str
    key: str
    exporter: str | None = None
    only: str = ""

    @property
    def is_of_account(self) -> bool:
        """Whether it means something to one account of PromptLayer's alone."""
        return self.exporter in (None, _OF_ACCOUNT)


class Lease:
    """What gives this process the right to deliver what it recorded.

    Args:
        database: Where the leases are kept.
        exporters: Names of the exporters that spans are delivered to; with none, there is nothing to own.
        account: Tells PromptLayer's account from others; empty without one.
    """

    def __init__(self, database: Database, exporters: Sequence[str], account: str = "") -> None:
        self._database = database
        self._exporters = tuple(exporters)
        self._account = account
        self._parts = [
            *(_Part("delivery_ranges", "first", exporter, " AND exporter = :exporter") for exporter in exporters),
            _Part("operations", "id"),
        ]
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork: a new owner."""
        self.owner = f"{_IMAGE}{uuid4().hex}" + (f"@{self._account}" if self._account else "")
        _own.add(self.owner)
        #: Counts the times that others took over what this process had to deliver: it was stopped for too long.
        self.losses = 0
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
            if self._seen_at and self._seen_in == self._database.openings:
                known = connection.execute("SELECT 1 FROM owners WHERE owner = ?", (self.owner,)).fetchone()
                self.losses += known is None
            connection.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)",
                (self.owner, _host(), os.getpid(), monotonic_ns()),
            )
            self._seen_at, self._seen_in = monotonic(), self._database.openings

    @property
    def is_old(self) -> bool:
        """Whether it has to be renewed; with no exporters there is none."""
        elsewhere = self._seen_in != self._database.openings
        old = not self._seen_at or elsewhere or monotonic() - self._seen_at > LEASE_S / 4
        return old and bool(self._exporters)

    def adopt(self, *, regardless: bool = False) -> int:
        """Take over what processes left that ended or lost their lease; return how many spans and operations.

        Args:
            regardless: Also the spans that another account was to get; else they wait, and that is told.
        """
        return sum(self._steps(regardless=regardless))

    def adopt_until(self, deadline: float) -> bool:
        """Take over what `adopt` does, in small steps until a monotonic time; return whether nothing is left of it."""
        steps = self._steps(deadline)
        for _ in steps:
            if monotonic() >= deadline:
                break
        return not any(steps)  # Most often there are none, or of processes that left nothing.

    def _steps(self, deadline: float = math.inf, *, regardless: bool = False) -> Iterator[int]:
        """Take over what processes left, step by step; each gives how many spans and operations it were.

        Args:
            deadline: Nobody is waited for beyond it, or not for long.
            regardless: As for `adopt`.
        """
        with self._database.reading() as connection:
            gone = self._gone(connection, regardless=regardless)
        for owner, parts in gone.items():
            yield from self._adopt_from(owner, parts, deadline)

    def _gone(self, connection: Any, *, regardless: bool) -> dict[str, list[_Part]]:
        """Return the processes that have ended or lost their lease, each with what it left that is to be taken over."""
        # Looked at first: a process that comes in between has its row by then, which it commits with its first span.
        left: dict[str, list[_Part]] = {}
        for part in self._parts:
            for (owner,) in connection.execute(
                _OWNERS.format(table=part.table, only=part.only), {"exporter": part.exporter}
            ):
                left.setdefault(owner, []).append(part)
        known = {row["owner"]: self._is_gone(row) for row in connection.execute("SELECT * FROM owners")}
        gone, waiting = {}, []
        for owner in {**left, **known}:
            if owner == self.owner or not known.get(owner, True):
                continue
            parts = left.get(owner, [])
            ours = self._of_them_ours(owner, parts, regardless=regardless)
            if ours or owner in known:
                gone[owner] = ours
            if len(ours) < len(parts):
                waiting.append(owner)
        if waiting and self._account:
            self._tell(connection, waiting)
        return gone

    def _of_them_ours(self, owner: str, parts: list[_Part], *, regardless: bool) -> list[_Part]:
        """Return what of that which a process left is this one's to deliver."""
        if _account_of(owner) in ("", self._account):
            return parts
        if regardless or owner in _own:  # To another account the id of a request says nothing, or is another's.
            return [part if part.exporter else part._replace(only=_WITHOUT_ID) for part in parts]
        return [part for part in parts if not part.is_of_account]

    def _tell(self, connection: Any, owners: Sequence[str]) -> None:
        """Warn of spans that processes left for another account."""
        (spans,) = connection.execute(
            "SELECT coalesce(sum(last - first + 1), 0) FROM delivery_ranges"
            " WHERE exporter = ? AND state = 0 AND owner IN (SELECT value FROM json_each(?))",
            (_OF_ACCOUNT, json.dumps(owners)),
        ).fetchone()
        if spans:
            warn_once(
                "other_account",
                "%d spans in the store %r were recorded with another API key or address of PromptLayer's, and wait for "
                "a process that has these. `pltrace sync` delivers them to the account of the present key, if that is "
                "what is wanted.",
                spans,
                str(self._database.place),
            )

    def _adopt_from(self, owner: str, parts: Sequence[_Part], deadline: float) -> Iterator[int]:
        """Take over what a process left, in steps: nobody should wait for a large backlog."""
        most = _MOST_IN_STEP
        while most == _MOST_IN_STEP:
            patience_s = max(deadline - monotonic(), _SHORT_PATIENCE_S)
            with self._database.writing(min(patience_s, _LONG_PATIENCE_S)) as connection:
                began = monotonic()
                taken = [
                    connection.execute(
                        f"UPDATE {part.table} SET owner = :ours WHERE {part.key} IN"
                        f" (SELECT {part.key} FROM {part.table} WHERE owner = :gone AND state = 0{part.only}"
                        f" ORDER BY {part.key} LIMIT {_MOST_IN_STEP}){part.only}",
                        {"ours": self.owner, "gone": owner, "exporter": part.exporter},
                    ).rowcount
                    for part in parts
                ]
                most = max(taken, default=0)
                if most < _MOST_IN_STEP:
                    connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
            sleep(monotonic() - began)  # For others to write.
            yield sum(taken)

    def _is_gone(self, row: Any) -> bool:
        if row["owner"] == self.owner:
            return False
        age_s = (monotonic_ns() - row["seen_at_ns"]) / 1e9
        if not -LEASE_S <= age_s <= LEASE_S:  # A lease from the future is from before the machine started.
            return True
        if row["host"] != _host():
            return False
        # In the process of this program another has ended that was there before `exec`.
        was_before = row["pid"] == os.getpid() and not row["owner"].startswith(_IMAGE)
        return was_before or not _is_alive(row["pid"])

    def leave(self) -> None:
        """Give it up: the next process takes over what is left, at once."""
        self._seen_at = 0.0
        with self._database.writing(_SHORT_PATIENCE_S) as connection:
            connection.execute("DELETE FROM owners WHERE owner = ?", (self.owner,))


def _account_of(owner: str) -> str:
    """Return the account that an owner delivers to, as its lease was told it; empty without one."""
    return owner.partition("@")[2]


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


at_fork(in_child=_own.clear)
