"""The pytest plugin that comes with pltrace: the fixture `pltrace_spans` and the marker that sets it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pltrace.testing import CapturedSpans

_MARKER = (
    "pltrace(deterministic=False, **settings): how the fixture `pltrace_spans` traces the test, as for "
    "`pltrace.testing.capture_spans`"
)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Let processes that are started while tests are collected know of pytest; from 8.2 on it tells them itself."""
    if "PYTEST_VERSION" not in os.environ:
        os.environ["PYTEST_VERSION"] = pytest.__version__

        def forget() -> None:
            os.environ.pop("PYTEST_VERSION", None)

        early_config.add_cleanup(forget)


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def pltrace_spans(request: pytest.FixtureRequest) -> Iterator[CapturedSpans]:
    """Trace the test in memory and give the spans that ended; fail it if it leaves a scope or a run open.

    `@pytest.mark.pltrace(deterministic=True, tags=["t"])` says how. Of several, on the test, its class and its module,
    all count; of what more than one of them sets, the closest.
    """
    from pltrace.testing import capture_spans

    wrong: tuple[Any, ...] = ()  # What stands in a marker without a name is refused as any call refuses it.
    settings: dict[str, Any] = {}
    for marker in request.node.iter_markers("pltrace"):
        wrong, settings = wrong + marker.args, {**marker.kwargs, **settings}
    with capture_spans(*wrong, **settings) as spans:
        yield spans
        spans.assert_nothing_open()
