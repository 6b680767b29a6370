"""Wraps a callable so that nothing of it changes but what happens when it is called."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, DynamicClassAttribute, FrameType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__all__ = [
    "TRANSFORMING",
    "ObjectProxy",
    "RunnableProxy",
    "WithoutWrapt",
    "Wrapped",
    "Wrapper",
    "class_of_wrapped",
    "code_flags",
    "has_to_stay_a_class",
    "held_in",
    "in_class",
    "is_coroutine",
    "is_decorable",
    "is_own_class",
    "is_runnable",
    "patched",
    "repr_of_wrapped",
    "rewrap",
    "set_class",
    "when_imported",
    "wrapped_call",
]

#: `wrapper(wrapped, instance, args, kwargs)`, as wrapt calls it.
Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


if TYPE_CHECKING:
    # wrapt's own types are generic in newer versions and absent in older ones; this is what we use of them.
    class ObjectProxy:
        __wrapped__: Any

        def __init__(self, wrapped: Any) -> None: ...

    class _FunctionWrapperBase(ObjectProxy):
        def __init__(
            self, wrapped: Any, instance: Any, wrapper: Wrapper, enabled: Any = None, binding: str = "callable"
        ) -> None: ...

    class FunctionWrapper(_FunctionWrapperBase):
        def __init__(self, wrapped: Any, wrapper: Wrapper, enabled: Any = None) -> None: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    from wrapt import FunctionWrapper, ObjectProxy

    _FunctionWrapperBase = FunctionWrapper.__base__


def _annotations(proxy: Any) -> Any:
    return proxy.__wrapped__.__annotations__


def _set_annotations(proxy: Any, value: Any) -> None:
    proxy.__wrapped__.__annotations__ = value


#: For the body of each proxy class. Whoever asks a class without annotations for them makes Python put an empty dict
#: into it, which from then on hides the annotations of all that is wrapped.
annotations_of_wrapped: Any = property(_annotations, _set_annotations)


def repr_of_wrapped(proxy: Any) -> str:
    """Return what a proxied object shows itself as; for the body of each proxy class too."""
    return repr(proxy.__wrapped__)


def _sending(frame: FrameType) -> bool:
    """Return whether it is cloudpickle's code, in one of its many copies, that runs in a frame."""
    return "cloudpickle" in str(frame.f_globals.get("__name__")).split(".")


def _class(proxy: Any) -> Any:
    return type(proxy) if _sending(sys._getframe(1)) else proxy.__wrapped__.__class__


#: The class of what is wrapped; but cloudpickle would take it for a plain function, and send what is wrapped, bare.
class_of_wrapped: Any = property(_class)


def _by_value(module: str) -> bool:
    """Return whether it is cloudpickle that is pickling, and what is in a module can't be found by name elsewhere."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _sending(frame):
            registered = frame.f_globals.get("_is_registered_pickle_by_value", lambda _: False)
            return module == "__main__" or bool(registered(sys.modules[module]))
        frame = frame.f_back
    return False


class WithoutWrapt(type(FunctionWrapper)):  # type: ignore[misc]
    """Shows a wrapper's classes without wrapt's."""

    @property
    def __mro__(cls) -> tuple[type, ...]:
        """What abstract classes, as `Sized`, look along for special methods; Python itself looks elsewhere.

        A proxy's class has all that there are: without it they go by the class of what is wrapped alone.
        """
        return tuple(kind for kind in super().__mro__ if kind is object or isinstance(kind, WithoutWrapt))


class _BehindWrapt(WithoutWrapt):
    """Also puts wrapt's class before those derived from it, before Python 3.11.

    It shadows nothing of theirs but `__init__`. At each call wrapt 2 looks along the classes of a wrapper for one
    of its own, which makes, and drops, an exception for each other class on the way: more than all the rest of a call
    while tracing is off.
    """

    if sys.version_info < (3, 11):

        def mro(cls) -> list[type]:
            order: list[type] = super().mro()
            order.remove(FunctionWrapper)
            return [FunctionWrapper, *order]


class _Absent:
    """Stands in a class for what a base class has, and it hasn't."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        kind = owner if instance is None else type(instance.__wrapped__)
        raise AttributeError(f"{kind.__name__!r} object has no attribute {self._name!r}")


class Wrapped(FunctionWrapper, metaclass=_BehindWrapt):
    """A function that calls a wrapper when the gate is open, and else the function itself; see `wrapped_call`."""

    __annotations__ = annotations_of_wrapped
    __class__ = class_of_wrapped
    __repr__ = repr_of_wrapped
    __exit__ = __aexit__ = _Absent()  # An exit stack asks the class of what it is given, and may call it then.
    if TYPE_CHECKING:
        _self_wrapper_of: tuple[Wrapper, list[Any]]
        _self_declaration: Any

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind in its own way, if what it wraps does; a result that is a method becomes one of this wrapper."""
        bound = self.__wrapped__.__get__(instance, owner)
        if bound is self.__wrapped__:
            return self
        if type(bound) is MethodType and bound.__func__ is self.__wrapped__:
            return MethodType(self, bound.__self__)
        return wrapped_call(bound, *self._self_wrapper_of, self._self_declaration)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the function, as everything else also what `functools.wraps` sets: not what is called here."""
        if name == "__wrapped__":
            setattr(self.__wrapped__, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """Pickle by name, as functions are; without one, what is wrapped and what it was decorated with."""
        name = str(getattr(self.__wrapped__, "__qualname__", ""))
        module = getattr(self.__wrapped__, "__module__", None) or ""
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self and not _by_value(module) else (self._self_declaration, (self.__wrapped__,))

    def __copy__(self) -> Any:
        """Return itself, as copying a function does; or with a copy of the object that it wraps."""
        return self._self_with(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: Any) -> Any:
        """Return itself, as copying a function does; or with a copy of the object that it wraps."""
        return self._self_with(copy.deepcopy(self.__wrapped__, memo))

    def _self_with(self, wrapped: Any) -> Any:
        return self if wrapped is self.__wrapped__ else self._self_declaration(wrapped)


class WrappedFunction(Wrapped):
    """The same for a plain function, whose binding has to be quick: wrapt's own takes three times as long."""

    __annotations__ = annotations_of_wrapped

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as the function does: to a real method, whose function is this wrapper."""
        return self if instance is None else MethodType(self, instance)


class _Unseen(_Absent):
    """A `__get__` that Python finds, as wrapt's classes have one, but nobody who asks whether there is one."""

    def __call__(self, wrapper: Wrapped, instance: Any, owner: type | None = None) -> Any:
        # Before Python 3.13 `classmethod` asks what has this method to bind itself, and binds all else on its own.
        return wrapper if instance is None or instance is not owner else MethodType(wrapper, instance)


class WrappedObject(Wrapped):
    """The same for what doesn't bind: a partial, a builtin or another callable object."""

    __annotations__ = annotations_of_wrapped
    __get__ = _Unseen()


class WrappedClass(WrappedObject):
    """The same for a class of C, which `inspect` looks into instead of asking it what is wrapped."""

    __annotations__ = annotations_of_wrapped

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the class."""
        return inspect.signature(self.__wrapped__)


def _kind_for(wrapped: Any) -> type[Wrapped]:
    if type(wrapped) is FunctionType:
        return WrappedFunction
    if isinstance(wrapped, type):
        return WrappedClass
    kind: Any = type(wrapped)
    # Some are made each time they are bound; what has a class of its own making may have no hash.
    return _kind_of(kind) if type(kind) is type else _kind_of.__wrapped__(kind)


#: What Python looks for in an object's class, and proxies don't have, as it would be found of any object.
_FURTHER = (
    "__iter__", "__next__", "__await__", "__aiter__", "__anext__", "__fspath__", "__length_hint__", "__exit__",
    "__aexit__",
)  # fmt: skip
#: So many classes of callable objects are remembered, and of Runnables.
_MOST_KINDS = 2_000


@functools.lru_cache(_MOST_KINDS)
def _kind_of(kind: type) -> type[Wrapped]:
    base = Wrapped if hasattr(kind, "__get__") else WrappedObject
    further = tuple(name for name in _FURTHER if hasattr(kind, name))
    return _with_methods(base, further) if further else base


@functools.lru_cache(None)
def _with_methods(base: type[Wrapped], further: tuple[str, ...]) -> type[Wrapped]:
    """Return the class for callable objects whose own class has these methods too."""

    def passing(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(type(self.__wrapped__), name)(self.__wrapped__, *args)

    methods = {name: passing(name) for name in further}
    make: Any = type(base)
    made: type[Wrapped] = make(base.__name__, (base,), {"__annotations__": annotations_of_wrapped, **methods})
    return made


def wrapped_call(wrapped: Any, wrapper: Wrapper, gate: list[Any], declaration: Any) -> Wrapped:
    """Return a callable with a wrapper around its calls.

    Args:
        wrapped: What is called while the gate is empty.
        wrapper: Called in its place.
        gate: wrapt tests it in C.
        declaration: What it was decorated with, for who asks.
    """
    made = _kind_for(wrapped)(wrapped, wrapper, enabled=gate)
    # Again, by the base's own: for a "builtin" no call looks for the object that it is bound to, which on a function
    # fails, by an exception that takes 0.5 µs. How it is bound is ours to say.
    _FunctionWrapperBase.__init__(made, wrapped, None, wrapper, gate, "builtin")
    made._self_wrapper_of = (wrapper, gate)
    made._self_declaration = declaration
    return made


#: Of the object itself, also where it is a proxy: not of what it stands for.
set_class: Any = vars(object)["__class__"].__set__

#: The methods of a LangChain Runnable that run it.
_RUNNABLE_METHODS = frozenset({
    "invoke", "ainvoke", "batch", "abatch", "batch_as_completed", "abatch_as_completed", "stream", "astream",
    "astream_log", "astream_events", "transform", "atransform",
})  # fmt: skip
#: Those of them that read a stream of what comes before it in a chain.
TRANSFORMING = frozenset({"transform", "atransform"})


#: Those that make another Runnable of it.
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
            # Composed is the proxy, not what it stands for.
            base: Any = sys.modules["langchain_core.runnables.base"]
            return MethodType(getattr(base.Runnable, name), self)
        value = super().__getattribute__(name)
        if name in _RUNNABLE_METHODS:
            return self._self_wrap(value)
        return _deriving(self, value) if name in _DERIVING_METHODS else value

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


@functools.lru_cache(_MOST_KINDS)
def _with_fields_of(kind: Any) -> type[RunnableProxy]:
    """Return such a proxy's class that has a model's fields: LangChain asks it for them where it makes JSON."""
    return type(RunnableProxy.__name__, (RunnableProxy,), {"model_fields": getattr(kind, "model_fields", {})})


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
    return issubclass(kind, RunnableProxy) or (hasattr(kind, "ainvoke") and hasattr(kind, "abatch"))


def _as_one(runnable: Any) -> Any:
    """Return a Runnable that LangChain doesn't take apart when it becomes part of a chain, as it does sequences."""
    base: Any = sys.modules.get("langchain_core.runnables.base")
    if base is None or not isinstance(runnable, base.RunnableSequence):
        return runnable
    return base.RunnableBinding(bound=runnable)


#: What lies in a class and isn't called, but gives something to call when it is bound.
_BINDING = (functools.partialmethod, functools.singledispatchmethod)
#: What a class makes by itself of functions that it finds under these names.
_MADE_BY_CLASSES: dict[str, Any] = {
    "__init_subclass__": classmethod,
    "__class_getitem__": classmethod,
    "__new__": staticmethod,
}

#: Python's flag for classes whose attributes can't be set.
_IMMUTABLE = 1 << 8


def is_own_class(value: Any) -> bool:
    """Return whether it is a class that was written in Python: it can be changed, others are callables like any."""
    return issubclass(type(value), type) and not value.__flags__ & _IMMUTABLE


def has_to_stay_a_class(value: Any) -> bool:
    """Return whether it is a class that may get an `__init__` yet, as by `@dataclass`, or is of no use wrapped.

    An exception is caught by its class, and an enum's class is iterated over.
    """
    if not is_own_class(value) or "__init__" in vars(value):
        return False
    fields = type(value) is type and not issubclass(value, tuple) and value.__annotations__
    return bool(fields) or issubclass(value, BaseException) or hasattr(type(value), "__iter__")


#: Objects of other packages that run a function they hold, by package and name of their classes, and where it is. What
#: runs them looks for the object itself, and calls more of it than the object.
_HOLDERS = {
    ("click", "Command"): "callback",
    ("typer", "Command"): "callback",
    ("_pytest", "FixtureFunctionDefinition"): "_fixture_function",
}


def held_in(value: Any) -> str | None:
    """Return the name of the attribute with the function that an object runs; None for what is called itself."""
    for base in type(value).__mro__:
        held = _HOLDERS.get((base.__module__.partition(".")[0], base.__name__))
        if held is not None and callable(vars(value).get(held)):
            return held
    return None


def is_decorable(function: Any) -> bool:
    """Return whether it can be called, or is a descriptor that calls a function."""
    return callable(function) or isinstance(
        function,
        (classmethod, staticmethod, property, functools.cached_property, DynamicClassAttribute, *_BINDING),
    )


def rewrap(function: Any, decorate: Callable[[Any], Any]) -> Any:
    """Return a descriptor of the same kind with the functions in it decorated; None for all else.

    Args:
        function: What is to be decorated.
        decorate: Decorates a function.
    """
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(decorate(function.__func__))
    if isinstance(function, functools.cached_property):
        made: Any = copy.copy(function)  # It keeps the name that a class gave it, which is given only once.
        made.func = decorate(function.func)
        return made
    if isinstance(function, (property, DynamicClassAttribute)):  # The latter is the `property` of an Enum.
        made = function
        for name, part in (("getter", made.fget), ("setter", made.fset), ("deleter", made.fdel)):
            # A setter is added to a copy of what the getter made, which may be decorated already.
            if part is not None and not issubclass(type(part), Wrapped):
                made = getattr(made, name)(decorate(part))
        return made
    return None


def in_class(wrapper: Any, function: Any) -> Any:
    """Return the wrapper of a function as what a class makes of the function itself, because of its name."""
    kind = _MADE_BY_CLASSES.get(function.__name__) if type(function) is FunctionType else None
    return wrapper if kind is None else kind(wrapper)


def is_coroutine(function: Any) -> bool:
    """Return whether it says that calling it makes something to await."""
    while isinstance(function, functools.partial):
        function = function.func
    test = inspect.iscoroutinefunction
    return test(function) or (not inspect.isroutine(function) and test(getattr(type(function), "__call__", None)))  # noqa: B004


def code_flags(function: Any) -> int:
    """Return the flags of the code that a call runs: what kind of thing it makes; 0 if it isn't Python code.

    A function can also be marked as a coroutine function; what it then makes shows only when it is called.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = getattr(type(function), "__call__", None)  # noqa: B004
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code.co_flags if isinstance(code, CodeType) else 0


def patched(owner: Any, name: str, wrapper: Wrapper) -> Callable[[], None]:
    """Put a wrapper around an attribute of `owner`; return what takes it off again.

    Where something else has been put over it since, that is left, and the wrapper under it does nothing any more.
    """
    original, gate = getattr(owner, name), [name]
    ours = FunctionWrapper(original, wrapper, enabled=gate)
    setattr(owner, name, ours)

    def undo() -> None:
        gate.clear()
        if vars(owner).get(name) is ours:
            setattr(owner, name, original)

    return undo


def when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call` with the module of that name: now if it is imported already, else when it is."""
    wrapt.register_post_import_hook(call, name)
