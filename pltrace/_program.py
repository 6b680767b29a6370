"""Runs a program as Python itself does, with tracing on, and shows at its end what happened."""

from __future__ import annotations

import atexit
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from pltrace import _runtime, _threads
from pltrace._health import failed
from pltrace._traced import traced
from pltrace._tracing import Tracing
from pltrace._tree import tree

__all__ = ["Program"]

#: How long the end of the program waits until all is delivered.
_DELIVERY_S = 10.0
#: What Python itself calls for `-m`, and for folders and archives.
_run_module: Any = runpy._run_module_as_main  # type: ignore[attr-defined]


class Program:
    """A program inside one block, with scopes carried into its threads and tracing on in the processes it starts.

    Args:
        name: A script, a folder or archive with a `__main__.py`, or a module.
        arguments: The program's own.
        is_module: It is a module.

    Raises:
        ConfigError: A variable of the environment is wrong.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, is_module: bool) -> None:
        self._name = name
        self._is_module = is_module
        self._pid = os.getpid()
        self._error: BaseException | None = None
        self._tracing: Tracing | None = None
        sys.argv = [name, *arguments]
        atexit.register(self._show)  # Called after what switching on registers, which writes all that is left.
        _runtime.configure(enabled=True)
        self._tracing = _runtime.active()
        atexit.register(self._end)  # Called before that, and after what the program registers.
        _switch_on_in_children()
        _threads.instrument_threads()
        self._block = traced(name)
        self._span = self._block.__enter__()

    def run(self) -> None:
        """Run it; what it raises comes out, and Python does with it what it does with any program's."""
        try:
            if self._is_module:
                _set_path(os.getcwd())
                _main_module()
                _run_module(self._name)
                return
            path = str(Path(self._name).absolute())
            if pkgutil.get_importer(path) is not None:
                _set_path(path, always=True)
                _main_module()
                _run_module("__main__", alter_argv=False)
            else:
                _set_path(os.path.dirname(os.path.realpath(path)))
                loader, code = _loaded(path)
                exec(code, vars(_main_module(__file__=path, __loader__=loader)))
        except SystemExit as error:
            if error.code:
                self._error = SystemExit(error.code)  # Not this one, which would keep the program's variables.
            raise
        except BaseException as error:
            self._error = error
            _hand_over(error)
            raise

    def _end(self) -> None:
        """End the block, now that threads and what the program does at its exit are done."""
        if os.getpid() == self._pid:  # Else the block is the parent's.
            error = self._error
            self._block.__exit__(None if error is None else type(error), error, None)
            if not _runtime.flush(timeout=_DELIVERY_S):
                print("pltrace: not all was delivered; `pltrace doctor` says why", file=sys.stderr)

    def _show(self) -> None:
        tracing = _runtime.active() or self._tracing  # The program may have switched it off itself.
        if os.getpid() != self._pid or tracing is None:
            return
        with suppress(Exception):
            sys.stdout.flush()  # The tree is the last that is seen.
        try:
            if records := tracing.store.trace(self._span.trace_id):  # None, if it was in memory.
                print(tree(records), file=sys.stderr)
        except Exception:
            failed("showing what happened")


def _switch_on_in_children() -> None:
    """Have processes that aren't forked trace into the same store, unless the environment keeps tracing off."""
    os.environ["PLTRACE_ENABLED"] = os.environ.get("PLTRACE_ENABLED") or "1"
    if os.environ.get("PLTRACE_STORE"):
        os.environ["PLTRACE_STORE"] = str(_runtime.settings().store)  # Absolute: they may run in another folder.


def _set_path(first: str, *, always: bool = False) -> None:
    """Put the program's folder where Python has put ours.

    Args:
        first: The folder.
        always: Also where Python was told to put none.
    """
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # Since Python 3.11.
        sys.path[0] = first
    elif always:
        sys.path.insert(0, first)


def _main_module(**known: object) -> ModuleType:
    """Make a fresh `__main__`, which stays: threads and exit functions look things up in it."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    vars(module).update(__annotations__={}, __builtins__=sys.modules["builtins"], __cached__=None, **known)
    return module


def _loaded(path: str) -> tuple[SourceFileLoader | SourcelessFileLoader, Any]:
    """Return what Python loads a script with, and the script's code."""
    try:
        if path.endswith(".pyc"):
            compiled = SourcelessFileLoader("__main__", path)
            return compiled, compiled.get_code("__main__")
        loader = SourceFileLoader("__main__", path)
        source = loader.get_data(path)
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    return loader, compile(source, path, "exec", dont_inherit=True)


def _hand_over(error: BaseException) -> None:
    """Let the program's hook see an exception as if nothing of ours, or of runpy's, had been around the program."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        traceback = traceback.tb_next
    hook = sys.excepthook

    def call(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        sys.excepthook = hook
        sys.last_traceback = value.__traceback__ = traceback
        hook(kind, value, traceback)

    sys.excepthook = call
