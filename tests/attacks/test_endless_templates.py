"""Chat templates that loop, allocate or compute without end."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from abliterate.errors import ChatTemplateError
from abliterate.prompts import ChatRenderer, watched
from families import byte_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOP,
    "loops with calls": "{% macro m(n) %}{% for a in range(99999) %}{{ m(n) }}{% endfor %}{% endmacro %}"
    + LOOP
    + "{{ m(1) }}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a long text": "{{ 'x' * 9999999999 }}",
    "a wide field": "{{ 'x' | center(9999999999) }}",
    "a wide format": "{{ '%09999999999d' | format(1) }}",
    "doubling": "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "lists": "{% set n = namespace(t=[1, 2]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a power in a condition": "{% if 9 ** 9 ** 9 > 1 %}{% endif %}",
    "many characters": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "no end": "{% for",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "SECONDS", 0.3)


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_end_is_one_line(what: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match="the chat template") as caught:
        ChatRenderer(byte_tokenizer(), ENDLESS[what]).render("Name a fruit.")
    assert time.monotonic() - start < 10
    assert str(caught.value).isprintable()


def test_the_tokenizers_own_template_is_bounded_too_and_in_any_thread() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOP
    found: list[BaseException] = []

    def render() -> None:
        try:
            ChatRenderer(tokenizer).render("Name a fruit.")
        except ChatTemplateError as error:
            found.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "more than 0.3 seconds" in str(found[0])


def test_bounds_are_those_of_the_template_only_and_end_with_it() -> None:
    """The control: ordinary templates, keywords in a call among them, and nothing is left behind."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    template = (
        "{% set n = namespace(**{'a': 'b'}) %}{% for m in messages %}{{ n.a }}{{ m.content }}{{ '-' * 3 }}{% endfor %}"
    )
    assert ChatRenderer(byte_tokenizer(), template).render("Name a fruit.") == "bName a fruit.---"
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == before
