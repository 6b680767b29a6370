"""Says which PromptLayer account direct calls go to, and turns what its client raises into errors of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

from pltrace import _runtime
from pltrace._client import client_for
from pltrace._errors import ConfigError, PromptLayerError

__all__ = ["Account", "account", "is_missing", "refused"]


class Account(NamedTuple):
    """Where direct calls go.

    Attributes:
        key: The API key.
        base_url: PromptLayer's address.
        given: The application's own client, or None.
    """

    key: str
    base_url: str
    given: Any

    @property
    def client(self) -> Any:
        """The `promptlayer` client; the first time, making it takes half a second."""
        return client_for(self.key, self.base_url, self.given)


def account(call: str) -> Account:
    """Return the account of the configuration, else of the environment, whether tracing is on or off.

    Args:
        call: What needs it, for the error.

    Raises:
        ConfigError: There is no API key.
    """
    config = _runtime.settings()
    if config.api_key is None:
        raise ConfigError(
            f"{call} asks PromptLayer, and there is no API key: set PROMPTLAYER_API_KEY or call "
            "pltrace.configure(api_key=...)"
        )
    return Account(config.api_key, config.base_url, config.client)


def is_missing(error: BaseException) -> bool:
    """Return whether an exception of the client says that there is no such thing."""
    return any(kind.__name__ == "PromptLayerNotFoundError" for kind in type(error).__mro__)


def refused(failed: str, where: Account, error: BaseException) -> PromptLayerError:
    """Return our error for one of the client.

    Args:
        failed: What couldn't be done.
        where: The account that was asked.
        error: What the client raised.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    remedy = "see that the address is right and can be reached from here"
    if names & {"PromptLayerAuthenticationError", "PromptLayerPermissionDeniedError"}:
        remedy = "see that PROMPTLAYER_API_KEY or configure(api_key=...) is a valid key of the right workspace"
    elif names & {"PromptLayerBadRequestError", "PromptLayerUnprocessableEntityError", "PromptLayerConflictError"}:
        remedy = "what was sent is not what PromptLayer takes"
    return PromptLayerError(f"Can't {failed} at {where.base_url}: {type(error).__name__}: {error}; {remedy}")
