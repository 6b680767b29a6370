"""Traces functions that one doesn't own, by name, before or after their module is imported; and undoes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pltrace import _runtime
from pltrace._errors import ConfigError
from pltrace._health import failed, logger
from pltrace._traced import Traced, traced
from pltrace._wrapping import when_imported

__all__ = ["instrument", "uninstrument"]

#: Packages bring instrumentation for others under this entry-point group: functions without arguments, which call
#: `instrument`. They are called when the application switches tracing on.
ENTRY_POINTS = "pltrace.instrumentation"

_targets: dict[str, Target] = {}
_entry_points_loaded = False


class Target:
    """One name that is traced: where it is, what was there before, and whether it is wanted still."""

    def __init__(self, name: str, declaration: Traced) -> None:
        self.declaration = declaration
        # Without a colon nobody can tell before the import where the module's name ends: all ways are tried.
        self.places = [tuple(name.split(":"))] if ":" in name else _splits(name)
        self.wanted = True
        self._undo: Callable[[], None] | None = None

    def apply(self, module: ModuleType, path: str) -> bool:
        """Trace what `path` names in `module`; return whether it is there."""
        if not self.wanted or self._undo is not None:
            return True
        *above, last = path.split(".")
        owner: Any = module
        for part in above:
            owner = getattr(owner, part, None)
        found = _own(owner, last)
        if found is None:
            return False
        own, function = found
        if not callable(function) and not isinstance(function, (classmethod, staticmethod)):
            raise ConfigError(f"instrument: {module.__name__}:{path} is no function, but {function!r}")
        setattr(owner, last, self.declaration(function))
        self._undo = (lambda: setattr(owner, last, function)) if own else (lambda: delattr(owner, last))
        return True

    def undo(self) -> None:
        """Put back what was there before."""
        self.wanted = False
        if self._undo is not None:
            self._undo()
            self._undo = None


def instrument(target: str, /, **traced_arguments: Any) -> None:
    """Trace a function or method that one doesn't own, without editing it.

    Args:
        target: `"package.module:Class.method"` or `"package.module:function"`; all dots is understood too. If the
            module isn't imported yet, it is done when it is.
        **traced_arguments: As for `traced`; `name` is the target's own.

    Raises:
        ConfigError: The target is malformed; or its module is imported and has no such function; or an argument of
            `traced` is wrong.
    """
    if not isinstance(target, str) or not _is_name(target):
        raise ConfigError(
            f'instrument: target={target!r}: expected "package.module:name" or "package.module:Class.name"'
        )
    uninstrument(target)
    made = Target(target, traced(**traced_arguments))
    if not _apply_to_imported(made):
        raise ConfigError(f"instrument: target={target!r}: the module is imported, and there is no such function in it")
    _targets[target] = made
    for module, path in made.places:
        if module not in sys.modules:
            when_imported(module, lambda imported, path=path: _apply_on_import(made, target, imported, path))  # type: ignore[misc]


def _apply_to_imported(made: Target) -> bool:
    """Apply to what is imported; return False only if all it could be in is, and it isn't there."""
    imported = [(sys.modules[module], path) for module, path in made.places if module in sys.modules]
    done = any(made.apply(module, path) for module, path in imported)
    return done or len(imported) < len(made.places)


def _apply_on_import(made: Target, target: str, module: ModuleType, path: str) -> None:
    try:
        if not made.apply(module, path) and ":" in target:
            logger.warning("pltrace.instrument(%r): %s has no %s", target, module.__name__, path)
    except Exception:
        failed(f"instrumenting {target}")


def uninstrument(target: str, /) -> None:
    """Undo `instrument` of the same target; does nothing if there is nothing to undo.

    Args:
        target: As it was given to `instrument`.
    """
    made = _targets.pop(target, None)
    if made is not None:
        made.undo()


def load_entry_points() -> None:
    """Apply the instrumentation that installed packages bring; once in a process."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()()
        except Exception:
            logger.exception("The instrumentation %s of %s failed; the program goes on", entry.name, entry.value)


def _own(owner: Any, name: str) -> tuple[bool, Any] | None:
    """Return whether `owner` has the attribute itself, and the attribute as it lies there; None if there is none."""
    for holder in (owner, *getattr(owner, "__mro__", ())):
        found = vars(holder).get(name) if hasattr(holder, "__dict__") else None
        if found is not None:
            return holder is owner, found
    return None


def _splits(name: str) -> list[tuple[str, ...]]:
    parts = name.split(".")
    return [(".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts) - 1, 0, -1)]


def _is_name(target: str) -> bool:
    module, colon, path = target.partition(":")
    parts = (module.split(".") + path.split(".")) if colon else module.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


_runtime.when_on(load_entry_points)
