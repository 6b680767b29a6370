"""PromptLayer's full-featured LangChain example, working again, in two ways.

    OPENAI_API_KEY=... PROMPTLAYER_API_KEY=... python examples/full_featured.py

The documented example is `drop_in` below, but for its imports, which were

    import promptlayer
    from langchain_community.callbacks.promptlayer_callback import PromptLayerCallbackHandler

PromptLayer's registry has to hold a prompt "example" with the variable `product`. OPENAI_BASE_URL points it at any
other server that speaks OpenAI's protocol. It needs `pip install langchain-openai`.
"""

import os
import sys

import pltrace
import pltrace as promptlayer
from pltrace import PromptLayerCallbackHandler, prompts, traced

try:
    from langchain_openai import OpenAI
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} isn't installed: this example needs `pip install langchain-openai`")


def drop_in() -> None:
    """The old way: the imports are changed, nothing else."""

    def pl_id_callback(promptlayer_request_id: int) -> None:
        print("prompt layer id ", promptlayer_request_id)
        promptlayer.track.score(request_id=promptlayer_request_id, score=100)  # an integer 0-100
        promptlayer.track.metadata(request_id=promptlayer_request_id, metadata={"foo": "bar"})  # key-value pairs
        promptlayer.track.prompt(
            request_id=promptlayer_request_id,
            prompt_name="example",
            prompt_input_variables={"product": "toasters"},
            version=1,
        )

    openai_llm = OpenAI(
        model_name="gpt-3.5-turbo-instruct",
        callbacks=[PromptLayerCallbackHandler(pl_id_callback=pl_id_callback)],
    )
    example_prompt = promptlayer.prompts.get("example", version=1, langchain=True)
    openai_llm.invoke(example_prompt.format(product="toasters"))


def with_traced() -> None:
    """The way of pltrace: the block scores and describes what is in it, and the prompt links itself."""
    openai_llm = OpenAI(model_name="gpt-3.5-turbo-instruct")
    with traced("advertise", metadata={"foo": "bar"}) as span:
        (prompts.get("example", version=1) | openai_llm).invoke({"product": "toasters"})
        span.score(100)


def main() -> None:
    """Run both."""
    if not os.environ.get("OPENAI_API_KEY"):
        sys.exit("OPENAI_API_KEY isn't set: this example asks a model of OpenAI's")
    if not os.environ.get("PROMPTLAYER_API_KEY"):
        sys.exit("PROMPTLAYER_API_KEY isn't set: this example gets a prompt from PromptLayer's registry")
    drop_in()
    with_traced()
    print("delivered" if pltrace.flush(timeout=10) else "not delivered yet; the next process goes on with it")


if __name__ == "__main__":
    main()
