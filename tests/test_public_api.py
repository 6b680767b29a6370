"""What the package shows to its users."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from importlib import metadata, resources

import pytest

import pltrace
import pltrace.testing

#: Every public name. An addition is a decision: it has to be made here too, and to have its line in the README.
PUBLIC = [
    "ConfigError",
    "ExportResult",
    "PltraceError",
    "PromptLayerCallbackHandler",
    "PromptLayerError",
    "Request",
    "Span",
    "SpanExporter",
    "StoreError",
    "StoredSpan",
    "Usage",
    "bind",
    "configure",
    "current_span",
    "flush",
    "inject",
    "instrument",
    "instrument_threads",
    "prompts",
    "shutdown",
    "traced",
    "track",
    "uninstrument",
    "uninstrument_threads",
]

#: The parameters of the public functions, as they are called.
SIGNATURES = {
    "bind": ["fn"],
    "configure": ["*api_key", "*base_url", "*client", "*store", "*exporters", "*service", "*tags", "*metadata",
                  "*capture", "*redact", "*sample", "*enabled", "*libraries"],
    "current_span": [],
    "flush": ["timeout"],
    "inject": ["carrier"],
    "instrument": ["/target", "**traced_arguments"],
    "instrument_threads": [],
    "shutdown": ["timeout"],
    "traced": ["/name", "*tags", "*metadata", "*on_request", "*user", "*session", "*capture", "*sample", "*parent"],
    "uninstrument": ["/target"],
    "uninstrument_threads": [],
}  # fmt: skip

#: The public attributes of the public classes that people get from us.
MEMBERS = {
    "Span": ["ended_at_ns", "error", "id", "input", "kind", "metadata", "name", "output", "parent_id", "requests",
             "score", "started_at_ns", "status", "tags", "trace_id", "update", "usage"],
    "Request": ["add_metadata", "add_to_group", "error", "id", "input", "input_tokens", "latency_s", "link_prompt",
                "metadata", "model", "output", "output_tokens", "provider", "score", "span_id", "status", "tags",
                "trace_id", "wait"],
    "SpanExporter": ["export", "name", "shutdown"],
    "Usage": ["by_model", "by_tag", "errors", "input_tokens", "output_tokens", "requests", "total_tokens"],
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    """`__all__` holds exactly the names above, in order."""
    assert pltrace.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_explained(name: str) -> None:
    """Each public name can be imported, has a docstring, and is shown by `dir`."""
    value = getattr(pltrace, name)

    assert inspect.getdoc(value)
    assert name in dir(pltrace)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_methods_of_public_classes_are_explained(name: str) -> None:
    """Each public method and property that we define on a public class has a docstring of its own."""
    value = getattr(pltrace, name)
    own = vars(value).items() if inspect.isclass(value) else ()

    assert [
        member
        for member, found in own
        if not member.startswith("_") and (callable(found) or isinstance(found, property)) and not inspect.getdoc(found)
    ] == []


def test_a_star_import_gives_the_public_names() -> None:
    """`from pltrace import *` works, though some names are loaded on first use."""
    names: dict[str, object] = {}

    exec("from pltrace import *", names)

    assert set(PUBLIC) <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that doesn't exist is refused as Python does it."""
    with pytest.raises(AttributeError, match="module 'pltrace' has no attribute 'nonsense'"):
        _ = pltrace.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_public_functions_take_these_arguments(name: str) -> None:
    """Each public function has the published parameters: `*` marks those by keyword alone, `/` by position alone."""
    kinds = inspect.Parameter
    marks = {kinds.KEYWORD_ONLY: "*", kinds.POSITIONAL_ONLY: "/", kinds.VAR_KEYWORD: "**"}
    parameters = inspect.signature(getattr(pltrace, name)).parameters.values()

    assert [marks.get(parameter.kind, "") + parameter.name for parameter in parameters] == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_public_classes_have_these_attributes(name: str) -> None:
    """What is published of a class is there."""
    value = getattr(pltrace, name)
    there = {*dir(value), *inspect.get_annotations(value), *inspect.signature(value.__init__).parameters}

    assert [member for member in MEMBERS[name] if member not in there] == []


def test_all_errors_are_ours() -> None:
    """One `except PltraceError` catches whatever we raise; a wrong setting is a `ValueError` too."""
    errors = [getattr(pltrace, name) for name in PUBLIC if name.endswith("Error")]

    assert all(issubclass(error, pltrace.PltraceError) for error in errors)
    assert issubclass(pltrace.ConfigError, ValueError)


def test_types_are_shipped() -> None:
    """`py.typed` tells type checkers to read our annotations."""
    assert resources.files("pltrace").joinpath("py.typed").is_file()


def test_the_installed_package_says_what_it_is() -> None:
    """The version in the metadata is the project's, it needs three packages, and it installs one command."""
    try:
        installed = metadata.distribution("pltrace")
    except metadata.PackageNotFoundError:
        pytest.skip("pltrace is not installed here; the tests run from a checkout on the path")
    needed = {
        requirement.partition(">")[0] for requirement in installed.requires or () if "extra ==" not in requirement
    }

    assert installed.version == "0.1.0"
    assert {name.partition("<")[0] for name in needed} == {"langchain-core", "promptlayer", "wrapt"}
    assert ("pltrace", "pltrace._cli:main") in {(script.name, script.value) for script in installed.entry_points}


def test_importing_loads_nothing_heavy() -> None:
    """`import pltrace` and an idle `traced` load neither LangChain nor promptlayer nor SQLite nor an HTTP client."""
    program = (
        "import sys, pltrace\n"
        "pltrace.traced(lambda: None)()\n"
        "print([name for name in ('langchain_core', 'promptlayer', 'opentelemetry', 'sqlite3', 'http.client',"
        " 'argparse', 'httpx', 'pltrace.testing') if name in sys.modules])"
    )

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)

    assert (printed.stdout, printed.stderr) == ("[]\n", "")


def test_asking_a_class_of_ours_hides_no_annotations() -> None:
    """Who looks at the type of a decorated or bound function leaves the annotations of all others readable."""

    @pltrace.traced
    def decorated(a: int) -> str:
        return str(a)

    with pltrace.testing.capture_spans(), pltrace.traced():
        bound = pltrace.bind(decorated)
    for function in (decorated, bound):
        _ = type(function).__annotations__

        assert function.__annotations__ == {"a": "int", "return": "str"}
        assert typing.get_type_hints(function) == {"a": int, "return": str}
