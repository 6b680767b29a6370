"""Fetches prompts from PromptLayer's registry, and keeps them: nobody waits for what has been fetched lately.

For a minute what is known is fresh. For ten it is given at once, while it is fetched anew behind the caller. What is
older is waited for, as is what a program asks to have anew, but not for long: PromptLayer may be down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from pltrace._account import Account, account, is_missing, refused
from pltrace._clock import monotonic
from pltrace._errors import PromptLayerError
from pltrace._forks import at_fork
from pltrace._health import logger, warn_once
from pltrace._runs import running_loop
from pltrace._silence import be_silent

__all__ = ["afetched", "fetched", "forget"]

FRESH_S, USABLE_S = 60.0, 600.0
#: After a failure, what is known is used for so long before PromptLayer is asked again.
_PAUSE_S = 10.0
#: How long a caller waits for PromptLayer, who has nothing, and who has something to go on with. Its client has no
#: timeout, and tries four times.
_LONGEST_WAIT_S, _STALE_WAIT_S = 30.0, 2.0
_MOST_ENTRIES = 1_000


class _Key(NamedTuple):
    account: tuple[str, str, int]
    name: str
    version: int | None
    label: str | None

    def __str__(self) -> str:
        which = f" version {self.version}" if self.version is not None else ""
        return f"prompt {self.name!r}{which}" + (f" label {self.label!r}" if self.label is not None else "")


@dataclass
class _Entry:
    template: Any
    fresh_until: float
    usable_until: float

    @classmethod
    def of(cls, template: Any) -> _Entry:
        """Return an entry that was fetched just now."""
        now = monotonic()
        return cls(template, now + FRESH_S, now + USABLE_S)

    def pause(self) -> None:
        """Use it for a while before PromptLayer is asked again, and after that still at once."""
        self.fresh_until = monotonic() + _PAUSE_S
        self.usable_until = max(self.usable_until, self.fresh_until + FRESH_S)


class _Fetch(NamedTuple):
    """A fetch that is under way, and what to go on with if it takes long or fails."""

    key: _Key
    base_url: str
    future: Future[Any]
    entry: _Entry | None

    @property
    def longest_wait_s(self) -> float:
        """How long to wait for it."""
        return _LONGEST_WAIT_S if self.entry is None else _STALE_WAIT_S

    def otherwise(self, error: Exception) -> Any:
        """Return what is known, or raise what came of the fetch."""
        missing = isinstance(error, _NotThereError)
        if isinstance(error, PromptLayerError):
            # One exception is handed to all who waited; raised by several threads it would collect all their frames.
            told = PromptLayerError(str(error))
            told.__cause__ = error.__cause__
        else:
            told = PromptLayerError(
                f"Can't get {self.key} at {self.base_url}: no answer within {self.longest_wait_s:.0f} s; see that the "
                "address is right and can be reached from here"
            )
        if self.entry is None or missing:
            raise told
        _go_on_with(self.entry, self.key, told)
        return _copied(self.entry.template)


_lock = threading.Lock()
_entries: dict[_Key, _Entry] = {}
_fetches: dict[_Key, Future[Any]] = {}


def fetched(name: str, version: int | None, label: str | None) -> Any:
    """Return the template of a registry entry, a fresh copy for each caller.

    Raises:
        ConfigError: There is no API key.
        PromptLayerError: There is no such prompt, or PromptLayer can't be asked and the prompt isn't known from before.
    """
    found = _looked_up(name, version, label)
    if not isinstance(found, _Fetch):
        return found
    try:
        return _copied(found.future.result(found.longest_wait_s))
    except (FutureTimeoutError, PromptLayerError) as error:
        return found.otherwise(error)


async def afetched(name: str, version: int | None, label: str | None) -> Any:
    """Return what `fetched` does, letting the event loop go on."""
    import asyncio  # Who awaits has it.

    found = _looked_up(name, version, label)
    if not isinstance(found, _Fetch):
        return found
    # Shielded, for others wait for it too.
    answer = asyncio.shield(asyncio.wrap_future(found.future))
    try:
        return _copied(await asyncio.wait_for(answer, found.longest_wait_s))
    except (asyncio.TimeoutError, PromptLayerError) as error:
        return found.otherwise(error)


def _looked_up(name: str, version: int | None, label: str | None) -> Any:
    """Return a template that may be used at once, or the fetch to wait for."""
    where = account(f"prompts.get({name!r})")
    key = _Key((where.key, where.base_url, id(where.given)), name, version, label)
    with _lock:
        entry = _entries.get(key)
        now = monotonic()
        if entry is not None and now < entry.fresh_until:
            return _copied(entry.template)
        future = _fetches.get(key)
        if future is None:
            future = _fetches[key] = _start(key, where)
    if entry is not None and now < entry.usable_until:
        return _copied(entry.template)
    return _Fetch(key, where.base_url, future, entry)


def _go_on_with(entry: _Entry, key: _Key, error: PromptLayerError) -> None:
    entry.pause()
    warn_once(f"stale:{key}", "%s. What was fetched earlier is used until PromptLayer answers again.", error)


class _NotThereError(PromptLayerError):
    """There is no such prompt, now or any more."""


def _start(key: _Key, where: Account) -> Future[Any]:
    """Fetch in a thread: callers can stop waiting, and what the client does to its thread's context stays there."""
    # Loaded here, in the user's thread: LangChain is the user's to import.
    from pltrace._from_blueprint import template_from

    if running_loop() is None:
        _ = where.client  # The same goes for promptlayer and what it imports, unless an event loop would stand still.

    future: Future[Any] = Future()
    threading.Thread(
        target=_fetch, args=(key, where, template_from, future), name="pltrace-prompts", daemon=True
    ).start()
    return future


def _fetch(key: _Key, where: Account, template_from: Callable[..., Any], future: Future[Any]) -> None:
    be_silent()
    template: Any = None
    error: PromptLayerError | None = None
    try:
        template = _asked(key, where, template_from)
    except PromptLayerError as raised:
        error = raised
    except Exception as raised:
        error = PromptLayerError(f"Can't get {key} at {where.base_url}: {type(raised).__name__}: {raised}")
        error.__cause__ = raised
    with _lock:
        if _fetches.get(key) is not future:
            pass  # Somebody asked for a later one meanwhile.
        elif template is not None:
            _entries.pop(key, None)
            _entries[key] = _Entry.of(template)
            if len(_entries) > _MOST_ENTRIES:
                del _entries[next(iter(_entries))]
        elif isinstance(error, _NotThereError):
            _entries.pop(key, None)
        elif error is not None and key in _entries:
            _go_on_with(_entries[key], key, error)
        if _fetches.get(key) is future:
            del _fetches[key]
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(template)


def _asked(key: _Key, where: Account, template_from: Callable[..., Any]) -> Any:
    # Unrendered: which of its braces are variables is decided here.
    parameters: dict[str, Any] = {"skip_input_variable_rendering": True}
    if key.version is not None:
        parameters["version"] = key.version
    if key.label is not None:
        parameters["label"] = key.label
    try:
        answer = where.client.templates.get(key.name, parameters)
    except Exception as error:
        if not is_missing(error):
            raise refused(f"get {key}", where, error) from error
        answer = None
    if answer is None:
        raise _NotThereError(
            f"PromptLayer has no {key} in the workspace of this API key ({where.base_url}); check name, version and "
            "label, or publish it with prompts.publish()"
        )
    try:
        template = template_from(answer, key.label)
    except Exception as error:
        raise PromptLayerError(
            f"The {key} can't be made a LangChain template: {type(error).__name__}: {error}; change it in the registry"
        ) from error
    logger.debug("Fetched %s from %s", key, where.base_url)
    return template


def _copied(template: Any) -> Any:
    """Return a copy that the caller may change in any way: what is kept is everybody's."""
    return deepcopy(template)


def forget(name: str | None = None) -> None:
    """Ask PromptLayer again at the next use of a prompt, or of any; until it answers, what is known stays of use."""
    with _lock:
        for key, entry in _entries.items():
            if name is None or key.name == name:
                entry.fresh_until = entry.usable_until = 0.0
                _fetches.pop(key, None)


def _forked() -> None:
    """Start with a lock of its own, in the child of a fork: fetches are the parent's threads'."""
    global _lock
    _lock = threading.Lock()
    _fetches.clear()


at_fork(in_child=_forked)
