"""A small LangChain app, traced, with a model that follows a script: it needs no key and no network.

    python examples/quickstart.py

It records into the default store, so that `pltrace ls` shows the trace afterwards, and ends by printing it. With
PROMPTLAYER_API_KEY set, the same program delivers its LLM calls to PromptLayer, and the ids and scores are
PromptLayer's.
"""

import subprocess
import sys

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.tools import tool

import pltrace
from pltrace import Request, traced

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "You help the customers of {shop}."), MessagesPlaceholder("messages")]
)
CALL = {"name": "order_status", "args": {"order": 1234}, "id": "call_1"}
#: What a model would answer: first it asks for a tool, then it answers, then it shortens its answer.
SCRIPT = [
    AIMessage("", tool_calls=[CALL], usage_metadata={"input_tokens": 41, "output_tokens": 12, "total_tokens": 53}),
    AIMessage(
        "Your order 1234 left our warehouse today. It should be with you tomorrow.",
        usage_metadata={"input_tokens": 66, "output_tokens": 17, "total_tokens": 83},
    ),
    AIMessage(
        "Shipped; arrives tomorrow.", usage_metadata={"input_tokens": 30, "output_tokens": 5, "total_tokens": 35}
    ),
]
model = GenericFakeChatModel(messages=iter(SCRIPT))


@tool
def order_status(order: int) -> str:
    """Look up where an order is."""
    return f"Order {order}: shipped today, delivery tomorrow."


def rate(request: Request) -> None:
    """Score each LLM call, in the background, once it has its id."""
    request.score(100 if request.status == "ok" else 0, "answered")


@traced(tags=["support"])
def answer(question: str) -> str:
    """Let the model answer, with the tools that it asks for."""
    messages: list[AnyMessage] = [HumanMessage(question)]
    while True:
        reply = (PROMPT | model).invoke({"shop": "Example & Sons", "messages": messages})
        messages.append(reply)
        if not reply.tool_calls:
            return str(reply.content)
        messages += [
            ToolMessage(order_status.invoke(call["args"]), tool_call_id=call["id"]) for call in reply.tool_calls
        ]


def main() -> None:
    """Answer one question, and show what happened."""
    pltrace.configure(enabled=True)
    shorten = ChatPromptTemplate.from_template("In three words: {text}") | model | StrOutputParser()

    with traced("quickstart", tags=["demo"], metadata={"channel": "chat"}, user="ada", on_request=rate) as span:
        text = answer("Where is my order 1234?")
        with traced("shorten", tags=["sms"]):
            short = shorten.invoke({"text": text})

    print(text)
    print(short)
    print(f"{span.usage.requests} LLM calls, {span.usage.total_tokens} tokens")
    if not pltrace.flush(timeout=10):
        print("Not all is delivered; the next process goes on with it.")
    print(flush=True)
    subprocess.run([sys.executable, "-m", "pltrace", "show", span.trace_id], check=False)


if __name__ == "__main__":
    main()
