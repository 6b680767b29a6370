"""Keeps the LangChain runs that are open, says which one the running code is in, and closes those that vanished."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextvars import Context
from itertools import count
from threading import get_ident
from types import FrameType
from typing import Any
from uuid import UUID

from pltrace._health import counts, failed
from pltrace._scope import NO_RUNS, Scope, ScopeSpan, current, still_open
from pltrace._span import Span
from pltrace._usage import RunKey

__all__ = [
    "RunId", "around", "config_here", "current_scope_or", "cut_off", "finish", "forked", "is_in_ainvoke", "key_of",
    "note_attempt", "note_attempts_in", "open_runs", "remember_starter", "running_loop", "settle", "sweep", "vanished",
]  # fmt: skip

#: Open runs by `key_of` their run id: hashing the UUID itself costs twice as much.
open_runs: dict[RunKey, Span] = {}


def _nothing() -> None:
    return None


#: Returns LangChain's config of the run that the code is in, or None: its own variable, when LangChain arrives.
config_here: Callable[[], Any] = _nothing

#: A run that is open for so long has lost its end. Looked at when the table is larger than it should be.
_OLDEST_S = 3600.0
_MANY = 10_000
_MOST = 100_000
#: With so many open it is looked at once in so many starts: a look goes over all of them.
_LOOK_EVERY = 256


#: What of LangChain's calls a model's own code, and what it calls the run manager, or the list of them; and what calls
#: handlers, whose code is no model's, and has none.
_CALLS_MODELS = {
    "_generate_with_cache": "run_manager",
    "_agenerate_with_cache": "run_manager",
    "stream": "run_manager",
    "astream": "run_manager",
    "_generate_helper": "run_managers",
    "_agenerate_helper": "run_managers",
    "handle_event": "",
    "ahandle_event": "",
}
_CALLERS = frozenset({
    "langchain_core.language_models.chat_models", "langchain_core.language_models.llms",
    "langchain_core.callbacks.manager",
})  # fmt: skip

#: What a run is said to have met that LangChain started, and says nothing more of.
_NO_END = "CancelledError: LangChain reported no end of this run; its task was cancelled or went away"

#: What runs in the tasks that LangChain makes to tell handlers of an async completion model's start.
_TELLS_HANDLERS = frozenset({"on_llm_start", "ahandle_event"})
#: The starter of such a run: who waits for its answer isn't known then. It is no thread's number.
_UNKNOWN = 0


def around(scope: Scope | None = None) -> Span | None:
    """Return the span of the LangChain run that the running code is in, or None.

    Args:
        scope: The scope that holds here; its open models and retrievers are looked at too. LangChain says nothing of
            them in their own code.
    """
    try:
        leaf = None if scope is None or not scope.open_runs else _leaf_here(scope)
        config = config_here()
        if config is None:
            return leaf
        run_id = getattr(config.get("callbacks"), "parent_run_id", None)
        try:
            run = None if run_id is None else open_runs.get(run_id.int)
        except AttributeError:
            run = open_runs.get(key_of(run_id))
        # The code is in both: a chain calls it in the leaf's code, or calls the leaf.
        return leaf if run is None or (leaf is not None and leaf.started_at_ns >= run.started_at_ns) else run
    except RecursionError:
        raise  # There is no room for the call either.
    except Exception:
        failed("looking for the LangChain run that a call is in")
        return None


def key_of(run_id: Any) -> RunKey:
    """Return what the run of an id is known by.

    LangChain takes anything for an id. Where each nanosecond counts this is called only of what has no `int`.
    """
    try:
        key: int = run_id.int
        return key
    except AttributeError:
        text = str(run_id)
    try:
        return UUID(text).int
    except ValueError:
        return text


def _leaf_here(scope: Scope) -> Span | None:
    """Return the innermost open retriever or model whose own code the running thread or task is in.

    A model that streams counts until its first token: from then on its code runs only while somebody reads.
    """
    here: Any = None
    looked = False
    for span in reversed(scope.open_runs.copy().values()):
        if span.kind == "retriever":
            here = here or _starter_here()
            if span.starter == here:
                return span
        elif span.kind == "llm" and not looked and not span.first_token_at_ns:
            here = here or _starter_here()
            if span.starter in (here, _UNKNOWN) or is_in_ainvoke():
                looked = True
                model = _model_here()
                if model is not None:
                    return model
    return None


def _model_here() -> Span | None:
    """Return the innermost open run of a model whose own code is running; None if that answers several at once.

    LangChain's function that called the code knows the run. Without it the code isn't in there: it is a handler's, or
    another greenlet's of the same thread.
    """
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        held = _CALLS_MODELS.get(frame.f_code.co_name)
        if held is not None and frame.f_globals.get("__name__") in _CALLERS:
            manager = frame.f_locals.get(held)
            if isinstance(manager, list):
                manager = manager[0] if len(manager) == 1 else None
            run_id = getattr(manager, "run_id", None)
            return None if run_id is None else open_runs.get(key_of(run_id))
        frame = frame.f_back
    return None


def _starter_here() -> Any:
    task = _current_task()
    return get_ident() if task is None else weakref.ref(task)


def remember_starter(span: Span, key: RunKey) -> None:
    """Note which task or thread started a run that LangChain may never end."""
    asyncio: Any = sys.modules.get("asyncio")  # As `_current_task`, without its steps.
    loop = None if asyncio is None else asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    if task is None:
        span.starter = get_ident()
    elif span.kind == "llm" and not span.is_chat and _is_telling_handlers():
        span.starter = _UNKNOWN
    else:
        span.starter = weakref.ref(task)
        cancels = _cancels_of(task)
        if cancels:
            span.cancels_before = cancels
    runs = span.scope.open_runs
    (span.scope.runs() if runs is NO_RUNS else runs)[key] = span


class RunId(weakref.ref[Any]):
    """The id of an open run, weakly: LangChain's run manager holds it for as long as the run can still end."""

    __slots__ = ("key",)
    key: RunKey


def vanished(run: RunId) -> None:
    """Close a run whose id nobody holds any longer: a cancelled `ainvoke` drops its run manager, and says nothing.

    It is called wherever the id dies, in the middle of other code and by the garbage collector too. That tells of ids
    before it closes the generators that held them: a stream has yet to say how it ended, and with what text.
    """
    span = open_runs.get(run.key)
    if span is not None and span.run_id is run:
        if span.is_stream or span.starter is None:
            _NextCollection(span, run.key)
        else:
            _close(span, run.key)


def _close(span: Span, key: RunKey) -> None:
    try:
        if open_runs.get(key) is span:
            finish(span, key)
            close_cancelled(span, key)
    except Exception:
        failed("closing a run that LangChain never ends")


class _NextCollection:
    """Closes a run when the garbage collector comes by again: it is a cycle that nobody holds."""

    def __init__(self, span: Span, key: RunKey) -> None:
        self._run = span, key
        self._itself = self

    def __del__(self) -> None:
        _close(*self._run)


def finish(span: Span, key: RunKey) -> None:
    """Forget an ended run that has a starter."""
    span.run_id = None
    scope: Scope | None = span.scope
    while scope is not None:
        if scope.open_runs.pop(key, None) is not None:
            return
        scope = scope.outer


def settle(scope: Scope) -> None:
    """Close, at the end of a block or call, the runs in it that LangChain will never report the end of.

    A cancelled `ainvoke` of a model, tool or retriever fires a start and then nothing. Mostly `vanished` has closed it
    by now, but its id may be held: by another tracer, or by an exception that somebody keeps. Of them those whose task
    has ended, is being cancelled or is leaving the block, are closed; those of a task that goes on, with it; a stream
    goes on with whoever reads it.
    """
    here = _current_task()
    # `copy` allocates nothing in between: the collector could end runs while the items are listed.
    for key, span in scope.open_runs.copy().items():
        scope.open_runs.pop(key, None)
        if open_runs.get(key) is not span:
            continue
        if not span.is_stream:
            if _is_gone(span, here):
                close_cancelled(span, key)
                continue
            _close_with_its_task(span, key)
        if scope.outer is not None:
            scope.outer.runs()[key] = span
    scope.open_runs = NO_RUNS  # An empty dict for each needn't wait to be written.


#: The runs that outlive a block, by the tasks that started them; those that end by themselves are not kept.
_outliving: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[RunKey, Span]] = weakref.WeakKeyDictionary()


def _close_with_its_task(span: Span, key: RunKey) -> None:
    """Close a run when the task that started it is done; mostly it has ended by then, or turned out to be a stream."""
    task = None if isinstance(span.starter, int) else span.starter()
    if task is None:
        return
    runs = _outliving.get(task)
    if runs is None:
        runs = _outliving[task] = weakref.WeakValueDictionary()
        task.add_done_callback(_close_all_of, context=Context())  # The task needn't hold what is current here.
    runs[key] = span


def _close_all_of(task: Any) -> None:
    for key, span in [*_outliving.pop(task).items()]:
        if not span.is_stream:
            _close(span, key)


def running_loop() -> Any:
    """Return the running event loop or None, without importing asyncio."""
    asyncio: Any = sys.modules.get("asyncio")
    return None if asyncio is None else asyncio._get_running_loop()


def _current_task() -> Any:
    """Return the running task; without asyncio, and without importing it, None."""
    loop = running_loop()
    return None if loop is None else sys.modules["asyncio"].current_task(loop)


def is_in_ainvoke() -> bool:
    """Return whether the running code is in the task that LangChain makes for each answer it gives in one piece."""
    task = _current_task()
    return task is not None and getattr(task.get_coro(), "__name__", None) == "_agenerate_with_cache"


def _is_telling_handlers() -> bool:
    """Return whether it is in one that LangChain makes to tell handlers of an async completion model's start."""
    task = _current_task()
    return task is not None and getattr(task.get_coro(), "__name__", None) in _TELLS_HANDLERS


def _is_gone(span: Span, here: Any) -> bool:
    if isinstance(span.starter, int):
        return here is None and span.starter == get_ident()
    task = span.starter()
    return task is None or task is here or task.done() or _cancels_of(task) > span.cancels_before


def _cancels_of(task: Any) -> int:
    """Return how often a task was cancelled: it may have gone on, and what it starts then isn't cancelled.

    That is counted since Python 3.11; before, a task that is being cancelled shows only when it is done.
    """
    cancels: int = getattr(task, "cancelling", int)()
    return cancels


def close_cancelled(span: Span, key: RunKey, error: str = _NO_END) -> None:
    """End a run that LangChain won't end."""
    if open_runs.pop(key, None) is None:
        return
    span.status = "cancelled"
    span.error = error
    span.error_types = ("CancelledError",)
    counts["closed_as_cancelled"] += 1
    _record_end(span)


def cut_off(span: Span, key: RunKey, error: str) -> None:
    """End a run as it is: a stream with the text so far, anything else as cancelled."""
    if not (span.is_stream and span.first_token_at_ns):
        close_cancelled(span, key, error)
    elif open_runs.pop(key, None) is not None:
        span.status = "partial"
        _record_end(span)


def _record_end(span: Span) -> None:
    span.ended_at_ns = span.inherited.recorder.now_ns()
    note_attempt(span)
    if span.kind == "llm":
        span.count_call()
    span.inherited.recorder.record(span)


def note_attempt(span: Span) -> None:
    """Remember on the span around a run how it ended, if others that attempt the same have to be told by it.

    A success that came after failures is remembered only on a run: a block may be around a million of them.
    """
    parent = span.parent
    if isinstance(parent, Span) and (span.error is not None or (span.tried_before and parent.run_key is not None)):
        span.noted_attempt = span.attempt
        parent.note(span.noted_attempt)


def note_attempts_in(failed_call: ScopeSpan) -> None:
    """Remember around a block or call that failed what was tried in it: who makes it again tries that again."""
    parent = failed_call.parent
    if isinstance(parent, Span):
        for attempt in failed_call.noted:
            parent.note(attempt)


_looks = count()


def sweep() -> None:
    """Close runs by age when there are suspiciously many; called at each start while there are `_MANY`."""
    if next(_looks) % _LOOK_EVERY:
        return
    oldest_ns = -1
    for key, span in open_runs.copy().items():
        if oldest_ns < 0:
            oldest_ns = span.inherited.recorder.now_ns() - int(_OLDEST_S * 1e9)
        if span.started_at_ns < oldest_ns or len(open_runs) > _MOST:
            finish(span, key)
            close_cancelled(span, key)
        elif len(open_runs) <= _MOST:
            break  # The table is in order of starting.


def forked() -> None:
    """Forget what the parent process runs: it ends there."""
    open_runs.clear()


def current_scope_or(parent: Span | None) -> Scope | None:
    """Return the current scope; where the context was lost, that of the parent run."""
    scope = current()
    if scope is not None and scope.left_elsewhere:
        scope = still_open(scope)
    return parent.scope if scope is None and parent is not None else scope
