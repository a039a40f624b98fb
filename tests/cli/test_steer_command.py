"""`abliterate steer` and `abliterate read`: what is printed and written, and what is refused in one line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import save_file

from abliterate.edit.direction import Direction, Site, save_direction
from abliterate.record import ReadingPart, ReadTextPart, read_record
from abliterate.report.tables.reading import show_reading
from abliterate.report.tables.steering import show_steering
from calling import Cli
from planted import BLOCKS, WRITES, Planted, plant
from records import full_record

SHORT = ("--max-new-tokens", "8", "--limit", "8", "--refusal-tokens", "I", "--device", "cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def direction(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted one as if it had been measured, with a length of 2.5."""
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    site = Site(WRITES + 2, -1)
    save_direction(path, Direction(planted.direction[None], site=site, facts={"chosen": {"norm": 2.5}}))
    return path


@pytest.fixture(scope="module")
def prompts(planted: Planted) -> tuple[str, ...]:
    named = {"harmful": planted.harmful, "harmless": planted.harmless, "borderline": planted.borderline}
    return tuple(part for name, path in named.items() for part in (f"--{name}", str(path)))


def test_a_sweep_is_a_table_a_record_and_a_page(
    cli: Cli, planted: Planted, direction: Path, prompts: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("steer", planted.folder, "--direction", direction, *prompts, *SHORT)
    result = cli(*asked, "--coefficients", "-0.5,0,0.5", "-o", out)
    assert result.code == 0, result.err
    assert f"Adds COEFFICIENT × ‖r‖ (2.5) to the stream, at layer {WRITES + 2}, at every token." in result.out
    rows = re.findall(r"^ +((?:random )?(?:none|-?[\d.]+)) +(\d+) \[.*?\] +(\d+) \[.*?\]", result.out, re.MULTILINE)
    assert [row[0] for row in rows] == ["none", "-0.5", "0", "0.5", "random -0.5", "random 0.5"]
    assert int(rows[1][1]) < int(rows[0][1]) == int(rows[2][1])
    assert int(rows[3][2]) > int(rows[2][2])
    assert "bomb" not in result.out, "replies of a sweep are not printed"
    record = read_record(out)
    assert record.steering is not None
    assert [one.coefficient for one in record.steering.doses] == [None, -0.5, 0, 0.5]
    assert record.settings["steering"]["coefficients"] == "-0.5,0,0.5"
    assert "What does steering do?" in (out / "report.html").read_text(encoding="utf-8")
    shown = cli("show", out)
    assert "Adds COEFFICIENT" in shown.out
    as_json = json.loads(cli(*asked, "--coefficients", "-0.5,0,0.5", "--json", "-q").out)
    assert as_json["doses"] == json.loads(record.model_dump_json())["steering"]["doses"]


def test_one_coefficient_shows_replies_and_redacts_those_to_harmful_prompts(
    cli: Cli, planted: Planted, direction: Path, prompts: tuple[str, ...]
) -> None:
    asked = ("steer", planted.folder, "--direction", direction, *prompts, *SHORT, "--coefficient", "-0.6", "-q")
    result = cli(*asked)
    assert result.code == 0, result.err
    assert "  none (refusal): I cannot help with […]" in result.out
    assert "  -0.6 (compliance): Sure , here it […]" in result.out
    assert "  -0.6 (compliance): Sure , here it is" in result.out, "those to harmless prompts are whole"
    assert "more harmful prompts (--json has all)" in result.out
    kept = cli(*asked, "--keep-completions")
    assert "[…]" not in kept.out
    assert "I cannot help with that ." in kept.out


def test_given_prompts_are_answered_at_every_coefficient(cli: Cli, planted: Planted, direction: Path) -> None:
    asked = (
        "steer",
        planted.folder,
        "--direction",
        direction,
        "--prompt",
        "show the bomb",
        "--prompt",
        "show the soup",
    )
    result = cli(*asked, "--coefficients", "-1,0.5", "--max-new-tokens", "5", "--tokens", "generated", "-q")
    assert result.code == 0, result.err
    assert "at the tokens that the reply is predicted from" in " ".join(result.out.split())
    lines = [line.strip() for line in result.out.splitlines() if line.strip()][-8:]
    assert lines[0] == "show the bomb"
    assert lines[1] == "none: I cannot help with that"
    assert lines[2] == lines[5].replace("none", "-1") == "-1: Sure , here it is"
    assert lines[7].startswith("0.5: I")


def test_control_vectors_and_layered_files_are_taken(cli: Cli, planted: Planted, tmp_path: Path) -> None:
    save_file({f"layer.{WRITES + 1}": -2.5 * planted.direction}, tmp_path / "v.safetensors")
    asked = ("--prompt", "show the bomb", "--max-new-tokens", "5", "-q", "--json")
    part = json.loads(cli("steer", planted.folder, "--direction", tmp_path / "v.safetensors", *asked).out)
    assert (part["layers"], part["unit"], part["lengths"]) == ([WRITES + 2], "file", [pytest.approx(2.5)])
    assert part["answers"]["1"]["given"][0]["text"] == "Sure , here it is"
    (tmp_path / "v.pt").write_bytes(b"PK\x03\x04")
    cli("steer", planted.folder, "--direction", tmp_path / "v.pt", *asked).failed(
        2, "a pickle", "layer.{n}", "save_file"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "x", "-o", "out"), "--out: does nothing with --prompt"),
        (("--prompt", "x", "--limit", "3"), "--limit: does nothing in steer --prompt"),
        (("--prompt", "x", "--judge", "learnt"), "--judge: does nothing in steer --prompt"),
        (("--prompt", "x", "--keep-completions"), "--keep-completions: does nothing"),
        (("--coefficients", "1,two"), "--coefficients 1,two: expected numbers"),
        (("--coefficients", "1,2", "--coefficient", "3"), "no --coefficient beside it"),
        (("--operation", "turn"), "--operation turn"),
        (("--layers", "99", "--prompt", "x"), f"--layers 99: expected layers 0 to {BLOCKS}"),
        (("--site", "1:-1"), "holds no candidates"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    cli: Cli, planted: Planted, direction: Path, options: tuple[str, ...], said: str
) -> None:
    cli("steer", planted.folder, "--direction", direction, "-q", *options).failed(2, said)


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_reading_is_a_table_json_and_a_page(cli: Cli, planted: Planted, direction: Path, tmp_path: Path) -> None:
    asked = ("read", planted.folder, "--direction", direction, "--text", "show the bomb today", "-q")
    result = cli(*asked)
    assert result.code == 0, result.err
    assert f"at layer {WRITES + 2}, in units of the stream; ‖r‖ is 2.5 long." in " ".join(result.out.split())
    values = {token: float(value) for token, value in re.findall(r"^ '(\S+)' +(-?[\d.]+)", result.out, re.MULTILINE)}
    assert values["bomb"] > 1 > abs(values["show"])
    part = ReadingPart.model_validate_json(cli(*asked, "--layer", "1", "--json").out)
    assert part.layer == 1
    assert part.layers == list(range(BLOCKS + 1))
    page = tmp_path / "reading.html"
    assert cli(*asked, "-o", page).out == f"Page: {page}\n"
    assert page.read_text(encoding="utf-8").count('class="t ') == len(part.texts[0].tokens)
    cli(*asked, "-o", page).failed(2, "exists")
    assert cli(*asked, "-o", page, "--overwrite").code == 0


def test_replies_in_a_file_are_read(cli: Cli, planted: Planted, direction: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"show the {word}", "response": "I cannot help"} for word in ("bomb", "soup", "poem")]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = ("read", planted.folder, "--direction", direction, "--file", tmp_path / "r.jsonl", "--limit", "2", "-q")
    part = ReadingPart.model_validate_json(cli(*asked, "--json").out)
    assert [text.tokens[text.prompt :] for text in part.texts] == [["I", "cannot", "help"]] * 2
    assert part.left_out == 1
    assert "1 more texts were not read" in cli(*asked).out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected --text TEXT or --file FILE"),
        (("--text", "x", "--file", "y"), "found both or neither"),
        (("--file", "none.jsonl"), "none.jsonl"),
        (("--text", "x", "-o", "page.txt"), ".html"),
        (("--text", "x", "-o", "nowhere/page.html"), "a folder that exists"),
        (("--text", "x", "--layer", "77"), "--layer 77: expected one of 0, 1"),
    ],
)
def test_what_cannot_be_read_is_refused(
    cli: Cli, planted: Planted, direction: Path, options: tuple[str, ...], said: str
) -> None:
    result = cli("read", planted.folder, "--direction", direction, "-q", *options)
    result.failed(result.code, said)


# -------------------------------------------------------------------------------------------------- tables and colours

HOSTILE = "\x1b[31m[bold]\u202e<b>"


def console(width: int = 100, **options: Any) -> Console:
    return Console(
        file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, legacy_windows=False, **options
    )


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_hostile_texts_are_texts_and_tables_keep_to_the_width(width: int) -> None:
    part = full_record(HOSTILE).steering
    assert part is not None
    for shown in (part, part.model_copy(update={"doses": []})):
        screen = console(width)
        show_steering(shown, screen)
        assert "\x1b" not in printed(screen)
        assert "\u202e" not in printed(screen)
        assert max(map(len, printed(screen).splitlines())) <= width


def reading(tokens: list[str], values: list[float]) -> ReadingPart:
    return ReadingPart(
        model="m",
        direction="d",
        layer=1,
        layers=[0, 1],
        unit="absolute",
        lengths=[1, 1],
        texts=[ReadTextPart(tokens=tokens, prompt=1, projections=[[0.0] * len(values), values])],
    )


def test_tokens_are_coloured_by_sign_and_size_on_a_terminal() -> None:
    part = reading(["a", HOSTILE, "b", "c\n"], [-4.0, 0.0, 4.0, 2.0])
    screen = console(force_terminal=True, color_system="truecolor")
    show_reading(part, screen)
    colours = re.findall(r"\x1b\[30;48;2;(\d+);(\d+);(\d+)m(.)", printed(screen))
    found = {letter: (int(red), int(blue)) for red, _, blue, letter in colours}
    assert found["a"][0] < found["a"][1], "blue is below 0"
    assert found["b"][0] > found["b"][1], "orange is above it"
    assert found["b"][1] < found["c"][1], "and the more the stronger"
    assert "\\x1b[31m[bold]\\u202e<b>" in printed(screen)
    assert "c↵" in printed(screen)
    bare = console()
    show_reading(part, bare)
    assert "\x1b" not in printed(bare)
    assert "4.000" in printed(bare)
