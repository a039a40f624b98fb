"""The table of a search: what it says in 80 and 40 columns, without colours, with hostile text; asking for a point."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from abliterate.cli.search import ask_point
from abliterate.errors import UsageError
from abliterate.record import PointPart, SearchPart
from abliterate.report.tables.search import show_search

#: refusals, over-refusals and KL, on validation and on held-out prompts
MEASURED = (
    ((0.0, 0.03, 0.0934), (0.015, 0.04, 0.101)),
    ((0.021, 0.03, 0.03125), (0.034, 0.025, 0.0362)),
    ((0.022, 0.11, 0.012), (0.03, 0.12, 0.0117)),
    ((0.41, 0.03, 0.00098), (0.41, 0.03, 0.00121)),
)
NAMES = ("refusals", "over-refusals", "kl")


def named(values: tuple[float, ...]) -> dict[str, float | None]:
    return dict(zip(NAMES, values, strict=True))


def point(number: int, **changed: Any) -> PointPart:
    scores, held_out = MEASURED[(number - 1) % len(MEASURED)]
    values: dict[str, Any] = {
        "number": number,
        "origin": f"gradient, weight of KL {10 * number}",
        "file": f"front/{number:02}.safetensors",
        "scores": named(scores),
        "held_out": named(held_out),
        "intervals": {
            "refusals": (max(held_out[0] - 0.02, 0), held_out[0] + 0.06),
            "kl": (held_out[2] * 0.9, held_out[2] * 1.1),
        },
        "feasible": scores[1] <= 0.05,
        "on_front": True,
    }
    return PointPart(**(values | changed))


def part(points: list[PointPart] | None = None, **changed: Any) -> SearchPart:
    values: dict[str, Any] = {
        "method": "gradient",
        "objectives": ["refusals", "kl"],
        "constraints": "over-refusals<=+0.02",
        "limits": {"over-refusals": 0.05, "kl": 0.1},
        "base": named((0.96, 0.03, 0.0)),
        "base_held_out": named((0.974, 0.03, 0.0)),
        "points": [point(number) for number in range(1, 5)] if points is None else points,
        "chosen": 2,
        "why": "knee",
        "evaluations": {"few": 0, "all": 12, "replies": 5},
        "seconds": 83.4,
    }
    return SearchPart(**(values | changed))


def shown(search: SearchPart, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    show_search(search, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, label: str) -> str:
    """The row of the table that begins with a label; cells stand at least two blanks apart."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(label) and "Point" not in line)
    return " | ".join(re.split(r"\s{2,}", line.strip()))


def test_points_stand_beside_the_unedited_model() -> None:
    text = shown(part(), 80)
    assert row(text, "unedited") == "unedited | 96 % | 97 % | 0 | 0"
    assert row(text, "→") == "→ | 2 | 2 % | 3 % [1, 9] | 0.0312 | 0.0362 [0.0326, 0.0398]"
    assert row(text, "✗") == "✗ | 3 | 2 % | 3 % [1, 9] | 0.0120 | 0.0117 [0.0105, 0.0129]"
    assert row(text, "4") == "4 | 41 % | 41 % [39, 47] | 0.000980 | 0.00121 [0.00109, 0.00133]"
    assert re.search(r"refusals +kl", text)
    assert re.search(r"validation +held-out \[95 %\] +validation +held-out \[95 %\]", text)


def test_what_the_table_cannot_say_stands_below() -> None:
    text = " ".join(shown(part()).split())
    assert "→ Point 2 was chosen (farthest below the line between the ends of the front)." in text
    asked = " ".join(shown(part().model_copy(update={"why": "the least kl of some", "prompts": 80})).split())
    assert "→ Point 2 was chosen (the least kl of some)." in asked
    assert "5 by replies, on 80 validation prompts." in asked
    assert "✗ Point 3: over-refusals 11.0 %, at most 5.0 %." in text
    assert "Point 4:" not in text
    assert "Not on the front" not in text
    assert "Search: gradient, 83 s; edits measured: 12 by first tokens, 5 by replies." in text
    assert "Another point: abliterate apply MODEL --direction OUT/front/01.safetensors -o EDITED" in text


def test_optimism_is_the_mean_of_held_out_minus_validation() -> None:
    text = " ".join(shown(part()).split())
    changes = [[after[i] - before[i] for before, after in MEASURED] for i in (0, 2)]
    refusals, kl = (sum(values) / 4 for values in changes)
    assert (
        "Selection was on validation prompts: on held-out ones "
        f"refusals {100 * refusals:+.1f} points, kl +{kl:.3g} (mean of 4 edits; unedited model: refusals +1.4 points, "
        "kl +0)."
    ) in text
    better = part([point(1, held_out=named((0.0, 0.03, 0.05)))], base_held_out=None, chosen=1)
    assert "refusals +0.0 points, kl -0.0434 (1 edit)." in " ".join(shown(better).split())


def test_numbers_that_are_not_known() -> None:
    broken = point(1, scores={"refusals": 0.1, "kl": None}, held_out={"refusals": None}, intervals={}, feasible=False)
    text = shown(part([broken, point(2)]))
    assert row(text, "✗") == "✗ | 1 | 10 % | – | – | –"
    assert "✗ Point 1: over-refusals unknown, at most 5.0 %; kl unknown, at most 0.100." in " ".join(text.split())
    assert "(1 edit;" in text


def test_a_limit_missed_narrowly_does_not_look_kept() -> None:
    narrow = point(1, scores=named((0.1, 0.054, 0.10004)), feasible=False)
    text = " ".join(shown(part([narrow, point(2)])).split())
    assert "over-refusals 5.4 %, at most 5.0 %; kl 0.100040, at most 0.100000." in text


def test_a_reason_that_is_not_in_the_limits_is_the_constraint_itself() -> None:
    text = shown(part([point(1, feasible=False)], limits={}, chosen=1))
    assert "✗ Point 1: does not keep over-refusals<=+0.02." in text
    assert row(text, "→").startswith("→ | 1 |")


def test_without_held_out_prompts_there_is_one_column_each() -> None:
    text = shown(part([point(number, held_out=None, intervals={}) for number in (1, 2)], base_held_out=None))
    assert row(text, "→").startswith("→ | 2 | 2 % | 0.0312")
    assert "validation" not in text
    assert "held-out" not in text


def test_wide_terminals_show_where_points_come_from() -> None:
    assert row(shown(part(), 120), "→").endswith("0.0362 [0.0326, 0.0398] | gradient, weight of KL 20")
    assert "weight of KL" not in shown(part(), 80)


def test_points_that_are_beaten_are_named() -> None:
    points = [point(1), point(2), point(3, feasible=True, on_front=False), point(4)]
    assert "Not on the front, another point is better: 3." in shown(part(points))
    assert "OUT/front/02.safetensors" in shown(part([point(1, on_front=False), *points[1:]], chosen=4))


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("objectives", [("refusals", "kl"), NAMES, (*NAMES, "refusal-score", "kl-reply")])
def test_no_number_is_broken_or_cut(width: int, objectives: tuple[str, ...]) -> None:
    points = [point(number) for number in range(1, 13)]
    text = shown(part(points, objectives=list(objectives), chosen=11), width)
    command = "Another point: "
    assert all(len(line) <= width for line in text.splitlines() if not line.startswith(command))
    assert "…" not in text
    table = text[: text.index("was chosen")]
    for number, (scores, held_out) in enumerate(MEASURED, 1):
        lines = [line for line in table.splitlines() if re.match(rf" [→✗ ] +{number}\s", line)]
        found = " ".join(lines)
        assert f" {100 * scores[0]:.0f} % " in found
        assert f" {100 * held_out[0]:.0f} %" in found
        assert f" {scores[2]:#.3g} " in found
        assert f" {held_out[2]:#.3g}" in found
    assert f"{command}abliterate apply MODEL --direction OUT/front/01.safetensors -o EDITED" in text.splitlines()


def test_narrow_terminals_get_a_table_for_each_objective() -> None:
    wide, narrow = shown(part(), 80), shown(part(), 40)
    assert narrow.count("Points of the search") == 1
    assert (wide.count("unedited "), narrow.count("unedited ")) == (2, 3)  # once below the table
    assert "[1, 9]" in narrow  # there is room for the interval of a rate, and none for that of a KL
    assert "[0.0326" not in narrow


def test_text_of_the_record_is_not_markup() -> None:
    hostile = "[red]x[/] [/nothing] \\[b]"
    points = [point(1, origin=hostile, file=f"{hostile}.safetensors", feasible=False), point(2)]
    text = shown(
        part(points, method=hostile, why=hostile, constraints=hostile, limits={}, evaluations={hostile: 3}), 160
    )
    assert text.count(hostile) == 6
    for limits in ({hostile: 0.0}, {}):
        assert hostile in shown(part(points, objectives=["refusals", hostile], limits=limits), 160)


def test_an_interval_of_words_is_not_markup_either() -> None:
    endless = point(1, intervals={"kl": (float("-inf"), float("inf"))})
    assert "0.101 [-inf, inf]" in shown(part([endless, point(2)]), 160)
    endless = point(1, intervals={"kl": (float("inf"), float("inf"))})
    assert "0.101 [inf, inf]" in shown(part([endless, point(2)]), 160)


def test_colours_only_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = shown(part())
    assert "\x1b" not in plain
    coloured = shown(part(), force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[2m✗", coloured)  # dim
    assert re.search(r"\x1b\[1m→", coloured)  # bold
    monkeypatch.setenv("NO_COLOR", "1")
    quiet = shown(part(), force_terminal=True)
    assert not re.search(r"\x1b\[3[0-9]", quiet)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain == re.sub(r"\x1b\[[0-9;]*m", "", quiet)


def test_nothing_found_and_nothing_chosen() -> None:
    assert "The search found no point." in shown(part([], chosen=None))
    text = shown(part(chosen=None))
    assert "No point was chosen." in text
    assert "→" not in text
    assert "Another point" not in shown(part([point(1), point(2, file=None)], chosen=1))


def test_a_file_elsewhere_is_named_as_it_is() -> None:
    assert "--direction /far/01.safetensors -o" in shown(part([point(1, file="/far/01.safetensors"), point(2)]))


class Keyboard:
    """Answers in the place of a person, then the end of the input."""

    def __init__(self, *answers: str) -> None:
        self.answers: Iterator[str] = iter(answers)

    def __call__(self, prompt: str = "") -> str:
        for answer in self.answers:
            return answer
        raise EOFError


def asked(search: SearchPart, *answers: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("builtins.input", Keyboard(*answers))
    console = Console(file=io.StringIO(), width=80)
    number = ask_point(search, console)
    assert isinstance(console.file, io.StringIO)
    return number, console.file.getvalue()


@pytest.mark.parametrize(
    ("answers", "number", "again"),
    [
        (("3",), 3, 0),
        ((" 4 ",), 4, 0),
        (("03",), 3, 0),
        (("",), 2, 0),
        ((), 2, 0),
        (("0", "5", "-1", "2.0", "x", "[/]", "1"), 1, 6),
        (("nine",), 2, 1),
        (("²", "4"), 4, 1),
    ],
)
def test_asking_for_a_point(answers: tuple[str, ...], number: int, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = asked(part(), *answers, monkeypatch=monkeypatch)
    assert found == number
    assert text.count("Point to take [2]: ") == again + 1
    assert text.count("Expected one of 1, 2, 3, 4.") == again


def test_asking_where_nothing_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = asked(part(chosen=None), "", "4", monkeypatch=monkeypatch)
    assert found == 4
    assert text.count("Point to take: ") == 2
    with pytest.raises(UsageError, match="found the end of the input; give --pick"):
        asked(part(chosen=None), monkeypatch=monkeypatch)


def test_showing_a_search_does_not_import_torch() -> None:
    code = "import sys, abliterate.cli.search; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
