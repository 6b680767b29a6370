"""Serves the tiny model by llama.cpp's own OpenAI-compatible server, in a child process."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from . import child_process
from .tiny_llm import write_tiny_gguf

_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class LlamaServer(child_process.ChildServer):
    """A real model, though it talks word salad: `url` ends in `/v1` and takes any model name.

    It calls a tool only with `tool_choice="any"` (and `parallel_tool_calls=False`); bound the strings and
    numbers in a tool's schema, or the model goes on for long. With `tool_choice="auto"` prose is answered by
    HTTP 500. Streams carry the usage only with `stream_usage=True`. What it says differs from run to run.
    """

    def __init__(self, api_key: str | None = None) -> None:
        super().__init__("llm_server", *(["--api-key", api_key] if api_key else []))


def _parameters(model: Path, port: int, api_key: str | None) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {"tiny"}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_ctx = 4096
    parameters.n_parallel = 2
    # With two threads on busy cores it's ten times slower.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.fit_params = False
    parameters.offline = True
    parameters.ui = False
    parameters.verbosity = 1
    parameters.chat_template = _TEMPLATE.read_text(encoding="utf-8")
    if api_key:
        parameters.api_keys = [api_key]
    return parameters


def main() -> None:
    """Serves the tiny model until it's told to end."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--api-key")
    options = child_process.arguments(parser)

    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_gguf(Path(folder, "tiny.gguf"))
        server = xllamacpp.Server(_parameters(model, options.port, options.api_key))
    child_process.serve(f"{server.listening_address}/v1", options)
    # The destructors of the C++ server take their time, or crash.
    os._exit(0)


if __name__ == "__main__":
    main()
