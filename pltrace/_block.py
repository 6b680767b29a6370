"""Blocks: a declaration that is entered and left, in any order, from any context."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from pltrace import _runtime
from pltrace._calling import end, leave_all, was_interrupted
from pltrace._collecting import at_work, is_collecting
from pltrace._declaration import Declaration
from pltrace._health import failed, is_interruption
from pltrace._scope import PassedOver, Scope, ScopeSpan, abandon, attach, current, detach, entry_of, reattach
from pltrace._span import INERT_SPAN, Span

__all__ = ["Block"]

#: The code of generators and coroutines, which the garbage collector closes in the midst of any other code.
_CLOSABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def _frame(depth: int) -> FrameType | None:
    """Return who calls, so far up; None if that isn't Python code, as at exit or in a greenlet."""
    try:
        return sys._getframe(depth + 1)
    except ValueError:
        return None


def _mark(frame: FrameType | None) -> int:
    # With its code's: the id of a frame that is over, as of an exit stack's method, is soon another's.
    return 0 if frame is None else id(frame) ^ id(frame.f_code)


def _is_around(frame: FrameType, mark: int) -> bool:
    outer = frame.f_back
    while outer is not None and _mark(outer) != mark:
        outer = outer.f_back
    return outer is not None


class Block(Declaration):
    """A declaration as a context manager; it can be entered by many at once, and again inside itself."""

    def __init__(self, name: str | None, module: str | None) -> None:
        # As the base does, without a call on the caller's path.
        self._name = name
        self._module = module
        #: Blocks that are open, latest last: for one that is left in another context than it was entered in.
        self._open: dict[object, ScopeSpan | PassedOver] = {}

    def __enter__(self, _depth: int = 1) -> Span:
        """Open a block: what runs inside it is recorded under its span.

        Args:
            _depth: How far up the user's frame is.
        """
        is_on = _runtime.is_on_everywhere or (_runtime.gate and _runtime.is_on(self._module))
        scope: ScopeSpan | PassedOver | None = None
        try:
            # Also if nothing is recorded: its leaving must find it, and not a block that was opened since.
            scope = self.derive(self._name or "traced", "block", self, self._module) if is_on else PassedOver(self)
            self._open[scope] = scope
            if len(self._open) > 1:  # Of two that are entered at once, at most the first has no mark.
                try:
                    frame = sys._getframe(_depth)
                    scope.frame = id(frame) ^ id(frame.f_code)  # As `_mark`, without a call on the caller's path.
                except ValueError:  # As in `_frame`.
                    pass
            scope.token = attach(scope) if at_work else reattach(scope)  # Mostly not a call of Python code.
        except BaseException as error:
            if scope is not None:
                self._open.pop(scope, None)
                Scope.roots.discard(scope)
                detach(scope)
            if is_interruption(error):
                raise
            failed("entering a traced block")
            with suppress(Exception):  # Its leaving must leave alone what others opened.
                scope = PassedOver(self)
                self._open[scope] = scope
                attach(scope)
            return INERT_SPAN
        return scope if type(scope) is ScopeSpan else INERT_SPAN

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any, _depth: int = 1) -> None:
        """Leave the latest block of this context that this declaration opened."""
        scope = span = None
        try:
            scope = current()
            if scope is None or scope.entry is not self or scope.closed:
                scope = entry_of(self) or self._left_elsewhere(_mark(_frame(_depth)))
                if scope is None:
                    return
            if len(self._open) > 1 and (kind is GeneratorExit or is_collecting()):
                # What is current may be that of the code that the garbage collector interrupted.
                frame = _frame(_depth)
                if kind is not GeneratorExit:
                    scope = self._left_elsewhere(_mark(frame))
                elif frame is not None:
                    scope = self._meant_by(frame, scope, traceback)
                if scope is None:
                    return
            leave = abandon if kind is GeneratorExit and is_collecting() else detach
            span = self._open.pop(scope, None)
            if span is None:  # It is a copy, for a run, of the one that was entered.
                span = self._open.pop(scope.span, None)
            if error is not None and current() is not scope and was_interrupted(error):
                leave_all(scope, error)  # Calls in it may have been interrupted in our own code.
            else:
                leave(scope)
            if span is not None:
                if span is not scope:
                    leave(span)
                span.entry = None  # A declaration made for this block alone needn't wait with it.
                if type(span) is ScopeSpan:
                    end(span, error)
        except BaseException as interrupt:
            scope = scope or entry_of(self)
            if scope is not None:
                self._interrupted(scope, span, interrupt)
            if not isinstance(interrupt, Exception):
                raise
            failed("leaving a traced block")

    def _interrupted(self, scope: Scope, span: ScopeSpan | PassedOver | None, error: BaseException) -> None:
        """Leave a block whose leaving was interrupted, as by Ctrl+C, when all or a part of it was done."""
        mine = span or scope.span
        self._open.pop(scope, None)
        self._open.pop(mine, None)
        if is_collecting():
            abandon(scope)
        else:
            leave_all(scope, error)
        if isinstance(mine, ScopeSpan) and (mine is span or mine.entry is self):
            mine.entry = None
            end(mine, error)

    def forget(self, span: Span) -> None:
        """Take note that a block was ended by what is around it."""
        self._open.pop(span, None)

    def _left_elsewhere(self, frame: int) -> Scope | None:
        """Return the open block that is left in another context than it was entered in.

        Args:
            frame: The mark of who leaves it: mostly the one who entered it, which tells it from others that are open.
        """
        opened = list(self._open.values())  # In one step: other threads enter and leave.
        theirs = [scope for scope in opened if scope.frame == frame] or [scope for scope in opened if not scope.frame]
        found = theirs or opened
        return found[-1] if found else None

    def _meant_by(self, leaving: FrameType, scope: Scope, traceback: Any) -> Scope | None:
        """Return the open block that a generator or coroutine leaves, as it is closed.

        The garbage collector may have closed it, and what is current is that of the code it came in between.

        Args:
            leaving: Who leaves it.
            scope: The latest of the current context.
            traceback: It begins in who leaves it, if that has a `with` statement of its own.
        """
        entered: int = getattr(scope if isinstance(scope, PassedOver) else scope.span, "frame", 0)
        mark = _mark(leaving)
        if entered == mark or not leaving.f_code.co_flags & _CLOSABLE:
            return scope
        opened = list(self._open.values())
        theirs = [one for one in opened if one.frame == mark]
        if not theirs:
            # An exit stack's coroutine leaves what another one entered; but what code further out entered, that leaves.
            is_own = getattr(traceback, "tb_frame", None) is leaving
            if not entered or not (is_own or _is_around(leaving, entered)):
                return scope
            theirs = [one for one in opened if not one.frame]
        return theirs[-1] if theirs else None

    async def __aenter__(self) -> Span:
        """Open a block."""
        return self.__enter__(2)

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the block."""
        self.__exit__(kind, error, traceback, 2)
