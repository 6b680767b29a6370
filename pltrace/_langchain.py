"""Meets LangChain when it is imported, by whoever does it: registers our handler's hook, once."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from pltrace import _runs
from pltrace._health import failed
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


#: What registers hooks, and what reads them at each run.
_CONTEXT, _MANAGER = "langchain_core.tracers.context", "langchain_core.callbacks.manager"

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
        for module in (_CONTEXT, _MANAGER):
            when_imported(module, _register)
        when_imported("langchain_core.runnables.config", _read_config)
    _variable.handler = _handler if on else None


def awaiting() -> bool:
    """Return whether LangChain hasn't been imported yet."""
    return _handler is None


def _register(_: ModuleType) -> None:
    """Register the hook, when both modules are there: LangChain imports them before it configures its first run.

    Before, the handler can't be made: in some versions the one is imported in the middle of the other.
    """
    global _handler
    context, manager = sys.modules.get(_CONTEXT), sys.modules.get(_MANAGER)
    if _handler is not None or context is None or not hasattr(manager, "AsyncCallbackManager"):
        return
    try:
        from pltrace._handler import SpanHandler

        _handler = SpanHandler()
        _variable.handler = _handler if _on else None
        context.register_configure_hook(_variable, inheritable=True)
    except Exception:  # It is the import of somebody's module that we are in.
        failed("registering with LangChain")


def _read_config(config: ModuleType) -> None:
    _runs.config_here = config.var_child_runnable_config.get
