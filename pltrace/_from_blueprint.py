"""Turns a prompt of the registry, a Prompt Blueprint, into LangChain's templates: the way back from `_to_blueprint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import (
    AIMessagePromptTemplate,
    HumanMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
    SystemMessagePromptTemplate,
)
from langchain_core.prompts.image import ImagePromptTemplate
from langchain_core.prompts.message import BaseMessagePromptTemplate

from pltrace._templates import RegistryChatPromptTemplate, RegistryPromptTemplate

__all__ = ["AnyMessagePromptTemplate", "template_from"]

_PLAIN: dict[str, Any] = {
    "system": SystemMessagePromptTemplate,
    "developer": SystemMessagePromptTemplate,
    "user": HumanMessagePromptTemplate,
    "assistant": AIMessagePromptTemplate,
}
_MESSAGES: dict[str, type[BaseMessage]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": HumanMessage,
    "assistant": AIMessage,
}


class AnyMessagePromptTemplate(BaseMessagePromptTemplate):
    """A message that LangChain has no template for: of a tool or a function, or with blocks other than text and images.

    Attributes:
        role: The blueprint's role.
        parts: Templates of texts and images; all else as the blueprint's blocks.
        fields: What the message has besides.
    """

    role: str
    parts: list[Any]
    fields: dict[str, Any]

    @property
    def input_variables(self) -> list[str]:
        """The variables of all parts."""
        templates = [part for part in self.parts if not isinstance(part, dict)]
        return list(dict.fromkeys(name for template in templates for name in template.input_variables))

    def format_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Return the message, with the variables filled in."""
        content: list[Any] = []
        for part in self.parts:
            if isinstance(part, dict):
                content.append(_medium(part["media"]) if part["type"] == "media" else part)
                continue
            made = part.format(**{name: kwargs[name] for name in part.input_variables})
            is_image = isinstance(part, ImagePromptTemplate)
            content.append({"type": "image_url", "image_url": made} if is_image else {"type": "text", "text": made})
        if all(block.get("type") == "text" for block in content):
            text = "\n".join(block["text"] for block in content)
            return [self._message(text)]
        return [self._message(content)]

    def _message(self, content: Any) -> BaseMessage:
        if self.role == "tool":
            return ToolMessage(content=content, **self.fields)
        if self.role == "function":
            return FunctionMessage(content=content, **self.fields)
        kind = _MESSAGES.get(self.role)
        return ChatMessage(content=content, role=self.role) if kind is None else kind(content=content, **self.fields)

    def pretty_repr(self, html: bool = False) -> str:
        """Return the message for people."""
        return f"{self.role}: {[getattr(part, 'template', part) for part in self.parts]}"


def template_from(answer: Mapping[str, Any], label: str | None) -> RegistryChatPromptTemplate | RegistryPromptTemplate:
    """Return the template of a registry entry.

    Args:
        answer: What PromptLayer answers to `GET` of a prompt.
        label: The release label that it was asked for by.

    Raises:
        KeyError, TypeError, ValueError: The entry is not a Prompt Blueprint, or can't be rendered by LangChain.
    """
    blueprint = answer["prompt_template"]
    metadata = answer.get("metadata") or {}
    linked = {
        "prompt_name": answer["prompt_name"],
        "prompt_version": answer.get("version"),
        "prompt_label": label,
        "model_settings": metadata.get("model") or {},
        "prompt_metadata": metadata,
    }
    if blueprint["type"] == "completion":
        return _completion(blueprint, linked)
    messages: list[Any] = [_message(message) for message in blueprint["messages"]]
    functions = [{"type": "function", "function": function} for function in blueprint.get("functions") or ()]
    tools = [*(blueprint.get("tools") or ()), *functions]
    choice = blueprint.get("tool_choice") or blueprint.get("function_call")
    return RegistryChatPromptTemplate(messages=messages, tools=tools, tool_choice=choice, **linked)


def _completion(blueprint: Mapping[str, Any], linked: Mapping[str, Any]) -> RegistryPromptTemplate:
    text = "".join(block["text"] for block in blueprint.get("content") or () if block["type"] == "text")
    form = blueprint.get("template_format") or "f-string"
    template = _text(text, form, blueprint.get("input_variables") or ())
    return RegistryPromptTemplate(template=template.template, template_format=template.template_format, **linked)


def _message(message: Mapping[str, Any]) -> BaseMessagePromptTemplate:
    role = message["role"]
    if role == "placeholder":
        return MessagesPlaceholder(message["name"], optional=True)
    parts = _parts(message)
    extras = _extras(message)
    plain = _PLAIN.get(role)
    if plain is not None and not any(isinstance(part, dict) for part in parts):
        one = parts[0] if len(parts) == 1 and isinstance(parts[0], PromptTemplate) else None
        prompt = one or parts or PromptTemplate.from_template("")
        made: BaseMessagePromptTemplate = plain(prompt=prompt, additional_kwargs=extras)
        return made
    fields: dict[str, Any] = {"additional_kwargs": extras} if plain is not None else {}
    if role in ("tool", "function") and message.get("name"):
        fields["name"] = message["name"]
    if role == "tool":
        fields["tool_call_id"] = message.get("tool_call_id") or ""
    return AnyMessagePromptTemplate(role=role, parts=parts, fields=fields)


def _extras(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message has besides its content, where LangChain's models look for it."""
    extras: dict[str, Any] = {}
    if message["role"] == "developer":
        extras["__openai_role__"] = "developer"
    if message.get("name"):
        extras["name"] = message["name"]
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            extras[key] = message[key]
    return extras


def _parts(message: Mapping[str, Any]) -> list[Any]:
    """Return templates for texts and images; other blocks as they are."""
    form = message.get("template_format") or "f-string"
    declared = message.get("input_variables") or ()
    parts: list[Any] = []
    for block in message.get("content") or ():
        kind = block["type"]
        if kind == "text":
            parts.append(_text(block["text"], form, declared))
        elif kind == "image_url":
            parts.append(_image(block, form, declared))
        elif kind == "media_variable":
            parts.append(ImagePromptTemplate(template={"url": f"{{{block['name']}}}"}, input_variables=[block["name"]]))
        else:
            parts.append(dict(block))
    return parts


def _image(block: Mapping[str, Any], form: str, declared: Sequence[str]) -> ImagePromptTemplate:
    given = block["image_url"]
    if block.get("image_variable"):
        url = PromptTemplate(template=f"{{{block['image_variable']}}}", input_variables=[])
    else:
        url = _text(given["url"], form, declared)
    template = {"url": url.template, **({"detail": given["detail"]} if given.get("detail") else {})}
    return ImagePromptTemplate(
        template=template, template_format=url.template_format, input_variables=url.input_variables
    )


def _medium(media: Mapping[str, Any]) -> dict[str, Any]:
    """Return LangChain's block of a fixed image, sound or file."""
    url, mime = media.get("url") or "", media.get("type") or "image/jpeg"
    family = mime.partition("/")[0]
    if family == "image":
        return {"type": "image_url", "image_url": {"url": url}}
    block: dict[str, Any] = {"type": family if family in ("audio", "video") else "file", "mime_type": mime}
    if url.startswith("data:"):
        block["base64"] = url.partition(",")[2]
    else:
        block["url"] = url
    if media.get("title"):
        block["filename"] = media["title"]
    return block


def _text(text: str, form: str, declared: Sequence[str]) -> PromptTemplate:
    if form == "jinja2":
        return PromptTemplate.from_template(text, template_format="jinja2")
    return PromptTemplate.from_template(_f_string(text, declared))


def _f_string(text: str, declared: Sequence[str]) -> str:
    """Return a template that LangChain takes, and that renders as PromptLayer would render `text`.

    Where PromptLayer finds no variable, as in a piece of JSON, the text stays as it is; LangChain would refuse it, or
    ask for a variable of that name.
    """
    try:
        pieces = list(Formatter().parse(text))
    except ValueError:  # A brace that stands alone.
        return _literal(text)
    made: list[str] = []
    for literal, field, spec, conversion in pieces:
        made.append(_literal(literal))
        if field is None:
            continue
        rest = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        variable = field.isidentifier() or (field in declared and not set(field) & set(".[]"))
        if variable and "{" not in rest:
            made.append(f"{{{field}{rest}}}")
        else:
            made.append(_literal(f"{{{field}{rest}}}"))
    return "".join(made)


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
