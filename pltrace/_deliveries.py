"""Notes which spans are pending, delivered or in quarantine for an exporter, by ranges of their numbers: few rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "DELIVERED", "PENDING", "QUARANTINED", "RENEWED", "SENT", "Delivery", "change", "cut", "kept_up_to",
    "pending",
]  # fmt: skip

PENDING, DELIVERED, QUARANTINED = 0, 1, 2
SENT, RENEWED = 1, 2


class Delivery(NamedTuple):
    """What is known of the delivery of some spans.

    Attributes:
        state: Pending, delivered or in quarantine.
        owner: The process that delivers them; of what isn't pending, nobody.
        uncertain: `SENT`: they were sent, and no whole answer has come; `RENEWED`: an earlier version of them was.
        error: Why they are in quarantine, or weren't taken at the last try.
    """

    state: int
    owner: str = ""
    uncertain: int = 0
    error: str | None = None


class _Range(NamedTuple):
    first: int
    last: int
    delivery: Delivery


#: The ranges that hold some of the numbers or touch them, and the one before.
_AROUND = """
SELECT first, last, state, owner, uncertain, error FROM delivery_ranges WHERE exporter = :exporter
AND first >= coalesce((SELECT max(first) FROM delivery_ranges WHERE exporter = :exporter AND first < :first), 0)
AND first <= :last + 1 ORDER BY first
"""


def pending(connection: Any, exporter: str, owner: str, most: int, *, unsent: bool = False) -> dict[int, int]:
    """Return the first pending spans of an owner, in order: number → what is uncertain about it.

    With `unsent`, only those that weren't sent as they are.
    """
    found: dict[int, int] = {}
    for first, last, uncertain in connection.execute(
        "SELECT first, last, uncertain FROM delivery_ranges WHERE exporter = ? AND owner = ? AND state = 0"
        " AND uncertain <> ? ORDER BY first LIMIT ?",
        (exporter, owner, SENT if unsent else -1, most),
    ).fetchall():
        found.update(dict.fromkeys(range(first, min(last, first + most - len(found) - 1) + 1), uncertain))
        if len(found) == most:
            break
    return found


def change(connection: Any, exporter: str, seqs: Iterable[int], held: Delivery, delivery: Delivery) -> set[int]:
    """Note what became of spans.

    Args:
        connection: In a transaction.
        exporter: Whom they are for.
        seqs: Their numbers.
        held: State and owner that they have to have, else they stay as they are.
        delivery: What they get.

    Returns:
        The numbers of those that were changed.
    """
    return _changed(connection, exporter, seqs, held, delivery)


def cut(connection: Any, seqs: Iterable[int]) -> None:
    """Forget deleted spans."""
    numbers = list(seqs)
    for (exporter,) in connection.execute("SELECT exporter FROM exporters").fetchall():
        _changed(connection, exporter, numbers, None, None)


def kept_up_to(connection: Any, seq: int) -> int | None:
    """Return the last of the spans that a span stands in the middle of that aren't all delivered yet, or None."""
    (last,) = connection.execute(
        "SELECT max(last) FROM exporters CROSS JOIN delivery_ranges"
        " WHERE delivery_ranges.exporter = exporters.exporter AND last >= :seq AND state <> 1 AND first ="
        " (SELECT max(first) FROM delivery_ranges WHERE exporter = exporters.exporter AND first <= :seq)",
        {"seq": seq},
    ).fetchone()
    return None if last is None else int(last)


def _changed(
    connection: Any, exporter: str, seqs: Iterable[int], held: Delivery | None, delivery: Delivery | None
) -> set[int]:
    runs = _runs(sorted(seqs))
    if not runs:
        return set()
    before = _around(connection, exporter, runs[0][0], runs[-1][1])
    after: list[_Range] = []
    changed: list[int] = []
    at = 0
    for one in before:
        rest = one.first
        if held is None or one.delivery[:2] == held[:2]:
            while at < len(runs) and runs[at][0] <= one.last:
                first, last = max(runs[at][0], one.first), min(runs[at][1], one.last)
                if first <= last:
                    after += _range(rest, first - 1, one.delivery)
                    after += _range(first, last, delivery)
                    changed += range(first, last + 1)
                    rest = last + 1
                if runs[at][1] > one.last:
                    break
                at += 1
        after += _range(rest, one.last, one.delivery)
    _put(connection, exporter, before, after)
    return set(changed)


def _range(first: int, last: int, delivery: Delivery | None) -> list[_Range]:
    """Return a range, or none."""
    return [] if first > last or delivery is None else [_Range(first, last, delivery)]


def _runs(seqs: Sequence[int]) -> list[tuple[int, int]]:
    """Return ordered numbers as first and last of those that follow one another."""
    runs: list[tuple[int, int]] = []
    for seq in seqs:
        if runs and seq == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], seq)
        else:
            runs.append((seq, seq))
    return runs


def _around(connection: Any, exporter: str, first: int, last: int) -> list[_Range]:
    return [
        _Range(row[0], row[1], Delivery(*row[2:]))
        for row in map(tuple, connection.execute(_AROUND, {"exporter": exporter, "first": first, "last": last}))
    ]


def _put(connection: Any, exporter: str, before: Sequence[_Range], after: Sequence[_Range]) -> None:
    """Replace ranges by others, which become one where they follow one another and nothing tells them apart."""
    merged: list[_Range] = []
    for one in after:
        if merged and merged[-1].last + 1 == one.first and merged[-1].delivery == one.delivery:
            one = merged.pop()._replace(last=one.last)
        merged.append(one)
    gone, new = set(before).difference(merged), set(merged).difference(before)
    connection.executemany(
        "DELETE FROM delivery_ranges WHERE exporter = ? AND first = ?", [(exporter, one.first) for one in gone]
    )
    connection.executemany(
        "INSERT INTO delivery_ranges VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(exporter, one.first, one.last, *one.delivery) for one in new],
    )
