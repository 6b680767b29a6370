"""Meets LangChain when it is imported, by whoever does it: registers our handler's hook, once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from pltrace import _runs
from pltrace._wrapping import when_imported

if TYPE_CHECKING:
    from pltrace._handler import SpanHandler

__all__ = ["awaiting", "switch"]


class HandlerVariable:
    """What LangChain's configure hook reads at each run: the handler while tracing is on, else None.

    LangChain asks a registered variable for nothing but `get()`. A real ContextVar would have to be set in every
    context that there is, since a run outside all scopes is to be seen too: it is counted, and warned about when its
    thread lost the scope.
    """

    handler: SpanHandler | None = None

    def get(self) -> SpanHandler | None:
        """Return the handler that every run gets now."""
        return self.handler


_variable = HandlerVariable()
_handler: SpanHandler | None = None
_on = False
_awaiting = False


def switch(on: bool) -> None:
    """Let LangChain's runs have the handler, or not; waits for LangChain if it isn't there yet."""
    global _awaiting, _on
    _on = on
    if on and not _awaiting:
        _awaiting = True
        when_imported("langchain_core.tracers.context", _register)
        when_imported("langchain_core.runnables.config", _read_config)
    _variable.handler = _handler if on else None


def awaiting() -> bool:
    """Return whether LangChain hasn't been imported yet."""
    return _handler is None


def _register(context: ModuleType) -> None:
    """Register the hook: LangChain imports this module before it configures its first run."""
    global _handler
    from pltrace._handler import SpanHandler

    _handler = SpanHandler()
    _variable.handler = _handler if _on else None
    context.register_configure_hook(_variable, inheritable=True)


def _read_config(config: ModuleType) -> None:
    _runs.config_variable = config.var_child_runnable_config
