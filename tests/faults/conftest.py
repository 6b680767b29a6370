"""What the fault tests are given: a store, the settings of a program, and a place for figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.support import Measured
from tests.support.promptlayer_server import PromptLayerServer


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The file that programs record into."""
    return tmp_path / "store" / "traces.db"


@pytest.fixture
def settings(promptlayer: PromptLayerServer, store: Path) -> dict[str, object]:
    """Environment that switches tracing on in a program, with delivery to the test's PromptLayer."""
    return {
        "PROMPTLAYER_API_KEY": promptlayer.api_key,
        "PROMPTLAYER_BASE_URL": promptlayer.url,
        "PLTRACE_STORE": store,
        # Python 3.12 and newer warn of any fork of a process that has threads.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Note figures, for the table at the end of the run: a busy machine must not fail a test by them."""

    def note(what: str, figure: float, unit: str) -> None:
        record_property("measured", f"{what}: {figure:.3g} {unit}")

    return note
