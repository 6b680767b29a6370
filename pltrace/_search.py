"""Finds the spans of a refused batch that a backend can't take, among those that it takes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from pltrace._exporter import ExportResult
from pltrace._rows import ReadSpan

__all__ = ["PoisonSearch"]

#: So many spans picked at random are tried before a batch counts as refused whatever is in it.
_PICKED = 3


class PoisonSearch:
    """Halves a refused batch until each poisonous span stands alone; the rest is delivered on the way.

    When nothing of it is taken after as many posts as one poisonous span would have cost, it may not be the spans: some
    picked at random are tried, and the newest one that waits behind the batch. If none is taken either, all is kept.

    Args:
        send: Sends some spans and writes down what was taken of them.
        newest: Returns the newest span that waits behind the batch, or None.
    """

    def __init__(self, send: Callable[[list[ReadSpan]], ExportResult], newest: Callable[[], ReadSpan | None]) -> None:
        self._send = send
        self._newest = newest
        #: Number → span and reason of those that are refused while others are taken.
        self.poison: dict[int, tuple[ReadSpan, str]] = {}
        #: Whether anything was taken.
        self.taken = False
        #: The number of a span from behind the batch that was taken, or 0.
        self.witness = 0
        self._tried: set[int] = set()  # Picked and taken: not to be sent again.
        self._early: list[ReadSpan] = []  # Refused before anything was taken: the backend may have refused all then.

    def run(self, batch: list[ReadSpan], refusal: ExportResult, *, doubtful: bool) -> ExportResult:
        """Search a batch that was refused.

        Args:
            batch: The spans.
            refusal: The answer that they got together.
            doubtful: If nothing of it is taken, others are tried before it is put down to the spans.

        Returns:
            `delivered` when all of it is taken or in `poison`; else what stands in the way, and `poison` is empty
            unless something was taken.
        """
        most_posts = 2 * math.log2(len(batch)) + 2
        posts, answer = 1, refusal
        parts = self._split(batch, refusal)
        while parts or (doubtful and not self.taken):
            if doubtful and not self.taken and (posts >= most_posts or not parts):
                answer = self._try_others([span for part in parts for span in part])
                if answer.outcome == "rejected":
                    answer = ExportResult(
                        "retry", f"refuses all of {len(batch)} spans: {answer.reason or refusal.reason}"
                    )
                if answer.outcome != "delivered":
                    break
                continue
            part = [span for span in parts.pop() if span.seq not in self._tried]
            if not part:
                continue
            answer = self._send(part)
            posts += 1
            if answer.outcome == "delivered":
                self.taken = True
            elif answer.outcome == "rejected":
                parts += self._split(part, answer)
            else:
                break
        else:
            answer = self._try_again() if self.taken else ExportResult("delivered")
        if answer.outcome != "delivered":
            for span in self._early if self.taken else [one for one, _ in self.poison.values()]:
                self.poison.pop(span.seq, None)
        return answer

    def _try_again(self) -> ExportResult:
        """Send those that were refused when nothing had been taken yet once more; return what stands in the way."""
        while self._early:
            span = self._early[-1]
            answer = self._send([span])
            if answer.outcome == "delivered":
                del self.poison[span.seq]
            elif answer.outcome != "rejected":
                return answer
            self._early.pop()
        return ExportResult("delivered")

    def _split(self, part: list[ReadSpan], refusal: ExportResult) -> list[list[ReadSpan]]:
        """Return the halves of a refused part, the second first: they are taken from the end. One span is poison."""
        if len(part) == 1:
            self.poison[part[0].seq] = (part[0], refusal.reason)
            if not self.taken:
                self._early.append(part[0])
            return []
        middle = len(part) // 2
        return [part[middle:], part[:middle]]

    def _try_others(self, rest: Sequence[ReadSpan]) -> ExportResult:
        """Send single spans from elsewhere until one is taken; return the last answer."""
        newest = self._newest()
        others = [*([newest] if newest is not None else []), *random.sample(rest, min(_PICKED, len(rest)))]
        answer = ExportResult("rejected")
        for span in others:
            answer = self._send([span])
            if answer.outcome == "delivered":
                self.taken = True
                self._tried.add(span.seq)
                self.witness = span.seq if span is newest else 0
            if answer.outcome != "rejected":
                break
        return answer
