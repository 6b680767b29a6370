"""The examples of PromptLayer's page that were dead, ported, and run as a user would run them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.tiny_llm import write_tiny_gguf
from tests.test_examples import EXAMPLES, run


def test_full_featured_delivers_in_both_ways(
    tmp_path: Path, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Score, metadata and prompt link arrive, said by callback and id as on the page, and said by a block."""
    promptlayer.add_prompt(
        "example", {"type": "completion", "content": [{"type": "text", "text": "Name a company that makes {product}."}]}
    )

    out = run(
        tmp_path,
        EXAMPLES / "full_featured.py",
        OPENAI_API_KEY="none",
        OPENAI_BASE_URL=llm.base_url,
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
    )

    assert out.endswith("delivered\n")
    assert [body["prompt"] for body in llm.bodies] == [["Name a company that makes toasters."]] * 2
    first, second = promptlayer.request_logs
    for log in (first, second):
        assert (log["prompt_name"], log["prompt_version_number"]) == ("example", 1)
        assert log["prompt_input_variables"] == {"product": "toasters"}
    assert f"prompt layer id  {first['id']}\n" in out
    asked = [(op["op"], op["request_id"]) for op in promptlayer.operations if op["request_id"] == first["id"]]
    assert asked == [("score", first["id"]), ("metadata", first["id"]), ("prompt", first["id"])]
    assert [op["score"] for op in promptlayer.operations if op["op"] == "score"] == [100, 100]
    assert second["metadata"]["foo"] == "bar"


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CI") and (find_spec("gpt4all") is None or find_spec("langchain_community") is None),
    reason="needs 300 MB of packages: pip install 'pltrace[examples]'",
)
def test_gpt4all_delivers_in_both_ways(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """The example with a local model runs a real model on the CPU, and both of its calls arrive with their tags."""
    model = write_tiny_gguf(tmp_path / "tiny.gguf")

    out = run(
        tmp_path,
        EXAMPLES / "gpt4all_local.py",
        model,
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
    )

    assert out.endswith("delivered\n")
    assert [log["tags"] for log in promptlayer.request_logs] == [["langchain", "gpt4all"]] * 2
    for log in promptlayer.request_logs:
        assert log["input"]["content"] == [{"type": "text", "text": "Once upon a time, "}]
        assert log["status"] == "SUCCESS"
    assert promptlayer.tree() == [("GPT4All", []), ("story", [("GPT4All", [])])]
