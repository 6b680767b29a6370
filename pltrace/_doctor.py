"""Says what is configured, what is reachable, what waits or was set aside and why, and what to do about it."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pltrace import _queries
from pltrace._config import Config
from pltrace._errors import StoreError
from pltrace._http import JsonClient, NoAnswerError, NotSentError
from pltrace._room import is_nearly_full

__all__ = ["diagnosis", "printed"]

#: What each count says, in the order of a call's way from LangChain to PromptLayer.
COUNTS = {
    "runs_seen": "LangChain runs that were seen",
    "runs_without_scope": "LangChain calls outside any block or traced function: not recorded",
    "runs_without_scope_in_threads": "of them in threads, while a block was open elsewhere: hand it over with bind()",
    "runs_merged": "runs that several of our handlers saw: recorded once",
    "sampled_out": "spans of traces that were sampled out",
    "recorded": "spans written to the store",
    "closed_as_cancelled": "runs whose end LangChain never reported: closed as cancelled",
    "dropped_queue_full": "spans dropped: the disk didn't keep up",
    "dropped_memory_full": "spans dropped: they were in memory alone and could not be delivered",
    "dropped_at_exit": "spans dropped: the process ended while the store couldn't be written",
    "dropped_with_file": "spans dropped: not delivered when the store's file was deleted, replaced or damaged",
    "dropped_in_own_work": "spans dropped: begun in a redactor or exporter, or in what interrupts pltrace",
    "dropped_not_encodable": "spans dropped: they could not be encoded",
    "delivered": "deliveries of spans",
    "calls_linked": "calls that PromptLayer's own instrumentation saw too: linked to ours, one request each",
    "calls_logged_twice": "calls that PromptLayer's client logged too, inside a LangChain model: two requests each",
    "requests_without_id": "LLM calls that PromptLayer took as spans and logged no request for",
    "quarantined": "spans that a backend refused for what is in them",
    "operations_refused": "scores, metadata, links or groups that PromptLayer refused",
    "callbacks_failed": "on_request functions that raised or were cut off",
    "callbacks_given_up": "on_request functions given up: too many waited for an id",
    "internal_errors": "failures of pltrace's own code; see the log, and please report them",
}


def diagnosis(config: Config) -> dict[str, Any]:
    """Return all there is to say, as JSON-like data.

    Args:
        config: What the environment and the command line say.
    """
    remedies: list[str] = []
    return {
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, **_versions()},
        "enabled": config.enabled,
        "promptlayer": _promptlayer(config, remedies),
        "store": _store(config, remedies),
        "remedies": remedies,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("pltrace", "langchain-core", "promptlayer", "wrapt"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _promptlayer(config: Config, remedies: list[str]) -> dict[str, Any]:
    if config.api_key is None:
        remedies.append(
            "To deliver to PromptLayer, set PROMPTLAYER_API_KEY; without it the local store is all there is."
        )
        return {"api_key": "not set", "base_url": config.base_url, "reachable": None}
    client = JsonClient(config.base_url, {"X-API-KEY": config.api_key})
    try:
        # A trace that can't exist: 404 says that the key is good.
        answer = client.request("GET", f"/api/public/v2/traces/{'0' * 31}1")
    except (NotSentError, NoAnswerError) as error:
        remedies.append(f"{config.base_url} can't be reached ({error}); spans wait in the store until it can.")
        return {"api_key": "set", "base_url": config.base_url, "reachable": False, "error": str(error)}
    finally:
        client.close()
    refused = answer.status in (401, 403)
    if refused:
        remedies.append("PromptLayer refuses the API key; set a valid PROMPTLAYER_API_KEY and run `pltrace sync`.")
    return {"api_key": "refused" if refused else "set", "base_url": config.base_url, "reachable": True}


def _store(config: Config, remedies: list[str]) -> dict[str, Any]:
    if not isinstance(config.store, Path):
        return {"path": config.store}
    is_full, free = is_nearly_full(config.store)
    if is_full:
        remedies.append(
            f"The store's disk is nearly full: {free / 1e6:.1f} MB are left. pltrace deletes delivered spans to make "
            "room, but never others; free some, or set a file on another disk with PLTRACE_STORE."
        )
    try:
        found = _queries.store_state(config.store, config.account)
    except StoreError as error:
        return {"path": str(config.store), "error": str(error)}
    pending = sum(found["pending"].values())
    if pending:
        again = "tries again now: see above why they weren't taken" if found["failing"] else "sends them now"
        remedies.append(f"{pending} spans wait for delivery; `pltrace sync` {again}.")
    elsewhere = found["pending_for_other_keys"]
    if config.account and any(elsewhere.values()):
        remedies.append(
            f"Of what waits, {elsewhere['spans']} spans and {elsewhere['operations']} scores, metadata, links or "
            "groups were recorded with another API key or address of PromptLayer's: a process that has these delivers "
            "them. `pltrace sync` sends the spans to the account of the present key, if that is what is wanted."
        )
    if "calls_logged_twice" in found["counts"]:
        remedies.append(
            "Calls are logged twice, by PromptLayer's client and by pltrace: inside a LangChain model, use the "
            "provider's own client instead of client.run(), client.openai or client.anthropic."
        )
    if found["quarantine"]:
        remedies.append(
            "Spans are in quarantine: see the reasons above; they stay in the store and are not sent again."
        )
    if found["refused"]:
        remedies.append(
            "Scores, metadata, links or groups were refused: see the reasons above; they are not sent again."
        )
    return {"path": str(config.store), **found}


def printed(found: Mapping[str, Any]) -> str:
    """Return a diagnosis for people."""
    lines = ["versions     " + ", ".join(f"{name} {number}" for name, number in found["versions"].items())]
    lines.append(f"tracing      {'on' if found['enabled'] else 'off (PLTRACE_ENABLED=0)'} when a program configures it")
    server = found["promptlayer"]
    reach = {None: "not asked", True: "reachable", False: "can't be reached"}[server["reachable"]]
    lines.append(f"PromptLayer  {server['base_url']}, API key {server['api_key']}, {reach}")
    lines += _store_lines(found["store"])
    if found["remedies"]:
        lines += ["", *(f"→ {remedy}" for remedy in found["remedies"])]
    return "\n".join(lines)


def _store_lines(store: Mapping[str, Any]) -> list[str]:
    lines = [f"store        {store['path']}"]
    if "error" in store:
        return [*lines, f"             {store['error']}"]
    if "spans" not in store:
        return lines
    lines.append(f"             {store['spans']} spans in {store['traces']} traces, {store['bytes'] / 1e6:.1f} MB")
    lines += [f"pending      {count} spans for {exporter}" for exporter, count in store["pending"].items()]
    lines += [
        f"failing      {entry['spans']} of them for {entry['exporter']}, at the last try: it {entry['error']}"
        for entry in store["failing"]
    ]
    if store["operations_pending"]:
        lines.append(f"pending      {store['operations_pending']} scores, metadata, links or groups")
    lines += [
        f"quarantine   span {entry['span_id']} ({entry['name']}) for {entry['exporter']}: {entry['error']}"
        for entry in store["quarantine"]
    ]
    lines += [f"refused      {entry['kind']} for {_request_of(entry)}: {entry['error']}" for entry in store["refused"]]
    lines += [
        f"count        {store['counts'][reason]:>8}  {text}"
        for reason, text in COUNTS.items()
        if reason in store["counts"]
    ]
    return lines


def _request_of(entry: Mapping[str, Any]) -> str:
    """Return which request an operation was for; what its handle or its id was not known of is left out."""
    span = f"span {entry['span_id']}" if entry["span_id"].strip("0") else ""
    if entry["request_id"] is None:
        return f"the request of {span or 'a span that is not stored'}"
    return f"request {entry['request_id']}{span and f' ({span})'}"
