"""Wraps LangChain's Runnables, so that nothing of them changes but what happens when they are run."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from pltrace._wrapping import MOST_KINDS, ObjectProxy, repr_of_wrapped, set_class

__all__ = ["TRANSFORMING", "RunnableProxy", "is_runnable"]

#: The methods of a LangChain Runnable that run it.
_RUNNABLE_METHODS = frozenset({
    "invoke", "ainvoke", "batch", "abatch", "batch_as_completed", "abatch_as_completed", "stream", "astream",
    "astream_log", "astream_events", "transform", "atransform",
})  # fmt: skip

#: Those of them that read a stream of what comes before it in a chain.
TRANSFORMING = frozenset({"transform", "atransform"})


#: Those that make another Runnable of it, as a part; where its class has one of its own, it is as those below.
_COMPOSING_METHODS = frozenset({
    "assign", "bind", "map", "pick", "pipe", "with_alisteners", "with_config", "with_fallbacks", "with_listeners",
    "with_retry", "with_types",
})  # fmt: skip

#: Those that make one of another kind, by rules of their own: what they make is wrapped in turn.
_DERIVING_METHODS = frozenset({
    "bind_functions", "bind_tools", "configurable_alternatives", "configurable_fields", "with_structured_output",
})  # fmt: skip


class RunnableProxy(ObjectProxy):
    """A LangChain Runnable, in all else what it was, whose methods that run it are wrapped.

    Args:
        runnable: The Runnable.
        wrap: Wraps a method.
        again: A function that makes such a proxy, and its arguments after the Runnable; it is pickled and copied so.
        here: Further arguments, for a copy in the same process.
    """

    def __init__(
        self, runnable: Any, wrap: Callable[[Any], Any], again: tuple[Any, ...], here: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(_as_one(runnable))
        self._self_wrap = wrap
        self._self_again = again
        self._self_here = here
        kind: Any = type(self.__wrapped__)
        set_class(self, _with_fields_of(kind))

    def __getattribute__(self, name: str) -> Any:
        if name in _COMPOSING_METHODS:
            if _is_overridden(self.__wrapped__.__class__, name):
                return _deriving(self, getattr(self.__wrapped__, name))
            # Composed is the proxy, not what it stands for.
            return MethodType(getattr(_runnable_class(), name), self)
        if name in _RUNNABLE_METHODS:
            return self._self_wrap(getattr(self.__wrapped__, name))
        if name in _DERIVING_METHODS:
            return _deriving(self, getattr(self.__wrapped__, name))
        return super().__getattribute__(name)

    __repr__ = repr_of_wrapped

    def __or__(self, other: Any) -> Any:
        """Put itself, not what it stands for, into a chain."""
        kind: Any = type(self.__wrapped__)
        return kind.__or__(self, other)

    def __ror__(self, other: Any) -> Any:
        """Put itself, not what it stands for, into a chain."""
        kind: Any = type(self.__wrapped__)
        return kind.__ror__(self, other)

    def _self_with(self, runnable: Any) -> Any:
        make, *arguments = self._self_again
        return make(runnable, *arguments, *self._self_here)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the Runnable and what it was wrapped with."""
        make, *arguments = self._self_again
        return make, (self.__wrapped__, *arguments)

    def __copy__(self) -> Any:
        """Return such a proxy of a copy."""
        return self._self_with(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: Any) -> Any:
        """Return such a proxy of a copy."""
        return self._self_with(copy.deepcopy(self.__wrapped__, memo))


@functools.lru_cache(MOST_KINDS)
def _with_fields_of(kind: Any) -> type[RunnableProxy]:
    """Return such a proxy's class that has a model's fields: LangChain asks it for them where it makes JSON.

    It can be called, if what it stands for can.
    """
    members = {"model_fields": getattr(kind, "model_fields", {})}
    if any("__call__" in vars(base) for base in kind.__mro__):
        members["__call__"] = _called
    return type(RunnableProxy.__name__, (RunnableProxy,), members)


def _called(proxy: RunnableProxy, *args: Any, **kwargs: Any) -> Any:
    return proxy._self_wrap(proxy.__wrapped__.__call__)(*args, **kwargs)


def _is_overridden(kind: Any, name: str) -> bool:
    """Return whether a class has a method of its own for what LangChain's own Runnables do in the same way."""
    return not str(getattr(getattr(kind, name), "__module__", None)).startswith("langchain_core.")


def _deriving(proxy: RunnableProxy, method: Any) -> Any:
    """Return a method of a Runnable that gives such a proxy of the Runnable that it makes."""

    @functools.wraps(method)
    def derive(*args: Any, **kwargs: Any) -> Any:
        made = method(*args, **kwargs)
        return proxy._self_with(made) if is_runnable(made) else made

    return derive


def is_runnable(value: Any) -> bool:
    """Return whether it is a LangChain Runnable, also a traced or bound one."""
    kind = type(value)
    if issubclass(kind, RunnableProxy):
        return True
    return hasattr(kind, "ainvoke") and hasattr(kind, "abatch") and issubclass(kind, _runnable_class())


def _runnable_class() -> Any:
    """Return LangChain's class of all Runnables; where it isn't imported, and there are none, what isn't any's."""
    return getattr(sys.modules.get("langchain_core.runnables.base"), "Runnable", ())


def _as_one(runnable: Any) -> Any:
    """Return a Runnable that LangChain doesn't take apart when it becomes part of a chain, as it does sequences."""
    base: Any = sys.modules["langchain_core.runnables.base"]
    if not isinstance(runnable, base.RunnableSequence):
        return runnable
    return base.RunnableBinding(bound=runnable)
