"""Carries a scope to another process: W3C `traceparent`, and tags, metadata, user and session as `baggage`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pltrace._errors import ConfigError
from pltrace._scope import Inherited, Scope, ScopeCopy, current, still_open
from pltrace._span import RemoteSpan, Span

__all__ = ["Remote", "carrier_of", "checked_carrier", "inject"]

# https://www.w3.org/TR/trace-context/#traceparent-header-field-values; a version we don't know may have more fields.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_TAGS, _METADATA, _USER, _SESSION = "pltrace.tags", "pltrace.metadata", "user.id", "gen_ai.conversation.id"
_BOUND_IN = "pltrace.bound_in"
_SPAN_ID = re.compile("[0-9a-f]{16}")


class Remote(NamedTuple):
    """What a carrier says."""

    span: RemoteSpan
    sampled: bool
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    user: str | None
    session: str | None
    #: The id of the run that `bind` was called in.
    bound_in: int | None

    def scope(self, base: Scope) -> Scope:
        """Return the scope that the carrier was made in, as far as it travels; its span stands for the far one."""
        inherited = self.applied_to(base.inherited).with_(sampled=self.sampled)
        span = Span("", "block", inherited, None, self.span.trace_bits, self.span.span_bits, 0)
        scope = ScopeCopy(inherited, span, (span,), base.outer, base.entry, base.entered_in)
        if self.bound_in is None:
            return scope.bound(None)
        return scope.bound(Span("", "chain", inherited, span, self.span.trace_bits, self.bound_in, 0))

    def applied_to(self, inherited: Inherited) -> Inherited:
        """Return what holds inside of what the carrier brings."""
        return inherited.with_(
            tags=tuple(dict.fromkeys((*inherited.tags, *self.tags))),
            metadata={**inherited.metadata, **self.metadata},
            user=self.user if self.user is not None else inherited.user,
            session=self.session if self.session is not None else inherited.session,
        )


def inject(carrier: dict[str, str] | None = None) -> dict[str, str]:
    """Put the current scope into a carrier: HTTP headers, or the message of any queue.

    Args:
        carrier: Gets the keys `traceparent` and `baggage`; None makes a new one.

    Returns:
        The carrier; outside any block unchanged.

    Raises:
        ConfigError: The carrier can't take keys.
    """
    carrier = {} if carrier is None else carrier
    if not hasattr(carrier, "__setitem__"):
        raise ConfigError(f"carrier={carrier!r}: expected a dict, or None for a new one")
    scope = still_open(current())
    return carrier if scope is None else _put(carrier, scope, {})


def carrier_of(scope: Scope) -> dict[str, str]:
    """Return a carrier of a bound scope, which also names the run that it was bound in."""
    run = scope.parent_inside
    return _put({}, scope, {_BOUND_IN: "" if run is scope.span else run.id})


def _put(carrier: dict[str, str], scope: Scope, more: Mapping[str, str]) -> dict[str, str]:
    import json  # Here and below: who only imports pltrace needs none of it.
    from urllib.parse import quote

    said = scope.inherited
    carrier["traceparent"] = f"00-{scope.span.trace_id}-{scope.span.id}-{'01' if said.sampled else '00'}"
    # Redacted, as on its way to the store: who gets a header may be anybody.
    handed_on = said.recorder.handed_on(said)
    tags, metadata = handed_on.get("tags"), handed_on.get("metadata")
    entries = {
        _TAGS: json.dumps(tags) if tags else "",
        _METADATA: json.dumps(metadata) if metadata else "",
        _USER: handed_on.get("user") or "",
        _SESSION: handed_on.get("session") or "",
        **more,
    }
    baggage = [f"{key}={quote(str(value), safe='')}" for key, value in entries.items() if value]
    others = [entry for entry in carrier.get("baggage", "").split(",") if entry and _key(entry) not in entries]
    if baggage or others:
        carrier["baggage"] = ",".join((*others, *baggage))
    return carrier


def checked_carrier(argument: str, carrier: object) -> Remote | None:
    """Return what a carrier says; None if there is no `traceparent` in it, as in one injected outside any block.

    Raises:
        ConfigError: It isn't a mapping, or what is in it is malformed; the message names `argument`.
    """
    if not isinstance(carrier, Mapping):
        raise ConfigError(f"{argument}={carrier!r}: expected a carrier, a dict made by inject()")
    found = {str(key).lower(): value for key, value in carrier.items()}
    text = found.get("traceparent")
    if not text:
        return None
    match = _TRACEPARENT.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{argument}: traceparent={text!r} is not of the form 00-<32 hex>-<16 hex>-<2 hex>")
    from urllib.parse import unquote

    baggage = {_key(entry): unquote(entry.partition("=")[2].partition(";")[0].strip())
               for entry in str(found.get("baggage") or "").split(",") if "=" in entry}  # fmt: skip
    return Remote(
        RemoteSpan(int(match[1], 16), int(match[2], 16)),
        bool(int(match[3], 16) & 1),
        tuple(tag for tag in _json(baggage.get(_TAGS), list) if isinstance(tag, str)),
        _json(baggage.get(_METADATA), dict),
        baggage.get(_USER) or None,
        baggage.get(_SESSION) or None,
        int(baggage[_BOUND_IN], 16) if _SPAN_ID.fullmatch(baggage.get(_BOUND_IN, "")) else None,
    )


def _key(entry: str) -> str:
    return entry.partition("=")[0].strip()


def _json(text: str | None, kind: type[Any]) -> Any:
    """Return what other services may have cut short as far as it can be read."""
    import json

    try:
        value = json.loads(text or "")
    except ValueError:
        return kind()
    return value if isinstance(value, kind) else kind()
