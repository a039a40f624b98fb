"""Servers that never come to an end, send too much, or answer with anything at all."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from abliterate.errors import AbliterateError
from abliterate.evaluation.engines import Pair, ServerEngine
from abliterate.evaluation.judging.base import Exchange, Label
from abliterate.evaluation.judging.llm import LlmJudge

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EXCHANGE = Exchange("Name a fruit.", "An apple.")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextlib.contextmanager
def serving(answer: Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """A server that answers every request with these bytes, as fast as they come."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def speak(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            for part in answer():
                if over.is_set():
                    return
                connection.sendall(part)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=speak, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def dripping(first: bytes) -> Iterator[bytes]:
    yield first
    for _ in itertools.count():
        time.sleep(0.02)
        yield b" "


def flooding() -> Iterator[bytes]:
    yield HEAD + b"\r\n"
    for _ in itertools.count():
        yield b" " * (1 << 20)


def whole(body: bytes, more: bytes = b"") -> list[bytes]:
    return [HEAD + more + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body]


PACKED = gzip.compress(bytes(10**7))
ENDLESS: dict[str, tuple[Callable[[], Iterable[bytes]], str]] = {
    "a byte at a time": (lambda: dripping(HEAD + b"\r\n"), "does not come to its end in time"),
    "a head without end": (lambda: dripping(HEAD + b"X-More: "), "does not come to its end in time"),
    "gigabytes": (flooding, "more than 16 MB"),
    "gigabytes in a few bytes": (
        lambda: whole(PACKED, b"Content-Encoding: gzip\r\n"),
        "compressed",
    ),
}

#: Answers of no server that means well.
ODD: dict[str, bytes] = {
    "nothing": b"",
    "a web page": b"<html></html>",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "a huge number": b'{"data": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"data": "\xff"}',
    "half a letter": b'{"choices": [{"message": {"content": "\\ud800"}}], "data": [{"id": "\\ud800"}]}',
    "other types": b'{"choices": {"0": 1}, "data": "m"}',
    "no choices": b'{"choices": [], "data": [1]}',
    "numbers for names": b'{"choices": [{"message": 5}], "data": [{"id": 5}]}',
}


@pytest.mark.parametrize("how", ENDLESS)
def test_an_answer_without_end_is_cut_off_and_one_line(how: str) -> None:
    answer, said = ENDLESS[how]
    start = time.monotonic()
    with serving(answer) as url, pytest.raises(AbliterateError, match=said) as caught:
        ServerEngine(url, Pair(None, frozenset()), timeout=0.3, retries=5)
    assert time.monotonic() - start < 10
    assert str(caught.value).isprintable()
    with serving(answer) as url, pytest.raises(AbliterateError, match=said):
        LlmJudge("m", url, timeout=0.3, retries=5).judge([EXCHANGE])
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("what", ODD)
def test_an_answer_of_another_form_is_one_line(what: str) -> None:
    with serving(lambda: whole(ODD[what])) as url, pytest.raises(AbliterateError) as caught:
        ServerEngine(url, Pair(None, frozenset()), timeout=5, retries=0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    with serving(lambda: whole(ODD[what])) as url, pytest.raises(AbliterateError) as caught:
        LlmJudge("m", url, timeout=5, retries=0).judge([EXCHANGE])
    assert str(caught.value).isprintable()


def completion(**changes: Any) -> bytes:
    choice = {"text": "a", "finish_reason": "stop", "token_ids": [1]}
    return json.dumps(
        {"choices": [choice | changes.pop("choice", {})], "usage": {"prompt_tokens": 1}} | changes
    ).encode()


@pytest.mark.parametrize(
    "odd",
    [
        {"choice": {"text": None}},
        {"choice": {"text": 5}},
        {"choice": {"token_ids": ["a"]}},
        {"choice": {"token_ids": [-1]}},
        {"choice": {"token_ids": [2**40]}},
        {"choice": {"finish_reason": 5}},
        {"usage": {"prompt_tokens": "many"}},
        {"usage": 5},
        {"choices": []},
    ],
)
def test_a_completion_of_another_form_is_one_line(odd: dict[str, Any]) -> None:
    listing = b'{"data": [{"id": "m"}]}'
    answers = itertools.chain([listing], itertools.repeat(completion(**odd)))
    with serving(lambda: whole(next(answers))) as url:
        engine = ServerEngine(url, Pair(None, frozenset()), timeout=5, retries=0)
        with pytest.raises(AbliterateError, match="expected a completion, found"):
            engine.complete([[1]], 4)


def test_an_ordinary_answer_comes_through() -> None:
    """The control: the same server with an answer as it should be."""
    body = json.dumps({"choices": [{"message": {"content": '{"reason": "does it", "label": "compliance"}'}}]}).encode()
    with serving(lambda: whole(body)) as url:
        (verdict,) = LlmJudge("m", url, timeout=5, retries=0).judge([EXCHANGE])
    assert verdict.label is Label.COMPLIANCE
