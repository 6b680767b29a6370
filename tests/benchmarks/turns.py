"""What any other thread costs a busy one: `python -m tests.benchmarks.turns [--rounds 100]`.

No tracer is at work here. One thread runs LangChain chains without a pause; a second one takes the interpreter, works
for so long, lets go of it, and wants it again. Batches without and with it come in drawn order, and each is compared
with the one of its round that had none. What the first thread's CPU time grows by is what work beside it costs, whoever
does it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from dataclasses import dataclass, field

from tests.benchmarks.workloads import make

#: How long the second thread works at each turn, in milliseconds; None: it doesn't want the interpreter.
LENGTHS_MS = (None, 0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
CHAINS = 40
_DOCUMENT = [{"number": number, "texts": [str(number), "text", None], "inner": {"half": 0.5}} for number in range(4)]


@dataclass
class Seen:
    """What was seen with turns of one length.

    Attributes:
        added_us: What a chain took more than without the second thread, of the first thread's CPU, a mean a round.
        turns: How many turns there were.
        work_s: The CPU of all of them.
    """

    added_us: list[float] = field(default_factory=list)
    turns: int = 0
    work_s: float = 0.0


class Second:
    """The thread that works beside the busy one, as a tracer's does: it makes and drops many small objects."""

    def __init__(self) -> None:
        self.turns, self.work_s = 0, 0.0
        self._seconds = 0.0
        self._wanted = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, length_ms: float | None) -> None:
        """Begin to take turns of that length."""
        if length_ms is not None:
            self._seconds = length_ms / 1e3
            self._wanted.set()

    def end(self) -> tuple[int, float]:
        """End; return how many turns there were since the beginning, and their CPU in seconds."""
        self._wanted.clear()
        time.sleep(0.02)  # It ends the turn that it is at.
        turns, work_s, self.turns, self.work_s = self.turns, self.work_s, 0, 0.0
        return turns, work_s

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            began, until = time.thread_time(), time.perf_counter() + self._seconds
            while time.perf_counter() < until:
                json.loads(json.dumps(_DOCUMENT))
            self.work_s += time.thread_time() - began
            self.turns += 1
            time.sleep(max(self._seconds, 0.0001))


def measure(rounds: int) -> dict[float | None, Seen]:
    """Return what was seen, by length."""
    chain = make("chain of 5 runs", None, None)
    assert chain is not None
    second = Second()
    seen = {length: Seen() for length in LENGTHS_MS}
    for number in range(rounds + 1):
        took_us = {}
        for length in random.Random(number).sample(LENGTHS_MS, len(LENGTHS_MS)):
            second.begin(length)
            began = time.thread_time_ns()
            for _ in range(CHAINS):
                chain()
            took_us[length] = (time.thread_time_ns() - began) / 1e3 / CHAINS
            turns, work_s = second.end()
            if number:  # The first round warms up.
                seen[length].turns += turns
                seen[length].work_s += work_s
        if number:
            for length in LENGTHS_MS:
                seen[length].added_us.append(took_us[length] - took_us[None])
    return seen


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="how many batches of each (default 100)")
    rounds = parser.parse_args().rounds
    print("| length of a turn, ms | turns a chain | added to a chain, µs | by each turn, µs | by each µs of work, µs |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for length, seen in measure(rounds).items():
        if length is not None:
            chains = rounds * CHAINS
            added = statistics.median(seen.added_us)
            by_turn = added * chains / max(seen.turns, 1)
            by_work = f"{added * chains / seen.work_s / 1e6:.2f}" if length else ""
            print(f"| {length:g} | {seen.turns / chains:.2f} | {added:.0f} | {by_turn:.0f} | {by_work} |")


if __name__ == "__main__":
    main()
