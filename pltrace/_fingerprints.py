"""Fingerprints of what prompts say: role and text of messages, or one string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["as_bytes", "beginnings", "digest_of", "of_string", "said_in"]

_ROLES = {"human": "user", "ai": "assistant", "HumanMessageChunk": "user", "AIMessageChunk": "assistant"}


def said_in(message: Any) -> tuple[str, str]:
    """Return role and text of a message; images count by their address."""
    kind = message.type
    role = message.role if kind == "chat" else _ROLES.get(kind, kind)
    content = message.content
    if isinstance(content, str):
        return role, content
    return role, "\n".join(part for block in content for part in _parts(block))


def _parts(block: Any) -> Iterator[str]:
    if isinstance(block, str):
        yield block
    elif isinstance(block, dict):
        if isinstance(block.get("text"), str):
            yield block["text"]
        image = block.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str):
            yield url


def beginnings(said: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """Give the fingerprint of the first message, of the first two, and so on."""
    digest = digest_of(b"messages")
    for role, text in said:
        encoded = as_bytes(text)
        digest.update(b"%b %d " % (as_bytes(role), len(encoded)))
        digest.update(encoded)
        yield digest.copy().digest()


def digest_of(kind: bytes) -> Any:
    """Return the digest of something that is still to come."""
    from hashlib import blake2b  # Loads OpenSSL, which importing pltrace needn't.

    return blake2b(kind, digest_size=16)


def of_string(text: str) -> bytes:
    """Return the fingerprint of a string."""
    digest = digest_of(b"string")
    digest.update(as_bytes(text))
    found: bytes = digest.digest()
    return found


def as_bytes(text: str) -> bytes:
    """Return a string as bytes, whatever is in it."""
    return text.encode("utf-8", "surrogatepass")
