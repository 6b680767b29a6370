"""Tells how time passes for waits, leases and back-off, also where a test stops the program's clocks.

freezegun puts others in the place of `time.monotonic` and `time.perf_counter`, in all modules that have them; who waits
by one that stands still waits for ever.
"""

from __future__ import annotations

import time
from functools import partial

__all__ = ["monotonic", "monotonic_ns"]

#: As those of `time`. They are asked for by another name, as that itself may be replaced before this is imported.
if hasattr(time, "clock_gettime"):
    monotonic = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    monotonic_ns = partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)
else:
    monotonic, monotonic_ns = partial(time.monotonic), partial(time.monotonic_ns)
