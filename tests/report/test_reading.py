"""The page of a reading: tokens of whatever text, shaded; nothing in it can act, and nothing is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Parsed

import browser
from abliterate.record import ReadingPart, ReadTextPart
from abliterate.report.html import hash_of
from abliterate.report.html.reading import render_reading, write_reading

LAYERS = 4


def reading(text: str = HOSTILE, texts: int = 2, tokens: int = 12) -> ReadingPart:
    values = [[(layer - 1.5) * (token - 4) for token in range(tokens)] for layer in range(LAYERS)]
    return ReadingPart(
        model=f"/home/somebody/{text}",
        direction=text,
        layer=2,
        layers=[0, 1, 2, 5],
        unit="norm",
        lengths=[3.0] * LAYERS,
        texts=[ReadTextPart(tokens=[text] * tokens, prompt=5, projections=values)] * texts,
        left_out=1,
    )


def test_whatever_a_text_holds_is_text() -> None:
    plain, hostile = (Parsed(render_reading(reading(text))) for text in ("word", HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert not any({"style", "src"} & set(attributes) for _, attributes in plain.tags)
    page = render_reading(reading(HOSTILE))
    assert "\u2028" not in page
    assert "{{ 7*7 }}" in unescape(page)
    assert "/home/somebody" not in render_reading(reading("word")), "where it lies is nobody's business"


def test_the_policy_allows_its_own_style_and_script_alone() -> None:
    page = Parsed(render_reading(reading()))
    policy = next(str(one["content"]) for tag, one in page.tags if tag == "meta" and "http-equiv" in one)
    assert policy.startswith("default-src 'none';")
    assert re.findall(r"(\w+-src) ([^;]+)", policy)[1:] == [
        ("script-src", next(hash_of(text) for kind, text in page.raw if kind == "script" and "use strict" in text)),
        ("style-src", next(hash_of(text) for kind, text in page.raw if kind == "style")),
    ]


def test_tokens_are_shaded_at_the_layer_that_is_shown() -> None:
    page = Parsed(render_reading(reading("word", texts=1)))
    shades = [str(one["class"]).split() for tag, one in page.tags if tag == "span" and "title" in one]
    assert [shade[1][0] for shade in shades] == ["n"] * 4 + ["p"] * 8
    assert [int(shade[1][1:]) for shade in shades] == [8, 6, 4, 2, 0, 2, 4, 6, 8, 10, 10, 10]
    assert [len(shade) == 3 for shade in shades] == [False] * 5 + [True] * 7, "the reply's are marked"
    data = json.loads(next(text for _, text in page.raw if text.startswith("{")))
    assert data["layers"] == [0, 1, 2, 5]
    assert len(data["texts"][0]) == LAYERS


def test_a_page_holds_so_much_and_says_what_is_left_out() -> None:
    page = render_reading(reading("word", texts=40, tokens=4000))
    shown = page.count('class="tokens"')
    assert 0 < shown < 40
    assert f"{41 - shown} more texts are not on this page" in page
    assert len(page) < 10**7


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_layers_are_chosen_and_tokens_tell_their_number(chromium: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path, complaints = write_reading(reading(), tmp_path / "reading.html"), list[str]()
    page = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first = page.locator(".t").first
    assert "n" in first.get_attribute("class")
    page.locator("#layer").fill("0")
    assert "p" in first.get_attribute("class").split()[1]
    assert page.locator("#number").inner_text() == "0"
    assert "layer 0," in page.locator("#said").inner_text()
    page.locator(".t").nth(7).click()
    assert page.locator("#readout").inner_text().startswith("Token 8 ")
    assert "reply" in page.locator(".t").nth(7).get_attribute("class")
    assert page.evaluate("getComputedStyle(document.querySelector('.t.n10')).backgroundColor") == "rgb(59, 130, 196)"
    page.context.close()
    assert complaints == []
