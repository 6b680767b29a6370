"""The modules of the package stand in layers: each imports only from layers below its own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pltrace"

#: Module → layer. A module imports only from lower layers, imports inside functions included. A new module gets the
#: lowest layer that is above all it imports.
RANKS = {
    "_blueprint._base": 0,
    "_clock": 0,
    "_collecting": 0,
    "_deliveries": 0,
    "_errors": 0,
    "_exporter": 0,
    "_messages": 0,
    "_provider_errors": 0,
    "_room": 0,
    "_tree": 0,
    "_typing": 0,
    "_wrapping": 0,
    "_blueprint._annotations": 1,
    "_blueprint._calls": 1,
    "_blueprint._media": 1,
    "_blueprint._tools": 1,
    "_blueprint._usage": 1,
    "_callables": 1,
    "_greenlets": 1,
    "_http": 1,
    "_imports": 1,
    "_rows": 1,
    "_runnables": 1,
    "_stepping": 1,
    "_blueprint._server_tools": 2,
    "_blueprint._text": 2,
    "_forks": 2,
    "_generators": 2,
    "_search": 2,
    "_slices": 2,
    "_trouble": 2,
    "_blueprint._content": 3,
    "_blueprint._extras": 3,
    "_client": 3,
    "_health": 3,
    "_redaction": 3,
    "_background": 4,
    "_blueprint._messages": 4,
    "_driving": 4,
    "_pace": 4,
    "_store_file": 4,
    "_told": 4,
    "_usage": 4,
    "_blueprint._prompts": 5,
    "_checkpoints": 5,
    "_queries": 5,
    "_snapshot": 5,
    "_suspicion": 5,
    "_termination": 5,
    "_blueprint": 6,
    "_checks": 6,
    "_database": 6,
    "_encoding._leaves": 6,
    "_thawing": 6,
    "_arguments": 7,
    "_attempts": 7,
    "_config": 7,
    "_encoding._walk": 7,
    "_lease": 7,
    "_retention": 7,
    "_doctor": 8,
    "_encoding._quick": 8,
    "_outbox": 8,
    "_span": 8,
    "_backpressure": 9,
    "_encoding._encoder": 9,
    "_links": 9,
    "_scope": 9,
    "_store": 9,
    "_encoding": 10,
    "_propagation": 10,
    "_request": 10,
    "_runs": 10,
    "_silence": 10,
    "_callbacks": 11,
    "_record": 11,
    "_templates": 11,
    "_twice": 11,
    "_unfinished": 11,
    "_wire": 11,
    "_workers": 11,
    "_commit": 12,
    "_delivery": 12,
    "_from_blueprint": 12,
    "_handler": 12,
    "_operations": 12,
    "_promptlayer": 12,
    "_langchain": 13,
    "_to_blueprint": 13,
    "_writer": 13,
    "_recorder": 14,
    "_tracing": 15,
    "_runtime": 16,
    "_account": 17,
    "_bind": 17,
    "_calling": 17,
    "_declaration": 17,
    "testing": 17,
    "_block": 18,
    "_pytest_plugin": 18,
    "_registry": 18,
    "_threads": 18,
    "track": 18,
    "_traced": 19,
    "prompts": 19,
    "_instrument": 20,
    "_program": 20,
    "__init__": 21,
    "_cli": 21,
    "__main__": 22,
}

#: Who may import what only one place should know; every other module goes through that one.
IMPORTERS = {
    "argparse": {"_cli"},
    "atexit": {"_program", "_runtime"},
    "http.client": {"_http"},
    # The handler is loaded when LangChain is; the others, for prompts of the registry, at their first use.
    "langchain_core": {"_from_blueprint", "_handler", "_templates", "_to_blueprint"},
    "promptlayer": {"_client"},
    "sqlite3": {"_checkpoints", "_database", "_doctor", "_queries", "_room", "_store_file", "_trouble"},
    "wrapt": {"_wrapping"},
}

DEPENDENCIES = {"langchain_core", "promptlayer", "wrapt"}

#: Modules that are loaded only where another package is: module → package.
OPTIONAL = {"_otlp": "opentelemetry", "_pytest_plugin": "pytest"}


class Import(NamedTuple):
    """One import statement's module: `pltrace._span`, or another package's; `root` stands for the package itself."""

    importer: str
    name: str
    line: int
    only_typing: bool


def module_name(path: Path) -> str:
    """Give a file's module, without the package's own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_typing_test(node: ast.AST) -> bool:
    """Say whether it is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_in(importer: str, source: str) -> Iterator[Import]:
    """Give all imports of a module, wherever in it they stand."""

    def visit(node: ast.AST, only_typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, only_typing)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield Import(importer, below if is_module(below) else base, node.lineno, only_typing)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, only_typing or (is_typing_test(node) and child in getattr(node, "body", ())))

    yield from visit(ast.parse(source), False)


def is_module(name: str) -> bool:
    """Say whether it is a module of the package, or `http.client`, which `from http import client` would hide."""
    file = PACKAGE.parent / Path(*name.split("."))
    return name == "http.client" or (
        name.startswith("pltrace.") and (file.with_suffix(".py").is_file() or file.is_dir())
    )


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = [found for name, path in MODULES.items() for found in imports_in(name, path.read_text(encoding="utf-8"))]
AT_RUN_TIME = [found for found in IMPORTS if not found.only_typing]


def inside(found: Import) -> str | None:
    """Give the module of ours that is imported, or None if it is another package's."""
    return found.name.removeprefix("pltrace.") if found.name.startswith("pltrace.") else None


def told(found: Import) -> str:
    """Give the place and the name of an import."""
    return f"pltrace/{found.importer.replace('.', '/')}.py:{found.line} imports {found.name}"


def test_every_module_has_its_layer() -> None:
    """The table above lists the modules that there are, no more and no less."""
    assert set(RANKS) == set(MODULES)


def test_a_module_imports_only_from_lower_layers() -> None:
    """No import points up or sideways, so there is no cycle, also none through an import inside a function."""
    wrong = [
        f"{told(found)}: layer {RANKS[found.importer]} imports layer {RANKS[target]}"
        for found in AT_RUN_TIME
        if (target := inside(found)) is not None and RANKS[target] >= RANKS[found.importer]
    ]

    assert wrong == []


def test_no_module_imports_the_package_itself() -> None:
    """What `__init__` gives to users is for users; our modules name each other."""
    assert [told(found) for found in IMPORTS if found.name == "pltrace"] == []


def test_imports_are_absolute() -> None:
    """Each import names its module in full."""
    assert [told(found) for found in IMPORTS if found.name.startswith(".")] == []


@pytest.mark.parametrize("package", sorted(IMPORTERS))
def test_few_modules_know_a_package(package: str) -> None:
    """What depends on a package is in one place, which the rest of the code goes through."""
    importers = {
        found.importer for found in AT_RUN_TIME if found.name == package or found.name.startswith(f"{package}.")
    }

    assert importers == IMPORTERS[package]


def test_only_the_standard_library_and_three_packages_are_imported() -> None:
    """Nothing else has to be installed."""
    allowed = {*sys.stdlib_module_names, *DEPENDENCIES, "pltrace"}

    assert [
        told(found)
        for found in AT_RUN_TIME
        if (package := found.name.partition(".")[0]) not in allowed and package != OPTIONAL.get(found.importer)
    ] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pltrace", [("pltrace", False)]),
        ("from pltrace import _span, traced", [("pltrace._span", False), ("pltrace", False)]),
        ("from pltrace._span import Span", [("pltrace._span", False)]),
        ("def f():\n    from pltrace import _span", [("pltrace._span", False)]),
        ("if TYPE_CHECKING:\n    import pltrace\nelse:\n    import wrapt", [("pltrace", True), ("wrapt", False)]),
        ("from http import client", [("http.client", False)]),
        ("from . import _span", [(".", False)]),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees_all_forms(source: str, expected: list[tuple[str, bool]]) -> None:
    """The tests above rest on this: no way of writing an import escapes them."""
    assert [(found.name, found.only_typing) for found in imports_in("x", source)] == expected
