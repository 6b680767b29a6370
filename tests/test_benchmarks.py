"""The benchmark runs; what it measures is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import report

ROOT = Path(__file__).resolve().parents[1]


def _run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", "--scale", "0.0005", "--processes", "1", "--out", str(out)]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280)


def _environment(out: Path, peer: str) -> None:
    """Let this Python pass for the environment of a peer."""
    python = out / "peers" / peer / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (out / "peers" / peer / "installed").touch()


@pytest.mark.timeout(300)  # Nine processes more, each with LangChain to import.
def test_one_command_measures_all_sections_and_writes_tables_and_a_plot(tmp_path: Path) -> None:
    """`python -m tests.benchmarks` measures every section and leaves a report, a plot and the raw numbers."""
    done = _run(tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.json").read_text().splitlines()]
    sections = {result["section"] for result in results}
    assert sections == {
        "versions", "calls", "paced", "threads", "total", "throughput", "bytes", "flatness", "off", "memory", "parts",
        "tails", "by thread",
    }  # fmt: skip
    tracers = {"none", "no-op", "prototype", "pltrace"}
    assert {r["tracer"] for r in results if "tracer" in r and r["section"] not in ("off", "parts")} == tracers
    told = (tmp_path / "report.md").read_text()
    assert "| decorated call, switched off |" in told
    assert "| chain, from 4 threads |" in told
    for how in ("| pltrace, never on | never switched on |", "| pltrace | configure(enabled=False), after it was on |"):
        assert how in told
    memory = told.partition("Memory of a process")[2].partition("##")[0]
    assert {line.split("|")[1].strip() for line in memory.splitlines()[4:] if line} == tracers
    for steps in told.split("what its parts add")[1:]:
        assert "| spans delivered | so: handler | waiting objects | writer | delivery |" in steps
        for workload in ("LLM call", "agent of 61 runs", "async chain of 5 runs", "decorated call", "with block"):
            assert f"\n| {workload} | " in steps
    for tracer in ("none", "no-op", "pltrace"):
        assert f"| chain of 5 runs | {tracer} | slowest 1 % | " in told
    assert "\n| pltrace-writer | " in told.partition("by thread")[2]
    for heading in ("Added to one operation", "p50 / p99 / worst", "bytes on disk", "While nobody switches it on"):
        assert heading in told
    assert (tmp_path / "added.svg").read_text().startswith("<svg ")


def test_a_tracer_that_cannot_be_measured_is_named_and_the_rest_is_written(tmp_path: Path) -> None:
    """A peer that fails is in the report and on the console with its error, and the benchmark's exit code says so."""
    _environment(tmp_path, "braintrust")  # Which isn't there.
    done = _run(tmp_path, "--peers", "braintrust", "--sections", "total", "--no-inert")
    assert done.returncode == 1
    told = (tmp_path / "report.md").read_text()
    for place in (told, done.stderr):
        assert "braintrust: ModuleNotFoundError: No module named 'braintrust'" in place
    assert "| braintrust | braintrust not installed, langchain-core " in told
    assert "| pltrace | pltrace " in told
    assert told.count("CPU of the whole process") == 1


def test_what_was_measured_is_told_where_pltrace_fails_in_the_middle() -> None:
    """A report is written of whatever there is, in whichever process it was measured."""
    results = [
        {"process": process, "section": section, "workload": "LLM call" if section == "calls" else "", "tracer": tracer,
         "cpu": [cpu, cpu], "wall": [cpu, cpu], "yardstick": [1.0, 1.0]}
        for process, section in (("pltrace", "total"), ("langfuse", "calls"))
        for tracer, cpu in {"none": 10.0, "no-op": 11.0, process: 30.0}.items()
    ]  # fmt: skip
    told = report.markdown(results, [], {"pltrace": "RuntimeError: it fell over"})
    assert "Not measured, or not to the end: pltrace: RuntimeError: it fell over" in told
    assert "| LLM call | 10.0 | 1.00 |  | 20.0 |" in told
    assert "| pltrace | 20.0 |" in told


def test_peers_are_switched_off_and_wait_for_a_slow_server(tmp_path: Path) -> None:
    """promptlayer, which is there, is measured as a peer: its decorator off, its requests also with a slow server."""
    _environment(tmp_path, "log_request")
    done = _run(tmp_path, "--peers", "log_request", "--sections", "slow-server,off", "--no-inert")
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "report.md").read_text()
    assert "| log_request | no enable_tracing | " in told
    slow = told.partition("answers after 50 ms")[2].partition("##")[0]
    walls = {line.split("|")[1].strip(): line.split("|")[2] for line in slow.splitlines()[4:] if line}
    # Ten times as many requests take ten times as long; less what the calls without them took longer.
    assert float(walls["LLM call"].replace(",", "")) > 40_000
    assert float(walls["agent of 61 runs"].replace(",", "")) > 400_000


def test_what_another_thread_costs_is_measured_too() -> None:
    """`python -m tests.benchmarks.turns` prints a line for each length of another thread's turns."""
    command = [sys.executable, "-m", "tests.benchmarks.turns", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["0", "0.2", "0.5", "1", "2", "4"]
