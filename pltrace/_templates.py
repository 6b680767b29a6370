"""LangChain prompt templates that are linked to an entry of PromptLayer's registry: rendering one leaves a note."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate

from pltrace import _links, _runs
from pltrace._health import failed
from pltrace._links import Link
from pltrace._scope import current
from pltrace._snapshot import snapshot
from pltrace._thawing import thawed

__all__ = ["RegistryChatPromptTemplate", "RegistryPromptTemplate"]

#: Under this name the variables go through LangChain's own rendering, resolved once: values that are functions must
#: not be asked again for the link.
_RESOLVED = "pltrace resolved variables"


class _Linked(BasePromptTemplate[Any]):
    """What both kinds of linked templates share."""

    prompt_name: str
    prompt_version: int | None = None
    prompt_label: str | None = None
    model_settings: dict[str, Any]
    prompt_metadata: dict[str, Any]

    def _merge_partial_and_user_variables(self, **kwargs: Any) -> dict[str, Any]:
        resolved: dict[str, Any] | None = kwargs.get(_RESOLVED)
        return super()._merge_partial_and_user_variables(**kwargs) if resolved is None else resolved

    def _link(self, variables: Mapping[str, Any]) -> Link:
        names = {*self.input_variables, *self.optional_variables, *self.partial_variables}
        given = {name: _attributes_of(value) for name, value in variables.items() if name in names}
        return Link(self.prompt_name, self.prompt_version, self.prompt_label, thawed(snapshot(given)))

    def _noted(self, variables: Mapping[str, Any], text: str) -> str:
        """Note a text that the template rendered to; return it as an object of its own."""
        text = _links.fresh(text)
        _note(self._link(variables), [text])
        return text


def _attributes_of(value: Any) -> Any:
    """Return an object that has nothing else to show as its attributes: they are what templates say of it."""
    if type(value) is list:
        return [_attributes_of(item) for item in value]
    shown_by: Any = type(value).__repr__
    if shown_by not in (object.__repr__, SimpleNamespace.__repr__) or not hasattr(value, "__dict__"):
        return value
    return {name: item for name, item in vars(value).items() if not name.startswith("_")} or value


def _note(link: Link, texts: Sequence[str | None], system: int = 0) -> None:
    try:
        run, scope = _runs.around(), current()
        span = run if run is not None else None if scope is None else scope.span
        _links.note(link, texts, system, span.trace_bits if span else 0, run)
    except Exception:
        failed("noting what a prompt of the registry rendered to")


class LinkedPromptValue(ChatPromptValue):
    """LangChain's `ChatPromptValue`, which a completion model makes a string of: the string is linked too."""

    _link: Link | None = None

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return LangChain's own id: loaded from its serialised form, the value is a plain one."""
        return [*cls.get_lc_namespace(), "ChatPromptValue"]

    def to_string(self) -> str:
        """Return the messages as one string."""
        text = _links.fresh(super().to_string())
        if self._link is not None:
            _note(self._link, [text])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatPromptValue) and list(self.messages) == list(other.messages)

    def __reduce__(self) -> Any:
        """Be pickled as a plain one: what was noted is this process's."""
        return partial(ChatPromptValue, messages=self.messages), ()


class RegistryChatPromptTemplate(_Linked, ChatPromptTemplate):
    """A chat prompt of the registry, as LangChain's `ChatPromptTemplate`; requests made from it are linked to it.

    It differs in one thing: a prompt of a single message formats to that message's text, without the role before it,
    so that it can be handed on as a string, to an agent as its system prompt for example.

    Attributes:
        prompt_name: Its name in the registry.
        prompt_version: Its version.
        prompt_label: The release label that it was asked for by, if any.
        tools: The tools that are stored with it, for `model.bind_tools(prompt.tools)`.
        tool_choice: Which of them the model has to use, if that is stored.
        model_settings: `provider`, `name` and `parameters` of the model that is stored with it; empty if none is.
        prompt_metadata: All the metadata that is stored with it.
    """

    tools: list[dict[str, Any]]
    tool_choice: Any = None

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return LangChain's own id: loaded from its serialised form, the template is a plain one."""
        return [*cls.get_lc_namespace(), "ChatPromptTemplate"]

    def __add__(self, other: Any) -> ChatPromptTemplate:
        """Return a template that goes on with `other`; what is rendered from it is linked as a beginning."""
        begun = self.model_copy(update={"messages": [*self.messages]})
        made: ChatPromptTemplate = ChatPromptTemplate([begun]) + other
        return made

    def format_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Return the messages, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = super().format_messages(**{_RESOLVED: variables})
        self._noted_messages(variables, messages)
        return messages

    async def aformat_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Return the messages, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = await super().aformat_messages(**{_RESOLVED: variables})
        self._noted_messages(variables, messages)
        return messages

    def format_prompt(self, **kwargs: Any) -> ChatPromptValue:
        """Return what a model takes, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = super().format_messages(**{_RESOLVED: variables})
        return self._value(self._noted_messages(variables, messages), messages)

    async def aformat_prompt(self, **kwargs: Any) -> ChatPromptValue:
        """Return what a model takes, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = await super().aformat_messages(**{_RESOLVED: variables})
        return self._value(self._noted_messages(variables, messages), messages)

    def format(self, **kwargs: Any) -> str:
        """Return the prompt as one string, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        return self._noted(variables, _text(super().format_messages(**{_RESOLVED: variables})))

    async def aformat(self, **kwargs: Any) -> str:
        """Return the prompt as one string, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        return self._noted(variables, _text(await super().aformat_messages(**{_RESOLVED: variables})))

    def _value(self, link: Link, messages: Sequence[BaseMessage]) -> ChatPromptValue:
        value = LinkedPromptValue(messages=messages)
        value._link = link
        return value

    def _noted_messages(self, variables: Mapping[str, Any], messages: Sequence[BaseMessage]) -> Link:
        """Note the messages that the template rendered to, and make their texts objects of their own."""
        link = self._link(variables)
        given = {id(message) for message in (*_fixed_in(self), *_messages_among(variables.values()))}
        texts: list[str | None] = []
        system, leads = 0, True
        for message in messages:
            leads = leads and _links.is_system(message)
            if id(message) in given:
                texts += [None] * len(list(_links.texts_in(message.content)))
            else:
                message.content = _freshened(message.content)
                texts += _links.texts_in(message.content)
            system = len(texts) if leads else system
        _note(link, texts, system)
        return link


def _freshened(content: Any) -> Any:
    """Return the content of a message with texts that are objects of their own."""
    if isinstance(content, str):
        return _links.fresh(content)
    return [_freshened_part(part) for part in content]


def _freshened_part(part: Any) -> Any:
    if isinstance(part, str):
        return _links.fresh(part)
    text = part.get("text")
    return {**part, "text": _links.fresh(text)} if isinstance(text, str) else part


def _fixed_in(template: ChatPromptTemplate) -> Iterator[BaseMessage]:
    """Give the messages in a template that aren't rendered but handed on."""
    for part in template.messages:
        if isinstance(part, BaseMessage):
            yield part
        elif isinstance(part, ChatPromptTemplate):
            yield from _fixed_in(part)


def _messages_among(values: Iterable[Any]) -> Iterator[BaseMessage]:
    """Give the messages that variables were given, for placeholders."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, BaseMessage))


class RegistryPromptTemplate(_Linked, PromptTemplate):
    """A completion prompt of the registry, as LangChain's `PromptTemplate`; requests made from it are linked to it.

    Attributes:
        prompt_name: Its name in the registry.
        prompt_version: Its version.
        prompt_label: The release label that it was asked for by, if any.
        model_settings: `provider`, `name` and `parameters` of the model that is stored with it; empty if none is.
        prompt_metadata: All the metadata that is stored with it.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return LangChain's own id: loaded from its serialised form, the template is a plain one."""
        return [*cls.get_lc_namespace(), "PromptTemplate"]

    def format(self, **kwargs: Any) -> str:
        """Return the prompt, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        return self._noted(variables, super().format(**{_RESOLVED: variables}))


def _text(messages: Sequence[BaseMessage]) -> str:
    if len(messages) == 1 and isinstance(messages[0].content, str):
        return messages[0].content
    return ChatPromptValue(messages=messages).to_string()
