"""Ends, with the process, what is open in it: runs, blocks and calls that nobody will end any more."""

from __future__ import annotations

import gc
import sys
import threading
from copy import copy
from sys import getrefcount
from types import AsyncGeneratorType, FrameType, GeneratorType
from typing import Any

from pltrace import _runs
from pltrace._checks import OUTPUTS
from pltrace._health import failed
from pltrace._runs import open_runs
from pltrace._scope import Scope, ScopeSpan, current
from pltrace._span import Span
from pltrace._stepping import HELD_ONCE
from pltrace._usage import RunKey

__all__ = ["end_all"]

_ERROR = "CancelledError: the process ended before it did"

#: LangChain's classes of models, whose streams know what came so far.
_MODELS = {
    "langchain_core.language_models.chat_models": "BaseChatModel",
    "langchain_core.language_models.llms": "BaseLLM",
}


def end_all() -> None:
    """Record what is open as it is, the innermost first; what threads still end of it isn't recorded again."""
    if not (open_runs or Scope.roots or _other_threads()):
        return  # To look takes 25 ms, and more where there are millions of objects.
    calls, streams = _find()
    spared = _may_be_left_yet()
    for frame in streams:
        _keep_pieces(frame)
    opened: list[tuple[Span, RunKey | None]] = [(call, None) for call in calls]
    opened += [(run, key) for key, run in open_runs.copy().items()]
    for span, key in sorted(opened, key=lambda one: (one[0].started_at_ns, one[0].span_bits), reverse=True):
        try:
            if isinstance(span, ScopeSpan):
                if span not in spared:
                    _end_call(span)
            elif key is not None:
                _runs.finish(span, key)
                _runs.cut_off(span, key, _ERROR)
        except Exception:
            failed("ending what was open at the end of the process")


def _may_be_left_yet() -> set[Span]:
    """Return the blocks here that something else holds: an exit function that is called after us may leave them."""
    spared: set[Span] = set()
    scope = current()
    while scope is not None:
        if scope.entry is not None and getrefcount(scope.entry) > HELD_ONCE:
            spared.add(scope.span)
        scope = scope.outer
    return spared


def _other_threads() -> bool:
    """Return whether threads of the program run: of a block in there the one around it may be closed."""
    here = threading.current_thread()
    return any(thread is not here and not thread.name.startswith("pltrace-") for thread in threading.enumerate())


def _find() -> tuple[list[ScopeSpan], list[FrameType]]:
    """Return the open blocks and calls, and the frames of models' streams.

    Nothing keeps a list of them, as it would cost each call. What holds an object's class or a frame's code is found
    as the garbage collector finds it: in 50 ns an object, and with nothing written to it, which is the parent's memory
    too in the child of a fork.
    """
    calls: list[ScopeSpan] = []
    streams: list[FrameType] = []
    for one in gc.get_referrers(ScopeSpan, *_codes()):
        if type(one) is ScopeSpan:
            # In the midst of its making it has no time yet.
            if getattr(one, "started_at_ns", 0) and not one.ended_at_ns:
                calls.append(one)
        else:
            frame: Any = one
            if type(one) is GeneratorType:
                frame = one.gi_frame
            elif type(one) is AsyncGeneratorType:
                frame = one.ag_frame
            if type(frame) is FrameType:
                streams.append(frame)
    return calls, streams


def _codes() -> list[Any]:
    models = [getattr(sys.modules.get(module), name, None) for module, name in _MODELS.items()]
    methods = [getattr(model, name, None) for model in models for name in ("stream", "astream")]
    return [code for method in methods if (code := getattr(method, "__code__", None)) is not None]


def _keep_pieces(frame: FrameType) -> None:
    """Have an open stream's span keep what has come: LangChain, which has it, won't end it any more."""
    known = frame.f_locals
    run_id = getattr(known.get("run_manager"), "run_id", None)
    span = None if run_id is None else open_runs.get(_runs.key_of(run_id))
    if span is not None and span.inherited.capture & OUTPUTS:
        # A chat model's come in a list, those of a completion model are put together as they come.
        span.pieces = [*(known.get("chunks") or ())] or [piece for piece in (known.get("generation"),) if piece]


def _end_call(span: ScopeSpan) -> None:
    """Record a block or call as it is, by a copy: its thread may be about to end it."""
    started_at_ns, span.started_at_ns = span.started_at_ns, 0  # It isn't this process's to record any more.
    cut = copy(span)
    cut.started_at_ns = started_at_ns
    if cut.status is None:
        cut.status, cut.error, cut.error_types = "cancelled", _ERROR, ("CancelledError",)
    cut.ended_at_ns = cut.inherited.recorder.now_ns()
    cut.inherited.recorder.record(cut)
