"""The benchmark runs; what it measures is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(300)  # Four processes more, each with LangChain to import.
def test_one_command_measures_all_sections_and_writes_tables_and_a_plot(tmp_path: Path) -> None:
    """`python -m tests.benchmarks` measures every section and leaves a report, a plot and the raw numbers."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks",
        "--scale",
        "0.0005",
        "--processes",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.json").read_text().splitlines()]
    sections = {result["section"] for result in results}
    assert sections == {"calls", "paced", "threads", "total", "throughput", "bytes", "flatness"}
    assert {result["tracer"] for result in results if "tracer" in result} == {"none", "no-op", "prototype", "pltrace"}
    report = (tmp_path / "report.md").read_text()
    for heading in ("Added to one operation", "p50 / p99 / worst", "bytes on disk", "While nobody switches it on"):
        assert heading in report
    assert (tmp_path / "added.svg").read_text().startswith("<svg ")


def test_what_another_thread_costs_is_measured_too() -> None:
    """`python -m tests.benchmarks.turns` prints a line for each length of another thread's turns."""
    command = [sys.executable, "-m", "tests.benchmarks.turns", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["0", "0.2", "0.5", "1", "2", "4"]
