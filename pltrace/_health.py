"""Counts what happened to every run and span, and keeps our own failures away from the user's program."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import FrameType
from typing import Any

from pltrace._clock import monotonic
from pltrace._forks import ForkLock
from pltrace._greenlets import before_gevent, is_ours

__all__ = [
    "counts", "failed", "forget_warnings", "is_interruption", "log", "logger", "pass_on", "pass_on_interrupt",
    "warn_once", "warn_sometimes",
]  # fmt: skip

logger = logging.getLogger("pltrace")

#: What happened in this process, by reason; `doctor` shows it. A `Counter` item update isn't atomic, so a count
#: that is written by several threads can be off by a few: it explains, nothing is computed from it.
counts: Counter[str] = Counter()

_warned: dict[str, float] = {}
_REPEAT_AFTER_S = 60.0
#: Held while one of our threads logs: a child that inherits the lock of the stream which is written to hangs when it
#: writes there too, as every process does at its end.
_logging = ForkLock()


def is_interruption(error: BaseException) -> bool:
    """Return whether an exception that came up in our code isn't of ours: it interrupts the program.

    `KeyboardInterrupt` does, and whatever a signal handler of the program's raises, a timeout for one: it comes out of
    any code that happens to run.
    """
    if not isinstance(error, Exception):
        return True
    handlers = _handlers()
    return bool(handlers) and any(frame.f_code in handlers for frame in _frames(error))


def pass_on_interrupt(error: BaseException) -> None:
    """Raise an exception again if it interrupted us; not one that an object of the user's raised as we looked at it."""
    *_, last = (None, *_frames(error))
    if last is not None and (
        last.f_code in _handlers()
        or (isinstance(error, KeyboardInterrupt) and str(last.f_globals.get("__name__")).startswith(__package__ + "."))
    ):
        raise error


def _frames(error: BaseException) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _handlers() -> set[Any]:
    """Return the code of the program's signal handlers."""
    signal = sys.modules.get("signal")  # Else there is none.
    if signal is None:
        return set()
    return {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}


def _code_of(handler: Any) -> Any:
    handler = getattr(handler, "func", handler)  # functools.partial
    return getattr(handler, "__code__", None) or getattr(vars(type(handler)).get("__call__"), "__code__", None)


def pass_on(error: BaseException | None) -> None:
    """Raise an exception that was caught in our code again if it interrupts the program."""
    if error is not None and is_interruption(error):
        raise error


def failed(doing: str) -> None:
    """Count a failure of our own, inside an `except` block, and log its traceback once per `doing`.

    What interrupts the program is none, and is raised again; nor is what can't be done when Python shuts down.
    """
    pass_on(sys.exc_info()[1])
    if sys.is_finalizing():
        return  # What we need is gone: what ends so late can't be recorded.
    counts["internal_errors"] += 1
    warn_once(
        f"failed:{doing}",
        "pltrace failed while %s; the program goes on, with less of it recorded. Please report this.",
        doing,
        exc_info=True,
    )


def warn_once(cause: str, message: str, *arguments: object, exc_info: bool = False) -> None:
    """Log `message` as a warning the first time that `cause` comes up in this process."""
    if cause not in _warned:
        _warned[cause] = monotonic()
        log(logging.WARNING, message, *arguments, exc_info=exc_info)


def warn_sometimes(cause: str, message: str, *arguments: object) -> None:
    """Log `message` as a warning, at most once a minute for one `cause`."""
    now = monotonic()
    if now - _warned.get(cause, -_REPEAT_AFTER_S) >= _REPEAT_AFTER_S:
        _warned[cause] = now
        log(logging.WARNING, message, *arguments)


def log(level: int, message: str, *arguments: object, exc_info: bool | BaseException | None = False) -> None:
    """Log `message`, in a way that no fork comes in the middle of; what the program's logging raises is left alone."""
    # A greenlet that logs may let others of its thread run, which must not stand still until it is done.
    is_greenlet = not is_ours() and before_gevent("_thread", "RLock") is not None
    try:
        with nullcontext() if is_greenlet else _logging.lock:
            logger.log(level, message, *arguments, exc_info=exc_info)
    except Exception as error:  # A filter of the program's raises, or the interpreter is shutting down.
        pass_on(error)


def forget_warnings() -> None:
    """Let every cause be warned about again, as after a new `configure`."""
    _warned.clear()
