"""Functions: plain, async, and a generator."""

import asyncio
from collections.abc import Iterator, Sequence

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from pltrace import traced

_PROMPT = ChatPromptTemplate.from_template("Summarize in {words} words: {text}")


def _chain(model: BaseChatModel) -> Runnable[dict[str, object], str]:
    return _PROMPT | model | StrOutputParser()


# The span is named after the function; name it in full, so that applications know whose it is.
@traced("tracedlib.summarize")
def summarize(model: BaseChatModel, text: str, *, words: int = 5) -> str:
    """Return a summary of a text."""
    return _chain(model).invoke({"words": words, "text": text})


@traced("tracedlib.summarize_all", tags=["bulk"])
async def summarize_all(model: BaseChatModel, texts: Sequence[str], *, words: int = 5) -> list[str]:
    """Return summaries of several texts, made at the same time."""
    return await asyncio.gather(*[_chain(model).ainvoke({"words": words, "text": text}) for text in texts])


@traced("tracedlib.summarize_stream")
def summarize_stream(model: BaseChatModel, text: str, *, words: int = 5) -> Iterator[str]:
    """Give a summary piece by piece, as the model makes it."""
    yield from _chain(model).stream({"words": words, "text": text})
