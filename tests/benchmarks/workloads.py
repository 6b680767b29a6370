"""What is measured: LangChain runs with a model that answers at once, and calls of decorated functions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

from tests.benchmarks.plan import CALLS_AT_ONCE

__all__ = ["make"]

#: Pieces of one streamed answer, and the turns of the agent, each of six runs inside the agent's own.
CHUNKS, TURNS = 200, 10

_USAGE = UsageMetadata(input_tokens=12, output_tokens=7, total_tokens=19)
_ANSWER = "Forty-two, as far as anybody has been able to find out so far."


class InstantModel(BaseChatModel):
    """A chat model that costs next to nothing, so that what is left is LangChain and who listens to it."""

    model_name: str = "instant"

    @property
    def _llm_type(self) -> str:
        return "instant"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = AIMessage(_ANSWER, usage_metadata=_USAGE)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for _ in range(CHUNKS):
            chunk = ChatGenerationChunk(message=AIMessageChunk("word "))
            if run_manager is not None:
                run_manager.on_llm_new_token("word ", chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for _ in range(CHUNKS):
            chunk = ChatGenerationChunk(message=AIMessageChunk("word "))
            if run_manager is not None:
                await run_manager.on_llm_new_token("word ", chunk=chunk)
            yield chunk


_model = InstantModel()
_prompt = ChatPromptTemplate.from_messages([("system", "You answer about {topic}."), ("human", "{question}")])
_chain = _prompt | _model | StrOutputParser() | RunnableLambda(str.upper)
_VARIABLES = {"topic": "everything", "question": "What is the answer?"}
_QUESTION = [HumanMessage("What is the answer to everything?")]


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} means what it says"


_step = _prompt | _model | RunnableLambda(lambda message: message.content[:5])
_note = RunnableLambda(lambda said: ToolMessage(said, tool_call_id="call"))


def _turns(state: dict[str, Any], config: Any) -> dict[str, Any]:
    """Take the turns of an agent, whose messages grow: per turn a chain of four runs, a tool and a function."""
    for _ in range(TURNS):
        word = _step.invoke(_VARIABLES, config)
        state["messages"].append(_note.invoke(look_up.invoke({"word": word}, config), config))
    return state


_agent = RunnableLambda(_turns)


def make(name: str, config: Any, tracer: Any) -> Callable[[], Any] | Callable[[], Awaitable[Any]] | None:
    """Return what runs a workload once, or None if the tracer has nothing of that kind.

    Args:
        name: The workload's.
        config: Goes with LangChain's runs.
        tracer: See `tracers.Tracer`.
    """
    if name in _RUNS:
        return lambda: _RUNS[name](config)
    return _decorated(name, tracer)


def _stream(config: Any) -> None:
    for _ in _model.stream(_QUESTION, config):
        pass


async def _astream(config: Any) -> None:
    async for _ in _model.astream(_QUESTION, config):
        pass


_RUNS: dict[str, Callable[[Any], Any]] = {
    "LLM call": lambda config: _model.invoke(_QUESTION, config),
    "chain of 5 runs": lambda config: _chain.invoke(_VARIABLES, config),
    "agent of 61 runs": lambda config: _agent.invoke({"messages": list(_QUESTION)}, config),
    "stream of 200 chunks": _stream,
    "async LLM call": lambda config: _model.ainvoke(_QUESTION, config),
    "async chain of 5 runs": lambda config: _chain.ainvoke(_VARIABLES, config),
    "async stream of 200 chunks": _astream,
}


def _decorated(name: str, tracer: Any) -> Callable[[], Any] | None:
    if name in _BLOCKS:
        block, enter = _BLOCKS[name](tracer)
        return _enter_nothing if tracer.name == "none" else block and (lambda: enter(block))
    function, drive = _FUNCTIONS[name]
    decorated = function if tracer.name == "none" else tracer.decorate(function)
    return None if decorated is None else lambda: drive(decorated)


def _declare_and_enter(make: Callable[[str], Any]) -> None:
    for _ in range(CALLS_AT_ONCE):
        with make("block"):
            pass


def _enter(block: Any) -> None:
    for _ in range(CALLS_AT_ONCE):
        with block:
            pass


def _enter_nothing() -> None:
    for _ in range(CALLS_AT_ONCE):
        pass


def _function(number: int, word: str = "word") -> int:
    return number


async def _coroutine(number: int, word: str = "word") -> int:
    return number


def _generator(count: int) -> Iterator[int]:
    yield from range(count)


async def _async_generator(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


def _call(function: Callable[..., Any]) -> None:
    for number in range(CALLS_AT_ONCE):
        function(number, word="a word")


async def _acall(function: Callable[..., Any]) -> None:
    for number in range(CALLS_AT_ONCE):
        await function(number, word="a word")


def _consume(function: Callable[..., Any]) -> None:
    for _ in function(1_000):
        pass


async def _aconsume(function: Callable[..., Any]) -> None:
    async for _ in function(1_000):
        pass


_BLOCKS: dict[str, Callable[[Any], tuple[Any, Callable[[Any], None]]]] = {
    "with block": lambda tracer: (tracer.block, _declare_and_enter),
    "with block, declared before": lambda tracer: (tracer.declared, _enter),
}

_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "decorated call": (_function, _call),
    "decorated coroutine": (_coroutine, _acall),
    "generator step": (_generator, _consume),
    "async generator step": (_async_generator, _aconsume),
}
