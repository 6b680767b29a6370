"""Reads what `configure` was given and the environment, once, into a checked `Config`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pltrace._checks import CAPTURE_ALL, checked_capture, checked_metadata, checked_name, checked_sample, checked_tags
from pltrace._errors import ConfigError
from pltrace._exporter import SpanExporter
from pltrace._health import logger, warn_once
from pltrace._typing import Capture, LibrarySettings, Redaction

__all__ = ["Config", "Library", "load", "wanted_by_environment"]

DEFAULT_BASE_URL = "https://api.promptlayer.com"
_PYTEST_VARIABLES = ("PYTEST_VERSION", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER")
_CAPTURE_WORDS = {
    "true": True,
    "1": True,
    "false": False,
    "0": False,
    "inputs": "inputs",
    "outputs": "outputs",
}


@dataclass(frozen=True)
class Library:
    """What the application decided about the functions and blocks of one package.

    Attributes:
        enabled: Whether they are traced.
        tags: Added to what they record.
        capture: The most that is kept of arguments, prompts and results inside them.
    """

    enabled: bool = True
    tags: tuple[str, ...] = ()
    capture: int = CAPTURE_ALL


@dataclass(frozen=True)
class Config:
    """What tracing in this process is set to.

    Attributes:
        enabled: Whether anything is traced.
        api_key: PromptLayer's key, or None for the local store alone.
        base_url: PromptLayer's address.
        client: A `promptlayer` client to send scores and the like through, or None to make one.
        store: A file, `memory`, or `off`: delivered spans are not kept.
        exporters: Where spans go besides PromptLayer.
        service: Names the application.
        tags: Go with every span.
        metadata: Goes with every span.
        capture: The most that is kept of arguments, prompts and results, as bits.
        redact: Replaces the default redaction of leaf values, or None.
        redact_also: More key names and patterns for the default redaction.
        sample: The share of traces that is recorded.
        libraries: What holds for the functions and blocks of some packages.
    """

    enabled: bool = False
    api_key: str | None = field(default=None, repr=False)
    base_url: str = DEFAULT_BASE_URL
    client: Any = None
    store: Path | Literal["memory", "off"] = "memory"
    exporters: tuple[SpanExporter, ...] = ()
    service: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    capture: int = CAPTURE_ALL
    redact: Redaction | None = None
    redact_also: tuple[str | re.Pattern[str], ...] = ()
    sample: float = 1.0
    libraries: Mapping[str, Library] = field(default_factory=dict)

    @property
    def account(self) -> str:
        """Tells PromptLayer's account from others, without saying the key; empty without one."""
        if self.api_key is None:
            return ""
        return hashlib.sha256(f"{self.base_url}\0{self.api_key}".encode()).hexdigest()[:12]


def wanted_by_environment() -> bool:
    """Return whether the environment alone switches tracing on."""
    enabled = _flag("PLTRACE_ENABLED", os.environ.get("PLTRACE_ENABLED"))
    return _key_of(os.environ) is not None if enabled is None else enabled


def _key_of(environ: Mapping[str, str]) -> str | None:
    """Return the API key of the environment; under pytest none: tests send nothing that they don't ask for."""
    key = environ.get("PROMPTLAYER_API_KEY") or None
    if key is not None and _is_under_pytest(environ):
        logger.info("Under pytest PROMPTLAYER_API_KEY of the environment is left alone; configure(api_key=...) sends.")
        return None
    return key


def _is_under_pytest(environ: Mapping[str, str]) -> bool:
    """Return whether this process is pytest, or was started by it."""
    if any(name in environ for name in _PYTEST_VARIABLES):
        return True
    # Before 8.2 pytest says nothing in the environment while it collects. To have imported it is no sign: programs do.
    return any(type(finder).__module__ == "_pytest.assertion.rewrite" for finder in sys.meta_path)


def load(
    *,
    api_key: str | None = None,
    base_url: str | None = None,
    client: Any = None,
    store: str | os.PathLike[str] | None = None,
    exporters: Iterable[SpanExporter] | None = None,
    service: str | None = None,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    capture: Capture | None = None,
    redact: Redaction | Iterable[str | re.Pattern[str]] | None = None,
    sample: float | None = None,
    enabled: bool | None = None,
    libraries: Mapping[str, LibrarySettings] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Return the settings: arguments win over the environment, except that `PLTRACE_ENABLED=0` needs `enabled=True`.

    Args, all but `environ`: as for `configure`.

    Raises:
        ConfigError: An argument or environment variable is wrong; the message names it.
    """
    environ = os.environ if environ is None else environ
    if enabled is not None and not isinstance(enabled, bool):
        raise ConfigError(f"enabled={enabled!r}: expected True, False or None")
    if client is not None and not isinstance(getattr(client, "api_key", None), str):
        raise ConfigError(f"client={client!r}: expected a client of promptlayer, PromptLayer(api_key=...)")
    key = _checked_key("api_key", None if api_key is None else checked_name("api_key", api_key))
    key = key or _checked_key("the client's api_key", getattr(client, "api_key", None))
    key = key or _checked_key("PROMPTLAYER_API_KEY", _key_of(environ))
    redactor, redact_also = _redaction(redact)
    return Config(
        enabled=enabled
        if enabled is not None
        else _flag("PLTRACE_ENABLED", environ.get("PLTRACE_ENABLED")) is not False,
        api_key=key,
        base_url=_address(base_url, getattr(client, "base_url", None), environ.get("PROMPTLAYER_BASE_URL")),
        client=client,
        store=_place(store, environ.get("PLTRACE_STORE")),
        exporters=_exporters(exporters, built_in=key is not None),
        service=checked_name(
            "service", service if service is not None else environ.get("PLTRACE_SERVICE") or _program()
        ),
        tags=tuple(dict.fromkeys((*_split(environ.get("PLTRACE_TAGS")), *checked_tags("tags", tags)))),
        metadata=checked_metadata("metadata", metadata if metadata is not None else {}),
        capture=_capture(capture, environ.get("PLTRACE_CAPTURE")),
        redact=redactor,
        redact_also=redact_also,
        sample=_sample(sample, environ.get("PLTRACE_SAMPLE")),
        libraries=_libraries(libraries if libraries is not None else {}),
    )


def _checked_key(name: str, key: str | None) -> str | None:
    """Return a key that can stand in a header; the error doesn't show one."""
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(
            f"{name}: expected printable ASCII without spaces or line ends; strip what was read from a file"
        )
    return key


def _flag(name: str, text: str | None) -> bool | None:
    if text is None or text == "":
        return None
    if text not in ("0", "1"):
        raise ConfigError(f"{name}={text!r} in the environment: expected 0 or 1")
    return text == "1"


def _capture(value: object, text: str | None) -> int:
    if value is not None:
        return checked_capture("capture", value)
    if not text:
        return CAPTURE_ALL
    if text.lower() not in _CAPTURE_WORDS:
        raise ConfigError(f"PLTRACE_CAPTURE={text!r} in the environment: expected true, false, inputs or outputs")
    return checked_capture("PLTRACE_CAPTURE", _CAPTURE_WORDS[text.lower()])


def _sample(value: object, text: str | None) -> float:
    if value is not None:
        return checked_sample("sample", value)
    if not text:
        return 1.0
    try:
        return checked_sample("PLTRACE_SAMPLE", float(text))
    except ValueError as error:
        raise ConfigError(f"PLTRACE_SAMPLE={text!r} in the environment: expected a number from 0.0 to 1.0") from error


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _address(given: object, of_client: object, text: str | None) -> str:
    name, value = ("base_url", given) if given is not None else ("the client's base_url", of_client)
    if value is None:
        name, value = "PROMPTLAYER_BASE_URL", text or DEFAULT_BASE_URL
    try:
        parts = urlsplit(value) if isinstance(value, str) else None
        valid = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: expected an address that begins with http:// or https://")
    if re.search(r"[^\x21-\x7e]|[?#@]", value):
        raise ConfigError(
            f"{name}={value!r}: expected an address without spaces, user, query (?) or fragment (#), as "
            f"{DEFAULT_BASE_URL}"
        )
    return value.rstrip("/")


def _place(given: object, text: str | None) -> Path | Literal["memory", "off"]:
    name, value = ("store", given) if given is not None else ("PLTRACE_STORE", text or None)
    if value is None:
        try:
            return Path("~/.pltrace/traces.db").expanduser()
        except RuntimeError as error:  # As in a container, for a user whom the system doesn't know.
            warn_once(
                "no_home",
                "Can't tell where ~/.pltrace/traces.db is (%s). Spans are kept in memory, and lost with the process "
                "unless they are delivered before; set HOME, or PLTRACE_STORE to a file.",
                error,
            )
            return "memory"
    if value == "memory":
        return "memory"
    if value == "off":
        return "off"
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or _is_no_path(str(value)):
        raise ConfigError(f'{name}={value!r}: expected a file path, "memory" or "off"')
    try:
        path = Path(os.fsdecode(value)).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{name}={value!r}: expected a file path: {error}") from error
    except OSError as error:
        raise ConfigError(f"{name}={value!r}: expected an absolute path: the current folder is gone") from error
    if os.path.isdir(path):  # Not `Path.is_dir`, which raises where it may not look.
        raise ConfigError(f"{name}={value!r}: expected a file path, and this is a folder")
    return path


def _is_no_path(text: str) -> bool:
    """Return whether it is another of the words in disguise, SQLite's word for memory, or an address."""
    return text.lower() in ("memory", "off", ":memory:") or "://" in text


def _exporters(value: object, *, built_in: bool) -> tuple[SpanExporter, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"exporters={value!r}: expected a list of exporters")
    exporters = tuple(value)
    for exporter in exporters:
        if not isinstance(exporter, SpanExporter):
            raise ConfigError(f"exporters={value!r}: {exporter!r} has no name, export and shutdown")
        if isinstance(exporter, type):
            raise ConfigError(f"exporters={value!r}: {exporter!r} is a class, and an instance of it is needed")
    names = [checked_name("exporters: name", exporter.name) for exporter in exporters]
    names += ["promptlayer"] if built_in else []
    if len(set(names)) < len(names):
        raise ConfigError(f"exporters={value!r}: two of them have the same name; the store keeps them apart by it")
    return exporters


def _redaction(value: object) -> tuple[Redaction | None, tuple[str | re.Pattern[str], ...]]:
    if value is None:
        return None, ()
    if callable(value):
        return value, ()
    also = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else (None,)
    if not all(isinstance(item, (str, re.Pattern)) for item in also):
        raise ConfigError(
            f"redact={value!r}: expected a function of key and value, or a list of key names and compiled patterns"
        )
    return None, tuple(item for item in also if isinstance(item, (str, re.Pattern)))


def _libraries(value: object) -> dict[str, Library]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"libraries={value!r}: expected a dict of package name to settings")
    return {checked_name("libraries", name): _library(name, settings) for name, settings in value.items()}


def _library(name: str, settings: object) -> Library:
    if not name.isidentifier():
        # Distributions are often named otherwise: `langchain-openai` is imported as `langchain_openai`.
        expected = name.partition(".")[0].replace("-", "_")
        raise ConfigError(f"libraries[{name!r}]: expected a top-level package as it is imported, such as {expected!r}")
    if not isinstance(settings, Mapping) or not set(settings) <= {"enabled", "tags", "capture"}:
        raise ConfigError(f"libraries[{name!r}]={settings!r}: expected a dict of enabled, tags and capture")
    enabled = settings.get("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"libraries[{name!r}]: enabled={enabled!r}: expected True or False")
    return Library(
        enabled,
        checked_tags(f"libraries[{name!r}]: tags", settings.get("tags", ())),
        checked_capture(f"libraries[{name!r}]: capture", settings.get("capture", True)),
    )


def _program() -> str:
    """Return the name of the running program, for want of a better one."""
    return Path(sys.argv[0]).stem if sys.argv and sys.argv[0] not in ("", "-c", "-m") else "python"
