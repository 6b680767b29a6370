"""Says which of PromptLayer's error types an exception is, by the names of its classes and the code that it reports."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["PARTIAL", "error_type_of"]

#: The one with which a request's status is WARNING.
PARTIAL = "PROVIDER_PARTIAL_RESPONSE"

_AUTH, _RATE, _QUOTA, _TIMEOUT, _OTHER = (
    "PROVIDER_AUTH_ERROR", "PROVIDER_RATE_LIMIT", "PROVIDER_QUOTA_LIMIT", "PROVIDER_TIMEOUT", "PROVIDER_ERROR",
)  # fmt: skip

#: Names of exception classes of openai, anthropic, groq, google, cohere, mistralai, ollama, httpx, requests, boto3,
#: LangChain and Python, most telling first. By name and along the inheritance, because none of these packages may be
#: imported to ask.
_BY_NAME = (
    (_QUOTA, ("PaymentRequiredError", "ContractSpendLimitReachedError", "EnforcedSpendLimitReachedError",
              "ServiceQuotaExceededException")),
    (_AUTH, ("AuthenticationError", "PermissionDeniedError", "CredentialsError", "WorkloadIdentityError",  # openai, …
             "Unauthenticated", "PermissionDenied", "Unauthorized", "Forbidden",  # google.api_core
             "UnauthorizedError", "ForbiddenError", "InvalidTokenError",  # cohere
             "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
             "AccessDeniedException", "UnrecognizedClientException", "ExpiredTokenException",
             "ExpiredToken", "InvalidSignatureException", "InvalidClientTokenId",  # boto3
             "ModelAuthenticationError", "ModelPermissionDeniedError")),  # langchain_core
    (_RATE, ("RateLimitError", "TooManyRequests", "ResourceExhausted", "TooManyRequestsError",
             "ThrottlingException", "Throttling", "TooManyRequestsException", "ModelRateLimitError")),
    (_TIMEOUT, ("APITimeoutError", "RequestTimeoutError", "GatewayTimeoutError", "TimeoutError", "TimeoutException",
                "Timeout", "GatewayTimeout", "DeadlineExceeded", "DeadlineExceededError", "ConnectTimeoutError",
                "ReadTimeoutError", "ModelTimeoutException", "ModelTimeoutError", "InferenceTimeoutError")),
    (_OTHER, ("APIError", "APIStatusError", "APIConnectionError", "OpenAIError", "AnthropicError", "GroqError",
              "GoogleAPIError", "GoogleAPICallError", "GoogleGenerativeAIError", "ClientError", "ServerError",
              "ApiError", "BotoCoreError", "HTTPError", "HTTPStatusError", "TransportError", "RequestException",
              "ResponseError", "SDKError", "MistralError", "ConnectionError", "ModelErrorException",
              "ServiceUnavailableException", "ModelError", "RequestError")),
)  # fmt: skip
#: Where those with one class for all report which it was: a code of AWS, one of Google, an HTTP status.
_NAMED_CODE = re.compile(r"An error occurred \((\w+)\)")
_GOOGLE_CODE = re.compile(r"\b(RESOURCE_EXHAUSTED|UNAUTHENTICATED|PERMISSION_DENIED|DEADLINE_EXCEEDED)\b")
_STATUS = re.compile(
    r"Error code: (\d{3})\b"  # openai, anthropic, groq
    r"|^(?:\w+: )?(\d{3}) (?:[A-Z_]+\.|Client Error|Server Error)"  # google-genai, requests
    r"|(?:Client|Server) error '(\d{3}) "  # httpx
    r"|status(?:_| )code:? (\d{3})\b"  # ollama, cohere
    r"|API error occurred: Status (\d{3})\b",  # mistralai
    re.IGNORECASE,
)
_BY_GOOGLE_CODE = {
    "RESOURCE_EXHAUSTED": _RATE,
    "UNAUTHENTICATED": _AUTH,
    "PERMISSION_DENIED": _AUTH,
    "DEADLINE_EXCEEDED": _TIMEOUT,
}
_BY_STATUS = {"401": _AUTH, "402": _QUOTA, "403": _AUTH, "408": _TIMEOUT, "429": _RATE, "504": _TIMEOUT}
#: What providers say when it is the account's money that has run out; in a rate limit's error, and in any.
_QUOTA_WORDS_OF_LIMITS = ("billing", "spending limit", "spend limit")
_QUOTA_WORDS = ("insufficient_quota", "exceeded your current quota", "credit balance", "insufficient credits",
                "insufficient funds")  # fmt: skip
#: What Google says of a wrong key, with the status of any wrong argument.
_AUTH_WORDS = ("api key not valid", "api_key_invalid")


def error_type_of(status: str | None, class_names: Sequence[str], message: str) -> str | None:
    """Return PromptLayer's `error_type` of an ended LLM call.

    Args:
        status: The span's status; "partial" also of one that was cancelled after a part of its answer had come.
        class_names: The exception's class and its bases, most derived first.
        message: What the exception says.

    Returns:
        One of the types in PromptLayer's description of `log_request` that its status allows, or None if it ended ok.
    """
    if status == "partial":
        return PARTIAL
    if status not in ("error", "cancelled"):
        return None
    if status == "cancelled":
        return "UNKNOWN_ERROR"
    found = _of_names(class_names)
    if found == _OTHER:
        found = _of_code(message[:2_000]) or found
    lowered = message.lower()
    if found in (_RATE, _OTHER) and any(words in lowered for words in _QUOTA_WORDS):
        return _QUOTA
    if found == _RATE and any(words in lowered for words in _QUOTA_WORDS_OF_LIMITS):
        return _QUOTA
    if found == _OTHER and any(words in lowered for words in _AUTH_WORDS):
        return _AUTH
    return found or "UNKNOWN_ERROR"


def _of_names(class_names: Sequence[str]) -> str | None:
    names = set(class_names)
    return next((error_type for error_type, known in _BY_NAME if names.intersection(known)), None)


def _of_code(message: str) -> str | None:
    """Return what the code in the message of a provider's exception means; None if there is none that tells."""
    code = _NAMED_CODE.search(message)
    if code is not None:
        return _of_names([code[1]])
    google = _GOOGLE_CODE.search(message)
    if google is not None:
        return _BY_GOOGLE_CODE[google[1]]
    status = _STATUS.search(message)
    return None if status is None else _BY_STATUS.get(next(group for group in status.groups() if group))
