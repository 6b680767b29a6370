"""The annotations say what the code does, as mypy in strict mode sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_typed_uses_are_accepted_and_misuses_found() -> None:
    """`tests/typing/api.py` has no error but those that it announces, and it has all of those."""
    ended = subprocess.run(
        # What other packages' versions do to our own modules is not asked here.
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "tests/typing/api.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
