"""LangChain prompt templates that are linked to an entry of PromptLayer's registry: rendering one leaves a note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableConfig

from pltrace import _links, _runs
from pltrace._health import failed
from pltrace._links import Link, Place
from pltrace._scope import current
from pltrace._span import Span

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

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        """Return what a model takes, with the variables filled in."""
        with _links.gathered(), _handed(config):
            return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        """Return what a model takes, with the variables filled in."""
        with _links.gathered(), _handed(config):
            return await super().ainvoke(input, config, **kwargs)

    def batch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[PromptValue]:
        """Return what a model takes, for each input."""
        with _links.gathered():
            return super().batch(inputs, config, **kwargs)

    async def abatch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[PromptValue]:
        """Return what a model takes, for each input."""
        with _links.gathered():
            return await super().abatch(inputs, config, **kwargs)

    def _merge_partial_and_user_variables(self, **kwargs: Any) -> dict[str, Any]:
        resolved: dict[str, Any] | None = kwargs.get(_RESOLVED)
        return super()._merge_partial_and_user_variables(**kwargs) if resolved is None else resolved

    def _rendered(self, variables: Mapping[str, Any], messages: Sequence[BaseMessage], *strings: str) -> None:
        """Note what the template rendered to."""
        try:
            names = {*self.input_variables, *self.optional_variables, *self.partial_variables}
            given = {name: value for name, value in variables.items() if name in names}
            link = Link(self.prompt_name, self.prompt_version, self.prompt_label, given)
            if messages:  # A completion model is given the messages as LangChain writes them out.
                strings = (*strings, ChatPromptValue(messages=messages).to_string())
            _links.note(link, messages, strings, _place())
        except Exception:
            failed("noting what a prompt of the registry rendered to")


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

    def format_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Return the messages, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = super().format_messages(**{_RESOLVED: variables})
        self._rendered(variables, messages)
        return messages

    async def aformat_messages(self, **kwargs: Any) -> list[BaseMessage]:
        """Return the messages, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = await super().aformat_messages(**{_RESOLVED: variables})
        self._rendered(variables, messages)
        return messages

    def format(self, **kwargs: Any) -> str:
        """Return the prompt as one string, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = super().format_messages(**{_RESOLVED: variables})
        text = _text(messages)
        self._rendered(variables, messages, text)
        return text

    async def aformat(self, **kwargs: Any) -> str:
        """Return the prompt as one string, with the variables filled in."""
        variables = self._merge_partial_and_user_variables(**kwargs)
        messages = await super().aformat_messages(**{_RESOLVED: variables})
        text = _text(messages)
        self._rendered(variables, messages, text)
        return text


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
        text = super().format(**{_RESOLVED: variables})
        self._rendered(variables, (), text)
        return text


def _text(messages: Sequence[BaseMessage]) -> str:
    if len(messages) == 1 and isinstance(messages[0].content, str):
        return messages[0].content
    return ChatPromptValue(messages=messages).to_string()


#: The run that a template's `invoke` was handed in its config. It may be known from there alone: on Python 3.10
#: LangChain doesn't set its own context in async code.
_handed_run: ContextVar[Span | None] = ContextVar("pltrace_handed_run", default=None)


@contextmanager
def _handed(config: RunnableConfig | None) -> Iterator[None]:
    run_id = getattr((config or {}).get("callbacks"), "parent_run_id", None)
    outer = _handed_run.get()
    _handed_run.set(None if run_id is None else _runs.open_runs.get(run_id.int))
    try:
        yield
    finally:
        _handed_run.set(outer)


def _place() -> Place:
    """Return where the running code is.

    What a LangChain run renders is for the run around it, a sequence mostly: LangChain runs each step in a context of
    its own, so what one step rendered isn't known to the next.
    """
    in_task = _runs.in_task()
    handed = _handed_run.get()
    if handed is not None:
        return Place(handed.trace_bits, handed.span_bits, in_task)
    run = _runs.around()
    scope = current()
    if run is not None and (scope is None or not scope.span or scope.span.trace_bits == run.trace_bits):
        around = run.run_around or run.parent
        if isinstance(around, Span) and around.run_fields is not None:
            return Place(run.trace_bits, around.span_bits, in_task)
        return Place(run.trace_bits, 0, in_task)
    return Place(scope.span.trace_bits if scope is not None else 0, 0, in_task)
