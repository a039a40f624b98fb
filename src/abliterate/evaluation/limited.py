"""HTTP whose answers end: so many bytes and so many seconds for each, heads and bodies together.

A server may send a byte a minute, or gigabytes. Both are seen where bytes come in, below all parsing: what is read of
one answer is counted, and waits no longer than is left of its time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

#: Bytes of an answer: a reply of a hundred thousand tokens takes one or two million.
MOST_BYTES = 16_000_000


class _Left(threading.local):
    """What is left of the answer that this thread waits for."""

    end: float = 0.0
    nbytes: int = 0
    begun: bool = False


class _OverLimitError(Exception):
    """An answer took too long or was too large; the text says which."""


class _Stream(httpcore.NetworkStream):
    """A connection that is read within what is left."""

    def __init__(self, inner: httpcore.NetworkStream, left: _Left) -> None:
        self._inner, self._left = inner, left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = self._left
        remains = left.end - time.monotonic()
        try:
            if remains <= 0:
                raise httpcore.ReadTimeout("timed out")
            data = self._inner.read(max_bytes, remains if timeout is None else min(timeout, remains))
        except httpcore.ReadTimeout as error:
            if left.begun:
                raise _OverLimitError("an answer that does not come to its end in time") from error
            raise
        left.begun, left.nbytes = True, left.nbytes - len(data)
        if left.nbytes < 0:
            raise _OverLimitError(f"an answer of more than {MOST_BYTES // 10**6} MB")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout), self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """Makes such connections."""

    def __init__(self, left: _Left) -> None:
        super().__init__()
        self._left = left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options), self._left)


class LimitedTransport:
    """Requests to the host of `url`, each answered within `seconds` and `MOST_BYTES`, through the environment's proxy.

    An answer beyond them is given back as an error of the gateway that is not to be tried again. One that does not
    begin raises `ReadTimeout`. Answers come uncompressed: what unpacks to more than was counted is an error.
    """

    def __init__(self, web: Any, url: str, seconds: float) -> None:
        """For a client of the library `web` (httpx, or what took its place). Nothing is sent yet."""
        self._web, self._seconds, self._left = web, seconds, _Left()
        options: dict[str, Any] = {"ssl_context": web.create_ssl_context(), "network_backend": _Backend(self._left)}
        proxy = _proxy(url)
        self._pool = httpcore.ConnectionPool(**options, proxy=httpcore.Proxy(proxy) if proxy else None)

    def handle_request(self, request: Any) -> Any:
        """The whole answer."""
        web, left, url = self._web, self._left, request.url
        left.end, left.nbytes, left.begun = time.monotonic() + self._seconds, MOST_BYTES, False
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"accept-encoding"]
        content = request.read()
        try:
            answer = self._pool.request(
                request.method, target, headers=headers, content=content, extensions=dict(request.extensions)
            )
        except _OverLimitError as error:
            return self._refused(str(error))
        except httpcore.TimeoutException as error:
            raise web.ReadTimeout(str(error) or "timed out", request=request) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
            raise web.ReadError(str(error) or type(error).__name__, request=request) from error
        if any(name.lower() == b"content-encoding" and value.lower() != b"identity" for name, value in answer.headers):
            return self._refused("a compressed answer, which was not asked for")
        return web.Response(answer.status, headers=answer.headers, content=answer.content)

    def _refused(self, found: str) -> Any:
        message = {"error": {"message": f"found {found}"}}
        return self._web.Response(502, headers={"x-should-retry": "false"}, json=message)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    def __enter__(self) -> Self:
        """It stands in a client that is entered and left."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`."""
    parts = urlsplit(url)
    proxies = getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")
