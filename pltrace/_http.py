"""A small JSON client over one kept-alive connection, which says whether a failed request can have arrived."""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "JsonClient", "NoAnswerError", "NotSentError"]

#: Servers close idle connections, often after 5 s; sending into one that is just being closed would be ambiguous.
_REUSE_WITHIN_S = 3.0
_LONGEST_RETRY_AFTER_S = 300.0


class NotSentError(Exception):
    """The request surely didn't arrive: there was no connection."""


class NoAnswerError(Exception):
    """The request was sent, and no whole answer came: it may have been done."""


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON, or None if it isn't."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def retry_after_s(self) -> float | None:
        """Return how many seconds `Retry-After` asks for (a number or a date, RFC 9110), five minutes at most."""
        value = self.headers.get("retry-after", "").strip()
        if not value:
            return None
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                return None
        if not seconds > 0:  # In the past, or not a number.
            return None
        return min(seconds, _LONGEST_RETRY_AFTER_S)


class JsonClient:
    """Speaks JSON with one server, from one thread.

    Args:
        base_url: `http://` or `https://`, with an optional path that all paths are put behind.
        headers: Sent with every request.
        connect_timeout_s: For the connection, in seconds.
        answer_timeout_s: For each wait for a part of the answer, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        connect_timeout_s: float = 3.0,
        answer_timeout_s: float = 10.0,
    ) -> None:
        parts = urlsplit(base_url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._headers = {**headers, "Accept": "application/json", "Host": parts.netloc.rpartition("@")[2]}
        self._connect_timeout_s = connect_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._used_at = 0.0

    def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Send a request and return the whole answer.

        Args:
            method: `GET` or `POST`.
            path: Begins with a slash.
            body: JSON text; the same bytes can be sent again.

        Raises:
            NotSentError: There was no connection.
            NoAnswerError: It was sent, and no whole answer came.
        """
        connection = self._connected()
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        try:
            connection.request(method, self._target(path), body, headers)
            response = connection.getresponse()
            answer = Answer(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error
        if response.will_close:
            self.close()
        self._used_at = time.monotonic()
        return answer

    def _connected(self) -> http.client.HTTPConnection:
        if self._connection is not None and time.monotonic() - self._used_at < _REUSE_WITHIN_S:
            return self._connection
        self.close()
        try:
            connection = self._new_connection()
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NotSentError(f"{type(error).__name__}: {error}") from error
        connection.sock.settimeout(self._answer_timeout_s)
        self._connection = connection
        return connection

    def _new_connection(self) -> http.client.HTTPConnection:
        """Return an unconnected connection, through the proxy that the environment names for this host, if any."""
        proxy = self._proxy()
        timeout = self._connect_timeout_s
        if not self._secure:
            host, port = (proxy.hostname or "", proxy.port or 80) if proxy else (self._host, self._port)
            return http.client.HTTPConnection(host, port, timeout=timeout)
        context = ssl.create_default_context()
        if proxy is None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)
        connection = http.client.HTTPSConnection(
            proxy.hostname or "", proxy.port or 80, timeout=timeout, context=context
        )
        connection.set_tunnel(self._host, self._port, headers=_credentials(proxy))
        return connection

    def _proxy(self) -> Any:
        if urllib.request.proxy_bypass(self._host):
            return None
        url = urllib.request.getproxies().get("https" if self._secure else "http")
        return urlsplit(url if "//" in url else f"//{url}") if url else None

    def _target(self, path: str) -> str:
        if not self._secure and self._proxy() is not None:
            return f"http://{self._host}:{self._port}{self._prefix}{path}"
        return self._prefix + path

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _credentials(proxy: Any) -> dict[str, str]:
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + b64encode(pair.encode()).decode()}
