"""What depends on the versions of other packages that the tests run with."""

from __future__ import annotations

from importlib.metadata import version

import pytest

_LANGCHAIN = tuple(int(part) for part in version("langchain").split(".")[:2])

#: The agents of langchain 1.0 run other steps than later ones, and take no message as system prompt.
recent_agents = pytest.mark.skipif(_LANGCHAIN < (1, 1), reason="agents of langchain 1.0 run other steps")
