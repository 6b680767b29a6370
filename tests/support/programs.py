"""Runs users' programs in processes of their own, and reads what they left in the store."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a program ended, what it printed, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


def start(source: str, folder: Path, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """Start a program, as a file of its own in `folder`, with these arguments and environment variables."""
    number = sum(1 for _ in folder.glob("program*.py"))
    file = folder / f"program{number}.py"
    file.write_text(dedent(source))
    return subprocess.Popen(
        [sys.executable, str(file), *map(str, arguments)],
        env=surroundings(**environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(source: str, folder: Path, *arguments: object, timeout: float = 60.0, **environment: object) -> Ended:
    """Run a program to its end."""
    began = time.monotonic()
    return ended(start(source, folder, *arguments, **environment), began, timeout)


def ended(process: subprocess.Popen[str], began: float = 0.0, timeout: float = 60.0) -> Ended:
    """Wait for a program's end; one that takes too long is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"The program didn't end within {timeout} s:\n{out}\n{err}") from None
    return Ended(process.returncode, out, err, time.monotonic() - began)


def module(*arguments: object, timeout: float = 60.0, **environment: object) -> Ended:
    """Run `python -m pltrace` with these arguments."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pltrace", *map(str, arguments)],
        env=surroundings(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return ended(process, began, timeout)


def surroundings(**environment: object) -> dict[str, str]:
    """Return this process's environment with pltrace importable and these variables set, and no word of pytest.

    A program of somebody's is no test; under pytest the key of the environment would be left alone.
    """
    # A copy of the package under test may come before the checkout.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_ROOT)]))
    quiet = {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**ours, **quiet, **{name: str(value) for name, value in environment.items()}}


def rows(store: Path, query: str, *parameters: object) -> list[dict[str, Any]]:
    """Read from a store's file as any other process may."""
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=10.0)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, parameters)]


def stored(store: Path) -> list[str]:
    """Return the names of the spans in a store, in the order they were recorded."""
    return [row["name"] for row in rows(store, "SELECT name FROM spans ORDER BY seq")]


def deliveries(store: Path, exporter: str = "promptlayer") -> dict[str, str]:
    """Return what became of each span for an exporter: name → state."""
    states = ("pending", "delivered", "quarantined")
    found = rows(store, "SELECT name, state FROM deliveries JOIN spans USING (seq) WHERE exporter = ?", exporter)
    return {row["name"]: states[row["state"]] for row in found}
