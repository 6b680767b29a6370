"""PromptLayer is down, slow, strange or in doubt: nothing is lost, nothing is logged twice, nobody waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.faults.support import PRELUDE, Measured, all_delivered, balance, deliver_rest, told
from tests.support.http_double import HANG, Fault
from tests.support.programs import ended, module, run, start
from tests.support.promptlayer_server import PromptLayerServer

#: A hang is told from none by this; the figures themselves are printed.
MOST_S = 5.0

_OUTAGES = {
    "refused": None,
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "5"}),
    "hangs": HANG,
}


@pytest.mark.slow
@pytest.mark.parametrize("outage", _OUTAGES)
def test_outage_while_the_program_goes_on(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    outage: str,
) -> None:
    """An outage in the middle of a program's life loses nothing, and its calls never notice."""
    fault = _OUTAGES[outage]
    if fault is None:
        promptlayer.stop()
    promptlayer.fault = fault
    source = PRELUDE + "warm()\ntimed(ask, 300, rate=20)\ntimed.report()\nassert pltrace.flush(60)"
    program = start(source, tmp_path, **settings)
    recovery = threading.Timer(10.0, lambda: (setattr(promptlayer, "fault", None), promptlayer.start()))
    recovery.start()
    report = told(ended(program, timeout=110.0))
    recovery.join()
    all_delivered(promptlayer, store, 600)
    assert report["worst_ms"] < 1000 * MOST_S
    measured("worst call", report["worst_ms"], "ms")
    measured("p99 of calls", report["p99_us"] / 1e3, "ms")


@pytest.mark.parametrize("by", ["the next process", "sync"])
def test_down_for_a_whole_life(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, by: str
) -> None:
    """What a process recorded that never met PromptLayer is delivered by the next, or by `pltrace sync`, once."""
    promptlayer.stop()
    told(run(PRELUDE + "warm()\ntimed(ask, 500)\ntimed.report()", tmp_path, **settings))
    assert balance(store, 1000).pending == 1000
    promptlayer.start()
    if by == "sync":
        assert module("sync", **settings).code == 0
    else:
        deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 1000)
