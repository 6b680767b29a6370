"""Scores, metadata, prompt links and groups by request id, as promptlayer's own client has them, but durable."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pltrace import _runtime
from pltrace._account import account, refused
from pltrace._checks import (
    checked_group,
    checked_metadata,
    checked_name,
    checked_optional_name,
    checked_release,
    checked_request_id,
    checked_score,
)
from pltrace._errors import PromptLayerError

__all__ = ["create_group", "group", "metadata", "prompt", "score"]

# The names are those of promptlayer's own `track`, parameters too.


def score(request_id: int, score: int, score_name: str | None = None) -> bool:
    """Score a request.

    It is kept on disk and sent in the background, in order, also by a later process. With no PromptLayer it is kept
    with the local request.

    Args:
        request_id: The request's id.
        score: 0 to 100.
        score_name: What is scored; without it, it is the request's own score.

    Returns:
        True; False while tracing is off, when nothing is kept.

    Raises:
        ConfigError: An argument is wrong.
    """
    arguments = {"score": checked_score(score), "score_name": checked_optional_name("score_name", score_name)}
    return _track("score", request_id, arguments)


def metadata(request_id: int, metadata: Mapping[str, Any]) -> bool:
    """Add metadata to a request; kept and sent as a score is.

    Args:
        request_id: The request's id.
        metadata: String keys, any values; those that aren't strings are sent as JSON text.

    Returns:
        True; False while tracing is off, when nothing is kept.

    Raises:
        ConfigError: An argument is wrong.
    """
    return _track("metadata", request_id, {"metadata": checked_metadata("metadata", metadata)})


def prompt(
    request_id: int,
    prompt_name: str,
    prompt_input_variables: Mapping[str, Any],
    version: int | None = None,
    label: str | None = None,
) -> bool:
    """Link a request to a prompt of the registry; kept and sent as a score is.

    Requests made from what `prompts.get` returned link themselves.

    Args:
        request_id: The request's id.
        prompt_name: The prompt's name.
        prompt_input_variables: What its variables were given.
        version: Its version; without it and `label`, the latest.
        label: A release label, in place of the version.

    Returns:
        True; False while tracing is off, when nothing is kept.

    Raises:
        ConfigError: An argument is wrong.
    """
    arguments = {
        "prompt_name": checked_name("prompt_name", prompt_name),
        "prompt_input_variables": checked_metadata("prompt_input_variables", prompt_input_variables),
        **checked_release(version, label),
    }
    return _track("prompt", request_id, arguments)


def group(request_id: int, group_id: int) -> bool:
    """Put a request into a group; kept and sent as a score is.

    Args:
        request_id: The request's id.
        group_id: What `create_group` returned.

    Returns:
        True; False while tracing is off, when nothing is kept.

    Raises:
        ConfigError: An argument is wrong.
    """
    return _track("group", request_id, {"group_id": checked_group(group_id)})


def create_group() -> int:
    """Make a group to put requests into, with `group`, `Request.add_to_group` or `Span.add_to_group`.

    This asks PromptLayer at once, and waits for the answer.

    Returns:
        The group's id; while tracing goes to the local store alone, one of its own.

    Raises:
        ConfigError: There is no API key, and tracing is off.
        PromptLayerError: PromptLayer refused, or couldn't be reached.
    """
    if _runtime.is_on() and _runtime.settings().api_key is None:
        return random.getrandbits(31) + 1
    where = account("track.create_group()")
    try:
        group_id = where.client.group.create()
    except Exception as error:
        raise refused("create a group", where, error) from error
    if isinstance(group_id, bool) or not isinstance(group_id, int):
        raise PromptLayerError(f"Can't create a group at {where.base_url}: it answered {group_id!r}")
    return group_id


def _track(kind: str, request_id: object, arguments: Mapping[str, Any]) -> bool:
    number = checked_request_id(request_id)
    tracing = _runtime.active() if _runtime.is_on() else None
    if tracing is None:
        return False
    tracing.recorder.track(kind, number, arguments)
    return True
