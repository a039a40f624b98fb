"""The report: every part of a record is told, whatever it says; nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from abliterate.record import Record
from abliterate.report.html import render, write_report
from records import full_record

#: What would act if it were not shown as text.
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"\' onload="x" \u2028 \x1b[31m <!-- '

ALL = [
    "asked",
    "separation",
    "direction",
    "proof",
    "weights",
    "cost",
    "replies",
    "search",
    "steering",
    "inspection",
    "audit",
    "reproduce",
    "glossary",
]


class Parsed(HTMLParser):
    """Elements and their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:  # inside a script or a style
            self.raw.append((self.cdata_elem, data))

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(text for kind, text in self.raw if text.startswith("{")))
        return found


def test_the_story_stands_in_the_order_of_the_phases() -> None:
    page = Parsed(render(full_record()))
    assert page.ids("section") == ALL


@pytest.mark.parametrize(
    ("left_out", "gone"),
    [
        (["search"], {"search"}),
        (
            ["separation", "selection", "evaluation", "search", "prompts"],
            {"separation", "direction", "proof", "cost", "replies", "search"},
        ),
        (["selection", "plan", "evaluation"], {"direction", "proof", "weights", "cost", "replies"}),
        (["plan", "separation", "selection", "search"], {"separation", "direction", "weights", "search"}),
    ],
    ids=["closed-form", "apply", "search", "eval"],
)
def test_what_a_record_has_not_is_left_out(left_out: list[str], gone: set[str]) -> None:
    page = Parsed(render(full_record().model_copy(update=dict.fromkeys(left_out))))
    assert page.ids("section") == [name for name in ALL if name not in gone]


def test_a_chosen_site_that_is_no_candidate_is_drawn_all_the_same() -> None:
    record = full_record()
    assert record.selection is not None
    other = record.selection.chosen.model_copy(update={"layer": 99})
    odd = record.model_copy(update={"selection": record.selection.model_copy(update={"chosen": other})})
    assert Parsed(render(odd)).ids("section") == ALL


def test_a_page_of_hostile_texts_has_the_elements_of_a_harmless_one() -> None:
    harmless, hostile = render(full_record("Name a fruit.")), render(full_record(HOSTILE))
    assert [tag for tag, _ in Parsed(hostile).tags] == [tag for tag, _ in Parsed(harmless).tags]
    assert not [a for _, attributes in Parsed(hostile).tags for a in attributes if a.startswith("on")]
    assert "<img" not in hostile
    assert "49" not in re.findall(r"\{\{ 7\*7 \}\}|\b49\b", hostile)
    assert any("</script>" in json.dumps(chart) for chart in Parsed(hostile).data.values())  # there, as text


def test_nothing_is_fetched_and_only_what_was_hashed_may_run() -> None:
    page = Parsed(render(full_record()))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind, text in page.raw:
        if text.startswith("{"):
            continue  # data
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy, kind
    assert sum(kind == "script" for kind, _ in page.raw) == 3
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        assert "style" not in attributes
        assert not attributes.keys() & {"src", "action", "ping"}
        assert attributes.get("href", "#")[:1] == "#"  # type: ignore[index]


def test_every_chart_has_its_table() -> None:
    text = render(full_record())
    page = Parsed(text)
    charts = [a["data-chart"] for t, a in page.tags if t == "div" and "data-chart" in a]
    assert len(charts) == 20
    assert set(charts) == set(page.data)
    assert text.count("<table>") == text.count("<figure") > len(charts)


def test_completions_to_harmful_prompts_stay_as_the_record_has_them() -> None:
    def shown(redacted: bool) -> str:
        page = render(full_record("a telling reply", redacted=redacted))
        return page.split('id="replies-harmful"')[1].split('id="replies-harmless"')[0]

    assert shown(redacted=True).count("a telling reply") == 1  # the prompt
    assert "first words […]" in shown(redacted=True)
    assert shown(redacted=False).count("a telling reply") == 3


def test_numbers_stand_with_their_intervals_and_the_control() -> None:
    page = render(full_record())
    assert "Of 20 harmful prompts the model refused 12 before the edit and 1 after it (5 % [0, 15]" in page
    assert "with a random direction in its place 12" in page
    assert "0.020 [0.010, 0.030] nats" in page
    assert "60 → 5 %" in page
    assert "Random control" in page


def test_a_record_of_thousands_of_experts_and_long_texts_stays_below_two_megabytes(tmp_path: Path) -> None:
    record = full_record("word " * 2000, redacted=False)
    assert record.plan is not None
    assert record.evaluation is not None
    assert record.separation is not None
    plan = record.plan.model_copy(
        update={
            "edits": [
                edit.model_copy(update={"tensor": f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"})
                for edit in record.plan.edits[:1]
                for layer in range(60)
                for expert in range(128)
            ]
        }
    )
    answers = {
        state: {name: replies * 1000 for name, replies in sets.items()}
        for state, sets in record.evaluation.answers.items()
    }
    evaluation = record.evaluation.model_copy(update={"answers": answers})
    separation = record.separation.model_copy(update={"prompts": record.separation.prompts * 500})
    path = write_report(
        record.model_copy(update={"plan": plan, "evaluation": evaluation, "separation": separation}), tmp_path
    )
    assert path.stat().st_size < 2_000_000


def test_a_number_that_is_not_finite_does_not_spoil_a_run() -> None:
    record = full_record()
    assert record.selection is not None
    broken = [site.model_copy(update={"kl": float("nan")}) for site in record.selection.candidates]
    page = render(record.model_copy(update={"selection": record.selection.model_copy(update={"candidates": broken})}))
    assert {cell[2] for cell in Parsed(page).data["map-kl"]["cells"]} == {None}


def test_records_of_earlier_versions_can_be_told(tmp_path: Path) -> None:
    old = json.loads(full_record().model_dump_json())
    del old["separation"], old["command"]
    assert "How to see it again?" in render(Record.model_validate(old))
