"""What the blocks around a LangChain call say holds for the call."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import linecache
import signal
import sys
import threading
from collections import UserDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI

import pltrace
from pltrace import ConfigError, Span, bind, current_span, inject, traced
from tests.support.programs import run
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import calls, chat, said, spans, the_span, tree


@pytest.fixture
def model(llm: ScriptedOpenAI) -> ChatOpenAI:
    """A chat model that says hello."""
    return chat(llm)


async def _bare_function(model: ChatOpenAI) -> None:
    @traced
    def answer() -> None:
        model.invoke("Hi")

    answer()


async def _function_with_arguments(model: ChatOpenAI) -> None:
    @traced("answer", tags=["t"])
    def anything() -> None:
        model.invoke("Hi")

    anything()


async def _bare_coroutine(model: ChatOpenAI) -> None:
    @traced
    async def answer() -> None:
        await model.ainvoke("Hi")

    await answer()


async def _coroutine_with_arguments(model: ChatOpenAI) -> None:
    @traced("answer", user="u")
    async def anything() -> None:
        await model.ainvoke("Hi")

    await anything()


class _Methods:
    @traced
    def plain(self, model: ChatOpenAI) -> None:
        model.invoke("Hi")

    @traced("answer")
    async def async_(self, model: ChatOpenAI) -> None:
        await model.ainvoke("Hi")

    @traced
    @classmethod
    def of_class(cls, model: ChatOpenAI) -> None:
        assert cls is _Methods
        model.invoke("Hi")

    @staticmethod
    @traced()
    def static(model: ChatOpenAI) -> None:
        model.invoke("Hi")


async def _method(model: ChatOpenAI) -> None:
    _Methods().plain(model)


async def _async_method(model: ChatOpenAI) -> None:
    await _Methods().async_(model)


async def _class_method(model: ChatOpenAI) -> None:
    _Methods.of_class(model)


async def _static_method(model: ChatOpenAI) -> None:
    _Methods.static(model)


async def _block(model: ChatOpenAI) -> None:
    with traced() as span:
        model.invoke("Hi")
    assert span.kind == "block"


async def _named_block(model: ChatOpenAI) -> None:
    with traced("answer"):
        model.invoke("Hi")


async def _async_block(model: ChatOpenAI) -> None:
    async with traced("answer") as span:
        assert current_span() is span
        await model.ainvoke("Hi")


@pytest.mark.parametrize(
    ("form", "root"),
    [
        (_bare_function, "_bare_function.<locals>.answer function"),
        (_function_with_arguments, "answer function"),
        (_bare_coroutine, "_bare_coroutine.<locals>.answer function"),
        (_coroutine_with_arguments, "answer function"),
        (_method, "_Methods.plain function"),
        (_async_method, "answer function"),
        (_class_method, "_Methods.of_class function"),
        (_static_method, "_Methods.static function"),
        (_block, "traced block"),
        (_named_block, "answer block"),
        (_async_block, "answer block"),
    ],
)
async def test_each_form(
    form: Callable[[ChatOpenAI], Awaitable[None]], root: str, local: Path, model: ChatOpenAI
) -> None:
    """Each way to say `traced` makes one span, named as promised, with the LLM call inside as its child."""
    await form(model)
    assert tree(local) == f"{root}\n  ChatOpenAI llm\n"


def test_a_call_outside_any_block_is_not_recorded(local: Path, model: ChatOpenAI) -> None:
    """What runs before, after and beside a block leaves no span."""
    model.invoke("Before")
    with traced("block"):
        pass
    model.invoke("After")
    assert tree(local) == "block block\n"


# Tags and metadata.

_LEVELS = ("block", "block k", "chain", "chain k")


def _nested(levels: tuple[str, ...], call: Callable[[], Any], depth: int = 0) -> None:
    """Runs `call` inside blocks and chains, each with a tag, a key of its own and perhaps the key that all share."""
    if not levels:
        call()
        return
    kind, tags, metadata = levels[0].split()[0], *_marks(levels[0], depth)
    if kind == "block":
        with traced(tags=tags, metadata=metadata):
            _nested(levels[1:], call, depth + 1)
    else:
        chain = RunnableLambda(lambda _: _nested(levels[1:], call, depth + 1))
        chain.invoke(0, config={"tags": tags, "metadata": metadata})


async def _anested(levels: tuple[str, ...], call: Callable[[], Awaitable[Any]], depth: int = 0) -> None:
    if not levels:
        await call()
        return
    kind, tags, metadata = levels[0].split()[0], *_marks(levels[0], depth)
    if kind == "block":
        async with traced(tags=tags, metadata=metadata):
            await _anested(levels[1:], call, depth + 1)
    else:

        async def inside(_: int) -> None:
            await _anested(levels[1:], call, depth + 1)

        await RunnableLambda(inside).ainvoke(0, config={"tags": tags, "metadata": metadata})


def _marks(level: str, depth: int) -> tuple[list[str], dict[str, Any]]:
    return [f"tag{depth}", "shared"], {f"own{depth}": depth, **({"k": f"level {depth}"} if " k" in level else {})}


def _expected(levels: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    tags: list[str] = []
    metadata: dict[str, Any] = {}
    for depth, level in enumerate(levels):
        own_tags, own_metadata = _marks(level, depth)
        tags += own_tags
        metadata |= own_metadata
    texts = {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}
    return list(dict.fromkeys(tags)), texts


_NESTINGS = [
    ("block", *between, run)
    for depth in (0, 1, 2)
    for between in itertools.product(_LEVELS, repeat=depth)
    for run in ("run", "run k")
] + [("block k", *between, "run") for between in itertools.product(_LEVELS, repeat=3)]


def test_nested_tags_are_united_and_inner_metadata_wins(local: Path, model: ChatOpenAI) -> None:
    """Whatever blocks and chains are nested: tags outermost first, each once; of one key the innermost value."""
    for levels in _NESTINGS:
        tags, metadata = _marks(levels[-1], len(levels) - 1)
        _nested(levels[:-1], lambda t=tags, m=metadata: model.invoke("Hi", config={"tags": t, "metadata": m}))  # type: ignore[misc]
    got = [(call["request_tags"], said(call["request_metadata"])) for call in calls(local)]
    wrong = [
        (levels, found, _expected(levels))
        for levels, found in zip(_NESTINGS, got, strict=True)
        if found != _expected(levels)
    ]
    assert wrong == []


async def test_nested_tags_and_metadata_in_async_code(local: Path, model: ChatOpenAI) -> None:
    """The same holds for `async with` and `ainvoke`."""
    nestings = [levels for levels in _NESTINGS if len(levels) < 5]
    for levels in nestings:
        tags, metadata = _marks(levels[-1], len(levels) - 1)

        async def call(tags: list[str] = tags, metadata: dict[str, Any] = metadata) -> None:
            await model.ainvoke("Hi", config={"tags": tags, "metadata": metadata})

        await _anested(levels[:-1], call)
    got = [(call["request_tags"], said(call["request_metadata"])) for call in calls(local)]
    assert got == [_expected(levels) for levels in nestings]


def test_what_configure_sets_is_outermost(tmp_path: Path, model: ChatOpenAI) -> None:
    """The application's tags come first, and its metadata yields to a block's."""
    path = tmp_path / "traces.db"
    pltrace.configure(store=path, tags=["app"], metadata={"k": "app", "only": "app"})
    with traced(tags=["block"], metadata={"k": "block"}):
        model.invoke("Hi")
    (call,) = calls(path)
    assert call["request_tags"] == ["app", "block"]
    assert said(call["request_metadata"]) == {"k": "block", "only": "app"}


def test_a_block_that_says_the_same_again(local: Path, model: ChatOpenAI) -> None:
    """An inner block wins over a chain around it, also when it repeats what an outer block said."""
    with traced(metadata={"k": "block"}):
        RunnableLambda(lambda _: _say_again(model)).invoke(0, config={"metadata": {"k": "chain"}})
    assert said(calls(local)[0]["request_metadata"]) == {"k": "block"}


def _say_again(model: ChatOpenAI) -> None:
    with traced(metadata={"k": "block"}):
        model.invoke("Hi")


def test_langchains_own_marks_stay_on_the_span(local: Path, model: ChatOpenAI) -> None:
    """`seq:step:N` and `ls_*` are kept on the span but not sent with the request."""
    with traced():
        (RunnableLambda(str) | model).invoke("Hi", config={"tags": ["mine"]})
    (call,) = calls(local)
    assert call["tags"] == ["mine", "seq:step:2"]
    assert call["metadata"]["ls_provider"] == "openai"
    assert call["request_tags"] == ["mine"]
    assert said(call["request_metadata"]) == {}


def test_user_and_session(local: Path, model: ChatOpenAI) -> None:
    """User and conversation are inherited, replaced by an inner block, and sent under PromptLayer's names."""
    with traced(user="ann", session="s1"):
        model.invoke("Hi")
        with traced(user="bob"):
            model.invoke("Hi")
    assert [said(call["request_metadata"]) for call in calls(local)] == [
        {"user_id": "ann", "conversation_id": "s1"},
        {"user_id": "bob", "conversation_id": "s1"},
    ]


# on_request.


def test_every_enclosing_on_request_is_called(local: Path, model: ChatOpenAI) -> None:
    """All `on_request` around a call get its one `Request`, the innermost first, each once; others get nothing."""
    seen: list[tuple[str, Any]] = []
    with traced(on_request=lambda request: seen.append(("outer", request))) as outer:
        with traced(), traced(on_request=lambda request: seen.append(("inner", request))):
            RunnableLambda(model.invoke).invoke("Hi")
        with traced(on_request=lambda request: seen.append(("beside", request))):
            pass
    assert pltrace.flush(10)
    (request,) = outer.requests
    assert seen == [("inner", request), ("outer", request)]


def test_one_function_given_twice_is_called_once(local: Path, model: ChatOpenAI) -> None:
    """A function that several blocks around a call were given is still called once for it."""
    seen: list[Any] = []
    again = traced("again", on_request=seen.append)
    with again, traced("between"), again:
        model.invoke("Hi")
    assert pltrace.flush(10)
    assert len(seen) == 1


async def test_one_coroutine_function_given_twice_is_called_once(local: Path, model: ChatOpenAI) -> None:
    """The same holds for an async `on_request`."""
    seen: list[Any] = []

    async def note(request: pltrace.Request) -> None:
        seen.append(request)

    async with traced("outer", on_request=note), traced("inner", on_request=note):
        await model.ainvoke("Hi")
    await asyncio.to_thread(pltrace.flush, 10)
    assert len(seen) == 1


# capture.

_KEPT = {True: (True, True), False: (False, False), "inputs": (True, False), "outputs": (False, True)}


@pytest.mark.parametrize("outer", _KEPT)
@pytest.mark.parametrize("inner", _KEPT)
def test_capture_only_narrows(outer: bool | str, inner: bool | str, local: Path, model: ChatOpenAI) -> None:
    """`capture` says what is kept of arguments, prompts and results; an inner one can take away, never give back."""

    @traced("inner", capture=inner)
    def answer(question: str) -> str:
        return str(model.invoke(question).content)

    with traced(capture=outer):
        assert answer("A secret?") == "Hello."
    inputs, outputs = (a and b for a, b in zip(_KEPT[outer], _KEPT[inner], strict=True))
    function, call = the_span(local, "inner"), calls(local)[0]
    assert function["input"] == ({"question": "A secret?"} if inputs else None)
    assert function["output"] == ("Hello." if outputs else None)
    assert ("A secret?" in str(call["input"])) == inputs
    assert ("Hello." in str(call["output"])) == outputs
    assert (call["input_tokens"], call["output_tokens"]) == (11, 7)


# sample.


@pytest.mark.parametrize(("application", "block", "kept"), [
    (1.0, None, True), (1.0, 0, False), (0.0, None, False), (0.0, 1, True), (0.0, 1.0, True),
])  # fmt: skip
def test_sample_is_decided_at_the_root(
    application: float, block: float | None, kept: bool, tmp_path: Path, model: ChatOpenAI
) -> None:
    """The root's share, or the application's, decides about the whole trace; an inner `sample` changes nothing."""
    path, seen = tmp_path / "traces.db", []
    pltrace.configure(store=path, sample=application)
    with traced("root", sample=block, on_request=seen.append) as root:
        for inner in (0.0, 1.0):
            with traced("inner", sample=inner):
                assert model.invoke("Hi").content == "Hello."
    requests = root.requests
    assert [request.wait(5) is not None for request in requests] == [kept, kept]
    assert len(spans(path)) == (5 if kept else 0)
    assert len(seen) == (2 if kept else 0)


def test_a_share_of_the_traces(local: Path) -> None:
    """With `sample=0.5`, about half of the traces are kept, each wholly."""
    for _ in range(400):
        with traced("root", sample=0.5), traced("child"):
            pass
    kept = spans(local)
    assert 240 < len(kept) < 560
    assert [span["name"] for span in kept].count("root") == len(kept) / 2


# The span at hand.


def test_the_current_span(local: Path) -> None:
    """`current_span()` is the innermost block's; outside it is inert: false, without ids, and deaf."""
    outside = current_span()
    assert (bool(outside), outside.id, outside.trace_id, outside.parent_id) == (False, "", "", None)
    outside.update(name="nothing", tags=["nothing"])
    outside.score(5)
    assert (outside.name, outside.tags, outside.metadata, outside.requests) == ("", (), {}, [])
    with traced("outer") as outer:
        assert current_span() is outer
        with traced("inner") as inner:
            assert current_span() is inner
            assert (inner.trace_id, inner.parent_id, outer.parent_id) == (outer.trace_id, outer.id, None)
        assert current_span() is outer
    assert current_span() is outside
    assert outer
    assert (len(outer.id), len(outer.trace_id), outer.status) == (16, 32, "ok")
    assert outer.started_at_ns <= inner.started_at_ns <= inner.ended_at_ns <= outer.ended_at_ns


def test_update_adds_to_the_span(local: Path, model: ChatOpenAI) -> None:
    """`update` adds to its own span, while it is open and after it; calls inside are not affected."""

    @traced("f", tags=["a"], metadata={"k": 1, "l": 1})
    def f(x: int) -> str:
        current_span().update(name="g", tags=["b"], metadata={"k": 2}, output={"told": True})
        model.invoke("Hi")
        return "returned"

    f(1)
    found = the_span(local, "g")
    assert (found["tags"], found["metadata"]) == (["a", "b"], {"k": 2, "l": 1})
    assert (found["input"], found["output"]) == ({"x": 1}, {"told": True})
    assert calls(local)[0]["request_tags"] == ["a"]
    with traced("late") as span:
        pass
    span.update(tags=["after"], input="in")
    assert the_span(local, "late")["tags"] == ["after"]
    assert the_span(local, "late")["input"] == "in"


@pytest.mark.parametrize("wrong", [{"name": ""}, {"tags": "abc"}, {"metadata": {1: 2}}])
def test_update_refuses_what_is_wrong(wrong: dict[str, Any], local: Path) -> None:
    """A wrong argument of `update` raises `ConfigError` with its name."""
    with traced() as span, pytest.raises(ConfigError, match=next(iter(wrong))):
        span.update(**wrong)


def test_a_span_that_many_threads_update_at_once(local: Path) -> None:
    """Whatever threads add to one span at the same time, all of it is there."""
    many, each = 8, 100

    def add(thread: int) -> None:
        together.wait(10)
        for number in range(each):
            span.update(tags=[f"{thread}.{number}"], metadata={f"{thread}.{number}": number, "last": thread})
            assert f"{thread}.{number}" in span.tags
            assert span.metadata[f"{thread}.{number}"] == number

    together = threading.Barrier(many)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with traced("block") as span, ThreadPoolExecutor(many) as pool:
            done = [pool.submit(add, thread) for thread in range(many)]
    finally:
        sys.setswitchinterval(interval)
    for one in done:
        one.result()
    expected = {f"{thread}.{number}" for thread in range(many) for number in range(each)}
    recorded = the_span(local, "block")
    assert {*span.tags} == {*recorded["tags"]} == expected
    assert {*span.metadata} == {*recorded["metadata"]} == {*expected, "last"}


def test_an_update_that_comes_in_between_another(local: Path) -> None:
    """What a finalizer or signal handler adds to a span, while the program adds to it, is there too."""

    class Interrupted(UserDict[str, int]):
        def __iter__(self) -> Iterator[str]:
            span.update(tags=["between"], metadata={"between": 1})
            return super().__iter__()

    with traced("block") as span:
        span.update(tags=Interrupted(tag=2))
        span.update(metadata=Interrupted(key=2))
    recorded = the_span(local, "block")
    assert recorded["tags"] == ["between", "tag"]
    assert recorded["metadata"] == {"between": 1, "key": 2}


# Leaving.


def test_an_exception_passes_unchanged(local: Path) -> None:
    """What is raised inside reaches the user as it is, is recorded, and the scope around is back."""
    error = ValueError("wrong")
    with traced("outer") as outer:
        with pytest.raises(ValueError, match="wrong") as caught, traced("inner"):
            raise error
        assert current_span() is outer
    assert caught.value is error
    assert error.__context__ is None
    assert error.__cause__ is None
    assert current_span().id == ""
    inner = the_span(local, "inner")
    assert (inner["status"], inner["error"]) == ("error", "ValueError: wrong")
    assert the_span(local, "outer")["status"] == "ok"


def test_blocks_left_in_any_order(local: Path) -> None:
    """Blocks may be left in any order: each leave restores the innermost that is still open."""
    for order in itertools.permutations(range(3)):
        blocks = [traced(f"{order}{index}") for index in range(3)]
        entered = [block.__enter__() for block in blocks]
        opened = set(range(3))
        for index in order:
            blocks[index].__exit__(None, None, None)
            opened.discard(index)
            assert current_span().id == (entered[max(opened)].id if opened else "")
    assert {span["status"] for span in spans(local)} == {"ok"}
    assert len(spans(local)) == 18


def _in_a_thread(leave: Callable[..., None]) -> None:
    thread = threading.Thread(target=leave, args=(None, None, None))
    thread.start()
    thread.join()


def _in_a_copied_context(leave: Callable[..., None]) -> None:
    contextvars.copy_context().run(leave, None, None, None)


def _in_a_bound_thread(leave: Callable[..., None]) -> None:
    _in_a_thread(bind(leave))


def _in_a_bound_thread_of_a_run(leave: Callable[..., None]) -> None:
    RunnableLambda(lambda _: _in_a_thread(bind(leave))).invoke(None)


def test_metadata_is_as_it_was_declared(local: Path) -> None:
    """What becomes of lists and dicts in metadata, after they were given, isn't recorded."""
    given: dict[str, Any] = {"ids": [1], "plan": {"step": 1}}
    with traced("block", metadata=given) as span:
        span.update(metadata={"more": given["ids"]})
        given["ids"].append(2)
        given["plan"].clear()
    assert the_span(local, "block")["metadata"] == {"ids": [1], "plan": {"step": 1}, "more": [1]}


def test_of_very_much_metadata_the_beginning_is_kept(local: Path) -> None:
    """Of a container with a million items only as much as is stored is copied, and how much more there is is told."""
    many = range(1_000_000)
    metadata = {"list": [*many], "dict": dict.fromkeys(many), "set": {*many}}
    with traced("block", metadata=metadata) as span:
        span.update(metadata={"beside": metadata["list"], **dict.fromkeys(map(str, many))})
    assert [len(span.metadata[name]) for name in ("list", "dict", "set", "beside")] == [10_000] * 4
    assert len(span.metadata) == 10_003
    stored = the_span(local, "block")["metadata"]
    told = "[… 990001 more]"
    assert stored["list"] == stored["beside"] == [*range(9_999), told]
    assert stored["dict"] == {**dict.fromkeys(map(str, range(9_999))), "…": told}
    assert stored["set"][-1] == told


@pytest.mark.parametrize("as_generator", [False, True])
def test_a_block_that_is_left_open_for_what_is_returned(as_generator: bool, local: Path) -> None:
    """A block that a function leaves open, for the iterator it returns to leave, holds while that is read."""

    def rows(stack: ExitStack) -> Iterator[str]:
        with stack:
            for _ in range(2):
                yield current_span().name

    @traced("read")
    def read() -> Iterator[str]:
        stack = ExitStack()
        stack.enter_context(traced("inside"))
        return rows(stack) if as_generator else map(str, rows(stack))

    with traced("around"):
        found = read()
        assert current_span().name == "around"
        for name in found:
            assert (name, current_span().name) == ("inside", "around")
    assert tree(local) == "around block\n  read function\n    inside block\n"


@pytest.mark.parametrize("kind", ["in another thread", "around it"])
def test_a_block_entered_while_tracing_was_off(local: Path, kind: str) -> None:
    """What was entered before tracing was on leaves alone what its declaration opened since, or had open before."""
    declaration = traced("block")
    if kind == "around it":
        with declaration as around:
            pltrace.configure(enabled=False)
            with declaration as inner:
                pass
            pltrace.configure(store=local)
            assert (bool(inner), around.status, current_span()) == (False, None, around)
    else:
        pltrace.configure(enabled=False)
        entered, left = threading.Event(), threading.Event()
        seen: list[Any] = []

        def other() -> None:
            with declaration as span:
                entered.set()
                left.wait(10.0)
                seen.append((span.status, current_span() is span))
            seen.append(span.status)

        thread = threading.Thread(target=other)
        with declaration:
            pltrace.configure(store=local)
            thread.start()
            entered.wait(10.0)
        left.set()
        thread.join()
        assert seen == [(None, True), "ok"]
    assert not current_span()


def test_blocks_of_one_declaration_left_in_other_contexts(local: Path) -> None:
    """Blocks that a declaration has open at the same time, each left in another context, end each as its own."""
    declaration = traced("unit")

    def unit() -> Iterator[Span]:  # As a dependency of FastAPI's, whose steps are run in copies of the context.
        with declaration as span:
            yield span

    units = [unit() for _ in range(3)]
    first, second, third = (contextvars.copy_context().run(next, one) for one in units)
    with pytest.raises(ZeroDivisionError):
        contextvars.copy_context().run(units[0].throw, ZeroDivisionError())  # type: ignore[attr-defined]
    assert [span.status for span in (first, second, third)] == ["error", None, None]
    contextvars.copy_context().run(next, units[1], None)
    assert [span.status for span in (first, second, third)] == ["error", "ok", None]
    contextvars.copy_context().run(next, units[2], None)
    assert third.status == "ok"


def _handed_over(declared: Callable[[], AbstractContextManager[Any]], overlap: int, done: Callable[[], None]) -> None:
    """Enters blocks in one thread and leaves them in another, each while some that came after it are open."""
    with ThreadPoolExecutor(1) as worker:
        _overtaken(declared, overlap, done, lambda leave: worker.submit(leave, None, None, None).result())


def _overtaken(
    declared: Callable[[], AbstractContextManager[Any]],
    overlap: int,
    done: Callable[[], None],
    somewhere: Callable[[Callable[..., Any]], Any] = lambda leave: leave(None, None, None),
) -> None:
    """Leaves blocks in the order that they were entered in."""
    for jobs in (20, 300):
        entered: deque[AbstractContextManager[Any]] = deque()
        for job in range(jobs + overlap):
            if job < jobs:
                entered.append(declared())
                entered[-1].__enter__()
            if job >= overlap:
                somewhere(entered.popleft().__exit__)
        done()


def _broken_off(declared: Callable[[], AbstractContextManager[Any]], overlap: int, done: Callable[[], None]) -> None:
    """Leaves async generators with a block by `break`: asyncio closes each in a task of its own, later."""

    async def stream() -> AsyncIterator[int]:
        with declared():
            yield 1
            yield 2

    async def work() -> None:
        for jobs in (20, 300):
            for _ in range(jobs):
                async for _ in stream():
                    break
                await asyncio.sleep(0.0 if overlap else 0.001)
            await asyncio.sleep(0.01)
            done()

    asyncio.run(work())


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython's garbage collector")
@pytest.mark.parametrize("leave", [_overtaken, _handed_over, _broken_off])
@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("tracing", ["off", "off for a library", "on"])
def test_what_is_left_is_let_go_of(
    local: Path, no_collector: None, tracing: str, overlap: int, leave: Callable[..., None]
) -> None:
    """However many blocks are left in any order, thread or task, none of them is kept."""
    pltrace.configure(
        store=local, enabled=tracing != "off",
        libraries={__name__.partition(".")[0]: {"enabled": False}} if tracing == "off for a library" else None,
    )  # fmt: skip
    shared = traced("job")
    kinds = itertools.cycle([lambda: shared, lambda: traced("job", metadata={"who": "job"})])
    there: list[int] = []

    def done() -> None:
        assert pltrace.flush(10)
        gc.collect()
        there.append(sum(type(one) is not ref for one in gc.get_objects()))  # asyncio has its own weak references.

    leave(lambda: next(kinds)(), overlap, done)
    assert there[1] - there[0] < 100
    with traced("next"):
        pass


def test_blocks_that_overlap_elsewhere_are_recorded_as_they_were(local: Path) -> None:
    """Blocks that are entered while the last one is open, and left elsewhere in turn, are each under the last one."""
    declarations = [traced(str(number), metadata={str(number): number}) for number in range(6)]
    with traced("around") as around:
        entered = []
        for number, declaration in enumerate(declarations):
            entered.append(declaration.__enter__())
            if number:
                _in_a_thread(declarations[number - 1].__exit__)
        assert current_span() is entered[-1]
        with traced("inside") as inside:
            assert inside.parent_id == entered[-1].id
            assert inside.metadata == {str(number): number for number in range(6)}
        _in_a_thread(declarations[-1].__exit__)
        assert current_span() is around
    assert [span.parent_id for span in entered] == [around.id, *[span.id for span in entered[:-1]]]
    names = ["around", *map(str, range(6)), "inside"]
    assert tree(local) == "".join(f"{'  ' * depth}{name} block\n" for depth, name in enumerate(names))


def test_left_where_there_is_no_python_code(tmp_path: Path) -> None:
    """A block ends where it is left by what isn't Python code, as at the program's exit."""
    program = run(
        """
        import asyncio, atexit
        import pltrace
        pltrace.configure(store="memory")
        async def main():
            one, other = pltrace.traced("one"), pltrace.traced("other")
            with other:
                spans = [one.__enter__(), one.__enter__(), other.__enter__()]
            atexit.register(lambda: print([span.status for span in spans]))
            for block in (one, one, other):
                atexit.register(block.__exit__, None, None, None)
        asyncio.run(main())
        """,
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "['ok', 'ok', 'ok']\n", "")


def test_leaving_what_could_not_be_entered(tmp_path: Path) -> None:
    """A block that we failed to enter is left without an end to what its declaration opened in other threads."""
    program = run(
        """
        import threading
        import pltrace
        class Odd:
            def __call__(self, request): pass
            def __eq__(self, other): raise ValueError("not with me")
        pltrace.configure(store="memory")
        declaration = pltrace.traced("block", on_request=Odd())
        entered, left = threading.Event(), threading.Event()
        def other():
            with declaration as span:
                entered.set()
                left.wait(10)
                print(span.status)
            print(span.status)
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        with pltrace.traced("around", on_request=Odd()), declaration as span:
            print(bool(span))
        left.set()
        thread.join()
        """,
        tmp_path,
    )
    assert (program.code, program.out) == (0, "False\nNone\nok\n")
    assert "entering a traced block" in program.err


def _calls() -> None:
    @traced
    def call(depth: int) -> None:
        if depth:
            call(depth - 1)

    call(1)


def _failing_calls() -> None:
    @traced
    def call() -> None:
        raise LookupError

    with suppress(LookupError):
        call()


def _iterators() -> None:
    @traced
    def rows() -> Iterator[str]:
        return map(str, range(1))

    list(rows())


def _blocks() -> None:
    declaration = traced("in")
    with declaration, declaration:
        pass


def _generators() -> None:
    @traced
    def steps() -> Iterator[int]:
        yield 1

    list(steps())


def _coroutines() -> None:
    @traced
    async def answer() -> int:
        return 1

    _run(answer())


def _async_generators() -> None:
    @traced
    async def steps() -> AsyncIterator[int]:
        yield 1

    async def consume() -> None:
        async for _ in steps():
            pass

    _run(consume())


def _run(coroutine: Coroutine[Any, None, Any]) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


def _may_be_interrupted(frame: Any) -> bool:
    """Gives whether an interrupt could come where a frame is: Python looks for signals at calls, not at a `try`."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return frame.f_code.co_name not in ("__del__", "_abandoned") and line != "try:"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces lines")
@pytest.mark.parametrize(
    ("inside", "around"),
    [
        (_calls, nullcontext()),
        (_failing_calls, nullcontext()),
        (_iterators, nullcontext()),
        (_generators, nullcontext()),
        (_coroutines, nullcontext()),
        (_async_generators, nullcontext()),
        (_blocks, traced("around")),
    ],
)
def test_interrupted_anywhere(
    local: Path, no_collector: None, inside: Callable[[], None], around: AbstractContextManager[Any]
) -> None:
    """Wherever Ctrl+C meets our code, nothing of a call stays current; of a block, once one around it is left.

    Where a block begins to be left nothing of ours can help yet, as with any context manager that is written in Python.
    """
    left = 0

    def interrupting(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if "pltrace" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return interrupting if event == "call" else None
        if event in ("call", "line") and _may_be_interrupted(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return interrupting

    for line in itertools.count(1):
        left = line
        try:
            with around:
                sys.settrace(interrupting)
                try:
                    inside()
                finally:
                    sys.settrace(None)
        except KeyboardInterrupt:
            pass
        assert not current_span(), line
        assert sys.get_asyncgen_hooks() == (None, None), line
        if left > 0:
            break
    assert line > 20


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces lines")
def test_an_interrupted_driver_closes_what_it_drives(local: Path, no_collector: None) -> None:
    """Wherever Ctrl+C meets our code between two steps of an async generator, its `finally` runs all the same."""
    left = opened = closed = 0

    @traced
    async def steps() -> AsyncIterator[int]:
        nonlocal opened, closed
        opened += 1
        try:
            yield 1
            yield 2
        finally:
            closed += 1

    async def consume() -> None:
        async for number in steps():
            if number == 1:
                sys.settrace(interrupting)
                await asyncio.sleep(0)

    def interrupting(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("_generators.py", "_stepping.py")):
            return interrupting if event == "call" else None
        if event == "line" and _may_be_interrupted(frame):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return interrupting

    for line in itertools.count(1):
        left = line
        with suppress(KeyboardInterrupt):
            try:
                asyncio.run(consume())
            finally:
                sys.settrace(None)
        assert opened == closed, line
        if left > 0:
            break
    assert line > 10


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces lines")
@pytest.mark.parametrize("carry", [inject, lambda: bind(print)], ids=["inject", "bind"])
def test_interrupted_as_a_carrier_is_made(local: Path, carry: Callable[[], object]) -> None:
    """Ctrl+C that meets what makes a carrier is the program's: it isn't taken for something that a tag says."""
    left = 0

    def interrupting(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if "_encoding" not in frame.f_code.co_filename:
            return interrupting if event == "call" else None
        if event in ("call", "line"):
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return interrupting

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    with traced("around", tags=["one", "two"], metadata={"list": [1, 2], "dict": {"a": "b"}}):
        for line in itertools.count(1):
            left, interrupted = line, False
            try:
                sys.settrace(interrupting)
                try:
                    carry()
                finally:
                    sys.settrace(None)
            except KeyboardInterrupt:
                interrupted = True
            assert interrupted == (left <= 0), line
            if left > 0:
                break
    signal.signal(signal.SIGINT, before)
    assert line > 10


@pytest.mark.parametrize(
    "somewhere", [_in_a_thread, _in_a_copied_context, _in_a_bound_thread, _in_a_bound_thread_of_a_run]
)
def test_leaving_where_it_was_not_entered(
    somewhere: Callable[[Callable[..., None]], None], local: Path, model: ChatOpenAI
) -> None:
    """A block that is left in another thread or context is over, where it was entered too, and no error anywhere."""
    block = traced("elsewhere")
    with traced("around") as around:
        span = block.__enter__()
        somewhere(block.__exit__)
        assert span.status == "ok"
        assert current_span() is around
        assert bind(current_span)() is around
        model.invoke("Hi")
        with traced("inside") as inner:
            assert current_span() is inner
        assert current_span() is around
    assert not current_span()
    assert [span["name"] for span in spans(local) if span["parent_id"] == around.id and span["kind"] != "chain"] == [
        "elsewhere", "ChatOpenAI", "inside",
    ]  # fmt: skip


async def test_leaving_in_a_thread_of_asyncio(local: Path) -> None:
    """The same holds for `asyncio.to_thread`, which copies the context; and for tasks that are made afterwards."""

    async def current() -> Span:
        return current_span()

    async with traced("around") as around:
        block = traced("elsewhere")
        block.__enter__()
        await asyncio.to_thread(block.__exit__, None, None, None)
        assert current_span() is around
        assert await asyncio.create_task(current()) is around
    assert tree(local) == "around block\n  elsewhere block\n"


async def test_a_task_that_outlives_its_block(local: Path, model: ChatOpenAI) -> None:
    """What a task does after the block that it was made in still belongs to the block."""
    left = asyncio.Event()

    async def work() -> None:
        await left.wait()
        await model.ainvoke("Hi")

    with traced("root", tags=["t"]):
        task = asyncio.create_task(work())
    left.set()
    await task
    assert tree(local) == "root block\n  ChatOpenAI llm\n"
    assert calls(local)[0]["request_tags"] == ["t"]


async def test_leaving_in_another_task(local: Path) -> None:
    """The same holds for tasks that know nothing of each other."""
    entered, left = asyncio.Event(), asyncio.Event()
    block = traced("elsewhere")

    async def enters() -> None:
        block.__enter__()
        entered.set()
        await left.wait()
        assert not current_span()

    task = asyncio.create_task(enters())
    await entered.wait()
    block.__exit__(None, None, None)
    left.set()
    await task
    assert tree(local) == "elsewhere block\n"


def test_leaving_what_was_never_entered(local: Path) -> None:
    """To leave a declaration that isn't entered does nothing."""
    traced().__exit__(None, None, None)
    assert spans(local) == []


def test_one_declaration_nested_in_itself(local: Path) -> None:
    """A declaration can be entered again inside itself; each leave leaves the latest entry."""
    again = traced("again")
    with again as first:
        with again as second:
            assert (second.parent_id, current_span()) == (first.id, second)
        assert current_span() is first
        with again as third:
            assert third.parent_id == first.id
    assert tree(local) == "again block\n  again block\n  again block\n"


def test_recursion(local: Path, model: ChatOpenAI) -> None:
    """A decorated function that calls itself nests its spans."""

    @traced("f", tags=["f"])
    def f(depth: int) -> None:
        if depth:
            f(depth - 1)
        else:
            model.invoke("Hi")

    f(2)
    assert tree(local) == "f function\n  f function\n    f function\n      ChatOpenAI llm\n"
    assert calls(local)[0]["request_tags"] == ["f"]


def test_one_declaration_in_many_threads(local: Path, model: ChatOpenAI) -> None:
    """One declaration entered by many threads at once gives each its own span and its own call."""
    declared = traced("shared")
    together = threading.Barrier(8)
    found: list[tuple[str, list[str], str | None, str]] = []

    def work() -> None:
        with declared as span:
            together.wait(10)
            model.invoke("Hi")
            together.wait(10)
        found.append((span.id, [request.span_id for request in span.requests], span.status, current_span().id))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(local) == "shared block\n  ChatOpenAI llm\n" * 8
    assert sorted((call["parent_id"], [call["span_id"]], "ok", "") for call in calls(local)) == sorted(found)


async def test_one_declaration_in_many_tasks(local: Path, model: ChatOpenAI) -> None:
    """One declaration entered by many tasks at once nests in each task's own way."""
    declared = traced("shared", tags=["shared"])

    async def work(number: int) -> None:
        async with declared, traced(metadata={"number": number}):
            await model.ainvoke(str(number))

    async with declared:
        await asyncio.gather(*(work(number) for number in range(10)))
    inner = "  shared block\n    traced block\n      ChatOpenAI llm\n"
    assert tree(local) == "shared block\n" + inner * 10
    for call in calls(local):
        (message,) = call["input"]["messages"]
        assert call["request_metadata"]["number"] == message["content"][0]["text"]


# What is refused.

_WRONG: list[tuple[str, Any]] = [
    ("tags", "abc"), ("tags", [1]), ("tags", [""]), ("tags", 5),
    ("metadata", [("a", 1)]), ("metadata", {1: "a"}), ("on_request", "print"), ("user", 7), ("user", ""),
    ("session", b"s"), ("capture", "everything"), ("capture", 2), ("capture", None),
    ("sample", 1.5), ("sample", -0.1), ("sample", "1"), ("sample", True), ("sample", float("nan")),
    ("parent", "00-abc-def-01"), ("parent", {"traceparent": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), _WRONG)
def test_a_wrong_argument_is_refused(argument: str, value: Any) -> None:
    """A wrong argument raises `ConfigError`, with its name and value, where it is written; also while off."""
    with pytest.raises(ConfigError) as caught:
        traced(**{argument: value})
    assert argument in str(caught.value)
    shown = value["traceparent"] if isinstance(value, dict) and "traceparent" in value else value
    assert repr(shown) in str(caught.value)


@pytest.mark.parametrize("value", [5, "", b"name", ["name"]])
def test_a_wrong_name_is_refused(value: Any) -> None:
    """So does a name that is none."""
    with pytest.raises(ConfigError, match="name") as caught:
        traced(value)
    assert repr(value) in str(caught.value)


def test_only_callables_can_be_decorated() -> None:
    """So does what can't be called, given to a declaration."""
    with pytest.raises(ConfigError, match="'text'"):
        traced("name")("text")  # type: ignore[call-overload]


def test_a_carrier_inside_a_run(local: Path, llm: ScriptedOpenAI) -> None:
    """Inside a chain too, what a carrier brings wins over what is around it here."""
    with traced("far", metadata={"who": "far", "far": 1}):
        carrier = pltrace.inject()

    def near(_: Any) -> None:
        with traced("near", parent=carrier, metadata={"near": 1}):
            chat(llm).invoke("Hi!")

    with traced("here", metadata={"who": "here"}):
        RunnableLambda(near).invoke("go")
    metadata = next(span["metadata"] for span in spans(local) if span["kind"] == "llm")
    assert {key: metadata[key] for key in ("who", "far", "near")} == {"who": "far", "far": 1, "near": 1}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="objects have their attributes in place since Python 3.11")
@pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython's garbage collector")
def test_a_span_has_no_dict(tmp_path: Path) -> None:
    """A block that waits is one object for Python's garbage collector, a call two, with its arguments.

    So it is whatever was traced first.
    """
    source = """
import gc, sys
import pltrace
from pltrace import current_span, traced

@traced
def function(number):
    kept.append(current_span())
    return number

def block(number):
    with traced("block") as span:
        kept.append(span)

def grown_by(work):
    before = len(gc.get_objects())
    for number in range(100):
        work(number)
    assert pltrace.flush()
    gc.collect()
    return len(gc.get_objects()) - before

kept = []
pltrace.configure(store=sys.argv[1])
for work in (block, function):
    grown_by(block)
    gc.collect()
    print(grown_by(work))
"""
    blocks, calls = map(int, run(source, tmp_path, tmp_path / "traces.db").out.split())
    assert blocks < 120
    assert calls < 220
