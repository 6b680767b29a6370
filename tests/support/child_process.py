"""Runs a double in a child process, which ends with its parent."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO

from typing_extensions import Self

_ROOT = Path(__file__).resolve().parents[2]
_READY = "READY "
_START_WITHIN_S = 60.0


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line with the options that all doubles have."""
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--url-file", type=Path, help="written when it's ready")
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin is closed")
    return parser.parse_args()


def serve(url: str, options: argparse.Namespace) -> None:
    """Tells the URL and blocks for as long as the double is wanted."""
    if options.url_file:
        unfinished = options.url_file.with_name(options.url_file.name + ".tmp")
        unfinished.write_text(url)
        unfinished.replace(options.url_file)
    print(_READY + url, flush=True)
    if options.exit_with_stdin:
        # Nobody reads what comes after the URL; a full pipe would block us.
        os.dup2(2, 1)
        sys.stdin.read()
    else:
        threading.Event().wait()


class ChildServer:
    """Starts `python -m tests.support.<module>` and knows its `url`; stops it by its process."""

    def __init__(self, module: str, *options: str) -> None:
        self.url = ""
        self._command = [sys.executable, "-m", f"tests.support.{module}", "--exit-with-stdin", *options]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        quiet = {"LANGSMITH_TRACING": "false", "PLTRACE_ENABLED": "0", "PYTHONPATH": path}
        with tempfile.TemporaryFile("w+") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=_ROOT,
                env={**os.environ, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            self.url = self._wait_for_url(self._process, log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Ends the child, at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # Closes the pipes as well.
            process.communicate()

    def _wait_for_url(self, process: subprocess.Popen[str], log: IO[str]) -> str:
        assert process.stdout is not None
        too_late = threading.Timer(_START_WITHIN_S, process.kill)
        too_late.start()
        try:
            for line in process.stdout:
                if line.startswith(_READY):
                    return line.removeprefix(_READY).strip()
        finally:
            too_late.cancel()
        self.stop()
        log.seek(0)
        raise RuntimeError(f"{' '.join(self._command)} didn't start:\n{log.read()}")
