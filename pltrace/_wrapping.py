"""Wraps a callable so that nothing of it changes but what happens when it is called."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__all__ = [
    "MOST_KINDS", "FunctionWrapper", "ObjectProxy", "WithoutWrapt", "Wrapped", "Wrapper", "annotations_of_wrapped",
    "class_of_wrapped", "patched", "repr_of_wrapped", "set_class", "when_imported", "wrapped_call",
]  # fmt: skip

#: `wrapper(wrapped, instance, args, kwargs)`, as wrapt calls it.
Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


if TYPE_CHECKING:
    # wrapt's own types are generic in newer versions and absent in older ones; this is what we use of them.
    class ObjectProxy:
        __wrapped__: Any

        def __init__(self, wrapped: Any) -> None: ...

    class _FunctionWrapperBase(ObjectProxy):
        _self_binding: str

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


def _leads_to(value: Any, function: Any) -> bool:
    """Return whether a value is a function, or stands for it by its `__wrapped__`."""
    try:
        return inspect.unwrap(value, stop=lambda inner: inner is function) is function
    except Exception:  # It is a loop already, or an object that answers in its own way.
        return False


class Wrapped(FunctionWrapper, metaclass=_BehindWrapt):
    """A function that calls a wrapper when the gate is open, and else the function itself; see `wrapped_call`."""

    __annotations__ = annotations_of_wrapped
    __class__ = class_of_wrapped
    __call__ = FunctionWrapper.__call__  # For who looks along `__mro__`, as `typing.Callable`; it stays a call in C.
    __repr__ = repr_of_wrapped
    __exit__ = __aexit__ = _Absent()  # An exit stack asks the class of what it is given, and may call it then.
    _self_binding = "builtin"  # Not wrapt's own, but for those who ask; see `wrapped_call`.
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
        wrapped = self.__wrapped__
        if name != "__wrapped__":
            super().__setattr__(name, value)
        elif not _leads_to(value, wrapped):
            setattr(wrapped, name, value)
        elif _leads_to(getattr(wrapped, name, None), wrapped):  # It has copied a loop from what stands for this too.
            delattr(wrapped, name)

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
    "__aexit__", "__len__", "__contains__", "__getitem__", "__reversed__", "__enter__", "__aenter__",
)  # fmt: skip
#: So many classes of callable objects are remembered, and as many of Runnables.
MOST_KINDS = 2_000


@functools.lru_cache(MOST_KINDS)
def _kind_of(kind: type) -> type[Wrapped]:
    base = Wrapped if hasattr(kind, "__get__") else WrappedObject
    further = tuple(name for name in _FURTHER if getattr(kind, name, None) is not None)
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
    if hasattr(type(wrapped), "__get__"):  # A decorator of wrapt's above this asks, and wouldn't bind it.
        made._self_binding = FunctionWrapper(wrapped, wrapper)._self_binding
    made._self_wrapper_of = (wrapper, gate)
    made._self_declaration = declaration
    return made


#: Of the object itself, also where it is a proxy: not of what it stands for.
set_class: Any = vars(object)["__class__"].__set__


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
