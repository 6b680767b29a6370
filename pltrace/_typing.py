"""The types of arguments that several functions share, for type checkers and for who asks for type hints."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack
else:  # It has no meaning when the program runs.
    Unpack = Union

__all__ = ["Capture", "CaptureSettings", "LibrarySettings", "Redaction", "TracedArguments", "Unpack"]

Capture = bool | Literal["inputs", "outputs"]
Redaction = Callable[[str, Any], Any]


class LibrarySettings(TypedDict, total=False):
    """What `configure(libraries=...)` says of one package."""

    enabled: bool
    tags: Iterable[str]
    capture: Capture


class TracedArguments(TypedDict, total=False):
    """The arguments of `traced` but for the name."""

    tags: Iterable[str]
    metadata: Mapping[str, Any] | None
    on_request: Callable[[Any], Any] | None
    user: str | None
    session: str | None
    capture: Capture
    sample: float | None
    parent: Mapping[str, str] | None


class CaptureSettings(TypedDict, total=False):
    """The arguments of `configure` that send and store nothing."""

    service: str | None
    tags: Iterable[str]
    metadata: Mapping[str, Any] | None
    capture: Capture | None
    redact: Redaction | Iterable[str | re.Pattern[str]] | None
    sample: float | None
    libraries: Mapping[str, LibrarySettings] | None
