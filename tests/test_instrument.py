"""`instrument` traces what one doesn't own, by name, before or after its import; `uninstrument` leaves no trace."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import pltrace
from pltrace import ConfigError, instrument, traced, uninstrument
from pltrace.testing import CapturedSpans
from tests.support.programs import run, stored

SOURCE = """
import functools

CONSTANT = 5
NOTHING = None

def function(a, b=2):
    return a + b

async def coroutine(a):
    return a

def generator(a):
    yield a

class Base:
    def inherited(self, a):
        return type(self).__name__, a

    @classmethod
    def inherited_classmethod(cls, a):
        return cls.__name__, a

class Class(Base):
    def method(self, a):
        return a

    @classmethod
    def of_class(cls, a):
        return cls.__name__, a

    @staticmethod
    def static(a):
        return a

    @property
    def of_property(self):
        return 1

    @functools.cached_property
    def cached(self):
        return 1

    class Nested:
        def method(self, a):
            return a

single = Class()

def __getattr__(name):
    if name == "lazy":
        return len
    raise AttributeError(name)
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of somebody else, with a module `core` in it, not imported yet."""
    name = f"theirs{len(_packages)}"
    _packages.append(name)
    folder = tmp_path / "site" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("def top(): return 0\n")
    (folder / "core.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(folder.parent)
    yield name
    for module in (name, f"{name}.core"):
        sys.modules.pop(module, None)


#: A name is used once: a hook waits for the import of a name, also after a test.
_packages: list[str] = []


def names(spans: CapturedSpans) -> list[str]:
    """Gives the names of the spans."""
    return [span.name for span in spans]


# What can be named: path in the module, how it is called, what it gives, the span's name.

CASES: list[tuple[str, str, Any, str]] = [
    ("function", "core.function(1, b=3)", 4, "function"),
    ("generator", "list(core.generator(1))", [1], "generator"),
    ("Class.method", "core.Class().method(1)", 1, "Class.method"),
    ("Class.of_class", "core.Class.of_class(1)", ("Class", 1), "Class.of_class"),
    ("Class.of_class", "core.Class().of_class(1)", ("Class", 1), "Class.of_class"),
    ("Class.static", "core.Class.static(1)", 1, "Class.static"),
    ("Class.static", "core.Class().static(1)", 1, "Class.static"),
    ("Class.inherited", "core.Class().inherited(1)", ("Class", 1), "Base.inherited"),
    ("Class.inherited_classmethod", "core.Class.inherited_classmethod(1)", ("Class", 1), "Base.inherited_classmethod"),
    ("Class.Nested.method", "core.Class.Nested().method(1)", 1, "Class.Nested.method"),
    ("single.method", "core.single.method(1)", 1, "Class.method"),
]


@pytest.mark.parametrize("before_import", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("separator", [":", "."], ids=["colon", "dots"])
@pytest.mark.parametrize(("path", "call", "value", "span"), CASES, ids=[call for _, call, _, _ in CASES])
def test_traced_and_undone(
    theirs: str, pltrace_spans: CapturedSpans, path: str, call: str, value: Any, span: str, separator: str,
    before_import: bool,
) -> None:  # fmt: skip
    """Every kind of function, named in both ways, before or after its import; then everything is as it was."""
    target = f"{theirs}.core{separator}{path}"
    if before_import:
        instrument(target, tags=["theirs"])
        core = importlib.import_module(f"{theirs}.core")
    else:
        core = importlib.import_module(f"{theirs}.core")
        before = _lying(core, path)
        instrument(target, tags=["theirs"])
    try:
        assert eval(call) == value
        assert [(found.name, found.tags) for found in pltrace_spans] == [(span, ("theirs",))]
    finally:
        uninstrument(target)
    assert eval(call) == value
    assert len(pltrace_spans) == 1
    if not before_import:
        assert _lying(core, path) == before
        assert all(one is other for one, other in zip(_lying(core, path), before, strict=True))


def _lying(module: types.ModuleType, path: str) -> list[Any]:
    """Gives what lies in the places on a path, without binding it; a place with nothing is left out."""
    *above, last = path.split(".")
    owner: Any = module
    for part in above:
        owner = getattr(owner, part)
    return [vars(owner)[last]] if last in vars(owner) else []


async def test_a_coroutine(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """A coroutine function stays one, and its span covers the await."""
    import inspect

    instrument(f"{theirs}.core:coroutine")
    core = importlib.import_module(f"{theirs}.core")
    assert inspect.iscoroutinefunction(core.coroutine)
    assert await core.coroutine(1) == 1
    assert names(pltrace_spans) == ["coroutine"]
    uninstrument(f"{theirs}.core:coroutine")


def test_a_function_of_the_package_itself(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """`package.function` names what lies in the package's own `__init__`."""
    instrument(f"{theirs}.top")
    package = importlib.import_module(theirs)
    assert package.top() == 0
    assert names(pltrace_spans) == ["top"]
    uninstrument(f"{theirs}.top")


def test_dots_while_only_the_package_is_imported(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """With dots alone, a module that is not there yet, of a package that is, is waited for."""
    importlib.import_module(theirs)
    instrument(f"{theirs}.core.Class.method")
    core = importlib.import_module(f"{theirs}.core")
    core.Class().method(1)
    assert names(pltrace_spans) == ["Class.method"]
    uninstrument(f"{theirs}.core.Class.method")


def test_a_base_class_is_left_alone(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """An inherited method is traced on the class that was named, not on its base."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:Class.inherited")
    core.Base().inherited(1)
    assert names(pltrace_spans) == []
    core.Class().inherited(1)
    assert names(pltrace_spans) == ["Base.inherited"]
    uninstrument(f"{theirs}.core:Class.inherited")
    assert "inherited" not in vars(core.Class)


def test_an_attribute_made_when_asked_for(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """A module may make its attributes when they are asked for, as many large packages do."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:lazy")
    assert core.lazy([1]) == 1
    assert names(pltrace_spans) == ["len"]
    uninstrument(f"{theirs}.core:lazy")
    assert core.lazy is len
    assert "lazy" not in vars(core)


def test_a_builtin_function(pltrace_spans: CapturedSpans) -> None:
    """A function written in C can be traced too, with its arguments."""
    original = math.sqrt
    instrument("math:sqrt", metadata={"k": 1})
    try:
        assert math.sqrt(9) == 3
        assert math.sqrt.__name__ == "sqrt"
    finally:
        uninstrument("math:sqrt")
    assert math.sqrt is original
    assert pltrace_spans.named("sqrt").output == 3.0
    assert pltrace_spans.named("sqrt").metadata == {"k": 1}


def test_a_command_of_click(pltrace_spans: CapturedSpans) -> None:
    """A command stays what it is while its function is traced, and afterwards."""
    click = pytest.importorskip("click")
    module: Any = types.ModuleType("commands")
    command = module.hello = click.Command("hello", callback=lambda: 5)
    function = command.callback
    sys.modules["commands"] = module
    try:
        instrument("commands:hello", tags=["c"])
        assert module.hello is command
        assert command.main([], standalone_mode=False) == 5
        uninstrument("commands:hello")
        assert command.callback is function
    finally:
        del sys.modules["commands"]
    assert [span.tags for span in pltrace_spans] == [("c",)]


def test_one_of_the_standard_library(pltrace_spans: CapturedSpans) -> None:
    """As in the README: a method of a class in a module that is imported already."""
    instrument("json.encoder:JSONEncoder.encode", tags=["json"])
    try:
        assert json.dumps({"a": [1]}, indent=1) == '{\n "a": [\n  1\n ]\n}'
    finally:
        uninstrument("json.encoder:JSONEncoder.encode")
    (span,) = pltrace_spans
    assert (span.name, span.tags, span.input) == ("JSONEncoder.encode", ("json",), {"o": {"a": [1]}})


def test_what_pltrace_uses_itself(pltrace_spans: CapturedSpans) -> None:
    """What we call ourselves can be traced too: our own calls make no spans, which would make more of them for ever."""
    instrument("json.encoder:JSONEncoder.encode")
    try:
        json.dumps([1])
        assert pltrace.flush(5.0)
    finally:
        uninstrument("json.encoder:JSONEncoder.encode")
    assert names(pltrace_spans) == ["JSONEncoder.encode"]


def test_inert_while_tracing_is_off(theirs: str) -> None:
    """Instrumented functions do nothing else until the application switches tracing on."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:function")
    assert core.function(1) == 3
    uninstrument(f"{theirs}.core:function")


# Again, and undone.


def test_twice_is_once(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """Instrumented again, also by the other way to write its name, a function is traced once, as said last."""
    core = importlib.import_module(f"{theirs}.core")
    original = core.function
    instrument(f"{theirs}.core:function", tags=["first"])
    instrument(f"{theirs}.core:function", tags=["second"])
    instrument(f"{theirs}.core.function", tags=["third"])
    core.function(1)
    assert [span.tags for span in pltrace_spans] == [("third",)]
    uninstrument(f"{theirs}.core:function")
    assert core.function is original


def test_twice_before_the_import(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """So it is when both came before the import."""
    instrument(f"{theirs}.core:function", tags=["first"])
    instrument(f"{theirs}.core:function", tags=["second"])
    core = importlib.import_module(f"{theirs}.core")
    core.function(1)
    assert [span.tags for span in pltrace_spans] == [("second",)]
    uninstrument(f"{theirs}.core:function")


def test_undone_before_the_import(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """What is undone before the module comes is never done."""
    instrument(f"{theirs}.core:function")
    uninstrument(f"{theirs}.core:function")
    core = importlib.import_module(f"{theirs}.core")
    core.function(1)
    assert type(core.function) is types.FunctionType
    assert pltrace_spans == []


@pytest.mark.parametrize("target", ["json:dumps", "nowhere.at:all", "nonsense", "a..b", ""])
def test_undoing_what_was_not_done(target: str) -> None:
    """`uninstrument` of anything else does nothing."""
    before = json.dumps
    uninstrument(target)
    assert json.dumps is before


def test_undone_under_what_came_later(theirs: str, caplog: pytest.LogCaptureFixture) -> None:
    """What somebody put in the function's place since is not thrown away; one warning says so."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:function")
    core.function = replaced = lambda a: a
    uninstrument(f"{theirs}.core:function")
    assert core.function is replaced
    (warning,) = caplog.records
    assert f"uninstrument('{theirs}.core:function')" in warning.getMessage()


def test_over_a_library_of_its_own(pltrace_spans: CapturedSpans, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that its library decorated gets a second span around it, and keeps its first afterwards."""

    @traced("theirs")
    def function() -> int:
        return 1

    module = types.ModuleType("decorated_elsewhere")
    vars(module)["function"] = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    instrument("decorated_elsewhere:function", tags=["ours"])
    module.function()
    uninstrument("decorated_elsewhere:function")
    assert module.function is function
    assert [span.name.rpartition(".")[2] for span in pltrace_spans] == ["theirs", "function"]
    assert [span.tags for span in pltrace_spans] == [("ours",), ("ours",)]


def test_the_application_governs_it(theirs: str, local: Path) -> None:
    """`configure(libraries=...)` holds for functions of the package that is instrumented."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:function")
    pltrace.configure(store=local, libraries={theirs: {"enabled": False}})
    assert core.function(1) == 3
    assert pltrace.flush(5.0)
    assert stored(local) == []
    uninstrument(f"{theirs}.core:function")


# What can't be.


@pytest.mark.parametrize(
    "target",
    ["", "function", "module:", ":name", "a:b:c", "a..b", "a.b.", "a b:c", "a:b-c", "a/b:c", 5, None, ["a:b"]],
)
def test_malformed(target: Any) -> None:
    """A target of another form is refused, with the form that is expected."""
    with pytest.raises(ConfigError, match=r"expected \"package\.module:name\""):
        instrument(target)


@pytest.mark.parametrize(
    "target",
    [
        "json:nothing", "json.encoder:JSONEncoder.encod",
        "json.encoder:Encoder.encode", "json.dumpz", "json.encoder.JSONEncoder.encod", "json.encoder.Encoder.encode",
        "math.sine", "math.pi.sine",
    ],
)  # fmt: skip
def test_no_such_function(target: str) -> None:
    """A name that isn't in a module that is imported is refused at once, in both ways of writing it."""
    importlib.import_module("json.encoder")
    with pytest.raises(ConfigError, match=f"target='{target}': its module is imported, and there is no such function"):
        instrument(target)


def test_no_function(theirs: str) -> None:
    """What isn't a function is refused, and left as it was."""
    core = importlib.import_module(f"{theirs}.core")
    with pytest.raises(ConfigError, match="is no function, but 5"):
        instrument(f"{theirs}.core:CONSTANT")
    assert core.CONSTANT == 5


@pytest.mark.parametrize("name", ["of_property", "cached"])
def test_a_property(theirs: str, pltrace_spans: CapturedSpans, name: str) -> None:
    """A property's functions are traced, and it stays one."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:Class.{name}")
    assert getattr(core.Class(), name) == 1
    uninstrument(f"{theirs}.core:Class.{name}")
    assert getattr(core.Class(), name) == 1
    assert [span.name for span in pltrace_spans] == [f"Class.{name}"]


def test_what_python_keeps_from_being_replaced() -> None:
    """A method of a builtin type can't be replaced, and the error says so."""
    with pytest.raises(ConfigError, match=r"target='builtins:str\.upper' can't be replaced: .*immutable type"):
        instrument("builtins:str.upper")


def test_wrong_arguments_leave_what_was(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """Arguments are those of `traced`; when one is refused, what was instrumented before stays so."""
    core = importlib.import_module(f"{theirs}.core")
    instrument(f"{theirs}.core:function", tags=["first"])
    with pytest.raises(ConfigError, match="sample=7"):
        instrument(f"{theirs}.core:function", sample=7)
    with pytest.raises(TypeError, match="tag"):
        instrument(f"{theirs}.core:function", tag="x")  # type: ignore[call-arg]
    core.function(1)
    assert [span.tags for span in pltrace_spans] == [("first",)]
    uninstrument(f"{theirs}.core:function")


@pytest.mark.parametrize(
    ("path", "told"), [("missing", "there is no such function in it"), ("CONSTANT", "is no function, but 5")]
)
def test_a_later_import_is_not_disturbed(theirs: str, caplog: pytest.LogCaptureFixture, path: str, told: str) -> None:
    """A mistake that shows only at the import is one warning that names the target; the import goes on."""
    instrument(f"{theirs}.core:{path}")
    with caplog.at_level(logging.WARNING):
        core = importlib.import_module(f"{theirs}.core")
    assert core.function(1) == 3
    (warning,) = caplog.records
    assert f"{theirs}.core:{path}" in warning.getMessage()
    assert told in warning.getMessage()
    uninstrument(f"{theirs}.core:{path}")


# Imports of other kinds than the first one.


def test_a_reload_keeps_it(theirs: str, pltrace_spans: CapturedSpans) -> None:
    """A module that is reloaded has functions and classes anew; they are traced again, and undone as ever."""
    targets = [f"{theirs}.core:function", f"{theirs}.core.Class.method"]
    instrument(targets[0])
    core = importlib.import_module(f"{theirs}.core")
    instrument(targets[1])
    for _ in range(2):
        importlib.reload(core)
        core.function(1)
        core.Class().method(1)
    assert names(pltrace_spans) == ["function", "Class.method"] * 2
    assert core.__loader__ is core.__spec__.loader
    assert core.__loader__.get_source(core.__name__) == SOURCE
    for target in targets:
        uninstrument(target)
    assert {type(core.function), type(vars(core.Class)["method"])} == {types.FunctionType}


def test_while_it_is_being_imported(theirs: str, tmp_path: Path, pltrace_spans: CapturedSpans) -> None:
    """Of a module whose import has begun, what isn't there yet is traced as soon as the import is over."""
    path = tmp_path / "site" / theirs / "circle.py"
    path.write_text(
        f"import pltrace; pltrace.instrument('{theirs}.circle:function'); pltrace.instrument('{theirs}.circle.other')\n"
        "def function(): return 1\ndef other(): return 2\nduring = function() + other()\n"
    )
    circle = importlib.import_module(f"{theirs}.circle")
    assert pltrace_spans == []
    assert circle.function() + circle.other() == circle.during
    assert names(pltrace_spans) == ["function", "other"]
    uninstrument(f"{theirs}.circle:function")
    uninstrument(f"{theirs}.circle:other")
    del sys.modules[circle.__name__]


def test_an_import_that_failed_can_succeed_later(theirs: str, tmp_path: Path, pltrace_spans: CapturedSpans) -> None:
    """What was asked for while a module was being imported that then failed holds for the next try."""
    path = tmp_path / "site" / theirs / "circle.py"
    path.write_text(
        f"import pltrace, sys; pltrace.instrument('{theirs}.circle:function')\n"
        "if not hasattr(sys, 'second_try'): raise ImportError('first try')\ndef function(): return 1\n"
    )
    with pytest.raises(ImportError, match="first try"):
        importlib.import_module(f"{theirs}.circle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "second_try", True, raising=False)
        circle = importlib.import_module(f"{theirs}.circle")
    circle.function()
    assert names(pltrace_spans) == ["function"]
    uninstrument(f"{theirs}.circle:function")
    del sys.modules[circle.__name__]


@pytest.mark.parametrize("path", ["core.functio", "core.Clas.method", "cor.function"])
def test_a_typo_in_dots_is_told_once(theirs: str, caplog: pytest.LogCaptureFixture, path: str) -> None:
    """With dots alone too, a name that no module can have any more is told, once, when that is known."""
    instrument(f"{theirs}.{path}")
    with caplog.at_level(logging.WARNING):
        core = importlib.import_module(f"{theirs}.core")
        importlib.reload(core)
    (warning,) = caplog.records
    assert (
        f"pltrace.instrument('{theirs}.{path}'): its module is imported, and there is no such" in warning.getMessage()
    )
    uninstrument(f"{theirs}.{path}")


def test_a_module_under_another_name(pltrace_spans: CapturedSpans) -> None:
    """A module is named as it is imported, whatever it calls itself: `os.path` is `posixpath`."""
    instrument("os.path:commonpath")
    try:
        assert os.path.commonpath(["/a/b", "/a/c"]) == "/a"
    finally:
        uninstrument("os.path:commonpath")
    assert names(pltrace_spans) == ["commonpath"]


# Packages that bring instrumentation for others.


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as `site-packages` is, with a package, and another that brings instrumentation for it."""
    site = tmp_path / "site"
    information = site / "bringer-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bringer\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[pltrace.instrumentation]\nbroken = bringer:broken\ntheirs = bringer:apply\nmissing = nowhere:apply\n"
    )
    (site / "theirs.py").write_text("def function():\n    return 1\n")
    (site / "bringer.py").write_text(
        dedent("""
        import pltrace

        print("bringer is imported")

        def broken():
            raise RuntimeError("it is broken")

        def apply():
            print("bringer is applied")
            pltrace.instrument("theirs:function", tags=["brought"])
        """)
    )
    return site


def test_entry_points_are_applied_when_on(site: Path, tmp_path: Path) -> None:
    """Instrumentation from entry points is applied when tracing goes on, once, and a broken one harms nobody."""
    store = tmp_path / "traces.db"
    program = run(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import pltrace
        import theirs
        theirs.function()
        print("before")
        pltrace.configure(store=sys.argv[1])
        theirs.function()
        pltrace.shutdown()
        theirs.function()
        pltrace.configure(store=sys.argv[1], tags=["again"])
        theirs.function()
        """,
        tmp_path, store,
    )  # fmt: skip
    assert program.code == 0
    assert program.out == "before\nbringer is imported\nbringer is applied\n"
    assert stored(store) == ["function", "function"]
    assert program.err.count("The instrumentation broken of bringer:broken failed; the program goes on") == 1
    assert program.err.count("The instrumentation missing of nowhere:apply failed; the program goes on") == 1
    assert "RuntimeError: it is broken" in program.err


def test_entry_points_that_cannot_be_read(site: Path, tmp_path: Path) -> None:
    """A package whose own information is broken keeps nobody from tracing; one logged error says so."""
    (site / "bringer-1.0.dist-info" / "entry_points.txt").write_text("[pltrace.instrumentation]\nbroken\n")
    program = run(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import pltrace
        pltrace.configure(store="memory")
        with pltrace.traced("block") as span:
            print(bool(span))
        """,
        tmp_path,
    )
    assert (program.code, program.out) == (0, "True\n")
    assert program.err.startswith("A package's entry points can't be read")


def test_entry_points_are_applied_by_the_environment(site: Path, tmp_path: Path) -> None:
    """So it is when the environment switches tracing on, at the first traced call."""
    store = tmp_path / "traces.db"
    program = run(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import pltrace
        import theirs
        with pltrace.traced("first"):
            theirs.function()
        """,
        tmp_path, PLTRACE_ENABLED=1, PLTRACE_STORE=store,
    )  # fmt: skip
    assert program.code == 0
    assert stored(store) == ["function", "first"]


def test_entry_points_are_not_read_while_off(site: Path, tmp_path: Path) -> None:
    """Without an opt-in, no package is looked for, imported or called."""
    program = run(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import pltrace
        import theirs
        with pltrace.traced("off"):
            theirs.function()
        assert "bringer" not in sys.modules
        """,
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "", "")


def test_entry_points_can_be_tested(site: Path, tmp_path: Path) -> None:
    """A package that brings instrumentation can test it with `capture_spans`."""
    program = run(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        from pltrace.testing import capture_spans
        import theirs
        with capture_spans() as spans:
            theirs.function()
        assert [(span.name, span.tags) for span in spans] == [("function", ("brought",))], spans
        """,
        tmp_path,
    )
    assert program.code == 0, program.err


def test_undone_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What couldn't be undone, for something stood over it, can be once that is gone."""
    module = types.ModuleType("over")
    module.work = lambda: "worked"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "over", module)
    original = module.work
    pltrace.instrument("over:work")
    with monkeypatch.context() as others:
        others.setattr(module, "work", lambda: "other")
        pltrace.uninstrument("over:work")
        with pytest.raises(ConfigError, match="undo that first"):
            pltrace.instrument("over:work")
    pltrace.uninstrument("over:work")
    assert module.work is original


def test_a_class_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class as a target is refused: what replaced it could be neither caught, matched nor subclassed."""
    module = types.ModuleType("classes")
    module.Kind = type("Kind", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "classes", module)
    with pytest.raises(ConfigError, match="is a class"):
        pltrace.instrument("classes:Kind")
