"""Servers that speak OpenAI's protocol: their addresses, and what is and is not sent to them.

Prompts and the key go to the host that was named and to no other: a redirect is an error that says where it points.
The key goes to another machine encrypted only, unless the user named that machine as one that may have it in the clear.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, Field

from abliterate.errors import AbliterateError, UsageError
from abliterate.files.bounded import MB, Kind

#: The environment's variable that holds the key.
KEY = "OPENAI_API_KEY"

#: The environment's variable that names hosts (HOST or HOST:PORT, comma-separated) which get the key over plain http.
IN_THE_CLEAR = "ABLITERATE_KEY_OVER_HTTP"


#: What servers answer. They are strangers: nothing in an answer is used before its type is known.
COMPLETION = Kind("a completion", 16 * MB, AbliterateError, "check that the address is right")
LISTING = Kind("a list of models", 16 * MB, AbliterateError, "check that the address is right, most end in /v1")


class _Usage(BaseModel):
    prompt_tokens: int


class _Choice(BaseModel):
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]] | None = None


class Completion(BaseModel):
    """An answer of `/completions`; vLLM's also holds the tokens."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _Message(BaseModel):
    content: str | None = None


class _Turn(BaseModel):
    message: _Message


class ChatCompletion(BaseModel):
    """An answer of `/chat/completions`."""

    choices: Annotated[list[_Turn], Field(min_length=1)]


class Served(BaseModel):
    """A model that a server lists; of an adapter `parent` is the model that it is for."""

    id: str
    parent: str | None = None
    owned_by: str | None = None


class Listing(BaseModel):
    """An answer of `/models`."""

    data: list[Served]


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and the key that it is sent. `host` (with its port) is what may be shown of the address."""

    url: str
    host: str
    _key: str = field(default="", repr=False)

    @classmethod
    def at(cls, who: str, url: str) -> Self:
        """The server at `url`, which `who` is to ask, with the environment's key.

        Raises `UsageError` for a URL that is none or holds more than an address, when OpenAI's own server gets no key,
        and when a key would go to another machine over plain http.
        """
        parts = _address(who, url)
        key = os.environ.get(KEY, "").strip()
        if not key.isascii() or not all(map(str.isprintable, key)):
            raise UsageError(f"{who}: expected a key of ASCII characters in the environment's {KEY}, found others")
        if not key and _is_openai(parts.hostname):
            raise UsageError(f"{who}: expected a key in the environment's {KEY}, found none")
        if key and parts.scheme == "http" and not (_is_loopback(parts.hostname) or _may_be_in_the_clear(parts)):
            raise UsageError(
                f"{who}: expected https:// to send the key in {KEY} to {parts.netloc}, found http://, which anybody on "
                f"the way can read; use https, unset {KEY}, or set {IN_THE_CLEAR}={parts.netloc}"
            )
        return cls(url.rstrip("/"), parts.netloc, key)

    def client(self, library: Any, *, timeout: float, retries: int) -> Any:
        """A client of the `openai` library that follows no redirects; an answer takes at most `timeout` seconds."""
        from abliterate.evaluation.limited import LimitedTransport  # as slow to import as the library

        kinds = library.DefaultHttpxClient.__mro__
        web = sys.modules[next(kind for kind in kinds if kind.__name__ == "Client").__module__.partition(".")[0]]
        # An organisation and a project of OpenAI's are nobody else's business.
        own = {} if _is_openai(urlsplit(self.url).hostname) else {"organization": "", "project": ""}
        return library.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=retries,
            http_client=library.DefaultHttpxClient(
                follow_redirects=False, timeout=timeout, transport=LimitedTransport(web, self.url, timeout)
            ),
            **own,
        )

    def without_key(self, text: str) -> str:
        """What a server said, in which the key is blacked out."""
        return text.replace(self._key, "…") if self._key else text

    def said(self, error: Exception) -> str:
        """An error of the client on one line, with what is behind it and without the key."""
        cause = f" {error.__cause__}" if error.__cause__ and not getattr(error, "status_code", None) else ""
        return " ".join(self.without_key(f"{error}{cause}").split())[:200]

    def redirected(self, who: str, error: Exception) -> AbliterateError | None:
        """What `who` raises for an answer that points elsewhere; None for all other errors."""
        status = getattr(error, "status_code", None)
        if not isinstance(status, int) or not 300 <= status < 400:
            return None
        headers = getattr(getattr(error, "response", None), "headers", {})
        target = "".join(filter(str.isprintable, str(headers.get("location", "nowhere"))))[:200]
        return AbliterateError(
            f"{who}: expected an answer, found a redirect to {self.without_key(target)} (HTTP {status}); "
            "redirects are not followed: give that address if it is the one you mean"
        )


def _address(who: str, url: str) -> SplitResult:
    """The parts of a URL that holds scheme, host, port and path, and nothing that must not be shown."""
    try:
        parts = urlsplit(url)
        readable = url.isprintable() and not {"\\", " "} & set(url)
        found = readable and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        found = False
    if not found:
        raise UsageError(f"{who}: expected a URL such as http://localhost:8000/v1, found none that can be read")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{who}: expected a URL of host and path only, found user, password or parameters in it; "
            f"give a key as {KEY}"
        )
    return parts


def _is_openai(hostname: str | None) -> bool:
    return hostname is not None and (hostname == "openai.com" or hostname.endswith(".openai.com"))


def _is_loopback(hostname: str | None) -> bool:
    """Whether nothing leaves this machine on the way there."""
    if hostname is None or hostname == "localhost":
        return hostname is not None
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False


def _may_be_in_the_clear(parts: SplitResult) -> bool:
    named = {name.strip().lower() for name in os.environ.get(IN_THE_CLEAR, "").split(",")}
    return bool(named & {parts.hostname, parts.netloc.lower()})
