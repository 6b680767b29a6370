"""Tells when modules have been imported: for the first time, again by `importlib.reload`, or at last, if it has begun.

wrapt tells of the first time alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pltrace._wrapping import ObjectProxy

__all__ = ["Imports"]


class Imports:
    """Stands among Python's finders and tells of the modules that are wanted; finding them is left to the others.

    Args:
        wanted: Whether to tell of the module of that name.
        tell: Called with the name of each, after its code has run.
    """

    def __init__(self, wanted: Callable[[str], bool], tell: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._tell = tell

    def begin(self) -> None:
        """Tell from now on; called again, do nothing."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Tell no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find what the others do, as finders are asked; of what is wanted, the loader tells."""
        if not self._wanted(name):
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    telling: Any = _Loader(spec.loader, self._tell)
                    spec.loader = telling
                return spec
        return None

    def waits_for(self, module: ModuleType) -> bool:
        """Tell of a module whose import has begun, when it is over; return whether it is one."""
        spec: Any = getattr(module, "__spec__", None)
        if type(spec) is ModuleSpec and getattr(spec, "_initializing", False):
            vars(spec)["tell"] = self._tell
            spec.__class__ = _Begun
        return type(spec) is _Begun


class _Begun(ModuleSpec):
    """What an import goes by that has begun: Python notes in it when it is over."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            tell = vars(self).pop("tell")
            if self.name in sys.modules:  # Else it failed.
                tell(self.name)


class _Loader(ObjectProxy):
    """A loader that tells when the code of a module has run; the module itself gets the loader that it stands for."""

    def __init__(self, loader: Any, tell: Callable[[str], None]) -> None:
        super().__init__(loader)
        self._self_tell = tell

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code, and tell."""
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self.__wrapped__
        self.__wrapped__.exec_module(module)
        self._self_tell(spec.name)
