"""Validates JSON against PromptLayer's published schemas, with errors that name the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

_SHOWN = 5
_LONG = 300
_NULL = {"type": "null"}
_DOCUMENT = json.loads(Path(__file__).with_name("promptlayer_schema.json").read_text(encoding="utf-8"))
_SCHEMAS: dict[str, Any] = _DOCUMENT["components"]["schemas"]
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")

formats = FormatChecker(())


@formats.checks("date-time")
def _is_date_time(value: object) -> bool:
    """Tells an RFC 3339 time; jsonschema has no such check without a further package."""
    if not isinstance(value, str):
        return True
    try:
        moment(value)
    except ValueError:
        return False
    return True


def moment(text: str) -> datetime:
    """Reads an RFC 3339 time; `fromisoformat` takes neither Z nor odd fractions on Python 3.10."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} isn't an RFC 3339 time with a zone")
    whole, fraction, zone = match.groups()
    micros = (fraction or "").ljust(6, "0")[:6]
    return datetime.fromisoformat(f"{whole}.{micros}{'+00:00' if zone == 'Z' else zone}")


def _one_of(
    validator: Any, alternatives: list[Any], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Follows the discriminator where there is one, as the tag is only a default in the alternatives."""
    if "discriminator" not in schema:
        yield from Draft202012Validator.VALIDATORS["oneOf"](validator, alternatives, instance, schema)
        return
    tag, mapping = schema["discriminator"]["propertyName"], schema["discriminator"]["mapping"]
    if not isinstance(instance, dict):
        yield ValidationError(f"{instance!r} is not of type 'object'")
    elif tag not in instance:
        yield ValidationError(f"{tag!r} is missing, which says what this is")
    elif not isinstance(instance[tag], str) or instance[tag] not in mapping:
        yield ValidationError(f"{tag!r} is {instance[tag]!r}, not one of {sorted(mapping)}")
    else:
        yield from validator.descend(instance, _inlined(_name(mapping[instance[tag]])))


def _any_of(
    validator: Any, alternatives: list[Any], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Looks straight into `X or null`, so that the error names the place inside X."""
    others = [alternative for alternative in alternatives if alternative != _NULL]
    if len(others) != 1:
        yield from Draft202012Validator.VALIDATORS["anyOf"](validator, alternatives, instance, schema)
    elif instance is not None or len(others) == len(alternatives):
        yield from validator.descend(instance, others[0])


_Validator = extend(Draft202012Validator, {"oneOf": _one_of, "anyOf": _any_of})


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


@cache
def _inlined(name: str) -> Any:
    """Gives a schema with its references put in, as following them is most of the time of a validation."""
    return _inline(_SCHEMAS[name])


def _inline(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_inline(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(_name(schema["$ref"]))
    return {key: value if key == "discriminator" else _inline(value) for key, value in schema.items()}


@cache
def validator(name: str) -> Any:
    """Gives the cached Draft 2020-12 validator of one published schema."""
    return _Validator(_inlined(name), format_checker=formats)


def properties(name: str) -> frozenset[str]:
    """Names the properties that a published schema knows."""
    return frozenset(_SCHEMAS[name]["properties"])


def errors(name: str, value: Any) -> list[tuple[list[str | int], str]]:
    """Lists where and how a value breaks a published schema."""
    found = (best_match([error]) for error in validator(name).iter_errors(value))
    return [(list(error.absolute_path), _shortened(error.message)) for error in found if error is not None]


def _shortened(message: str) -> str:
    """Leaves out the middle: a message starts with the whole value and ends with what is wrong with it."""
    return message if len(message) <= _LONG else f"{message[:100]} … {message[-150:]}"


def validate(name: str, value: Any) -> None:
    """Raises `jsonschema.ValidationError`, whose message names place and reason, unless the value fits."""
    found = errors(name, value)
    if found:
        lines = [f"{'.'.join(map(str, path)) or '(top)'}: {message}" for path, message in found[:_SHOWN]]
        more = [f"… and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ValidationError(f"not a {name}: " + "; ".join(lines + more), path=found[0][0], instance=value)
