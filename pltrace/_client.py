"""Makes `promptlayer` clients, importing the package on first need: that takes half a second."""

from __future__ import annotations

from typing import Any

from pltrace._forks import ForkLock

__all__ = ["client_for"]

_made: dict[tuple[str, str], Any] = {}
#: The child of a fork that comes while a thread imports a module can never import it.
_making = ForkLock(is_short=False)


def client_for(api_key: str, base_url: str, given: Any = None) -> Any:
    """Return the client to use.

    Args:
        api_key: PromptLayer's key.
        base_url: PromptLayer's address.
        given: The application's own client; it is used, unless it was made with `throw_on_error=False`: such a one
            doesn't say why a call failed, so nobody could tell whether to try again.

    Returns:
        `given`, or the process's one client for that key and address.
    """
    if given is not None and getattr(given, "throw_on_error", True) is not False:
        return given
    with _making.lock:
        client = _made.get((api_key, base_url))
        if client is None:
            from promptlayer import PromptLayer

            client = _made[api_key, base_url] = PromptLayer(api_key=api_key, base_url=base_url)
        return client
