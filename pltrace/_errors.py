"""The exceptions that pltrace raises, always where the mistake is made and never later.

PltraceError
├── ConfigError      a wrong argument or environment value (also a ValueError)
├── StoreError       the store can't be read, or is of a version that this one doesn't know
└── PromptLayerError PromptLayer refused or couldn't be reached, where the caller asked for its answer
"""

from __future__ import annotations

__all__ = ["ConfigError", "PltraceError", "PromptLayerError", "StoreError"]


class PltraceError(Exception):
    """Base of all exceptions that pltrace raises itself."""


class ConfigError(PltraceError, ValueError):
    """An argument or an environment variable has a wrong type or value."""


class StoreError(PltraceError):
    """The local store can't be opened, read or understood."""


class PromptLayerError(PltraceError):
    """PromptLayer refused a call, or couldn't be reached."""
