"""Fetches prompts from PromptLayer's registry, keeps them for a minute, and longer while PromptLayer is down."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from copy import deepcopy
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

from pltrace._account import Account, account, is_missing, refused
from pltrace._errors import PromptLayerError
from pltrace._health import logger, warn_once
from pltrace._silence import be_silent

__all__ = ["fetched", "forget"]

FRESH_S = 60.0
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


_lock = threading.Lock()
_entries: dict[_Key, _Entry] = {}
_fetches: dict[_Key, Future[Any]] = {}


def fetched(name: str, version: int | None, label: str | None) -> Any:
    """Return the template of a registry entry, a fresh copy for each caller.

    Raises:
        ConfigError: There is no API key.
        PromptLayerError: There is no such prompt, or PromptLayer can't be asked and the prompt isn't known from before.
    """
    where = account(f"prompts.get({name!r})")
    key = _Key((where.key, where.base_url, id(where.client)), name, version, label)
    with _lock:
        entry = _entries.get(key)
        if entry is not None and monotonic() < entry.fresh_until:
            return _copied(entry.template)
        future = _fetches.get(key)
        if future is None:
            future = _fetches[key] = _start(key, where)
    try:
        return _copied(future.result(_LONGEST_WAIT_S if entry is None else _STALE_WAIT_S))
    except FutureTimeoutError:
        missing = False
        error = PromptLayerError(
            f"Can't get {key} at {where.base_url}: no answer within {_LONGEST_WAIT_S:.0f} s; see that the address is "
            "right and can be reached from here"
        )
    except PromptLayerError as raised:
        # One exception is handed to all who waited; raised by several threads it would collect all their frames.
        error, missing = PromptLayerError(str(raised)), isinstance(raised, _NotThereError)
        error.__cause__ = raised.__cause__
    if entry is None or missing:
        raise error
    entry.fresh_until = monotonic() + _PAUSE_S
    warn_once(f"stale:{key}", "%s. What was fetched earlier is used until PromptLayer answers again.", error)
    return _copied(entry.template)


class _NotThereError(PromptLayerError):
    """There is no such prompt, now or any more."""


def _start(key: _Key, where: Account) -> Future[Any]:
    """Fetch in a thread: callers can stop waiting, and what the client does to its thread's context stays there."""
    # Loaded here, in the user's thread: LangChain is the user's to import.
    from pltrace._from_blueprint import template_from

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
        _fetches.pop(key, None)
        if template is not None:
            _entries.pop(key, None)
            _entries[key] = _Entry(template, monotonic() + FRESH_S)
            if len(_entries) > _MOST_ENTRIES:
                del _entries[next(iter(_entries))]
        elif isinstance(error, _NotThereError):
            _entries.pop(key, None)
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
                entry.fresh_until = 0.0


def _forked() -> None:
    """Start with a lock of its own, in the child of a fork: fetches are the parent's threads'."""
    global _lock
    _lock = threading.Lock()
    _fetches.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
