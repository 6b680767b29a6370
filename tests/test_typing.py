"""The annotations say what the code does, as mypy and pyright see it in strict mode."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pltrace
from pltrace import Request, Span, prompts, track
from pltrace.testing import CapturedSpans

ROOT = Path(__file__).resolve().parents[1]
USES = "tests/typing/api.py"
#: Methods of public classes that aren't for users.
INTERNAL = {"note", "count_call", "own", "said", "set_error", "totals_below"}


@pytest.mark.parametrize(
    "checker",
    [
        # What other packages' versions do to our own modules is not asked here.
        pytest.param(["mypy", "--follow-imports=silent"], id="mypy"),
        # Brings a Node.js of its own, so it is installed for development alone.
        pytest.param(["pyright", "--pythonpath", sys.executable], id="pyright", marks=pytest.mark.slow),
    ],
)
def test_typed_uses_are_accepted_and_misuses_found(checker: list[str]) -> None:
    """`tests/typing/api.py` has no error but those that it announces, and it has all of those."""
    ended = subprocess.run(
        [sys.executable, "-m", *checker, USES], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_uses_are_of_everything() -> None:
    """Every public name is used there."""
    text = (ROOT / USES).read_text(encoding="utf-8")

    assert [name for name in pltrace.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_the_misuses_are_of_every_function() -> None:
    """Every public function and method is misused there."""
    text = (ROOT / USES).read_text(encoding="utf-8")
    functions = [
        name
        for owner, names in ((pltrace, pltrace.__all__), (prompts, prompts.__all__), (track, track.__all__))
        for name in names
        if inspect.isfunction(getattr(owner, name))
    ]
    methods = [
        name
        for owner in (Span, Request, CapturedSpans)
        for name, found in vars(owner).items()
        if inspect.isfunction(found) and not name.startswith("_") and name not in INTERNAL
    ]

    names = [*functions, *methods, "capture_spans", "PromptLayerCallbackHandler"]
    assert [name for name in names if not re.search(rf"\b{name}\(.*# type: ignore\[", text)] == []
