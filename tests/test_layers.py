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
    "_encoding._leaves": 4,
    "_pace": 4,
    "_snapshot": 4,
    "_store_file": 4,
    "_usage": 4,
    "_blueprint._prompts": 5,
    "_checkpoints": 5,
    "_checks": 5,
    "_queries": 5,
    "_suspicion": 5,
    "_termination": 5,
    "_thawing": 5,
    "_arguments": 6,
    "_attempts": 6,
    "_blueprint": 6,
    "_config": 6,
    "_database": 6,
    "_encoding._walk": 6,
    "_doctor": 7,
    "_encoding._quick": 7,
    "_lease": 7,
    "_retention": 7,
    "_span": 7,
    "_backpressure": 8,
    "_encoding._encoder": 8,
    "_links": 8,
    "_outbox": 8,
    "_scope": 8,
    "_encoding": 9,
    "_propagation": 9,
    "_request": 9,
    "_runs": 9,
    "_silence": 9,
    "_store": 9,
    "_callbacks": 10,
    "_record": 10,
    "_templates": 10,
    "_twice": 10,
    "_unfinished": 10,
    "_wire": 10,
    "_workers": 10,
    "_commit": 11,
    "_delivery": 11,
    "_from_blueprint": 11,
    "_handler": 11,
    "_operations": 11,
    "_promptlayer": 11,
    "_langchain": 12,
    "_to_blueprint": 12,
    "_writer": 12,
    "_recorder": 13,
    "_tracing": 14,
    "_runtime": 15,
    "_account": 16,
    "_bind": 16,
    "_calling": 16,
    "_declaration": 16,
    "testing": 16,
    "_block": 17,
    "_pytest_plugin": 17,
    "_registry": 17,
    "_threads": 17,
    "track": 17,
    "_traced": 18,
    "prompts": 18,
    "_instrument": 19,
    "_program": 19,
    "_cli": 20,
    "__init__": 21,
    "__main__": 21,
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
