"""Keeps a call from being logged twice where PromptLayer's own instrumentation of providers' clients sees it too."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType
from typing import Any

from pltrace._health import counts, failed, warn_once
from pltrace._runs import key_of, open_runs
from pltrace._span import Span
from pltrace._wrapping import Wrapper, patched, when_imported

__all__ = ["switch"]

#: The attributes by which PromptLayer is told that a span's request is logged by somebody else, and under which span.
_MANAGED = "promptlayer.request_log.managed"
_MANAGED_BY = "promptlayer.request_log.span_id"
#: What the frames of LangChain's models call their runs.
_RUN_MANAGERS = ("run_manager", "run_managers")

_on = False
_awaiting = False


def switch(on: bool) -> None:
    """Look out for PromptLayer's own instrumentation, or no longer: while we log the requests at PromptLayer."""
    global _awaiting, _on
    _on = on
    if on and not _awaiting:
        _awaiting = True
        when_imported("promptlayer.span_exporter", _see_spans)
        when_imported("promptlayer.promptlayer", _see_runs)
        when_imported("promptlayer.promptlayer_base", _see_proxies)


def _see_spans(module: ModuleType) -> None:
    _see(module, "GenAIPromptTemplateSpanProcessor", "on_start", _on_start)


def _see_runs(module: ModuleType) -> None:
    for client in ("PromptLayer", "AsyncPromptLayer"):
        _see(module, client, "run", _on_run)


def _see_proxies(module: ModuleType) -> None:
    _see(module, "PromptLayerBase", "__call__", _on_proxy)


def _see(module: ModuleType, kind: str, method: str, wrapper: Wrapper) -> None:
    """Wrap a method of a class, if this PromptLayer has it: it is the import of the user's that we are in."""
    owner = getattr(module, kind, None)
    if any(method in vars(base) for base in getattr(owner, "__mro__", ())):
        patched(owner, method, wrapper)


def _on_start(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Let PromptLayer's processor look at a span that starts; link what it takes for a request to our own."""
    result = wrapped(*args, **kwargs)
    if _on:
        try:
            _link(args[0] if args else kwargs["span"])
        except Exception:
            failed("linking a span of PromptLayer's own instrumentation")
    return result


def _link(span: Any) -> None:
    attributes = span.attributes or {}
    if attributes.get("node_type") != "LLM_CALL" or attributes.get(_MANAGED):
        return
    call = _call_around(sys._getframe(1))
    if call is not None:
        span.set_attribute(_MANAGED, True)
        span.set_attribute(_MANAGED_BY, call.id)
        counts["calls_linked"] += 1


def _on_run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Run a prompt by PromptLayer's client, which logs it by itself."""
    _note_twice("client.run()")
    return wrapped(*args, **kwargs)


def _on_proxy(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Call a provider by PromptLayer's stand-in for the provider's module, which logs it by itself."""
    if not isinstance(object.__getattribute__(instance, "_obj"), type):  # That makes a client.
        _note_twice("client.openai or client.anthropic")
    return wrapped(*args, **kwargs)


def _note_twice(logger: str) -> None:
    """Count a call that PromptLayer's client logs; inside a LangChain model that is one too many."""
    if not _on:
        return
    try:
        if _call_around(sys._getframe(2)) is not None:
            counts["calls_logged_twice"] += 1
            warn_once(
                f"logged_twice:{logger}",
                "A call is logged twice at PromptLayer: %s logs it, and so does pltrace, because it is made by a "
                "LangChain model. Let the model call its provider, with the provider's own client; or decorate a "
                "function that does this in place of the model.",
                logger,
            )
    except Exception:
        failed("looking for a model around a call by PromptLayer's client")


def _call_around(frame: FrameType | None) -> Span | None:
    """Return the LLM call that we log and that the running code is part of.

    The frames tell it: LangChain has no variable of the context for it, and setting one of our own in a callback would
    outlive the call.
    """
    while frame is not None:
        names = frame.f_code.co_varnames
        if "run_manager" in names or "run_managers" in names:
            found = _call_in(frame.f_locals)
            if found is not None:
                return found
        frame = frame.f_back
    return None


def _call_in(variables: Any) -> Span | None:
    for name in _RUN_MANAGERS:
        managers = variables.get(name)
        for manager in managers if isinstance(managers, list) else (managers,):
            run_id = getattr(manager, "run_id", None)
            span = None if run_id is None else open_runs.get(key_of(run_id))
            if span is not None and span.kind == "llm" and span.inherited.sampled:
                return span
    return None
