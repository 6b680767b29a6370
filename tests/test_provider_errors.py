"""What went wrong at a provider is told to PromptLayer in its own terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

import pltrace
from pltrace import traced
from pltrace._provider_errors import error_type_of
from tests.support.http_double import HANG
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ApiError, ScriptedOpenAI
from tests.support.span_rules import ALLOWED_STATUSES
from tests.support.traces import calls, chat

_ANTHROPIC = ["APIStatusError", "APIError", "AnthropicError", "Exception"]
_GENAI = ["ClientError", "APIError", "Exception"]
_GOOGLE = ["GoogleAPICallError", "GoogleAPIError", "Exception"]
_GEMINI = ["ChatGoogleGenerativeAIError", "GoogleGenerativeAIError", "Exception"]

#: Classes as the packages define them, most derived first; what the exception says; PromptLayer's type.
TABLE: list[tuple[Sequence[str], str, str]] = [
    # openai, also as langchain-openai derives from it
    (["AuthenticationError", "APIStatusError", "APIError", "OpenAIError"], "Error code: 401", "PROVIDER_AUTH_ERROR"),
    (["PermissionDeniedError", "APIStatusError", "APIError", "OpenAIError"], "Error code: 403", "PROVIDER_AUTH_ERROR"),
    (["RateLimitError", "APIStatusError", "APIError", "OpenAIError"], "Rate limit reached", "PROVIDER_RATE_LIMIT"),
    (["OpenAIRateLimitError", "RateLimitError", "APIStatusError"], "Too many tokens", "PROVIDER_RATE_LIMIT"),
    (["RateLimitError", "APIStatusError"], "{'code': 'insufficient_quota'}", "PROVIDER_QUOTA_LIMIT"),
    (["RateLimitError", "APIStatusError"], "You exceeded your current quota, please check", "PROVIDER_QUOTA_LIMIT"),
    (["APITimeoutError", "APIConnectionError", "APIError", "OpenAIError"], "Request timed out.", "PROVIDER_TIMEOUT"),
    (["APIConnectionError", "APIError", "OpenAIError"], "Connection error.", "PROVIDER_ERROR"),
    (["InternalServerError", "APIStatusError", "APIError", "OpenAIError"], "Error code: 500", "PROVIDER_ERROR"),
    (["InternalServerError", "APIStatusError", "APIError"], "Error code: 504 - {}", "PROVIDER_TIMEOUT"),
    (["APIStatusError", "APIError"], "APIStatusError: Error code: 402 - {'message': '…'}", "PROVIDER_QUOTA_LIMIT"),
    (["BadRequestError", "APIStatusError", "APIError"], "Error code: 400 - about 429 things", "PROVIDER_ERROR"),
    (["APIError", "OpenAIError"], "You exceeded your current quota, please check your billing", "PROVIDER_QUOTA_LIMIT"),
    (["ContentFilterFinishReasonError", "OpenAIError"], "Could not parse", "PROVIDER_ERROR"),
    # anthropic
    (["AuthenticationError", *_ANTHROPIC], "invalid x-api-key", "PROVIDER_AUTH_ERROR"),
    (["CredentialsError", "AnthropicError", "Exception"], "no credentials", "PROVIDER_AUTH_ERROR"),
    (["RateLimitError", *_ANTHROPIC], "Error code: 429 - rate_limit_error", "PROVIDER_RATE_LIMIT"),
    (["EnforcedSpendLimitReachedError", "RateLimitError", *_ANTHROPIC], "Error code: 429", "PROVIDER_QUOTA_LIMIT"),
    (["LinkedOrganizationSpendLimitReachedError", "PaymentRequiredError", *_ANTHROPIC], "402", "PROVIDER_QUOTA_LIMIT"),
    (["BadRequestError", *_ANTHROPIC], "Your credit balance is too low to access the API", "PROVIDER_QUOTA_LIMIT"),
    (["OverloadedError", "InternalServerError", *_ANTHROPIC], "Error code: 529", "PROVIDER_ERROR"),
    (["GatewayTimeoutError", "InternalServerError", *_ANTHROPIC], "Error code: 504", "PROVIDER_TIMEOUT"),
    (["RequestTimeoutError", *_ANTHROPIC], "Error code: 408", "PROVIDER_TIMEOUT"),
    # google-genai, google.api_core, langchain-google-genai
    (_GENAI, "ClientError: 429 RESOURCE_EXHAUSTED. {'error': {'code': 429}}", "PROVIDER_RATE_LIMIT"),
    (_GENAI, "429 RESOURCE_EXHAUSTED. You exceeded your current quota", "PROVIDER_QUOTA_LIMIT"),
    (_GENAI, "401 UNAUTHENTICATED. {'error': {'code': 401}}", "PROVIDER_AUTH_ERROR"),
    (_GENAI, "403 PERMISSION_DENIED. {'error': {'code': 403}}", "PROVIDER_AUTH_ERROR"),
    (_GENAI, "400 INVALID_ARGUMENT. {'error': {'code': 400}}", "PROVIDER_ERROR"),
    (_GENAI, "400 INVALID_ARGUMENT. API key not valid. Please pass a valid API key.", "PROVIDER_AUTH_ERROR"),
    (_GENAI, "API key not valid. Please pass a valid API key.", "PROVIDER_AUTH_ERROR"),
    (["ServerError", "APIError", "Exception"], "504 DEADLINE_EXCEEDED. {}", "PROVIDER_TIMEOUT"),
    (["ServerError", "APIError", "Exception"], "503 UNAVAILABLE. {}", "PROVIDER_ERROR"),
    (["ResourceExhausted", "TooManyRequests", "ClientError", *_GOOGLE], "429 slow down", "PROVIDER_RATE_LIMIT"),
    (["Unauthenticated", "Unauthorized", "ClientError", *_GOOGLE], "401 no", "PROVIDER_AUTH_ERROR"),
    (["PermissionDenied", "Forbidden", "ClientError", *_GOOGLE], "403 no", "PROVIDER_AUTH_ERROR"),
    (["DeadlineExceeded", "GatewayTimeout", "ServerError", *_GOOGLE], "504 late", "PROVIDER_TIMEOUT"),
    (["ServiceUnavailable", "ServerError", *_GOOGLE], "503 down", "PROVIDER_ERROR"),
    (_GEMINI, "Error calling model 'gemini' (RESOURCE_EXHAUSTED): 429 RESOURCE_EXHAUSTED.", "PROVIDER_RATE_LIMIT"),
    (_GEMINI, "Invalid argument provided to Gemini: 400", "PROVIDER_ERROR"),
    # LangChain's own, of any provider
    (["ModelAuthenticationError", "ModelError", "LangChainException"], "no", "PROVIDER_AUTH_ERROR"),
    (["ModelPermissionDeniedError", "ModelError", "LangChainException"], "no", "PROVIDER_AUTH_ERROR"),
    (["ModelRateLimitError", "ModelError", "LangChainException"], "slow down", "PROVIDER_RATE_LIMIT"),
    (["ModelTimeoutError", "ModelConnectionError", "ModelError"], "late", "PROVIDER_TIMEOUT"),
    (["ModelRefusalError", "ModelError", "LangChainException"], "I can't", "PROVIDER_ERROR"),
    # mistralai, cohere
    (["SDKError", "MistralError", "Exception"], "API error occurred: Status 401. Body: {}", "PROVIDER_AUTH_ERROR"),
    (["SDKError", "Exception"], "SDKError: API error occurred: Status 402. Body: {}", "PROVIDER_QUOTA_LIMIT"),
    (["SDKError", "Exception"], "API error occurred: Status 408. Body: {}", "PROVIDER_TIMEOUT"),
    (["SDKError", "Exception"], "API error occurred: Status 429\n{}", "PROVIDER_RATE_LIMIT"),
    (["SDKError", "Exception"], "API error occurred: Status 500. Body: Status 401", "PROVIDER_ERROR"),
    (["InvalidTokenError", "ApiError", "Exception"], "status_code: 498", "PROVIDER_AUTH_ERROR"),
    # httpx, requests
    (["ReadTimeout", "TimeoutException", "TransportError", "RequestError", "HTTPError"], "", "PROVIDER_TIMEOUT"),
    (["ConnectError", "NetworkError", "TransportError", "RequestError", "HTTPError"], "", "PROVIDER_ERROR"),
    (["HTTPStatusError", "HTTPError"], "Client error '429 Too Many Requests' for url 'x'", "PROVIDER_RATE_LIMIT"),
    (["HTTPStatusError", "HTTPError"], "Client error '401 Unauthorized' for url 'x'", "PROVIDER_AUTH_ERROR"),
    (["HTTPStatusError", "HTTPError"], "Server error '500 Internal Server Error' for url 'x'", "PROVIDER_ERROR"),
    (["ReadTimeout", "Timeout", "RequestException", "OSError"], "timed out", "PROVIDER_TIMEOUT"),
    (["HTTPError", "RequestException", "OSError"], "HTTPError: 403 Client Error: Forbidden", "PROVIDER_AUTH_ERROR"),
    # botocore
    (["ThrottlingException", "ClientError", "Exception"], "slow", "PROVIDER_RATE_LIMIT"),
    (["ClientError", "Exception"], "An error occurred (ThrottlingException) when calling", "PROVIDER_RATE_LIMIT"),
    (["ClientError", "Exception"], "An error occurred (AccessDeniedException) when calling", "PROVIDER_AUTH_ERROR"),
    (["ClientError", "Exception"], "An error occurred (ModelTimeoutException) when calling", "PROVIDER_TIMEOUT"),
    (["ClientError", "Exception"], "An error occurred (ServiceQuotaExceededException) when", "PROVIDER_QUOTA_LIMIT"),
    (["ClientError", "Exception"], "An error occurred (ValidationException) when calling", "PROVIDER_ERROR"),
    (["NoCredentialsError", "BotoCoreError", "Exception"], "Unable to locate credentials", "PROVIDER_AUTH_ERROR"),
    (["ReadTimeoutError", "HTTPClientError", "BotoCoreError"], "Read timeout on endpoint", "PROVIDER_TIMEOUT"),
    (["EndpointConnectionError", "ConnectionError", "BotoCoreError"], "Could not connect", "PROVIDER_ERROR"),
    # Python
    (["TimeoutError", "OSError", "Exception"], "", "PROVIDER_TIMEOUT"),
    (["ConnectionResetError", "ConnectionError", "OSError", "Exception"], "reset", "PROVIDER_ERROR"),
    (["ValueError", "Exception"], "Error code: 401", "UNKNOWN_ERROR"),
    (["KeyError", "LookupError", "Exception"], "'quota'", "UNKNOWN_ERROR"),
]


@pytest.mark.parametrize(("names", "message", "expected"), TABLE, ids=lambda value: str(value)[:40])
def test_exceptions_by_their_names(names: Sequence[str], message: str, expected: str) -> None:
    """Each provider's exception has the type that PromptLayer has for it, one that goes with the status ERROR."""
    assert error_type_of("error", names, message) == expected
    assert "ERROR" in ALLOWED_STATUSES[expected]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("ok", None), (None, None), ("partial", "PROVIDER_PARTIAL_RESPONSE"), ("cancelled", "UNKNOWN_ERROR")],
)
def test_the_status_decides_first(status: str | None, expected: str | None) -> None:
    """A call that ended well has no type; one that was left or cancelled has its own, whatever class it raised."""
    assert error_type_of(status, ["RateLimitError"], "") == expected


@pytest.mark.parametrize(
    "name",
    ["AuthenticationError", "PermissionDeniedError", "RateLimitError", "APITimeoutError", "APIConnectionError",
     "InternalServerError", "BadRequestError", "NotFoundError", "UnprocessableEntityError", "ConflictError"],
)  # fmt: skip
def test_openai_has_no_exception_that_is_unknown(name: str) -> None:
    """None of the installed openai's exceptions is an UNKNOWN_ERROR."""
    names = [kind.__name__ for kind in getattr(openai, name).__mro__]

    assert error_type_of("error", names, "") != "UNKNOWN_ERROR"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ApiError(401, "Incorrect API key provided.", "invalid_api_key"), "PROVIDER_AUTH_ERROR"),
        (ApiError(403, "Not allowed."), "PROVIDER_AUTH_ERROR"),
        (ApiError(429, "Rate limit reached for requests."), "PROVIDER_RATE_LIMIT"),
        (ApiError(429, "You exceeded your current quota.", "insufficient_quota"), "PROVIDER_QUOTA_LIMIT"),
        (ApiError(400, "No such thing."), "PROVIDER_ERROR"),
        (ApiError(500), "PROVIDER_ERROR"),
        (ApiError(504), "PROVIDER_TIMEOUT"),
    ],
    ids=lambda value: f"{value.status} {value.code}" if isinstance(value, ApiError) else value,
)
def test_real_errors_of_openai(deliver: Any, promptlayer: PromptLayerServer, error: ApiError, expected: str) -> None:
    """What the real client raises for an answer arrives at PromptLayer as an ERROR of the right type."""
    deliver()

    with ScriptedOpenAI(error) as llm, traced("failing"), pytest.raises(openai.APIStatusError):
        chat(llm).invoke("Hi")

    assert_logged(promptlayer, expected)


def test_a_real_timeout_of_openai(deliver: Any, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A server that doesn't answer in time is a PROVIDER_TIMEOUT."""
    deliver()
    llm.faults.append(lambda request: HANG)

    with traced("failing"), pytest.raises(openai.APITimeoutError):
        chat(llm, timeout=0.2).invoke("Hi")
    llm.release()

    assert_logged(promptlayer, "PROVIDER_TIMEOUT")


def test_a_real_lost_connection_of_openai(local: Path) -> None:
    """A server that isn't there is a PROVIDER_ERROR."""
    with ScriptedOpenAI() as gone:
        model = chat(gone)

    with traced("failing"), pytest.raises(openai.APIConnectionError):
        model.invoke("Hi")

    (call,) = calls(local)
    assert call["error_type"] == "PROVIDER_ERROR"


def assert_logged(promptlayer: PromptLayerServer, expected: str) -> None:
    """Check that one request was logged, as an error of that type."""
    assert pltrace.flush(10.0)
    (log,) = promptlayer.request_logs
    assert (log["status"], log["error_type"]) == ("ERROR", expected)
