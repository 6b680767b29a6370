"""PromptLayer's LangChain example for a local model, working again, in two ways.

    PROMPTLAYER_API_KEY=... python examples/gpt4all_local.py [MODEL_FILE]

The documented example was

    from langchain_community.callbacks.promptlayer_callback import PromptLayerCallbackHandler
    from langchain_community.llms import GPT4All

    model = GPT4All(model="./models/gpt4all-model.bin", n_ctx=512, n_threads=8)
    response = model.invoke(
        "Once upon a time, ", config={"callbacks": [PromptLayerCallbackHandler(pl_tags=["langchain", "gpt4all"])]}
    )

GPT4All takes no `n_ctx` any more; it is `max_tokens` now. The model is a GGUF file; more threads than idle cores make
it slow. It needs `pip install "pltrace[examples]"`, about 300 MB. (A file named gpt4all.py would be imported as the
package of that name.)
"""

import os
import sys

import pltrace
from pltrace import PromptLayerCallbackHandler, traced

try:
    import gpt4all  # noqa: F401 - LangChain would look for it when the model is made
    from langchain_community.llms import GPT4All
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} isn\'t installed: this example needs `pip install "pltrace[examples]"`')

MODEL = sys.argv[1] if len(sys.argv) > 1 else "./models/gpt4all-model.gguf"


def drop_in(model: GPT4All) -> None:
    """The old way: one import is changed, nothing else."""
    response = model.invoke(
        "Once upon a time, ",
        config={"callbacks": [PromptLayerCallbackHandler(pl_tags=["langchain", "gpt4all"])]},
    )
    print(response)


def with_traced(model: GPT4All) -> None:
    """The way of pltrace: a block around the calls, and no list of callbacks to hand over."""
    with traced("story", tags=["langchain", "gpt4all"]):
        print(model.invoke("Once upon a time, "))


def main() -> None:
    """Run both."""
    if not os.path.isfile(MODEL):
        sys.exit(f"There is no file {MODEL}: this example takes the path of a model, a GGUF file, as its argument")
    model = GPT4All(model=MODEL, max_tokens=512, n_predict=24, n_threads=1, device="cpu", allow_download=False)
    drop_in(model)
    with_traced(model)
    if not pltrace.flush(timeout=10):
        print("not delivered yet; the next process goes on with it")
    elif os.environ.get("PROMPTLAYER_API_KEY"):
        print("delivered")
    else:
        print("not delivered: PROMPTLAYER_API_KEY isn't set")


if __name__ == "__main__":
    main()
