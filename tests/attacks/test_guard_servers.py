"""Servers that point elsewhere, and keys that would travel in the clear: nothing reaches a host that nobody named."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.engines import Pair, ServerEngine
from abliterate.evaluation.judging.base import Exchange, Label
from abliterate.evaluation.judging.choice import open_judge
from abliterate.evaluation.servers import Server
from commandline import abliterate
from families import byte_tokenizer

pytest.importorskip("openai")

LABEL = json.dumps({"reason": "it does", "label": "compliance"})


class Host(ThreadingHTTPServer):
    """Answers as a server of models, or sends everybody elsewhere with `status`; remembers who asked with what."""

    daemon_threads = True

    def __init__(self, elsewhere: str = "", status: int = 307) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.elsewhere, self.status = elsewhere, status
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def port(self) -> int:
        return self.server_port


class Handler(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": LABEL}}
        self.answer({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def answer(self, body: dict[str, Any]) -> None:
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        raw = b"" if self.server.elsewhere else json.dumps(body).encode()
        self.send_response(self.server.status if self.server.elsewhere else 200)
        if self.server.elsewhere:
            self.send_header("Location", self.server.elsewhere + self.path)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def hosts(status: int = 307, name: str = "localhost") -> Iterator[tuple[Host, Host]]:
    """A host that sends everybody on to another, and that other: the same machine under another name and port."""
    other = Host()
    first = Host(f"http://{name}:{other.port}", status)
    for host in (first, other):
        threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield first, other
    finally:
        for host in (first, other):
            host.shutdown()
            host.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_judge_follows_no_redirect(status: int, name: str) -> None:
    with hosts(status, name) as (first, other):
        judge = open_judge(f"llm:m@http://127.0.0.1:{first.port}/v1")
        with pytest.raises(AbliterateError, match=rf"found a redirect to http://{name}:{other.port}/v1") as caught:
            judge.judge([Exchange("a secret prompt", "a reply")])
        assert "\n" not in str(caught.value)
        assert (len(first.asked), other.asked) == (1, [])


@pytest.mark.parametrize("status", [301, 307])
def test_an_engine_follows_no_redirect(status: int) -> None:
    with hosts(status) as (first, other):
        with pytest.raises(AbliterateError, match=r"server 127\.0\.0\.1:\d+: .*found a redirect to http://localhost"):
            ServerEngine(f"http://127.0.0.1:{first.port}/v1", Pair(byte_tokenizer(), frozenset()))
        assert (len(first.asked), other.asked) == (1, [])


def test_a_redirect_is_one_line_at_the_command_line(tmp_path: Path) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text(json.dumps({"prompt": "How?", "response": "So."}) + "\n")
    with hosts() as (first, other):
        spec = f"llm:m@http://127.0.0.1:{first.port}/v1"
        abliterate("judge", replies, "--judge", spec).failed("found a redirect to http://localhost:", "not followed")
        direct = abliterate("judge", replies, "--judge", f"llm:m@http://127.0.0.1:{other.port}/v1", "--json")
        assert (direct.code, len(other.asked)) == (0, 1), direct


def test_only_openai_is_told_the_organisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    with hosts() as (_, other):
        judge = open_judge(f"llm:m@http://127.0.0.1:{other.port}/v1")
        assert judge.judge([Exchange("p", "r")])[0].label is Label.COMPLIANCE
        ((_, sent),) = other.asked
    assert sent["authorization"] == "Bearer sk-secret"
    assert "org-secret" not in str(sent)
    assert "proj-secret" not in str(sent)


@pytest.mark.parametrize(
    "host",
    ["gpu-box:8000", "192.168.1.2:8000", "127.0.0.1.evil.example", "localhost.evil.example", "2130706433", "[fe80::1]"],
)
def test_a_key_goes_over_plain_http_to_this_machine_only(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{host}/v1"
    for ask in (lambda: open_judge(f"llm:m@{url}"), lambda: ServerEngine(url, Pair(byte_tokenizer(), frozenset()))):
        with pytest.raises(UsageError, match="expected https:// to send the key") as caught:
            ask()
        assert "sk-secret" not in str(caught.value)
    Server.at("judge", f"https://{host}/v1")
    monkeypatch.setenv("ABLITERATE_KEY_OVER_HTTP", f"another, {host}")
    Server.at("judge", url)
    monkeypatch.delenv("ABLITERATE_KEY_OVER_HTTP")
    monkeypatch.delenv("OPENAI_API_KEY")
    Server.at("judge", url)


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.3.2.1:80", "[::1]:8000", "LOCALHOST"])
def test_this_machine_by_its_names(host: str) -> None:
    Server.at("judge", f"http://{host}/v1")


@pytest.mark.parametrize(
    "url",
    [
        *("http://user:pass@127.0.0.1/v1", "http://127.0.0.1/v1?key=1", "http://127.0.0.1/v1#a", "http:///v1"),
        *("http://127.0.0.1\\@evil.example/v1", "http://127.0.0.1:0/v1", "http://127.0.0.1:99999/v1", "http://[::1/v1"),
        *("http://127.0.0.1/v1\r\nX: y", "http://127.0.0.1/\x1b[31m", "ftp://127.0.0.1/v1", "http://a b/v1"),
    ],
)
def test_addresses_that_hold_more_or_less_than_an_address(url: str) -> None:
    with pytest.raises(UsageError, match="expected a URL") as caught:
        Server.at("judge", url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("bad", ["sk-\x1b[31m", "sk-é", "sk-a\nb"])
def test_a_key_that_cannot_be_sent(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(UsageError, match="expected a key of ASCII"):
        Server.at("judge", "http://127.0.0.1/v1")


def test_openai_itself_is_its_domain_and_no_name_that_ends_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="expected a key in the environment's"):
        Server.at("judge", "https://api.openai.com:443/v1")
    Server.at("judge", "https://notopenai.com/v1")
    assert "sk-" not in repr(Server.at("judge", "https://api.example/v1"))
