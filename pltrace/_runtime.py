"""Switches tracing on and off: composes store, recorder, exporters and handler, and sees to exit and fork."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet, ref

from pltrace import _langchain, _links, _runs, _scope, _twice, _unfinished, _usage
from pltrace._background import in_subinterpreter, wait_for_threads
from pltrace._checks import checked_timeout
from pltrace._clock import monotonic
from pltrace._errors import ConfigError
from pltrace._forks import ForkLock, at_fork, forked_past_python, hook_uwsgi
from pltrace._health import failed, forget_warnings, log
from pltrace._scope import Scope
from pltrace._termination import before_termination
from pltrace._typing import Capture, LibrarySettings, Redaction
from pltrace._wrapping import when_imported

if TYPE_CHECKING:
    import re
    from types import ModuleType

    from pltrace._config import Config, Library
    from pltrace._exporter import SpanExporter
    from pltrace._tracing import Tracing

__all__ = [
    "active", "base", "configure", "consumed", "flush", "gate", "instead", "is_decided", "is_on", "is_on_everywhere",
    "library", "settings", "shutdown", "when_on",
]  # fmt: skip

#: Not empty while calls of decorated functions have to be looked at: tracing is on, or nobody has decided yet.
gate: list[str] = ["undecided"]

#: The longest wait of a flush without a timeout, which also ends when an attempt to deliver fails.
LONGEST_FLUSH_S = 30.0
#: How long new settings wait for what was recorded by the old ones to be delivered; what is left they deliver.
_REPLACING_S = 2.0


class Ends(Protocol):
    """What can be ended from outside."""

    def end(self, error: BaseException) -> None:
        """End it, if it hasn't ended yet; never raises."""


class StandIn(Protocol):
    """What records in place of the usual, for a test: `configure` goes on working, and nothing is sent."""

    def settings(self, config: Config) -> Config:
        """Return what is left of the application's settings."""

    def tracing(self, config: Config, before: Tracing | None) -> Tracing:
        """Return what to record with."""


#: Traced calls whose results are being consumed, by their ids, weakly: what is left of them ends with the process.
consumed: dict[int, ref[Ends]] = {}

_active: Tracing | None = None
#: Whether tracing is on, and for all packages alike: mostly all that has to be asked.
is_on_everywhere = False
#: What the application decided about packages, while tracing is on.
_libraries: Mapping[str, Library] = {}
_configured: Config | None = None
_stand_in: StandIn | None = None
#: What was switched off; a block that was opened before may still end.
_switched_off: WeakSet[Tracing] = WeakSet()
#: A fork waits for who holds it, who may be in the middle of importing what switches tracing on.
_deciding = ForkLock(first=True, is_short=False)
_is_deciding = False
_hooked = False
_when_on: list[Callable[[], None]] = []


def is_on(module: str | None = None) -> bool:
    """Return whether what runs now is traced, as what `module` says is; the first call reads the environment."""
    if _active is None:
        return bool(gate) and _decide()
    if not _libraries:
        return True
    found = library(module)
    return found is None or found.enabled


# A handler in a `callbacks` list may be all that a program has of pltrace: its first run decides too.
_scope.set_is_on(is_on)


def is_decided() -> bool:
    """Return whether somebody has said if tracing is on or off."""
    return _configured is not None or "PLTRACE_ENABLED" in os.environ


def base() -> Scope:
    """Return the scope around all blocks; only while tracing is on."""
    scope = _scope.outermost()
    assert scope is not None
    return scope


def library(module: str | None) -> Library | None:
    """Return what the application decided about the package that a module is in, if anything."""
    return _libraries.get(str(module).partition(".")[0]) if _libraries else None


def active() -> Tracing | None:
    """Return what tracing consists of while it is on."""
    return _active


def settings() -> Config:
    """Return what direct calls of PromptLayer go by: the last `configure`, else the environment, be tracing on or off.

    Raises:
        ConfigError: A variable of the environment is wrong.
    """
    if _configured is not None:
        return _configured
    from pltrace import _config

    return _config.load()


def _decide() -> bool:
    """Switch on if the environment says so, at the first use of a process that doesn't call `configure`."""
    global _is_deciding
    if sys.is_finalizing():
        return False  # Nothing can be imported any more.
    with _deciding.lock:  # Other threads wait: what they record meanwhile is wanted too.
        if _active is not None or not gate or _is_deciding:
            return _active is not None
        _is_deciding = True
        try:
            from pltrace import _config

            if _config.wanted_by_environment():
                _switch_on(_config.load())
        except ConfigError as error:
            log(logging.ERROR, "pltrace stays off: %s", error)
        except Exception:
            failed("switching on by the environment")
        finally:
            _is_deciding = False
            if _active is None:
                gate.clear()
        return _active is not None


def configure(
    *,
    api_key: str | None = None,
    base_url: str | None = None,
    client: Any = None,
    store: str | os.PathLike[str] | None = None,
    exporters: Iterable[SpanExporter] | None = None,
    service: str | None = None,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    capture: Capture | None = None,
    redact: Redaction | Iterable[str | re.Pattern[str]] | None = None,
    sample: float | None = None,
    enabled: bool | None = None,
    libraries: Mapping[str, LibrarySettings] | None = None,
) -> None:
    """Switch tracing on, with these settings; called again, replace them all.

    Args:
        api_key: PromptLayer's key, else `PROMPTLAYER_API_KEY`; without one, the local store is all there is.
        base_url: PromptLayer's address, else `PROMPTLAYER_BASE_URL`.
        client: A `promptlayer` client; its key and address are used.
        store: A file, `"memory"`, or `"off"`: memory too, but of what is delivered only about the latest 16 MiB; else
            `PLTRACE_STORE`, else `~/.pltrace/traces.db`.
        exporters: Where spans go besides PromptLayer.
        service: Names the application; else `PLTRACE_SERVICE`, else the program's name.
        tags: Go with everything, besides those of `PLTRACE_TAGS` (separated by commas).
        metadata: Goes with everything.
        capture: The most that is kept of arguments, prompts and results: True, False, `"inputs"` or `"outputs"`; else
            `PLTRACE_CAPTURE`.
        redact: A function `(key, value) -> value` that replaces the default redaction and is called for each leaf
            value (in prompts, answers and tool definitions for each text), or a list of key names and compiled patterns
            that extend it.
        sample: The share of traces that is recorded, 0.0 to 1.0; else `PLTRACE_SAMPLE`.
        enabled: True or False; None is on, unless `PLTRACE_ENABLED=0`.
        libraries: Package name → `{"enabled": bool, "tags": [...], "capture": ...}`, for its functions and blocks.

    Raises:
        ConfigError: An argument or environment variable is wrong; the message names it.
    """
    global _configured
    with _deciding.lock:
        from pltrace import _config  # Here: the child of a fork that came in the middle of it could never import it.

        config = _config.load(
            api_key=api_key, base_url=base_url, client=client, store=store, exporters=exporters, service=service,
            tags=tags, metadata=metadata, capture=capture, redact=redact, sample=sample, enabled=enabled,
            libraries=libraries, environ=None if _stand_in is None else {},
        )  # fmt: skip
        if _stand_in is not None:
            config = _stand_in.settings(config)
        _configured = config
        if _active is not None and _active.config == config:
            return
        before = _active
        forget_warnings()
        if config.enabled:
            _switch_on(config, before)
        else:
            _switch_off(_REPLACING_S, patient=False)  # Nothing may be on yet: then that is decided.
            if before is not None:
                before.recorder.registry.shut()


def _switch_on(config: Config, before: Tracing | None = None) -> None:
    global _hooked
    if _stand_in is not None:
        after = _stand_in.tracing(config, before)
    else:
        from pltrace._tracing import Tracing

        after = Tracing(config, before)
    if before is not None:
        _switched_off.add(before)
    _use(after)
    after.take_over(_REPLACING_S)
    if not _hooked:
        _hooked = True
        _hook_exit()
        at_fork(in_child=_after_fork_in_child)
        hook_uwsgi()
        # It puts a hook of its own in the place of others'.
        when_imported("uwsgidecorators", lambda decorators: decorators.postfork(forked_past_python))
    for call in _when_on:
        call()


def _switch_off(timeout: float, *, patient: bool) -> bool:
    tracing = _use(None)
    if tracing is None:
        return True
    _switched_off.add(tracing)
    return tracing.shutdown(timeout, patient=patient)


def _use(tracing: Tracing | None) -> Tracing | None:
    """Record with `tracing` from now on, or with nothing; return what was recorded with before."""
    global _active, _libraries, is_on_everywhere
    before, _active = _active, tracing
    _libraries = {} if tracing is None else tracing.config.libraries
    is_on_everywhere = tracing is not None and not _libraries
    _scope.set_outermost(None if tracing is None else tracing.outermost)
    _langchain.switch(tracing is not None)
    _twice.switch(tracing is not None and tracing.logs_requests)
    gate[:] = [] if tracing is None else ["on"]
    return before


@contextmanager
def instead(stand_in: StandIn, config: Config) -> Iterator[None]:
    """Switch on with `stand_in` for a block; afterwards go on as before, also if nobody had decided yet."""
    global _configured, _stand_in
    with _deciding.lock:
        before, decided, configured, outer = _active, gate[:], _configured, _stand_in
        # Direct calls of PromptLayer go by these settings too.
        _stand_in, _configured = stand_in, config
    try:
        with _deciding.lock:
            _switch_on(config)
        yield
    finally:
        with _deciding.lock:
            stood_in = _use(before)
            gate[:], _configured, _stand_in = decided, configured, outer
        if stood_in is not None:
            _switched_off.add(stood_in)
            stood_in.shutdown(0.0, patient=False)
            stood_in.recorder.registry.shut()


def when_on(call: Callable[[], None]) -> None:
    """Have `call` called whenever tracing is switched on; now too, if it is on."""
    _when_on.append(call)
    if _active is not None:
        call()


def flush(timeout: float | None = None) -> bool:
    """Wait until all that was recorded is stored, delivered where an exporter is set, and its callbacks are done.

    Args:
        timeout: The longest wait in seconds. Without one it waits 30 seconds at most, and ends when an attempt to
            deliver fails.

    Returns:
        Whether it all is.

    Raises:
        ConfigError: `timeout` is not a number of seconds.
    """
    timeout = checked_timeout(timeout)
    if _active is None:
        return True
    return _active.flush(LONGEST_FLUSH_S if timeout is None else timeout, patient=timeout is not None)


def shutdown(timeout: float | None = None) -> bool:
    """Flush, and switch tracing off.

    Args:
        timeout: As for `flush`.

    Returns:
        Whether all was stored and delivered; what wasn't is sent by the next process.

    Raises:
        ConfigError: `timeout` is not a number of seconds.
    """
    timeout = checked_timeout(timeout)
    with _deciding.lock:
        before = _active
        done = _switch_off(LONGEST_FLUSH_S if timeout is None else timeout, patient=timeout is not None)
        if before is not None:
            before.recorder.registry.shut()
        _links.forget()
        return done


def _hook_exit() -> None:
    # threading's own hook runs before non-daemon threads are waited for, and in multiprocessing's children too, where
    # atexit's doesn't before Python 3.13. It is private, so it may be missing; atexit then has to do.
    register: Callable[[Callable[[], None]], None] | None = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(_before_last)
        except RuntimeError:  # The main thread has ended, and others go on; or atexit's functions run, and ours won't.
            _at_exit(last=True)
    atexit.register(_at_last)
    when_imported("celery.signals", _hook_celery)
    before_termination(_Termination())


def _hook_celery(signals: ModuleType) -> None:
    """Have Celery call us before it ends a child, which it does with a signal, a moment after its last task."""
    signals.worker_process_shutdown.connect(lambda **_: _at_exit(last=True), weak=False)


def _all() -> list[Tracing]:
    """Return what records now, and what was switched off and may be written to yet."""
    return [*_switched_off, *([] if _active is None else [_active])]


def _before_last() -> None:
    """End before other threads are waited for; in a child of `multiprocessing` for good, which ends without atexit."""
    processes: Any = sys.modules.get("multiprocessing.process")
    is_last = processes is not None and processes.parent_process() is not None
    # Threads that are waited for end by themselves what is open in them.
    if is_last and all(thread.daemon or thread is threading.current_thread() for thread in threading.enumerate()):
        _safely(_end_open)
    _at_exit(last=is_last)


def _end_open() -> None:
    """End what is open, to be written together: it may be thousands of runs."""
    bounds = [tracing.recorder.writer.bound for tracing in _all()]
    try:
        for bound in bounds:
            bound.is_lifted = True
        _unfinished.end_all()
    finally:
        for bound in bounds:
            bound.is_lifted = False


def _at_exit(*, last: bool) -> None:
    for tracing in _all():
        _safely(partial(tracing.at_exit, last=last))


class _Termination:
    """What is done before a signal ends the process."""

    def write(self) -> None:
        """Put all on disk, then what is open."""
        self._write()
        _safely(_end_open)
        self._write()

    def _write(self) -> None:
        for tracing in _all():
            _safely(tracing.write_before_termination)

    def deliver(self, timeout: float) -> None:
        """Deliver what can be in so many seconds, and leave the rest to others."""
        deadline = monotonic() + timeout
        for tracing in _all():
            _safely(partial(tracing.deliver_before_termination, deadline))


def _safely(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        failed("leaving the process")


def _at_last() -> None:
    """End what nobody will: what isn't consumed to its end, and what is open in threads that aren't waited for."""
    for call in [*consumed.values()]:
        if (open_call := call()) is not None:
            open_call.end(GeneratorExit())
    _safely(_end_open)
    _at_exit(last=True)
    if in_subinterpreter():  # Else the threads end with the process.
        for tracing in _all():
            _safely(tracing.end_threads)
        wait_for_threads()
    _safely(_close)


def _close() -> None:
    """Close the stores of what was switched off; that of what is on may be recorded into by the last finalizers."""
    from pltrace._database import close_at_exit  # It is there: tracing was on.

    active = None if _active is None else _active.store.database
    close_at_exit({tracing.store.database for tracing in _switched_off} - {active})


def _after_fork_in_child() -> None:
    _usage.forked()
    _runs.forked()
    _links.forked()
    Scope.roots.clear()
    for tracing in _all():
        try:
            tracing.forked()
        except Exception:
            failed("starting afresh in a forked process")


def _forget_decision() -> None:
    """Let the child of a fork decide by itself, where the fork came in the middle of it."""
    global _is_deciding
    _is_deciding = False


at_fork(in_child=_forget_decision)
