"""Says which of PromptLayer's error types an exception is, by the names of its classes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["error_type_of"]

#: Names of exception classes of openai, anthropic, google, httpx, boto3, requests and Python, most telling first. By
#: name and along the inheritance, because none of these packages may be imported to ask.
_BY_NAME = (
    ("PROVIDER_AUTH_ERROR", ("AuthenticationError", "PermissionDeniedError", "Unauthenticated", "PermissionDenied",
                             "AccessDeniedException", "Unauthorized")),
    ("PROVIDER_RATE_LIMIT", ("RateLimitError", "ThrottlingException", "TooManyRequests", "ResourceExhausted")),
    ("PROVIDER_TIMEOUT", ("APITimeoutError", "TimeoutError", "TimeoutException", "Timeout", "DeadlineExceeded")),
    ("PROVIDER_ERROR", ("APIError", "APIStatusError", "APIConnectionError", "OpenAIError", "AnthropicError",
                        "GoogleAPIError", "GoogleAPICallError", "ClientError", "HTTPError", "HTTPStatusError",
                        "TransportError", "ConnectionError")),
)  # fmt: skip
#: What providers say in a rate-limit error when it is the account's money that has run out.
_QUOTA_WORDS = (
    "insufficient_quota",
    "exceeded your current quota",
    "billing",
    "spending limit",
    "credit balance",
)


def error_type_of(status: str | None, class_names: Sequence[str], message: str) -> str | None:
    """Return PromptLayer's `error_type` of an ended LLM call.

    Args:
        status: The span's status.
        class_names: The exception's class and its bases, most derived first.
        message: What the exception says.

    Returns:
        One of the types in PromptLayer's description of `log_request` that its status allows, or None if it ended ok.
    """
    if status == "partial":
        return "PROVIDER_PARTIAL_RESPONSE"
    if status not in ("error", "cancelled"):
        return None
    if status == "cancelled":
        return "UNKNOWN_ERROR"
    names = set(class_names)
    for error_type, known in _BY_NAME:
        if names.intersection(known):
            lowered = message.lower()
            if error_type == "PROVIDER_RATE_LIMIT" and any(word in lowered for word in _QUOTA_WORDS):
                return "PROVIDER_QUOTA_LIMIT"
            return error_type
    return "UNKNOWN_ERROR"
