"""The pytest plugin that comes with pltrace: the fixture `pltrace_spans`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pltrace.testing import CapturedSpans


@pytest.fixture
def pltrace_spans() -> Iterator[CapturedSpans]:
    """Trace the test in memory and give the spans that ended; fail it if it leaves a scope or a run open."""
    from pltrace.testing import capture_spans

    with capture_spans() as spans:
        yield spans
        spans.assert_nothing_open()
