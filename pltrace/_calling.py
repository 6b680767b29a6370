"""Says how an open traced call goes on and ends: at once, or step by step as its result is consumed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import ref

from pltrace import _runs, _runtime
from pltrace._arguments import Arguments
from pltrace._checks import INPUTS, OUTPUTS
from pltrace._collecting import at_work, is_collecting
from pltrace._health import failed, is_interruption
from pltrace._scope import NO_RUNS, Scope, ScopeSpan, attach, current, detach, reattach
from pltrace._snapshot import PLAIN, snapshot

if TYPE_CHECKING:
    from pltrace._declaration import Declaration

__all__ = ["OpenCall", "end", "leave", "leave_all", "was_interrupted"]


class CancelledError(BaseException):
    """Stands for asyncio's, which isn't imported here: a coroutine was closed, or collected, before its end."""


class Call:
    """A traced call that is consumed step by step: the scope is around each step, the span around all of them.

    Args:
        declaration: Opens the scope, at the first step.
        name: The span's name.
        module: Where the function was defined.
        arguments: As they were at the call.
        scope: The scope, if it is open already, and current.
    """

    __slots__ = (
        "__weakref__", "_arguments", "_declaration", "_ended", "_inside", "_module", "_name", "_scope", "is_awaited",
    )  # fmt: skip

    def __init__(
        self,
        declaration: Declaration,
        name: str,
        module: str | None = None,
        arguments: Arguments | None = None,
        scope: ScopeSpan | None = None,
    ) -> None:
        self._declaration = declaration
        self._name = name
        self._module = module
        self._arguments = arguments
        self._scope = scope
        # What is current inside, blocks that were opened there included.
        self._inside = None if scope is None else _current_inside(scope)
        self._ended = False
        self.is_awaited = False
        _runtime.consumed[id(self)] = ref(self)

    outside = staticmethod(current)
    restore = staticmethod(attach)

    def resume(self) -> None:
        """Make current what the last step left; for the first one, open the scope."""
        try:
            inside = self._inside
            if inside is None:
                if self._scope is None:
                    self._open()
                else:
                    attach(None)
                return
            run = None if _runs.config_here() is None else _runs.around()
            if run is not inside.entered_in:
                inside = inside.resumed_in(run)
            (attach if at_work else reattach)(inside)  # Mostly not a call of Python code.
        except Exception:
            failed("resuming a traced call")

    def _open(self) -> None:
        if not _runtime.is_on(self._module):
            return  # No longer.
        scope = self._scope = self._declaration.derive(self._name, "function", None, self._module)
        attach(scope)
        if scope.inherited.capture & INPUTS:
            scope.arguments = self._arguments
        self._arguments = None

    def suspend(self, outside: Scope | None) -> None:
        """Keep what is current for the next step, and give the consumer its own scope back."""
        inside = current()
        if inside is not outside or not is_collecting():  # Else the scope was never current.
            self._inside = inside
            reattach(outside)

    def end(self, error: BaseException | None = None, value: Any = None) -> None:
        """End the span, if it hasn't ended."""
        scope = self._scope
        if self._ended or scope is None:
            return
        self._inside = None
        _runtime.consumed.pop(id(self), None)
        scope.closed = True
        if self.is_awaited and isinstance(error, GeneratorExit):
            error = CancelledError("closed before it ended")
        end(scope, error, value)
        self._ended = True  # Now: where this is interrupted, it is called again.
        self.__class__ = Call


def _current_inside(scope: Scope) -> Scope:
    inside = around = current()
    while around is not None and around is not scope:
        around = around.outer
    return scope if around is None or inside is None else inside


class OpenCall(Call):
    """One that hasn't ended. Its finalizer isn't there any more when it has: an interrupt in there would be lost."""

    __slots__ = ()

    def __del__(self) -> None:
        """End the span of what was never begun, or couldn't be closed, and is collected."""
        with suppress(AttributeError):  # Its making was interrupted.
            _runtime.consumed.pop(id(self), None)
            self.end(GeneratorExit())


def leave(scope: Scope, error: BaseException | None = None) -> None:
    """Make what was around a call current again; nearly always the call's own scope is on top."""
    outer = scope.outer
    if current() is scope and (outer is None or not outer.left_early):
        scope.closed = True
        reattach(outer)
    else:
        leave_all(scope, error)


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an exception interrupted the program somewhere, in our own code perhaps."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, Exception) and is_interruption(error))


def leave_all(scope: Scope, error: BaseException | None) -> None:
    """Leave a call, and calls in it that couldn't: interrupted in our own code, or out of stack.

    Where the program was interrupted, blocks in it too.
    """
    interrupted = was_interrupted(error)
    left = []
    inner = current()
    while inner is not None and inner is not scope:
        span = inner.span
        if (inner.entry is None or interrupted) and not inner.closed and isinstance(span, ScopeSpan):
            left.append((inner, span))
        inner = inner.outer
    if inner is scope:
        for one, span in left:
            one.closed = True
            if one.entry is not None:
                one.entry.forget(span)
            end(span, error)
    detach(scope)


def end(span: ScopeSpan, error: BaseException | None, value: Any = None) -> None:
    """End the span of a block or call and record it; never raises."""
    if span.outer is None:
        Scope.roots.discard(span)
    try:
        if span.open_runs is not NO_RUNS:
            _runs.settle(span)
        inherited = span.inherited
        if error is not None:
            span.set_error(error)
            if span.noted and span.error is not None:
                _runs.note_attempts_in(span)
        else:
            span.status = "ok"
            if value is not None and inherited.capture & OUTPUTS and not span.output_is_set:
                try:
                    span.raw_output = value if type(value) in PLAIN else snapshot(value)
                except TypeError:  # Its class has no hash.
                    span.raw_output = value
        recorder = inherited.recorder
        span.ended_at_ns = recorder.now_ns()
        recorder.record(span)
    except RecursionError:
        pass  # There is no room for us this deep.
    except Exception:
        failed("ending a traced block or call")
