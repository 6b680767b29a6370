"""`traced`: a declaration that opens a scope, with a span, around a block or around each call of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from sys import _getframe
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from pltrace import _runtime
from pltrace._arguments import arguments_of, is_method, namesake
from pltrace._bind import reading
from pltrace._block import Block
from pltrace._callables import code_flags, has_to_stay_a_class, held_in, in_class, is_decorable, is_own_class, rewrap
from pltrace._calling import OpenCall, end, leave
from pltrace._checks import (
    CAPTURE_ALL,
    INPUTS,
    checked_capture,
    checked_metadata,
    checked_name,
    checked_sample,
    checked_tags,
)
from pltrace._driving import consumed, coroutine, is_driven
from pltrace._errors import ConfigError
from pltrace._generators import async_generator, generator
from pltrace._health import failed
from pltrace._propagation import checked_carrier
from pltrace._runnables import TRANSFORMING, RunnableProxy, is_runnable
from pltrace._scope import attach
from pltrace._typing import Capture
from pltrace._wrapping import Wrapped, wrapped_call

if TYPE_CHECKING:
    from functools import cached_property, partialmethod, singledispatchmethod

    from langchain_core.runnables import Runnable

__all__ = ["Traced", "traced"]

__tracebackhide__ = True  # pytest shows the user's own lines.

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
AnyClass = TypeVar("AnyClass", bound=type)
AnyRunnable = TypeVar("AnyRunnable", bound="Runnable[Any, Any]")
# In one piece: pyright doesn't read a type that is joined from two, and takes anything for it.
AnyDescriptor = TypeVar(
    "AnyDescriptor", bound="property | cached_property[Any] | partialmethod[Any] | singledispatchmethod[Any]"
)

_NO_TAGS: tuple[str, ...] = ()


class Traced(Block):
    """A declaration made by `traced(...)`; it never changes, so it can be used anywhere, by many at once, and again."""

    @overload
    def __call__(self, function: AnyRunnable, /) -> AnyRunnable: ...
    @overload
    def __call__(self, function: classmethod[T, P, R], /) -> classmethod[T, P, R]: ...
    @overload
    def __call__(self, function: staticmethod[P, R], /) -> staticmethod[P, R]: ...
    @overload
    def __call__(self, function: AnyDescriptor, /) -> AnyDescriptor: ...
    @overload
    def __call__(self, function: AnyClass, /) -> AnyClass: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Return `function`, traced: each call is a span.

        Args:
            function: Any callable, or a descriptor with functions in it. A class with an `__init__` of its own stays
                what it is; that is traced, under the name of the class. So does a command of Click's or a fixture of
                pytest's, with its function.

        Raises:
            ConfigError: It is something else, or a class that has yet to get its `__init__`, as by `@dataclass`.
        """
        inner = rewrap(function, self)
        if inner is not None:
            return inner
        if is_runnable(function):
            return self._traced_runnable(function)
        if not is_decorable(function):
            raise ConfigError(f"traced: expected a callable, got {function!r}")
        held = held_in(function)
        if held is not None:
            setattr(function, held, self(getattr(function, held)))
            return function
        if is_own_class(function) and "__init__" in vars(function):
            return self._traced_class(function)
        if has_to_stay_a_class(function):
            # Wrapped it would be no class to what makes it one, and what is put there, taken for the user's own.
            raise ConfigError(
                f"traced: {function!r} defines no __init__ that could be traced; put @traced on its methods, or above "
                "what makes its __init__, as @dataclass"
            )
        return in_class(self._wrapped(function, _name_of(function), _module_of(function)), function)

    def _wrapped(self, function: Any, name: str, module: str | None) -> Wrapped:
        return wrapped_call(function, self._wrapper_for(function, name, module), _runtime.gate, self)

    def _traced_class(self, kind: Any) -> Any:
        kind.__init__ = self._wrapped(vars(kind)["__init__"], _name_of(kind), _module_of(kind))
        return kind

    def _traced_runnable(self, runnable: Any) -> RunnableProxy:
        # Its own class is LangChain's; it belongs to who traces it.
        name, module = str(runnable.get_name()), self._module

        def wrap(method: Any) -> Wrapped:
            wrapper = self._wrapper_for(method, name, module)
            if method.__name__ in TRANSFORMING:
                wrapper = reading(wrapper)
            return wrapped_call(method, wrapper, _runtime.gate, self)

        return RunnableProxy(runnable, wrap, (_traced_again, self))

    def _wrapper_for(self, function: Any, name: str, module: str | None) -> Any:
        """Return what is called in place of `function`: chosen once, by what calling it makes."""
        name = self._name or name
        flags = code_flags(function)
        for flag, drive in _DRIVERS:
            if flags & flag:
                return self._driven(function, name, module, drive)
        return self._plain(function, name, module)

    def _driven(self, function: Any, name: str, module: str | None, drive: Any) -> Any:
        names: Any = None  # Made at the first call: the function is decorated further until then.

        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            nonlocal names
            source = wrapped(*args, **kwargs)
            if not _runtime.is_on(module):
                return source
            if names is None:
                names = namesake(function)
            arguments = arguments_of(names if wrapped is function else namesake(wrapped), args, kwargs)
            return drive(OpenCall(self, name, module, arguments), source)

        return call

    def _plain(self, function: Any, name: str, module: str | None) -> Any:
        names: Any = None

        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            nonlocal names
            if not _runtime.is_on_everywhere and not _runtime.is_on(module):
                return wrapped(*args, **kwargs)
            scope = None
            try:
                try:
                    scope = self.derive(name, "function", None, module)
                except RecursionError:
                    pass  # There is no room for us, nor is there for the call.
                except Exception:
                    failed("entering a traced call")
                if scope is None:  # Here, or the user's exceptions would get ours as their context.
                    return wrapped(*args, **kwargs)
                try:
                    attach(scope)
                    if scope.inherited.capture & INPUTS:
                        if names is None:
                            names = namesake(function)
                        by = names if wrapped is function else namesake(wrapped)
                        scope.arguments = arguments_of(by, args, kwargs)
                    result = wrapped(*args, **kwargs)
                    drive = consumed(result)
                except BaseException as error:
                    leave(scope, error)
                    end(scope, error)
                    scope = None  # All is done.
                    raise
                if drive is None or _is_program_s_own(result, wrapped, args) or _is_given_back(result, args, kwargs):
                    leave(scope)
                    end(scope, None, result)
                    return result
                steps = OpenCall(self, name, scope=scope)
                attach(scope.outer)  # Left, but not closed: it is resumed while the result is consumed.
                return drive(steps, result)
            except BaseException as error:
                if scope is not None:
                    # What is ours was interrupted, as by Ctrl+C, when all or a part of it was done.
                    leave(scope, error)
                    end(scope, error)
                raise

        return call


def _is_program_s_own(result: Any, method: Any, args: tuple[Any, ...]) -> bool:
    """Return whether what could be consumed is what a method has to give as it is: a new object, or its own."""
    # Of these types alone: an object may answer in its own way when it is asked for a name.
    if type(method) is MethodType:
        # It has its name from its function, or what is there in its place.
        return result is method.__self__ or getattr(method.__func__, "__name__", None) == "__new__"
    if type(method) is not FunctionType:
        return False
    if method.__name__ == "__new__":
        return True
    # Not a static method, which was given it.
    return bool(args) and result is args[0] and is_method(method) and hasattr(type(result), method.__name__)


def _is_given_back(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a stream that has a scope of its own was an argument: from hand to hand it gets no more."""
    return is_driven(result) and any(result is one for one in (*args, *kwargs.values()))


_DRIVERS: tuple[tuple[int, Callable[[Any, Any], Any]], ...] = (
    (inspect.CO_COROUTINE, coroutine),
    (inspect.CO_GENERATOR, generator),
    (inspect.CO_ASYNC_GENERATOR, async_generator),
)


def _traced_again(runnable: Any, declaration: Traced) -> Any:
    return declaration(runnable)


def _name_of(function: Any) -> str:
    """Return a callable's qualified name: its own, that of what it stands for, or that of its class."""
    inner = _behind(function)
    return str(getattr(inner, "__qualname__", None) or type(inner).__qualname__)


def _module_of(function: Any) -> str:
    """Return the module that a callable was defined in."""
    inner = _behind(function)
    return str(getattr(inner, "__module__", None) or type(inner).__module__)


def _behind(function: Any) -> Any:
    """Return the function that a callable without a name stands for, as a partial does; else itself."""
    inner = None if hasattr(function, "__qualname__") else getattr(function, "func", None)
    return inner if callable(inner) else function


@overload
def traced(function: AnyRunnable, /) -> AnyRunnable: ...
@overload
def traced(function: classmethod[T, P, R], /) -> classmethod[T, P, R]: ...
@overload
def traced(function: staticmethod[P, R], /) -> staticmethod[P, R]: ...
@overload
def traced(function: AnyDescriptor, /) -> AnyDescriptor: ...
@overload
def traced(function: AnyClass, /) -> AnyClass: ...
@overload
def traced(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def traced(
    name: str | None = None,
    /,
    *,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_request: Callable[[Any], Any] | None = None,
    user: str | None = None,
    session: str | None = None,
    capture: Capture = True,
    sample: float | None = None,
    parent: Mapping[str, str] | None = None,
) -> Traced: ...
def traced(
    name: Any = None,
    /,
    *,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_request: Callable[[Any], Any] | None = None,
    user: str | None = None,
    session: str | None = None,
    capture: Capture = True,
    sample: float | None = None,
    parent: Mapping[str, str] | None = None,
) -> Any:
    """Record all LangChain calls inside a block, or inside each call of a function, under one span.

    Use it as a decorator (`@traced` or `@traced(...)`), on any callable, or as a context manager (`with` or
    `async with`), which yields the `Span`. One object can be used many times, at the same time, and nested in itself.

    Args:
        name: The span's name; by default the function's qualified name, or `traced` for a block.
        tags: Strings, added to those of the blocks around it.
        metadata: String keys and any values, added to that of the blocks around it; the inner wins.
        on_request: Called in the background with the `Request` of each LLM call inside, once it has its id; plain or
            async. Those of the blocks around it are called too, the innermost first.
        user: The end user that it is done for.
        session: The conversation that it belongs to.
        capture: True, False, `"inputs"` or `"outputs"`: what is kept of arguments, prompts and results. An inner
            block can only narrow it.
        sample: The share of traces that is recorded, 0.0 to 1.0; decided where a trace begins.
        parent: A carrier that `inject()` made, in another process: the block goes on with its trace.

    Returns:
        The function, traced; or a declaration to decorate or enter.

    Raises:
        ConfigError: An argument has a wrong type or value.
    """
    runnable = None
    if name is not None and not isinstance(name, str):
        if is_runnable(name):
            name, runnable = None, name
        elif is_decorable(name):
            return _DEFAULT(name)
        else:
            raise ConfigError(f"name={name!r}: expected a string, got {type(name).__name__}")
    if on_request is not None and not callable(on_request):
        raise ConfigError(f"on_request={on_request!r}: expected a function that takes a Request")
    try:
        module = _getframe(1).f_globals.get("__name__")
    except ValueError:  # Called by no Python code, as a thread's first function is.
        module = None
    declaration = Traced(name or (None if name is None else checked_name("name", name)), module)
    if (
        tags is not _NO_TAGS or metadata is not None or on_request is not None or user is not None
        or session is not None or capture is not True or sample is not None or parent is not None
    ):  # fmt: skip
        # What isn't given isn't checked: blocks are declared where they are entered, also while tracing is off.
        declaration.say(
            () if tags is _NO_TAGS else checked_tags("tags", tags),
            {} if metadata is None else checked_metadata("metadata", metadata),
            on_request,
            None if user is None else checked_name("user", user),
            None if session is None else checked_name("session", session),
            CAPTURE_ALL if capture is True else checked_capture("capture", capture),
            None if sample is None else checked_sample("sample", sample),
            None if parent is None else checked_carrier("parent", parent),
        )
    return declaration if runnable is None else declaration(runnable)


_DEFAULT = traced()
