"""Prompts of PromptLayer's registry as LangChain prompt templates, linked to the requests that are made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pltrace import _registry
from pltrace._account import account, refused
from pltrace._checks import checked_metadata, checked_name, checked_release, checked_tags
from pltrace._errors import ConfigError, PromptLayerError

if TYPE_CHECKING:
    from pltrace._templates import RegistryChatPromptTemplate, RegistryPromptTemplate

__all__ = ["aget", "get", "publish", "refresh"]

#: PromptLayer's limits.
_LONGEST_NAME, _LONGEST_MESSAGE = 512, 72


def get(
    name: str, *, version: int | None = None, label: str | None = None, langchain: Literal[True] = True
) -> RegistryChatPromptTemplate | RegistryPromptTemplate:
    """Return a prompt of the registry as a LangChain prompt template.

    Requests that are made from it are linked to it, with its version and what its variables were given, whether it is
    piped into a model, formatted, bound with `partial()`, or handed to an agent.

    It is kept for a minute. For ten, what is known is returned at once and fetched anew in the background; `refresh`
    asks for the latest. When PromptLayer can't be reached, what is known is used, with one warning.

    Args:
        name: The prompt's name, or its id.
        version: Its version; without it and `label`, the latest.
        label: A release label.
        langchain: Says what is so anyway; calls of the former `promptlayer.prompts.get` have it.

    Returns:
        A `ChatPromptTemplate`, or for a completion prompt a `PromptTemplate`. Its attributes `prompt_name`,
        `prompt_version`, `prompt_label`, `model_settings`, `prompt_metadata` and, of a chat prompt, `tools` and
        `tool_choice` hold the rest of the entry. Placeholders are optional `MessagesPlaceholder`s.

    Raises:
        ConfigError: An argument is wrong, or there is no API key.
        PromptLayerError: There is no such prompt, or PromptLayer can't be asked and the prompt isn't known from before.
    """
    _check(name, version, label)
    if langchain is not True:
        raise ConfigError(
            f"langchain={langchain!r}: prompts.get gives LangChain templates; promptlayer's own client.templates.get "
            "gives the entry as it is"
        )
    template: RegistryChatPromptTemplate | RegistryPromptTemplate = _registry.fetched(name, version, label)
    return template


async def aget(
    name: str, *, version: int | None = None, label: str | None = None
) -> RegistryChatPromptTemplate | RegistryPromptTemplate:
    """Return what `get` does; where it has to wait for PromptLayer, the event loop goes on.

    Args:
        name: The prompt's name, or its id.
        version: Its version; without it and `label`, the latest.
        label: A release label.

    Returns:
        As `get`.

    Raises:
        ConfigError: An argument is wrong, or there is no API key.
        PromptLayerError: There is no such prompt, or PromptLayer can't be asked and the prompt isn't known from before.
    """
    _check(name, version, label)
    template: RegistryChatPromptTemplate | RegistryPromptTemplate = await _registry.afetched(name, version, label)
    return template


def _check(name: str, version: int | None, label: str | None) -> None:
    checked_name("name", name)
    checked_release(version, label)


def publish(
    name: str,
    template: Any,
    *,
    labels: Iterable[str] = (),
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    commit_message: str | None = None,
) -> int:
    """Publish a LangChain prompt template as the next version of a prompt in the registry.

    Args:
        name: The prompt's name; it is made if there is none.
        template: A `ChatPromptTemplate`, a `PromptTemplate`, or a string in f-string syntax (a completion prompt). What
            `get` returned keeps its tools and model settings.
        labels: Release labels to put on this version.
        tags: Tags of the prompt.
        metadata: Goes with the version; its `model`, a dict of `provider`, `name` and `parameters`, sets the model.
        commit_message: Says what changed, in 72 characters.

    Returns:
        The number of the new version.

    Raises:
        ConfigError: An argument is wrong, the registry has no place for something in the template, or there is no API
            key.
        PromptLayerError: PromptLayer refused it, or couldn't be reached.
    """
    if len(checked_name("name", name)) > _LONGEST_NAME:
        raise ConfigError(f"name={name[:40]!r}…: expected at most {_LONGEST_NAME} characters")
    if commit_message is not None and len(checked_name("commit_message", commit_message)) > _LONGEST_MESSAGE:
        raise ConfigError(f"commit_message={commit_message!r}: expected at most {_LONGEST_MESSAGE} characters")
    from pltrace._to_blueprint import blueprint_from

    if metadata is not None:
        checked_metadata("metadata", metadata)
    kept = getattr(template, "prompt_metadata", {}) if metadata is None else dict(metadata)
    body: dict[str, Any] = {"prompt_name": name, "prompt_template": blueprint_from(template)}
    optional = {
        "metadata": kept,
        "release_labels": list(checked_tags("labels", labels)),
        "tags": list(checked_tags("tags", tags)),
        "commit_message": commit_message,
    }
    body.update({key: value for key, value in optional.items() if value})
    where = account(f"prompts.publish({name!r})")
    try:
        answer = where.client.templates.publish(body)
    except Exception as error:
        raise refused(f"publish prompt {name!r}", where, error) from error
    number = answer.get("version_number") if isinstance(answer, Mapping) else None
    if not isinstance(number, int):  # The client raises for one status alone and hands on what others say.
        raise PromptLayerError(f"Can't publish prompt {name!r} at {where.base_url}: it answered {answer!r}")
    _registry.forget(name)
    return number


def refresh(name: str | None = None) -> None:
    """Let the next `get` ask PromptLayer, however fresh what is known may be.

    Args:
        name: The prompt; None means all.
    """
    _registry.forget(name)
