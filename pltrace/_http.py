"""A small JSON client over one kept-alive connection, which says whether a failed request can have arrived."""

from __future__ import annotations

import http.client
import io
import json
import selectors
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pltrace._clock import monotonic

__all__ = ["Answer", "JsonClient", "NoAnswerError", "NotSentError"]

#: Servers close idle connections, often after 5 s; sending into one that is just being closed would be ambiguous.
_REUSE_WITHIN_S = 3.0
#: For so long no connection is used twice with a server that closed one without a word.
_DISTRUST_S = 60.0
#: A whole answer takes no longer, however often a piece of it arrives.
_LONGEST_ANSWER_S = 30.0
_PIECE = 1 << 16
# Loads the codec that connections need, here and not in a thread of ours: the child of a fork that comes while a thread
# imports a module can never import that module.
"localhost".encode("idna")
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
        except (ValueError, RecursionError):  # Brackets in brackets, without end.
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


class _BoundedReader(io.RawIOBase):
    """Reads an answer from a socket; the time for it is bounded as a whole, not only that of each wait for a piece.

    Args:
        sock: Its timeout is the longest wait for a piece.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb", buffering=0)
        self._longest_wait_s = sock.gettimeout() or _LONGEST_ANSWER_S
        self._deadline = monotonic() + _LONGEST_ANSWER_S

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there into a buffer, waiting for it if nothing is.

        Raises:
            TimeoutError: Nothing came, or the time for the whole answer is over.
        """
        remaining = self._deadline - monotonic()
        if remaining <= 0:
            raise TimeoutError(f"the answer took longer than {_LONGEST_ANSWER_S:.0f} seconds")
        self._sock.settimeout(min(remaining, self._longest_wait_s))
        return self._reader.readinto(buffer)

    def close(self) -> None:
        """Let go of the socket."""
        self._reader.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose time is bounded, that for its headers included."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_BoundedReader(sock))


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
        self._proxy: Any = None  # Of the connection.
        self._used_at = 0.0
        self._distrusted_until = 0.0

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
        used_before = self._connection
        connection = self._connected()
        proxy = self._proxy
        headers = self._headers if body is None else {**self._headers, **_described(body)}
        target = self._prefix + path
        if proxy is not None and not self._secure:
            target = f"http://{self._headers['Host']}{target}"
            headers = {**headers, **_credentials(proxy)}
        try:
            connection.request(method, target, _pieces(body), headers)
            response = connection.getresponse()
            answer = Answer(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                _body(response),
            )
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if connection is used_before:
                self._distrusted_until = monotonic() + _DISTRUST_S
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error
        if response.will_close:
            self.close()
        self._used_at = monotonic()
        return answer

    def _connected(self) -> http.client.HTTPConnection:
        if self._connection is not None and self._is_usable(self._connection):
            self._connection.sock.settimeout(self._answer_timeout_s)
            return self._connection
        self.close()
        self._proxy = self._named_proxy()  # A look at the whole environment.
        try:
            connection = self._new_connection(self._proxy)
            connection.response_class = _BoundedResponse
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NotSentError(f"{type(error).__name__}: {error}") from error
        connection.sock.settimeout(self._answer_timeout_s)
        self._connection = connection
        return connection

    def _is_usable(self, connection: http.client.HTTPConnection) -> bool:
        """Return whether a connection that was used before can be used again."""
        now = monotonic()
        if now - self._used_at >= _REUSE_WITHIN_S or now < self._distrusted_until or connection.sock is None:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(connection.sock, selectors.EVENT_READ)
            return not selector.select(0)  # Nobody has asked: what is there to be read is the other side's farewell.

    def _new_connection(self, proxy: Any) -> http.client.HTTPConnection:
        """Return an unconnected connection, through the proxy if there is one."""
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

    def _named_proxy(self) -> Any:
        """Return the proxy that the environment names for this host, or None.

        Raises:
            NotSentError: What is named can't be one.
        """
        if urllib.request.proxy_bypass(self._host):
            return None
        scheme = "https" if self._secure else "http"
        url = urllib.request.getproxies().get(scheme)
        if not url:
            return None
        with suppress(ValueError):
            proxy = urlsplit(url if "//" in url else f"//{url}")
            if proxy.hostname and proxy.port != 0:
                return proxy
        # Without its value: that may hold a password.
        raise NotSentError(
            f"{scheme}_proxy in the environment isn't the address of a proxy; set it to one like "
            "http://user:password@host:port, or unset it"
        )

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _body(response: http.client.HTTPResponse) -> bytes:
    pieces: list[bytes] = []
    while piece := response.read1(_PIECE):
        pieces.append(piece)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    response.close()  # Only of the answer; the connection can be used again.
    return b"".join(pieces)


def _described(body: bytes) -> dict[str, str]:
    return {"Content-Type": "application/json", "Content-Length": str(len(body))}


def _pieces(body: bytes | None) -> Iterator[bytes] | None:
    """Return a body in pieces: the timeout holds for each, so that a slow line gets a large body through."""
    return None if body is None else (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))


def _credentials(proxy: Any) -> dict[str, str]:
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + b64encode(pair.encode()).decode()}
