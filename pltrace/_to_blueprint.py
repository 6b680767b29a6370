"""Turns LangChain's prompt templates into a Prompt Blueprint for the registry: the way back from `_from_blueprint`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.prompts.chat import (
    AIMessagePromptTemplate,
    BaseChatPromptTemplate,
    ChatMessagePromptTemplate,
    HumanMessagePromptTemplate,
    SystemMessagePromptTemplate,
)
from langchain_core.prompts.image import ImagePromptTemplate
from langchain_core.prompts.message import BaseMessagePromptTemplate

from pltrace import _blueprint
from pltrace._encoding import Encoder
from pltrace._errors import ConfigError
from pltrace._from_blueprint import AnyMessagePromptTemplate

__all__ = ["blueprint_from"]

Block = dict[str, Any]

_ROLES = {"human": "user", "ai": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_KINDS: tuple[tuple[Any, str], ...] = (
    (SystemMessagePromptTemplate, "system"),
    (HumanMessagePromptTemplate, "user"),
    (AIMessagePromptTemplate, "assistant"),
)
_REGISTRY_ROLES = ("system", "user", "assistant", "developer", "tool", "function")
#: Whom a message of these roles answers, which the registry demands.
_ADDRESSES = {"tool": "tool_call_id", "function": "name"}
_FORMATS = ("f-string", "jinja2")
_VARIABLE = re.compile(r"\{(\w+)\}")


def blueprint_from(template: Any) -> Block:
    """Return the Prompt Blueprint of a template.

    Args:
        template: A string (f-string syntax), a `PromptTemplate`, or a `ChatPromptTemplate`.

    Raises:
        ConfigError: The registry has no place for something in it; the message says for what.
    """
    if isinstance(template, str):
        template = PromptTemplate.from_template(template)
    if not isinstance(template, BasePromptTemplate):
        raise ConfigError(f"template={template!r}: expected a string, a PromptTemplate or a ChatPromptTemplate")
    bound = _bound_in(template)
    if bound:
        raise ConfigError(
            f"template: the variables {bound} are bound by partial(), and the registry keeps no values; publish the "
            "template without them, and bind them where it is used"
        )
    if isinstance(template, PromptTemplate):
        content = [{"type": "text", "text": template.template}]
        return {
            "type": "completion",
            "template_format": _form(template.template_format),
            "content": content,
            "input_variables": list(template.input_variables),
        }
    if not isinstance(template, ChatPromptTemplate):
        raise ConfigError(f"template: a {type(template).__name__} has no place in the registry")
    if getattr(template, "schema_", None):
        raise ConfigError(
            "template: the schema of a StructuredPrompt has no place in the registry's messages; publish a "
            "ChatPromptTemplate, and the schema in metadata['model']['parameters']['response_format']"
        )
    made: Block = {
        "type": "chat",
        "messages": [message for part in template.messages for message in _messages(part)],
        "input_variables": list(template.input_variables),
    }
    for name in ("tools", "tool_choice"):
        if value := getattr(template, name, None):
            made[name] = value
    return made


def _bound_in(template: Any) -> list[str]:
    """Return the variables that have values already; placeholders that may be left out have an empty list."""
    inner = [part for part in getattr(template, "messages", ()) if isinstance(part, ChatPromptTemplate)]
    bound = [name for name, value in template.partial_variables.items() if value != []]
    return [*bound, *(name for part in inner for name in _bound_in(part))]


def _messages(part: Any) -> list[Block]:
    if isinstance(part, BaseMessage):
        return [_fixed(part)]
    if isinstance(part, ChatPromptTemplate):
        return [message for inner in part.messages for message in _messages(inner)]
    if isinstance(part, MessagesPlaceholder):
        if part.n_messages is not None:
            raise ConfigError(
                f"template: n_messages={part.n_messages} of the placeholder {part.variable_name!r} has no place in the "
                "registry; cut the list where it is given"
            )
        return [{"role": "placeholder", "name": part.variable_name}]
    if isinstance(part, (BaseMessagePromptTemplate, BaseChatPromptTemplate)):
        return [_message(part)]
    raise ConfigError(f"template: a {type(part).__name__} has no place in the registry")


def _message(part: Any) -> Block:
    if isinstance(part, AnyMessagePromptTemplate):
        role, parts, fields = part.role, part.parts, part.fields
    elif isinstance(part, ChatMessagePromptTemplate):
        role, parts, fields = part.role, [part.prompt], {"additional_kwargs": part.additional_kwargs}
    elif any(isinstance(part, kind) for kind, _ in _KINDS):
        role = next(role for kind, role in _KINDS if isinstance(part, kind))
        parts = part.prompt if isinstance(part.prompt, list) else [part.prompt]
        fields = {"additional_kwargs": part.additional_kwargs}
    else:
        raise ConfigError(f"template: a {type(part).__name__} has no place in the registry")
    extras = dict(fields.get("additional_kwargs") or {})
    if role == "system" and extras.pop("__openai_role__", None) == "developer":
        role = "developer"
    role = _ROLES.get(role, role)
    if role not in _REGISTRY_ROLES:
        raise ConfigError(
            f"template: the role {role!r} has no place in the registry, which knows {', '.join(_REGISTRY_ROLES)}; use "
            "one of these"
        )
    forms = {_form(one.template_format) for one in parts if hasattr(one, "template_format")}
    if len(forms) > 1:
        raise ConfigError("template: a message mixes f-string and jinja2, and the registry knows one format a message")
    made: Block = {
        "role": role,
        "content": [_block(one) for one in parts],
        "template_format": forms.pop() if forms else "f-string",
        "input_variables": list(part.input_variables),
    }
    for key in ("name", "tool_calls", "function_call", "tool_call_id"):
        value = extras.get(key) or fields.get(key)
        if value:
            made[key] = value
    address = _ADDRESSES.get(role)
    if address is not None and address not in made:
        raise ConfigError(
            f"template: a message of the role {role!r} needs a {address} in the registry; give it in additional_kwargs"
        )
    return made


def _block(part: Any) -> Block:
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, PromptTemplate):
        return {"type": "text", "text": part.template}
    if isinstance(part, ImagePromptTemplate):
        url = str(part.template.get("url") or "")
        image: Block = {"type": "image_url", "image_url": {"url": url}}
        if part.template.get("detail"):
            image["image_url"]["detail"] = part.template["detail"]
        whole = _VARIABLE.fullmatch(url)
        if whole:
            image["image_variable"] = whole[1]
        return image
    raise ConfigError(f"template: a {type(part).__name__} has no place in the registry")


def _fixed(message: BaseMessage) -> Block:
    """Return a message without variables; its braces are no variables, so they are doubled."""
    (made, *others) = _blueprint.chat_prompt([message], Encoder())["messages"]
    if others:
        raise ConfigError(f"template: {message!r} holds results of tools; give each a message of its own")
    made["content"] = [_escaped(block) for block in made["content"]]
    found: Block = {**made, "template_format": "f-string"}
    return found


def _escaped(block: Block) -> Block:
    if block.get("type") == "text":
        return {**block, "text": _doubled(block["text"])}
    if block.get("type") == "image_url":
        return {**block, "image_url": {**block["image_url"], "url": _doubled(block["image_url"]["url"])}}
    return block


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _form(template_format: str) -> str:
    if template_format not in _FORMATS:
        raise ConfigError(f"template_format={template_format!r}: the registry knows {' and '.join(_FORMATS)}")
    return template_format
