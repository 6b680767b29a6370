"""Prompts of the registry as LangChain templates, and the requests that are linked to them."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps, load
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
    merge_message_runs,
    trim_messages,
)
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import ChatMessagePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel

import pltrace
from pltrace import PltraceError, PromptLayerCallbackHandler, prompts, traced
from pltrace._registry import FRESH_S
from tests.support.http_double import CLOSE, HANG, Fault, on
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import calls, chat, completion
from tests.support.versions import recent_agents

Deliver = Callable[..., None]
Linked = tuple[str | None, int | None, dict[str, Any] | None]


def text(role: str, said: str, **more: Any) -> dict[str, Any]:
    """Make a blueprint message of one text."""
    return {"role": role, "content": [{"type": "text", "text": said}], **more}


JOKE = [text("system", "You are {mood}."), text("user", "Tell me about {topic}.")]
AGENT = [text("system", "You are {who}, an agent.")]
SLOGAN = {"type": "completion", "content": [{"type": "text", "text": "Name a maker of {product}."}]}


@pytest.fixture
def registry(deliver: Deliver, promptlayer: PromptLayerServer) -> PromptLayerServer:
    """Deliver to a PromptLayer whose registry holds three prompts."""
    promptlayer.add_prompt("joke", [text("user", "An old one.")])
    promptlayer.add_prompt("joke", JOKE, labels=["prod"])
    promptlayer.add_prompt("agent", AGENT)
    promptlayer.add_prompt("slogan", SLOGAN)
    deliver()
    return promptlayer


def links(server: PromptLayerServer) -> list[Linked]:
    """Give name, version and variables that each request was logged with."""
    assert pltrace.flush(10.0)
    fields = ("prompt_name", "prompt_version_number", "prompt_input_variables")
    return [tuple(log.get(field) for field in fields) for log in server.request_logs]  # type: ignore[misc]


def asked_for_prompts(server: PromptLayerServer) -> int:
    """Give how often a prompt was asked for."""
    return sum(request.path.startswith("/prompt-templates/") for request in server.requests)


#: The answer is ready, and held back until the server is released.
LATE = Fault(store=True, delay=60.0)
UNLINKED: Linked = (None, None, None)
VARIABLES = {"mood": "terse", "topic": "tea"}


def joke(**variables: Any) -> Linked:
    """Give the link of a request made from the prompt `joke`."""
    return ("joke", 2, variables or VARIABLES)


# What `get` returns.


def test_a_chat_prompt_is_a_chat_prompt_template(registry: PromptLayerServer) -> None:
    """Name, version and label say where it is from; its messages are rendered by LangChain."""
    prompt = prompts.get("joke", label="prod")

    assert isinstance(prompt, ChatPromptTemplate)
    assert (prompt.prompt_name, prompt.prompt_version, prompt.prompt_label) == ("joke", 2, "prod")
    assert prompt.input_variables == ["mood", "topic"]
    assert prompt.invoke(VARIABLES).to_messages() == [
        SystemMessage("You are terse."),
        HumanMessage("Tell me about tea."),
    ]


def test_a_completion_prompt_is_a_prompt_template(registry: PromptLayerServer) -> None:
    """A prompt for completion models formats to a string."""
    prompt = prompts.get("slogan")

    assert isinstance(prompt, PromptTemplate)
    assert (prompt.input_variables, prompt.format(product="tea")) == (["product"], "Name a maker of tea.")


def test_versions_and_labels(registry: PromptLayerServer) -> None:
    """The latest version is the default; a version and a label give theirs."""
    assert prompts.get("joke").prompt_version == 2
    assert prompts.get("joke", label="prod").prompt_version == 2
    old = prompts.get("joke", version=1)
    assert (old.prompt_version, old.format()) == (1, "An old one.")


def test_placeholders_images_tools_and_other_roles(registry: PromptLayerServer) -> None:
    """Each kind of message has its LangChain counterpart, and what the entry holds besides can be reached."""
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": "tea"}'}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    picture = {"type": "image_url", "image_url": {"url": ""}, "image_variable": "photo"}
    file = {"type": "media", "media": {"title": "a.pdf", "type": "application/pdf", "url": "https://x/a.pdf"}}
    messages = [
        text("developer", "Be {mood}."),
        {"role": "placeholder", "name": "history"},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]},
        {"role": "assistant", "content": [], "tool_calls": [call]},
        text("tool", "Found {found}.", tool_call_id="c1"),
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, file]},
    ]
    model = {"provider": "openai", "name": "gpt-4o", "parameters": {"temperature": 0.2}}
    blueprint = {"type": "chat", "messages": messages, "tools": [tool], "tool_choice": "auto"}
    registry.add_prompt("all", blueprint, metadata={"model": model, "team": "a"})

    prompt = prompts.get("all")
    made = prompt.invoke({"mood": "kind", "photo": "https://x/y.png", "found": "tea", "history": [("ai", "Hi")]})

    developer, past, question, asked, result, last = made.to_messages()
    assert (developer.content, developer.additional_kwargs) == ("Be kind.", {"__openai_role__": "developer"})
    assert past == AIMessage("Hi")
    assert question.content[1] == {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    assert isinstance(asked, AIMessage)
    assert [(one["name"], one["args"], one["id"]) for one in asked.tool_calls] == [("find", {"q": "tea"}, "c1")]
    assert (result, last.content[1]["type"]) == (ToolMessage("Found tea.", tool_call_id="c1"), "file")
    assert any(isinstance(one, MessagesPlaceholder) for one in prompt.messages)
    assert (prompt.tools, prompt.tool_choice) == ([tool], "auto")
    assert (prompt.model_settings, prompt.prompt_metadata["team"]) == (model, "a")
    assert len(prompt.invoke({"mood": "kind", "photo": "u", "found": "tea"}).to_messages()) == 5


def test_jinja2(registry: PromptLayerServer) -> None:
    """A jinja2 message may loop and reach into values; braces of JSON in it are text."""
    template = '{% for one in items %}{{ one.name }} {% endfor %}{"a": 1}'
    registry.add_prompt("jinja", [text("user", template, template_format="jinja2")])

    assert prompts.get("jinja").format(items=[{"name": "tea"}, {"name": "pie"}]) == 'tea pie {"a": 1}'


@pytest.mark.parametrize(
    ("template", "variables", "rendered"),
    [
        ("Hi {name}", ["name"], "Hi Bo"),
        ('Answer as {"a": 1}, {name}', ["name"], 'Answer as {"a": 1}, Bo'),
        ("{{name}} is {name!r:>6}", ["name"], "{name} is   'Bo'"),
        ("A { alone", [], "A { alone"),
        ("{} and {0} and {name.first}", [], "{} and {0} and {name.first}"),
        ('{"outer": {"inner": 2}}', [], '{"outer": {"inner": 2}}'),
        ("", [], ""),
    ],
)
def test_braces_that_are_no_variables(
    registry: PromptLayerServer, template: str, variables: list[str], rendered: str
) -> None:
    """What PromptLayer doesn't take for a variable is text, where LangChain alone would refuse it."""
    registry.add_prompt("braces", [text("user", template)])

    prompt = prompts.get("braces")

    assert prompt.input_variables == variables
    assert prompt.format(**dict.fromkeys(variables, "Bo")) == rendered


def test_a_single_message_formats_to_its_text(registry: PromptLayerServer) -> None:
    """A prompt of one message can be handed on as a string; of several, roles tell them apart, as in LangChain."""
    assert prompts.get("agent").format(who="Bo") == "You are Bo, an agent."
    assert prompts.get("joke").format(**VARIABLES) == "System: You are terse.\nHuman: Tell me about tea."


def test_templates_are_ordinary_ones(registry: PromptLayerServer) -> None:
    """They can be copied, pickled, extended and serialised, and nobody's change reaches another's copy."""
    prompt = prompts.get("joke")
    prompt.append(("human", "Now!"))

    assert len(prompts.get("joke").messages) == 2
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert prompt.lc_id()[-1] == "ChatPromptTemplate"
    longer = prompt + "more"
    prompt.append(("human", "And now!"))
    assert type(longer) is ChatPromptTemplate
    assert len(longer.format_messages(**VARIABLES)) == 4
    value = prompt.invoke(VARIABLES)
    plain = ChatPromptValue(messages=value.to_messages())
    assert (value == plain, plain == value, value == "x", dumps(value)) == (True, True, False, dumps(plain))
    assert type(pickle.loads(pickle.dumps(value))) is ChatPromptValue
    assert load(dumpd(value)) == plain


# Errors and the cache.


def test_a_missing_prompt_is_named(registry: PromptLayerServer) -> None:
    """The error says which prompt, version or label there isn't, and what to check."""
    with pytest.raises(PltraceError, match=r"no prompt 'nonsense'.*check name"):
        prompts.get("nonsense")
    with pytest.raises(PltraceError, match=r"no prompt 'joke' version 9"):
        prompts.get("joke", version=9)
    with pytest.raises(PltraceError, match=r"no prompt 'joke' label 'staging'"):
        prompts.get("joke", label="staging")


def test_without_a_key_it_says_what_to_set(local: Path) -> None:
    """With the local store alone there is no registry; the error names the remedy."""
    with pytest.raises(pltrace.ConfigError, match=r"prompts.get\('joke'\).*PROMPTLAYER_API_KEY"):
        prompts.get("joke")


@pytest.mark.parametrize(
    "arguments",
    [{"name": ""}, {"name": 3}, {"version": 0}, {"version": True}, {"version": "1"}, {"label": ""},
     {"version": 1, "label": "prod"}, {"langchain": False}],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any]) -> None:
    """A wrong argument is named where it is given."""
    with pytest.raises(pltrace.ConfigError):
        prompts.get(**{"name": "joke", **arguments})


def test_a_wrong_key_is_told_as_such(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """PromptLayer's refusal of the key comes with the name of the setting."""
    deliver(api_key="pl_wrong")

    with pytest.raises(pltrace.PromptLayerError, match=r"prompt 'joke'.*PROMPTLAYER_API_KEY"):
        prompts.get("joke")


def test_it_works_while_tracing_is_off(promptlayer: PromptLayerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry needs a key, not tracing."""
    promptlayer.add_prompt("joke", JOKE)
    monkeypatch.setenv("PLTRACE_ENABLED", "0")
    pltrace.configure(api_key=promptlayer.api_key, base_url=promptlayer.url)

    assert prompts.get("joke").prompt_version == 1
    assert promptlayer.spans == {}


def test_it_is_fetched_once_a_minute(registry: PromptLayerServer) -> None:
    """Many threads that ask at once share one request, and later ones ask nobody until it is refreshed."""
    together = threading.Barrier(8)

    def get(_: int) -> int | None:
        together.wait()
        return prompts.get("joke").prompt_version

    def asked() -> int:
        return sum(1 for request in registry.requests if request.path.startswith("/prompt-templates/"))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(get, range(8))) == {2}
    assert (asked(), prompts.get("joke").prompt_version, asked()) == (1, 2, 1)
    registry.add_prompt("joke", [text("user", "A new one.")])
    prompts.refresh("joke")
    assert (prompts.get("joke").prompt_version, asked()) == (3, 2)


@pytest.mark.parametrize("fault", [CLOSE, HANG], ids=["closes", "hangs"])
def test_what_is_known_is_used_while_promptlayer_is_down(
    registry: PromptLayerServer, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    """A prompt that was fetched before stays of use, with one warning; one that wasn't is an error."""
    prompts.get("joke")
    prompts.refresh()
    registry.faults.append(lambda request: fault if request.path.startswith("/prompt-templates") else None)

    assert [prompts.get("joke").prompt_version for _ in range(3)] == [2, 2, 2]
    assert [record.message.split(" at ")[0] for record in caplog.records if record.name == "pltrace"] == [
        "Can't get prompt 'joke'"
    ]
    if fault is CLOSE:
        with pytest.raises(pltrace.PromptLayerError, match="Can't get prompt 'agent'"):
            prompts.get("agent")
    registry.release()


async def test_aget_lets_the_event_loop_go_on(registry: PromptLayerServer) -> None:
    """Who awaits a prompt stops nobody else, shares the request with others, and may give up alone."""
    registry.faults.append(on("/prompt-templates/joke", LATE, 1))
    first, second, third = (asyncio.create_task(prompts.aget("joke")) for _ in range(3))
    for _ in range(20):
        await asyncio.sleep(0.001)  # The loop turns, though nothing has been answered.
    await asyncio.to_thread(registry.wait_for, lambda: asked_for_prompts(registry) == 1)
    assert not first.done()
    third.cancel()
    while not first.done():
        registry.release()
        await asyncio.sleep(0.01)

    assert [(await one).prompt_version for one in (first, second)] == [2, 2]
    assert third.cancelled()
    assert (await prompts.aget("joke", version=1)).prompt_version == 1
    assert (await prompts.aget("joke", label="prod")).prompt_label == "prod"
    assert asked_for_prompts(registry) == 3
    with pytest.raises(pltrace.PromptLayerError, match="no prompt 'nonsense'"):
        await prompts.aget("nonsense")
    with pytest.raises(pltrace.ConfigError):
        await prompts.aget("joke", version=0)


async def test_aget_goes_on_with_what_is_known(registry: PromptLayerServer) -> None:
    """While PromptLayer is down, a prompt that was fetched before stays of use for those who await it too."""
    await prompts.aget("joke")
    prompts.refresh()
    registry.faults.append(lambda request: CLOSE if request.path.startswith("/prompt-templates") else None)

    assert (await prompts.aget("joke")).prompt_version == 2


def test_a_refresh_is_not_answered_by_an_older_request(registry: PromptLayerServer) -> None:
    """A prompt that is published while it is being fetched anew is the one that the next `get` returns."""
    prompts.get("joke")
    prompts.refresh()
    registry.faults.append(on("/prompt-templates/joke", LATE, 1))
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(prompts.get, "joke")
        registry.wait_for(lambda: asked_for_prompts(registry) == 2)
        prompts.publish("joke", "A new one.")
        assert prompts.get("joke").prompt_version == 3
        while not early.done():
            registry.release()
            time.sleep(0.01)

    assert prompts.get("joke").prompt_version == 3


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_was_fetched_lately_is_given_at_once(registry: PromptLayerServer) -> None:
    """After a minute a prompt is fetched anew behind the caller, who goes on with what is known."""
    assert prompts.get("joke").prompt_version == 2
    registry.add_prompt("joke", [text("user", "A new one.")])
    registry.faults.append(on("/prompt-templates/joke", LATE, 1))
    time.sleep(FRESH_S + 0.5)

    assert [prompts.get("joke").prompt_version for _ in range(3)] == [2, 2, 2]
    deadline = time.monotonic() + 30.0
    while prompts.get("joke").prompt_version == 2:
        assert time.monotonic() < deadline
        registry.release()
        time.sleep(0.05)

    assert prompts.get("joke").prompt_version == 3


def test_a_deleted_prompt_is_not_served_from_memory(registry: PromptLayerServer) -> None:
    """That PromptLayer has it no more is an answer, not an outage."""
    prompts.get("joke")
    del registry.prompts["joke"]
    prompts.refresh()

    with pytest.raises(PltraceError, match="no prompt 'joke'"):
        prompts.get("joke")


# Publishing.


def critic(role: str) -> ChatMessagePromptTemplate:
    """Make a template of a message whose role is free."""
    return ChatMessagePromptTemplate.from_template("Judge {it}", role=role)


def test_publish_and_get_it_back(registry: PromptLayerServer) -> None:
    """A chat template comes back as it was, as the next version, with its label."""
    template = ChatPromptTemplate(
        [
            SystemMessage("Keep {braces}."),
            HumanMessage([{"type": "image_url", "image_url": {"url": "https://x/{braces}.png"}}]),
            ("system", "You are {mood}."),
            MessagesPlaceholder("history", optional=True),
            ("human", [{"type": "text", "text": "See {what}"}, {"type": "image_url", "image_url": {"url": "{photo}"}}]),
            ("ai", "Well, {{so}} it is."),
        ]
    )
    variables = {"mood": "kind", "what": "this", "photo": "https://x/y.png", "history": [HumanMessage("Hi")]}

    number = prompts.publish("joke", template, labels=["next"], tags=["a"], commit_message="Try")

    back = prompts.get("joke", label="next")
    assert (number, back.prompt_version) == (3, 3)
    assert back.invoke(variables).to_messages() == template.invoke(variables).to_messages()
    assert registry.prompts["joke"].tags == ["a"]
    assert registry.prompts["joke"].versions[2]["commit_message"] == "Try"


def test_publish_keeps_what_get_gave(registry: PromptLayerServer) -> None:
    """A prompt that was fetched, changed and published keeps its tools and its model."""
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    model = {"provider": "openai", "name": "gpt-4o", "parameters": {}}
    registry.add_prompt("tooled", {"type": "chat", "messages": JOKE, "tools": [tool]}, metadata={"model": model})
    prompt = prompts.get("tooled")
    prompt.append(("human", "Now!"))

    prompts.publish("tooled", prompt)

    latest = prompts.get("tooled")
    assert (latest.prompt_version, latest.tools, latest.model_settings) == (2, [tool], model)
    assert len(latest.messages) == 3


def test_publish_sends_all_metadata(registry: PromptLayerServer) -> None:
    """What is published isn't cut as what is recorded is."""
    examples = [*range(20_000)]
    prompts.publish("joke", "Hi {name}", metadata={"examples": examples})
    assert prompts.get("joke").prompt_metadata["examples"] == examples


@pytest.mark.parametrize("template", ["Hi {name}, {{x}}", PromptTemplate.from_template("Hi {name}, {{x}}")])
def test_publish_a_completion_prompt(registry: PromptLayerServer, template: Any) -> None:
    """A string and a `PromptTemplate` are prompts for completion models."""
    prompts.publish("greeting", template)

    assert prompts.get("greeting").format(name="Bo") == "Hi Bo, {x}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": ChatPromptTemplate([("human", "{a}")]).partial(a="b")}, r"\['a'\] are bound by partial"),
        (
            {"template": ChatPromptTemplate([ChatPromptTemplate([("human", "{a}")]).partial(a="b")])},
            r"\['a'\] are bound by partial",
        ),
        ({"template": ChatPromptTemplate([MessagesPlaceholder("past", n_messages=2)])}, "n_messages=2.*'past'"),
        ({"template": PromptTemplate.from_template("{{a}}", template_format="mustache")}, "mustache"),
        (
            {"template": ChatPromptTemplate([critic("critic")])},
            "the role 'critic' has no place in the registry, which knows system, user, assistant, developer, tool, fun",
        ),
        ({"template": ChatPromptTemplate([critic("tool")])}, "the role 'tool' needs a tool_call_id"),
        ({"template": ChatPromptTemplate([critic("function")])}, "the role 'function' needs a name"),
        ({"template": 3}, "expected a string, a PromptTemplate"),
        ({"name": "x" * 513}, "512 characters"),
        ({"commit_message": "x" * 73}, "72 characters"),
        ({"labels": "prod"}, "labels='prod'"),
        ({"metadata": "a"}, "metadata='a'"),
    ],
)
def test_publish_refuses_what_has_no_place(
    registry: PromptLayerServer, arguments: dict[str, Any], message: str
) -> None:
    """What the registry can't hold is named, and nothing is published."""
    with pytest.raises(pltrace.ConfigError, match=message):
        prompts.publish(**{"name": "joke", "template": "Hi", **arguments})

    assert len(registry.prompts["joke"].versions) == 2


def test_publish_tells_a_refusal(registry: PromptLayerServer) -> None:
    """Promptlayer's client says nothing of most refusals; here they are errors."""
    registry.fail_next(status=422, body={"detail": "no such workspace"}, path="/rest/prompt-templates")

    with pytest.raises(pltrace.PromptLayerError, match="no such workspace"):
        prompts.publish("joke", "Hi")


# Linking.

WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "piped": lambda prompt, model: (prompt | model).invoke(VARIABLES),
    "streamed": lambda prompt, model: list((prompt | model).stream(VARIABLES)),
    "batched": lambda prompt, model: (prompt | model).batch([VARIABLES]),
    "invoked apart": lambda prompt, model: model.invoke(prompt.invoke(VARIABLES)),
    "batched apart": lambda prompt, model: model.batch(prompt.batch([VARIABLES])),
    "formatted": lambda prompt, model: model.invoke(prompt.format(**VARIABLES)),
    "formatted as messages": lambda prompt, model: model.invoke(prompt.format_messages(**VARIABLES)),
    "formatted as a value": lambda prompt, model: model.invoke(prompt.format_prompt(**VARIABLES)),
    "partial": lambda prompt, model: (prompt.partial(mood="terse") | model).invoke({"topic": "tea"}),
    "partial by a function": lambda prompt, model: (prompt.partial(mood=lambda: "terse") | model).invoke("tea"),
    "in a function of a chain": lambda prompt, model: RunnableLambda(
        lambda given: model.invoke(prompt.invoke(given))
    ).invoke(VARIABLES),
    "by one step for the next": lambda prompt, model: (
        RunnableLambda(lambda given: prompt.format_messages(**given)) | model
    ).invoke(VARIABLES),
    "with more behind it": lambda prompt, model: model.invoke(
        [*prompt.format_messages(**VARIABLES), AIMessage("Well…"), HumanMessage("Go on.")]
    ),
    "inside a larger prompt": lambda prompt, model: (ChatPromptTemplate([prompt, ("human", "Now!")]) | model).invoke(
        VARIABLES
    ),
    "before a message more": lambda prompt, model: ((prompt + "Now!") | model).invoke(VARIABLES),
    "in messages of one's own": lambda prompt, model: model.invoke(
        [(message.type, message.content) for message in prompt.format_messages(**VARIABLES)]
    ),
    "as dicts": lambda prompt, model: model.invoke(convert_to_openai_messages(prompt.invoke(VARIABLES).to_messages())),
    "as a variable of another template": lambda prompt, model: (
        ChatPromptTemplate([("system", "{instructions}"), ("human", "{question}")]) | model
    ).invoke({"instructions": prompt.format(**VARIABLES), "question": "Now!"}),
    "with more behind its text": lambda prompt, model: model.invoke(prompt.format(**VARIABLES) + " Be brief."),
    "with more behind its text, by one step for the next": lambda prompt, model: (
        RunnableLambda(lambda given: prompt.format(**given) + "\n\nBe brief.") | model
    ).invoke(VARIABLES),
    "with more behind its text, in a block in a step": lambda prompt, model: (
        RunnableLambda(lambda given: prompt.format(**given) + "\n\nBe brief.") | _in_a_block(model)
    ).invoke(VARIABLES),
    "copied": lambda prompt, model: model.invoke(deepcopy(prompt.invoke(VARIABLES))),
    "rendered in another thread": lambda prompt, model: model.invoke(_in_thread(prompt.format_messages, **VARIABLES)),
    "in another thread": lambda prompt, model: _in_thread(model.invoke, prompt.format_messages(**VARIABLES)),
    "without blanks": lambda prompt, model: model.invoke(_padded(prompt).format(**VARIABLES).strip()),
    "with more behind its last message": lambda prompt, model: model.invoke(_extended(prompt, 1)),
    "with more behind its first message": lambda prompt, model: model.invoke(_extended(prompt, 0)),
    "with a value more": lambda prompt, model: (prompt | model).invoke({**VARIABLES, "unused": 1}),
}


def _in_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(pltrace.bind(call), *args, **kwargs).result()


def _extended(prompt: Any, place: int) -> Any:
    messages = prompt.format_messages(**VARIABLES)
    messages[place].content += "\n\nContext: none."
    return messages


def _padded(prompt: Any) -> Any:
    return prompt.model_copy(update={"messages": [*prompt.messages, HumanMessage("Now!\n\n")]})


def _in_a_block(model: Any) -> Any:
    def call(given: Any) -> Any:
        with traced("inside"):
            return model.invoke(given)

    return RunnableLambda(call)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_made_from_a_prompt_is_linked(registry: PromptLayerServer, llm: ScriptedOpenAI, way: str) -> None:
    """Name, version and variables go with the request, however the prompt came to the model."""
    with traced("linking"):
        WAYS[way](prompts.get("joke"), chat(llm))

    assert links(registry) == [joke()]


ASYNC_WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "piped": lambda prompt, model: (prompt | model).ainvoke(VARIABLES),
    "batched": lambda prompt, model: (prompt | model).abatch([VARIABLES]),
    "streamed": lambda prompt, model: _drained((prompt | model).astream(VARIABLES)),
    "invoked apart": lambda prompt, model: _then(prompt.ainvoke(VARIABLES), model.ainvoke),
    "batched apart": lambda prompt, model: _then(prompt.abatch([VARIABLES]), model.abatch),
    "formatted": lambda prompt, model: _then(prompt.aformat(**VARIABLES), model.ainvoke),
    "formatted as messages": lambda prompt, model: _then(prompt.aformat_messages(**VARIABLES), model.ainvoke),
    "formatted before, in tasks of its own": lambda prompt, model: _gathered(model, prompt.format(**VARIABLES)),
    "rendered in a task of its own": lambda prompt, model: _from_a_task(prompt.ainvoke(VARIABLES), model.ainvoke),
    "formatted in a task of its own": lambda prompt, model: _from_a_task(prompt.aformat(**VARIABLES), model.ainvoke),
    "formatted in a thread": lambda prompt, model: _from_a_thread(prompt.format, model.ainvoke),
    "formatted, and called in a thread": lambda prompt, model: asyncio.to_thread(
        model.invoke, prompt.format(**VARIABLES)
    ),
}


async def _drained(stream: Any) -> None:
    async for _ in stream:
        pass


async def _then(made: Any, use: Any) -> None:
    await use(await made)


async def _gathered(model: Any, prompt: str) -> None:
    await asyncio.gather(model.ainvoke(prompt))


async def _from_a_task(call: Any, use: Any) -> None:
    await use(await asyncio.create_task(call))


async def _from_a_thread(call: Any, use: Any) -> None:
    await use(await asyncio.to_thread(call, **VARIABLES))


@pytest.mark.parametrize("way", ASYNC_WAYS)
async def test_a_request_made_in_async_code_is_linked(
    registry: PromptLayerServer, llm: ScriptedOpenAI, way: str
) -> None:
    """The same holds for coroutines, streams and tasks."""
    async with traced("linking"):
        await ASYNC_WAYS[way](prompts.get("joke"), chat(llm))

    assert await asyncio.to_thread(links, registry) == [joke()]


@pytest.mark.parametrize("piped", [True, False], ids=["piped", "formatted"])
def test_completion_models_link_too(registry: PromptLayerServer, llm: ScriptedOpenAI, piped: bool) -> None:
    """A string prompt in a completion or a chat model, and a chat prompt in a completion model, are linked."""
    slogan, old = prompts.get("slogan"), prompts.get("joke")
    with traced("linking"):
        for prompt, model, given in (
            (slogan, completion(llm), {"product": "tea"}),
            (slogan, chat(llm), {"product": "tea"}),
            (old, completion(llm), VARIABLES),
        ):
            (prompt | model).invoke(given) if piped else model.invoke(prompt.format(**given))

    assert links(registry) == [("slogan", 1, {"product": "tea"}), ("slogan", 1, {"product": "tea"}), joke()]


@pytest.mark.parametrize(
    "system_prompt",
    [
        lambda prompt: prompt.format(who="Bo"),
        pytest.param(lambda prompt: prompt.format_messages(who="Bo")[0], marks=recent_agents),
        lambda prompt: prompt.format(who="Bo") + "\n\nUse your tools.",
        pytest.param(
            lambda prompt: SystemMessage(
                [{"type": "text", "text": prompt.format(who="Bo"), "cache_control": {"type": "ephemeral"}}]
            ),
            marks=recent_agents,
        ),
    ],
    ids=["string", "message", "with more behind it", "in a block of content"],
)
@pytest.mark.parametrize("rendered", ["before", "inside"])
def test_an_agent_links_its_system_prompt(
    registry: PromptLayerServer, llm: ScriptedOpenAI, system_prompt: Any, rendered: str
) -> None:
    """Each call of an agent is linked to its system prompt, made before any block or in the block that runs it."""
    agents = pytest.importorskip("langchain.agents")
    prompt = prompts.get("agent")
    before = system_prompt(prompt) if rendered == "before" else None

    with traced("agent"):
        agent = agents.create_agent(chat(llm), tools=[], system_prompt=before or system_prompt(prompt))
        agent.invoke({"messages": [("user", "Hi")]})
        agent.invoke({"messages": [("user", "Hi"), ("ai", "Hello"), ("user", "And?")]})

    assert links(registry) == [("agent", 1, {"who": "Bo"})] * 2


def test_an_agent_stays_linked(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """An agent whose system prompt was known once keeps its link, however much is rendered since, in any thread."""
    agents = pytest.importorskip("langchain.agents")
    prompt, joke_prompt = prompts.get("agent"), prompts.get("joke")
    system = prompt.format(who="Bo") + "\n\nUse your tools."
    agent = agents.create_agent(chat(llm), tools=[], system_prompt=system)

    def ask() -> None:
        with traced("agent"):
            agent.invoke({"messages": [("user", "Hi")]})

    ask()
    assert pltrace.flush(10.0)
    for number in range(100):
        joke_prompt.format(mood="terse", topic=str(number))
    ask()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask).result()

    assert links(registry) == [("agent", 1, {"who": "Bo"})] * 3


def test_content_of_several_texts_is_linked_in_any_thread(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A text beside the prompt's own, instead of behind it, leaves that one as it is, and known for itself."""
    system = SystemMessage([prompts.get("agent").format(who="Bo"), "Use your tools."])

    def ask() -> None:
        with traced("another thread"):
            chat(llm).invoke([system, HumanMessage("Hi")])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask).result()

    assert links(registry) == [("agent", 1, {"who": "Bo"})]


def test_a_static_prompt_with_lines_behind_it(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A sentence without variables is the prompt's own where a line ends behind it."""
    registry.add_prompt("helpful", [text("system", "You are a helpful assistant.")])
    with traced("linking"):
        chat(llm).invoke(prompts.get("helpful").format() + "\n\nUse your tools.")

    assert links(registry) == [("helpful", 1, {})]


def test_a_conversation_is_linked_to_its_latest_turn(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Of several renderings of one prompt in a request the last counts; of several prompts the first."""
    registry.add_prompt("short", [text("user", "Shortly: {question}")])
    history: list[Any] = []
    with traced("linking"):
        for question in ("one", "two", "three"):
            history.append(HumanMessage(prompts.get("short").format(question=question)))
            history.append(chat(llm).invoke(history))
        chat(llm).invoke([SystemMessage(prompts.get("agent").format(who="Bo")), *history])

    expected: list[Linked] = [("short", 1, {"question": question}) for question in ("one", "two", "three")]
    assert links(registry) == [*expected, ("agent", 1, {"who": "Bo"})]


def test_a_prompt_handed_over_by_callbacks_links(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """The drop-in handler needs no block for it."""
    handler = PromptLayerCallbackHandler()

    (prompts.get("joke") | chat(llm)).invoke(VARIABLES, config={"callbacks": [handler]})
    chat(llm, callbacks=[handler]).invoke(prompts.get("joke").format(**VARIABLES))

    assert links(registry) == [joke(), joke()]


def test_the_span_says_it_too(registry: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """Name, version and label stand on the call's span, and in the store."""
    with traced("linking"):
        (prompts.get("joke", label="prod") | chat(llm)).invoke(VARIABLES)

    (call,) = calls(tmp_path / "store" / "traces.db")
    assert (call["prompt_name"], call["prompt_version"], call["prompt_label"]) == ("joke", 2, "prod")
    (span,) = [span for span in registry.spans.values() if span["name"] == "ChatOpenAI"]
    said = {key: value for key, value in span["attributes"].items() if key.startswith("promptlayer.prompt.")}
    assert said == {
        "promptlayer.prompt.name": "joke",
        "promptlayer.prompt.version": "2",
        "promptlayer.prompt.label": "prod",
    }


def test_a_later_link_by_hand_is_sent(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """What the program links itself goes to PromptLayer after the request, and so holds."""
    with traced("linking") as span:
        (prompts.get("joke") | chat(llm)).invoke(VARIABLES)
        span.requests[0].link_prompt("agent", version=1)

    assert links(registry) == [joke()]
    assert [(op["op"], op["prompt_name"]) for op in registry.operations] == [("prompt", "agent")]


def test_a_conversation_goes_on(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """What is sent again with more behind it stays linked: as a list, merged, and trimmed to its system message."""
    model = chat(llm)
    with traced("linking"):
        history = prompts.get("joke").invoke(VARIABLES).to_messages()
        model.invoke(history)
        history = [*history, AIMessage("Well…"), HumanMessage("Go on.")]
        model.invoke(history)
        model.invoke(merge_message_runs([*history, HumanMessage("Please.")]))
        model.invoke(trim_messages(history, max_tokens=2, token_counter=len, include_system=True))
        model.invoke(merge_message_runs([*prompts.get("joke").invoke(VARIABLES).to_messages(), HumanMessage("Now!")]))

    assert links(registry) == [joke()] * 5


@pytest.mark.parametrize("next_turn", ["written by hand", "rendered"])
def test_a_conversation_is_read_back_from_a_checkpoint(
    registry: PromptLayerServer, llm: ScriptedOpenAI, next_turn: str
) -> None:
    """A later turn of a LangGraph thread holds the words alone of what was rendered before, and is linked still."""
    graphs, memory = pytest.importorskip("langgraph.graph"), pytest.importorskip("langgraph.checkpoint.memory")
    registry.add_prompt("short", [text("user", "Shortly: {question}")])
    short, model = prompts.get("short"), chat(llm)
    graph = graphs.StateGraph(graphs.MessagesState)
    graph.add_node("ask", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(graphs.START, "ask")
    app = graph.compile(checkpointer=memory.InMemorySaver())

    def turn(thread: str, *messages: Any) -> None:
        with traced("turn"):
            app.invoke({"messages": list(messages)}, {"configurable": {"thread_id": thread}})

    turn("one", *short.format_messages(question="one"))
    turn("two", HumanMessage("Shortly: one"))
    turn("one", *(short.format_messages(question="two") if next_turn == "rendered" else [HumanMessage("Go on.")]))
    turn("two", HumanMessage("Go on."))

    later = "two" if next_turn == "rendered" else "one"
    assert links(registry) == [
        ("short", 1, {"question": "one"}), UNLINKED, ("short", 1, {"question": later}), UNLINKED
    ]  # fmt: skip


def test_a_conversation_may_say_the_same_by_hand(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """In one LangGraph thread too, a first request in the same words, or a common sentence, is no prompt's."""
    registry.add_prompt("helpful", [text("system", "You are a helpful assistant.")])
    model = chat(llm).with_config(metadata={"thread_id": "one"})
    with traced("conversation"):
        model.invoke(prompts.get("joke").invoke(VARIABLES))
        model.invoke(HANDWRITTEN)
        model.invoke([*prompts.get("helpful").format_messages(), HumanMessage("Hi")])
        model.invoke([SystemMessage("You are a helpful assistant."), HumanMessage("Judge this.")])
        model.invoke([SystemMessage("You are a helpful assistant. Judge."), HumanMessage("This.")])

    assert links(registry) == [joke(), UNLINKED, ("helpful", 1, {}), UNLINKED, UNLINKED]


def test_a_program_s_setup_is_known_to_all_its_threads(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """An agent that was made before anything was traced, with more behind its prompt, may first be used anywhere."""
    agents = pytest.importorskip("langchain.agents")
    agent = agents.create_agent(
        chat(llm), tools=[], system_prompt=prompts.get("agent").format(who="Bo") + "\n\nUse your tools."
    )

    def ask() -> None:
        with traced("agent"):
            agent.invoke({"messages": [("user", "Hi")]})

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    assert links(registry) == [("agent", 1, {"who": "Bo"})] * 2


# Never to the wrong request.


def test_what_is_not_from_the_registry_is_not_linked(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Prompts that only resemble a rendered one stay without a link."""
    registry.add_prompt("who", [text("system", "You are {who}")])
    model = chat(llm)
    with traced("linking"):
        prompts.get("joke").invoke(VARIABLES)
        prompts.get("who").format(who="Bo")
        model.invoke("Tell me about tea.")
        model.invoke([("system", "You are terse."), ("human", "Tell me about coffee.")])
        model.invoke([("human", "You are terse."), ("human", "Tell me about tea.")])
        model.invoke([("system", "You are Bob."), ("human", "Hi")])
        model.invoke([("human", "Before."), ("system", "You are terse."), ("human", "Tell me about tea.")])

    assert links(registry) == [UNLINKED] * 5


HANDWRITTEN = [("system", "You are terse."), ("human", "Tell me about tea.")]
RENDERED: dict[str, Callable[[Any], Any]] = {
    "messages": lambda prompt: prompt.format_messages(**VARIABLES),
    "a value": lambda prompt: prompt.invoke(VARIABLES),
    "a string": lambda prompt: prompt.format(**VARIABLES),
}


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("form", RENDERED)
@pytest.mark.parametrize("where", ["before any block", "in the same block", "in another trace"])
def test_the_same_words_written_by_hand_are_not_linked(
    registry: PromptLayerServer, llm: ScriptedOpenAI, where: str, form: str, used: bool
) -> None:
    """Words that are equal to a rendering's, but are not what it gave, are somebody else's, wherever it was made."""
    model, prompt = chat(llm), prompts.get("joke")
    made = RENDERED[form](prompt) if where == "before any block" else None
    with traced("linking"):
        if where == "in the same block":
            made = RENDERED[form](prompt)
        elif where == "in another trace":
            with traced("another", parent={}):
                made = RENDERED[form](prompt)
        if used:
            model.invoke(made)
        model.invoke(HANDWRITTEN)
        model.invoke("System: You are terse.\nHuman: Tell me about tea.")
        completion(llm).invoke("System: You are terse.\nHuman: Tell me about tea.")

    assert links(registry) == [joke()] * used + [UNLINKED] * 3


@pytest.mark.parametrize("batch", [False, True], ids=["branches", "batch"])
def test_siblings_that_say_the_same_are_told_apart(
    registry: PromptLayerServer, llm: ScriptedOpenAI, batch: bool
) -> None:
    """Of the branches of one `RunnableParallel`, or the items of one batch, those of the registry are linked."""
    model = chat(llm)
    plain = ChatPromptTemplate(HANDWRITTEN)
    linked = prompts.get("joke")
    ways: list[Any] = [
        linked | model.with_config(tags=["linked"]),
        plain | model,
        RunnableLambda(lambda given: linked.format_messages(**given)) | model.with_config(tags=["linked"]),
        RunnableLambda(lambda given: plain.format_messages()) | model,
        RunnableLambda(lambda given: linked.format(**given) + "\nNow!") | model.with_config(tags=["linked"]),
        RunnableLambda(lambda given: "System: You are terse.\nHuman: Tell me about tea.\nNow!") | model,
    ]
    with traced("linking"):
        if batch:
            RunnableLambda(lambda number: ways[number].invoke(VARIABLES)).batch([*range(len(ways))])
        else:
            RunnableParallel({str(number): way for number, way in enumerate(ways)}).invoke(VARIABLES)

    links(registry)
    assert sorted((log.get("prompt_name") or "", log["tags"]) for log in registry.request_logs) == [
        *[("", [])] * 3,
        *[("joke", ["linked"])] * 3,
    ]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("You are", "You are Bob, the builder."),
        ("You are", "You are\nBob."),
        ("Yes.", "Yes. Of course."),
        ("You are a helpful assistant", "You are a helpful assistant who knows tea."),
        ("You are a helpful assistant", "You are a helpful assistants' assistant."),
        ("You are a helpful assistant.", "You are a helpful assistant. You classify mails."),
        ("You are a helpful assistant.", "You are a helpful assistant."),
    ],
)
def test_a_common_beginning_is_no_link(
    registry: PromptLayerServer, llm: ScriptedOpenAI, template: str, written: str
) -> None:
    """A few words, a part of a sentence, or a sentence that anybody may begin with, say nothing of the registry."""
    registry.add_prompt("beginning", [text("system", template)])
    with traced("linking"):
        prompts.get("beginning").format()
        chat(llm).invoke([("system", written), ("human", "Hi")])
        chat(llm).invoke(written)

    assert links(registry) == [UNLINKED] * 2


@pytest.mark.parametrize("behind", ["", " Use your tools."], ids=["as it is", "with more behind it"])
def test_what_was_sent_explains_no_more(registry: PromptLayerServer, llm: ScriptedOpenAI, behind: str) -> None:
    """Where each request comes from the registry or is written by hand, in the same words, each is what it is."""

    def handle(system: str) -> None:
        chat(llm).invoke([("system", system), ("human", "Hi")])

    with traced("request"):
        handle(prompts.get("agent").format(who="Bo") + behind)
    with traced("request"):
        handle("You are Bo, an agent." + " Use your tools.")

    assert links(registry) == [("agent", 1, {"who": "Bo"}), UNLINKED]


def test_a_beginning_counts_where_it_was_rendered(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Where a text was put behind a prompt's, words have to tell: only in code that is known to have rendered them."""
    prompt, model = prompts.get("agent"), chat(llm)

    def render() -> None:
        prompt.format(who="Bo")

    with traced("linking"):
        thread = threading.Thread(target=pltrace.bind(render))
        thread.start()
        thread.join()
        model.invoke([("system", "You are Bo, an agent. Use your tools."), ("human", "Hi")])
        render()
        model.invoke([("system", "You are Bo, an agent. Use your tools."), ("human", "Hi")])

    assert links(registry) == [UNLINKED, ("agent", 1, {"who": "Bo"})]


def test_what_a_prompt_was_given_is_not_its_own(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A string or message of the user's own that went through a prompt links nothing where it is used elsewhere."""
    registry.add_prompt("bare", [text("user", "{question}")])
    registry.add_prompt("past", [{"role": "placeholder", "name": "history"}])
    question, history = "Why is tea green?", [HumanMessage("What is tea?")]
    with traced("linking"):
        chat(llm).invoke(prompts.get("bare").format_messages(question=question))
        chat(llm).invoke(question)
        chat(llm).invoke(prompts.get("past").format_messages(history=history))
        chat(llm).invoke(history)
        chat(llm).invoke([("system", "Judge this."), ("human", "Really."), ("human", question)])

    assert links(registry) == [("bare", 1, {"question": question})] + [UNLINKED] * 4
    assert history == [HumanMessage("What is tea?")]


def test_a_part_of_another_request_is_not_linked(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A request that holds a rendered message somewhere, but doesn't begin with it, was not made from it."""
    with traced("linking"):
        system, human = prompts.get("joke").format_messages(**VARIABLES)
        for messages in ([human], [human, system], [HumanMessage("Judge this."), system, human]):
            chat(llm).invoke(messages)

    assert links(registry) == [UNLINKED] * 3


def test_the_same_rendering_in_another_trace_is_linked(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """What was rendered once is linked wherever it is used."""
    with traced("one"):
        said = prompts.get("joke").format_messages(**VARIABLES)
    with traced("two"):
        chat(llm).invoke([(message.type, message.content) for message in said])

    assert links(registry) == [joke()]


def test_a_later_rendering_is_not_linked_to_an_earlier_call(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A call can't have been made from what was rendered after it had begun."""
    with traced("linking"):
        chat(llm).invoke([("system", "You are Bo, an agent. Use your tools."), ("human", "Tell me about tea.")])
        prompts.get("agent").format(who="Bo")

    assert links(registry) == [UNLINKED]


def test_of_two_prompts_that_say_the_same_the_one_that_was_used_is_linked(
    registry: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Equal words don't confuse; but where words alone can tell, and fit two prompts, none is linked."""
    registry.add_prompt("double", AGENT)
    said = {name: prompts.get(name).format(who="Bo") for name in ("double", "agent")}
    with traced("linking"):
        for name in said:
            chat(llm).invoke(said[name])
        chat(llm).invoke(said["agent"] + " Use your tools.")

    assert links(registry) == [("double", 1, {"who": "Bo"}), ("agent", 1, {"who": "Bo"}), UNLINKED]


def test_the_longer_beginning_wins(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Of two prompts whose words a request begins with, the one that says more is meant."""
    registry.add_prompt("longer", [text("system", "You are {who}, an agent. You have tools.")])
    with traced("linking"):
        longer = prompts.get("longer").format(who="Bo")
        prompts.get("agent").format(who="Bo")
        chat(llm).invoke(longer + " Use them.")

    assert links(registry) == [("longer", 1, {"who": "Bo"})]


def test_variables_that_cant_be_told_apart_are_left_out(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Two renderings of one prompt that say the same keep their variables; where words alone tell, none are sent."""
    registry.add_prompt("glued", [text("user", "You are an agent of {one}{two}.")])
    glued = prompts.get("glued")
    with traced("linking"):
        for one, two in (("ab", "c"), ("a", "bc")):
            chat(llm).invoke(glued.format(one=one, two=two))
        one, _ = glued.format(one="ab", two="c"), glued.format(one="a", two="bc")
        chat(llm).invoke(one + " Hi.")

    assert links(registry) == [
        ("glued", 1, {"one": "ab", "two": "c"}),
        ("glued", 1, {"one": "a", "two": "bc"}),
        ("glued", 1, {}),
    ]


@pytest.mark.parametrize("same_words", [False, True], ids=["other words", "the same words"])
@pytest.mark.parametrize("one_block", [False, True], ids=["a block each", "one block around all"])
@pytest.mark.parametrize("piped", [True, False], ids=["piped", "formatted"])
async def test_twenty_tasks_of_which_half_use_the_registry(
    registry: PromptLayerServer, llm: ScriptedOpenAI, same_words: bool, one_block: bool, piped: bool
) -> None:
    """Exactly the requests made from the registry's prompt are linked, each to its own variables.

    That holds even where the other tasks say the same words at the same time in the same trace.
    """
    linked = prompts.get("joke")
    plain = ChatPromptTemplate([("system", "You are {mood}."), ("human", "Tell me about {topic}.")])
    model = chat(llm)
    together = asyncio.Barrier(20) if sys.version_info >= (3, 11) else None

    async def task(number: int) -> None:
        prompt = linked if number % 2 else plain
        given = {"mood": "terse", "topic": "tea" if same_words else f"topic {number}"}
        async with traced(f"task {number}", tags=[str(number)]):
            if together is not None:
                await together.wait()
            if piped:
                await (prompt | model).ainvoke(given)
            else:
                said = prompt.format_messages(**given)
                await asyncio.sleep(0)
                await model.ainvoke(said)

    async def all_tasks() -> None:
        await asyncio.gather(*(task(number) for number in range(20)))

    if one_block:
        async with traced("all"):
            await all_tasks()
    else:
        await all_tasks()

    await asyncio.to_thread(links, registry)
    found = {int(log["tags"][-1]): log for log in registry.request_logs}
    assert sorted(found) == list(range(20))
    assert [number for number, log in sorted(found.items()) if log.get("prompt_name")] == list(range(1, 20, 2))
    for number in range(1, 20, 2):
        topic = "tea" if same_words else f"topic {number}"
        assert found[number]["prompt_input_variables"] == {"mood": "terse", "topic": topic}


# What is kept.


def test_what_is_remembered_is_bounded(registry: PromptLayerServer) -> None:
    """What prompts rendered to is forgotten when much has been rendered since, with what the variables held."""

    class Topic(str):
        pass

    prompt = prompts.get("joke")
    with traced("linking"):
        first = Topic("x" * 1_000_000)
        freed = weakref.ref(first)
        prompt.format_messages(mood="terse", topic=first)
        prompt.format(mood="terse", topic=first)
        del first
        for _ in range(20):
            prompt.format(mood="terse", topic="x" * 1_000_000)
        gc.collect()

        assert freed() is None


class Customer:
    """One that shows nothing of itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._client = object()


def test_objects_as_variables_are_their_attributes(registry: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Of an object without a text of its own the attributes are told, without private ones."""
    registry.add_prompt("offer", [text("user", "Offer {customer} some of {goods}.")])
    given = {"customer": Customer("Ada"), "goods": [SimpleNamespace(name="tea")]}
    with traced("linking"):
        (prompts.get("offer") | chat(llm)).invoke(given)

    assert links(registry) == [("offer", 1, {"customer": {"name": "Ada"}, "goods": [{"name": "tea"}]})]


def test_secrets_in_variables_are_redacted(registry: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """Redaction holds for what a prompt's variables were given, in the store and on the wire."""
    registry.add_prompt("secret", [text("user", "Use {api_key} and {note}.")])
    key = "sk-proj-" + "a1B2c3D4" * 6
    with traced("linking"):
        (prompts.get("secret") | chat(llm)).invoke({"api_key": "hunter2", "note": key})

    ((name, _, variables),) = links(registry)
    (call,) = calls(tmp_path / "store" / "traces.db")
    assert name == "secret"
    assert variables is not None
    assert variables["api_key"] == "[redacted]"
    assert key not in json.dumps([variables, call])


@pytest.mark.parametrize("capture", [False, "outputs"])
def test_without_inputs_the_link_has_no_variables(
    registry: PromptLayerServer, llm: ScriptedOpenAI, capture: Any
) -> None:
    """Where prompts aren't kept, name and version are, and neither variables nor words."""
    with traced("linking", capture=capture):
        (prompts.get("joke") | chat(llm)).invoke(VARIABLES)

    assert links(registry) == [("joke", 2, {})]
    assert registry.request_logs[0]["input"]["messages"] == []
    assert "tea" not in json.dumps(registry.request_logs[0]["input"])


def test_the_package_loads_neither_langchain_nor_promptlayer() -> None:
    """`prompts` and `track` are there without being paid for, whichever way they are imported."""
    program = (
        "import sys\n"
        "from pltrace import prompts, track\n"
        "import pltrace, pltrace.prompts as again\n"
        "assert pltrace.prompts is prompts is again and pltrace.track is track and callable(prompts.get)\n"
        "print([name for name in ('langchain_core', 'promptlayer', 'sqlite3') if name in sys.modules])"
    )

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)

    assert (printed.stdout, printed.stderr) == ("[]\n", "")


@pytest.mark.parametrize("answer", ["whole", "lost"])
def test_a_prompt_that_is_gone_costs_the_link_alone(
    registry: PromptLayerServer, llm: ScriptedOpenAI, answer: str
) -> None:
    """A request made from a prompt that was removed since is logged without a link, once, and gets its id."""
    told: list[int] = []
    prompt = prompts.get("agent")
    del registry.prompts["agent"]
    if answer == "lost":
        registry.faults.append(on("/spans-bulk", Fault(store=True, close=True), 1))
    with traced("block", on_request=lambda request: told.append(int(request))) as span:
        (prompt | chat(llm)).invoke({"who": "Ada"})
    span.score(90)
    assert links(registry) == [UNLINKED]
    assert told == [registry.request_logs[0]["id"]]
    assert [score["request_id"] for score in registry.operations] == told
