"""Traces functions that one doesn't own, by name, before or after their module is imported; and undoes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pltrace import _runtime
from pltrace._callables import held_in, is_decorable
from pltrace._errors import ConfigError
from pltrace._health import failed, logger
from pltrace._imports import Imports
from pltrace._traced import Traced, traced
from pltrace._typing import TracedArguments, Unpack

__all__ = ["instrument", "uninstrument"]

#: Packages bring instrumentation for others under this entry-point group: functions without arguments, which call
#: `instrument`. They are called when the application switches tracing on.
ENTRY_POINTS = "pltrace.instrumentation"

#: By their names with dots alone: `a.b:C.d` and `a.b.C.d` are one.
_targets: dict[str, Target] = {}
_entry_points_loaded = False


class Target:
    """One name that is traced: where it may be, and what was there before.

    Attributes:
        name: As it was given.
        places: Module → path in it. Without a colon nobody can tell before the import where the module's name ends:
            all ways are tried, the longest first.
        told: Whether it was told already that there is no such function.
    """

    def __init__(self, name: str, declaration: Traced) -> None:
        self.name = name
        self._declaration = declaration
        module, colon, path = name.partition(":")
        self.places = {module: path} if colon else _splits(name)
        self.told = False
        self._wrapper: Any = None
        self._undo: Callable[[], bool] | None = None

    def apply(self, module: str) -> bool:
        """Trace what is named in a module, anew if it isn't what was traced before; return whether it is there.

        Raises:
            ConfigError: It is there, and can't be traced.
        """
        *above, last = self.places[module].split(".")
        owner: Any = sys.modules[module]
        for part in above:
            owner = getattr(owner, part, None)
        found = None if owner is None else _found(owner, last)
        if found is None:
            return False
        own, function = found
        held = held_in(function)
        if held is not None:
            owner, last, own, function = function, held, True, getattr(function, held)
        if function is self._wrapper:
            return True
        if isinstance(function, type):
            raise ConfigError(
                f"instrument: target={self.name!r} is a class, which has to stay one; name a method of it, as __init__"
            )
        if not is_decorable(function):
            raise ConfigError(f"instrument: target={self.name!r} is no function, but {function!r}")
        wrapper = self._declaration(function)
        try:
            setattr(owner, last, wrapper)
        except (AttributeError, TypeError, ValueError) as error:  # Pydantic's objects raise the last.
            raise ConfigError(f"instrument: target={self.name!r} can't be replaced: {error}") from error

        def undo() -> bool:
            if vars(owner).get(last) is not wrapper:
                logger.warning(
                    "pltrace.uninstrument(%r): something else has been put in its place since, which is left there; "
                    "undo that first, and then this again",
                    self.name,
                )
                return False
            if own:
                setattr(owner, last, function)
            else:
                delattr(owner, last)
            return True

        self._wrapper, self._undo = wrapper, undo
        return True

    def may_come(self) -> bool:
        """Return whether it may be in a module that isn't imported yet."""
        name = next((name for name in self.places if name in sys.modules), None)
        if name is None:
            return True
        module, (first, dot, _) = sys.modules[name], self.places[name].partition(".")
        # `first` may be a module below this one only if this one is a package, and has no class of that name.
        below = len(self.places) > 1 and dot and hasattr(module, "__path__") and not hasattr(module, first)
        return bool(below) and find_spec(f"{name}.{first}") is not None

    def undo(self) -> bool:
        """Put back what was there before; return whether that could be done."""
        if self._undo is None or self._undo():
            self._wrapper = self._undo = None
        return self._undo is None


def instrument(target: str, /, **traced_arguments: Unpack[TracedArguments]) -> None:
    """Trace a function or method that one doesn't own, without editing it; called again, with other arguments.

    What other modules have taken out of its module with `from module import name` before stays as it was.

    Args:
        target: `"package.module:Class.method"` or `"package.module:function"`; all dots is understood too. If the
            module isn't imported yet, or not to its end, it is done when it is; and again when it is reloaded.
        **traced_arguments: As for `traced`; the span is named after the function.

    Raises:
        ConfigError: The target is malformed; or its module is imported and has no such function; or it can't be
            replaced, as the methods of builtin types; or an argument of `traced` is wrong.
    """
    if not isinstance(target, str) or not _is_name(target):
        raise ConfigError(
            f'instrument: target={target!r}: expected "package.module:name" or "package.module:Class.name"'
        )
    made = Target(target, traced(**traced_arguments))
    uninstrument(target)
    if _key(target) in _targets:
        raise ConfigError(
            f"instrument: target={target!r} is traced, and something else has been put over it since: undo that first"
        )
    there = [name for name in made.places if name in sys.modules]
    begun = [name for name in there if _imports.waits_for(sys.modules[name])]
    if not begun and not any(map(made.apply, there)) and not made.may_come():
        raise ConfigError(f"instrument: target={target!r}: its module is imported, and there is no such function in it")
    _targets[_key(target)] = made
    _imports.begin()


def _imported(module: str) -> None:
    for made in list(_targets.values()):
        if module not in made.places:
            continue
        try:
            if not made.apply(module) and not made.told and not made.may_come():
                made.told = True
                logger.warning(
                    "pltrace.instrument(%r): its module is imported, and there is no such function in it", made.name
                )
        except ConfigError as error:
            logger.warning("pltrace.%s", error)
        except Exception:
            failed(f"instrumenting {made.name}")


_imports = Imports(lambda name: any(name in made.places for made in list(_targets.values())), _imported)


def uninstrument(target: str, /) -> None:
    """Undo `instrument` of the same target; does nothing if there is nothing to undo.

    Args:
        target: As it was given to `instrument`.
    """
    made = _targets.get(_key(target))
    if made is not None and made.undo():
        del _targets[_key(target)]
        if not _targets:
            _imports.end()


def load_entry_points() -> None:
    """Apply the instrumentation that installed packages bring; once in a process."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    from importlib.metadata import entry_points

    try:
        found = entry_points(group=ENTRY_POINTS)
    except Exception:
        logger.exception("A package's entry points can't be read, so none brings instrumentation; the program goes on")
        return
    for entry in found:
        try:
            entry.load()()
        except Exception:
            logger.exception("The instrumentation %s of %s failed; the program goes on", entry.name, entry.value)


def _found(owner: Any, name: str) -> tuple[bool, Any] | None:
    """Return whether `owner` has the attribute itself, and the attribute as it lies there; None if there is none."""
    if isinstance(owner, type):
        for holder in owner.__mro__:
            if name in vars(holder):
                return holder is owner, vars(holder)[name]
        return None
    # A module may make an attribute when it is asked for; that of an object is what a look-up gives, bound.
    function = getattr(owner, name, None)
    return None if function is None else (name in getattr(owner, "__dict__", ()), function)


def _key(target: str) -> str:
    return str(target).replace(":", ".")


def _splits(name: str) -> dict[str, str]:
    parts = name.split(".")
    return {".".join(parts[:cut]): ".".join(parts[cut:]) for cut in range(len(parts) - 1, 0, -1)}


def _is_name(target: str) -> bool:
    module, colon, path = target.partition(":")
    parts = (module.split(".") + path.split(".")) if colon else module.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


_runtime.when_on(load_entry_points)
