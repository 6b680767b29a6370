"""PromptLayer's LangChain example for chat models, working again, in two ways.

    OPENAI_API_KEY=... PROMPTLAYER_API_KEY=... python examples/chat_openai.py

The documented example was

    from langchain_community.callbacks.promptlayer_callback import PromptLayerCallbackHandler

    chat_llm = ChatOpenAI(temperature=0, callbacks=[PromptLayerCallbackHandler(pl_tags=["chatopenai"])])
    chat_llm.invoke([HumanMessage(content="What comes after 1,2,3 ?"), HumanMessage(content="Tell me another joke?")])

OPENAI_BASE_URL points it at any other server that speaks OpenAI's protocol. It needs `pip install langchain-openai`.
"""

import os
import sys

from langchain_core.messages import HumanMessage

import pltrace
from pltrace import PromptLayerCallbackHandler, traced

try:
    from langchain_openai import ChatOpenAI
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} isn't installed: this example needs `pip install langchain-openai`")

MESSAGES = [HumanMessage(content="What comes after 1,2,3 ?"), HumanMessage(content="Tell me another joke?")]


def drop_in() -> None:
    """The old way: one import is changed, nothing else."""
    chat_llm = ChatOpenAI(temperature=0, callbacks=[PromptLayerCallbackHandler(pl_tags=["chatopenai"])])
    chat_llm.invoke(MESSAGES)


def with_traced() -> None:
    """The way of pltrace: a block around the calls, and no list of callbacks to hand over."""
    with traced("joke", tags=["chatopenai"]):
        ChatOpenAI(temperature=0).invoke(MESSAGES)


def main() -> None:
    """Run both."""
    if not os.environ.get("OPENAI_API_KEY"):
        sys.exit("OPENAI_API_KEY isn't set: this example asks a model of OpenAI's")
    drop_in()
    with_traced()
    if not pltrace.flush(timeout=10):
        print("not delivered yet; the next process goes on with it")
    elif os.environ.get("PROMPTLAYER_API_KEY"):
        print("delivered")
    else:
        print("not delivered: PROMPTLAYER_API_KEY isn't set")


if __name__ == "__main__":
    main()
