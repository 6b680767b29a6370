"""Who listens: nobody, a handler that does nothing, and pltrace with all that it has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from langchain_core.callbacks.base import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

__all__ = ["API_KEY", "Nobody", "Noop", "Pltrace", "Tracer", "Variable"]

API_KEY = "pl_benchmark_0123456789abcdef"
_TAGS, _METADATA = ("benchmark", "nightly"), {"release": "1.2.3", "customer": 42}


class Tracer:
    """What a workload is measured with; made once in a process, and on inside `on()` alone.

    Args:
        sink: The address of a local server that takes whatever is sent.
        folder: Where files may be written.
    """

    name = "none"
    #: Goes into the config of LangChain's runs.
    callbacks: list[Any] | None = None
    #: Makes a block of a name; and a block that was declared before. None: there is no such thing.
    block: Callable[[str], AbstractContextManager[Any]] | None = None
    declared: AbstractContextManager[Any] | None = None

    def __init__(self, sink: str, folder: Path) -> None:
        self.sink = sink
        self.folder = folder

    def on(self) -> AbstractContextManager[Any]:
        """Return what it is on inside of."""
        return nullcontext()

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the function, traced; None if there is no such thing."""
        return None

    def settle(self) -> None:
        """Wait until the background has done its work."""


class Nobody(Tracer):
    """No tracer at all."""


class NoopHandler(BaseCallbackHandler):
    """Hears all and does nothing: the floor of what any callback tracer costs."""

    run_inline = True

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    on_chat_model_start = on_llm_new_token = on_llm_end = on_llm_error = on_llm_start
    on_chain_start = on_chain_end = on_chain_error = on_llm_start
    on_tool_start = on_tool_end = on_tool_error = on_llm_start
    on_retriever_start = on_retriever_end = on_retriever_error = on_llm_start


class Variable:
    """What LangChain's configure hook reads."""

    value: Any = None

    def get(self) -> Any:
        """Return the handler that is on, or None."""
        return self.value


class Noop(Tracer):
    """The handler that does nothing, installed as pltrace installs its own."""

    name = "no-op"

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        self._variable: Any = Variable()
        self._handler = NoopHandler()
        register_configure_hook(self._variable, inheritable=True)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on."""
        self._variable.value = self._handler
        try:
            yield
        finally:
            self._variable.value = None


class Pltrace(Tracer):
    """pltrace with a store on disk, delivery, a scope with tags and metadata, and capture."""

    name = "pltrace"

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        import pltrace

        self._pltrace = pltrace
        self.store = folder / "traces.db"
        self.start()
        self._scope = pltrace.traced("benchmark", tags=_TAGS, metadata=_METADATA, user="ada", session="one")
        self.declared = pltrace.traced("declared before")
        self.block = pltrace.traced

    def start(self, *, deliver: bool = True) -> None:
        """Switch tracing on."""
        key = API_KEY if deliver else None
        self._pltrace.configure(api_key=key, base_url=self.sink if deliver else None, store=self.store, enabled=True)

    def stop(self) -> None:
        """Switch tracing off."""
        self.settle()
        self._pltrace.configure(enabled=False)

    def on(self) -> AbstractContextManager[Any]:
        """Open a scope: outside of one nothing is recorded."""
        return self._scope

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, traced."""
        return self._pltrace.traced(function)

    def settle(self) -> None:
        """Wait until all is stored and delivered."""
        if not self._pltrace.flush(timeout=60):
            raise RuntimeError("pltrace didn't deliver to the benchmark's server; `pltrace doctor` says why")
