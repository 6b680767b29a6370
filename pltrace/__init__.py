"""Traces LangChain into PromptLayer: say `@traced` once, and every call inside is recorded, kept and delivered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pltrace._bind import bind
from pltrace._errors import ConfigError, PltraceError, PromptLayerError, StoreError
from pltrace._instrument import instrument, uninstrument
from pltrace._propagation import inject
from pltrace._runtime import configure, flush, shutdown
from pltrace._scope import current_span
from pltrace._span import Span
from pltrace._traced import traced
from pltrace._usage import Usage

if TYPE_CHECKING:
    from pltrace import prompts, track
    from pltrace._exporter import ExportResult, SpanExporter, StoredSpan
    from pltrace._handler import PromptLayerCallbackHandler
    from pltrace._request import Request
    from pltrace._threads import instrument_threads, uninstrument_threads

__all__ = [
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

#: Loaded on first use: importing pltrace must cost nothing that isn't needed yet.
_LATER = {
    "ExportResult": "pltrace._exporter",
    "PromptLayerCallbackHandler": "pltrace._handler",
    "Request": "pltrace._request",
    "SpanExporter": "pltrace._exporter",
    "StoredSpan": "pltrace._exporter",
    "instrument_threads": "pltrace._threads",
    "prompts": "pltrace.prompts",
    "track": "pltrace.track",
    "uninstrument_threads": "pltrace._threads",
}


if not TYPE_CHECKING:  # Type checkers know all names from above, and would take any other for one of these.

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module 'pltrace' has no attribute {name!r}")
        from importlib import import_module

        module = import_module(_LATER[name])
        value = globals()[name] = module if _LATER[name] == f"pltrace.{name}" else getattr(module, name)
        return value


def __dir__() -> list[str]:
    import sys

    # Who looks at whatever modules have, as freezegun does, must not be the one to load LangChain.
    hidden = set() if "langchain_core" in sys.modules else {"PromptLayerCallbackHandler"}
    return sorted({*globals(), *__all__} - hidden)
