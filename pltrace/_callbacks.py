"""Runs `on_request` functions in the background, each once, and lets `flush` wait for them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

from pltrace._background import Background
from pltrace._clock import monotonic
from pltrace._greenlets import Condition
from pltrace._health import counts, failed, log, warn_sometimes
from pltrace._request import MOST_WAITING, Request
from pltrace._scope import Callback, attach

__all__ = ["CallbackRunner"]


class CallbackRunner:
    """One thread, started by the first callback, that calls them in order and never passes on what they raise."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """Start empty, as in the child of a fork."""
        self._changed = Condition()
        self._queue: deque[tuple[tuple[Callback, ...], Request]] = deque()
        self._busy = False
        self._stopped = False
        self._on_loops: dict[Future[Any], asyncio.AbstractEventLoop] = {}
        self._thread: Background | None = None
        self._ident: int | None = None

    def submit(self, callbacks: tuple[Callback, ...], request: Request) -> None:
        """Call `callbacks` one after the other with `request`, soon."""
        with self._changed:
            self._queue.append((callbacks, request))
            if len(self._queue) > MOST_WAITING:
                self._queue.popleft()
                counts["callbacks_given_up"] += 1
                warn_sometimes(
                    "callbacks",
                    "on_request functions take longer than requests come: %d wait, and the oldest are given up.",
                    MOST_WAITING,
                )
            self._changed.notify_all()
            if self._thread is not None and self._thread.is_alive():
                return
            # One that was stopped ends again when it has done this.
            try:
                self._thread = Background(self._run, "pltrace-callbacks", is_users=True).start()
            except RuntimeError:  # The interpreter is shutting down; `flush` at exit runs what is left.
                self._thread = None

    def _run(self) -> None:
        self._ident = threading.get_ident()
        attach(None)  # A thread can begin in the scope of who started it, and what callbacks do is not part of it.
        while True:
            with self._changed:
                while not self._queue:
                    if self._stopped:
                        self._thread = None
                        return
                    self._changed.wait()
                callbacks, request = self._queue.popleft()
                self._busy = True
            try:
                for callback in callbacks:
                    self._call(callback, request)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _call(self, callback: Callback, request: Request) -> None:
        try:
            answer = callback.function(request)
            if inspect.isawaitable(answer):
                self._await(answer, callback)
        except Exception:
            _log(callback)
        except BaseException as error:  # A callback that calls sys.exit() ends itself, not our thread.
            counts["callbacks_failed"] += 1
            log(logging.ERROR, "on_request function %r raised %r; the program goes on", callback.function, error)

    def _await(self, answer: Any, callback: Callback) -> None:
        """Run a coroutine on the loop that entered its scope if that is running, else here."""
        loop = callback.loop
        if loop is None or not loop.is_running():
            asyncio.run(_finish(answer))
            return
        try:
            future = asyncio.run_coroutine_threadsafe(_finish(answer), loop)
        except RuntimeError:  # It was closed at this moment.
            asyncio.run(_finish(answer))
            return
        with self._changed:
            self._on_loops[future] = loop
        future.add_done_callback(lambda done: self._ended_on_loop(done, callback))

    def _ended_on_loop(self, future: Future[Any], callback: Callback) -> None:
        try:
            if future.cancelled():
                counts["callbacks_failed"] += 1
                log(logging.ERROR, "on_request function %r was cut off by the end of its event loop", callback.function)
            elif future.exception() is not None:
                counts["callbacks_failed"] += 1
                log(
                    logging.ERROR,
                    "on_request function %r raised; the program goes on",
                    callback.function,
                    exc_info=future.exception(),
                )
        except Exception:
            failed("ending an on_request function")
        with self._changed:
            self._on_loops.pop(future, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread end when nothing is left for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self, deadline: float | None) -> bool:
        """Wait until all callbacks so far are done, except those on the event loop of the thread that waits.

        Args:
            deadline: Monotonic time to give up at, or None.

        Returns:
            Whether they are done.
        """
        try:
            here: Any = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if threading.get_ident() == self._ident:
            return True  # A callback that flushes would wait for itself.
        with self._changed:
            while self._queue or self._busy or any(self._still_runs(loop, here) for loop in self._on_loops.values()):
                remaining = 0.1 if deadline is None else min(0.1, deadline - monotonic())
                if remaining <= 0:
                    return False
                # Woken by each callback that ends; looked at again now and then for a loop that ended without a word.
                self._changed.wait(remaining)
        return True

    def _still_runs(self, loop: asyncio.AbstractEventLoop, here: object) -> bool:
        return loop is not here and loop.is_running()


async def _finish(answer: Any) -> Any:
    return await answer


def _log(callback: Callback) -> None:
    counts["callbacks_failed"] += 1
    log(logging.ERROR, "on_request function %r raised; the program goes on", callback.function, exc_info=True)
