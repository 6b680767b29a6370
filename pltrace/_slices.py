"""Lets other threads run while one of ours works: the interpreter is one thread's at a time."""

from __future__ import annotations

from pltrace._clock import monotonic
from pltrace._greenlets import sleep

__all__ = ["Slices"]

#: So long one of our threads keeps the interpreter at most, item by item. One that encodes hundreds of spans in one go
#: makes a quarter of the callers wait for it, up to Python's switch interval of 5 ms each time that they let go.
_SLICE_S, _LONG_SLICE_S = 0.0005, 0.002
#: Not zero: since Python 3.13 a sleep of nothing returns before any waiting thread has woken.
_PAUSE_S = 0.00001


class Slices:
    """Cuts a long piece of work up; made when it begins.

    Args:
        long: For what is seldom, such as a long text, and where more comes in than is worked off: to get the
            interpreter back from a thread that never waits takes 5 ms, whatever one does with it then.
    """

    __slots__ = ("_length", "_until")

    def __init__(self, *, long: bool = False) -> None:
        self._length = _LONG_SLICE_S if long else _SLICE_S
        self._until = monotonic() + self._length

    def between(self) -> None:
        """Let other threads run, if this one had its slice; called between items."""
        if monotonic() > self._until:
            sleep(_PAUSE_S)
            self._until = monotonic() + self._length
