"""Options from files: `config` writes them, `--config` and `--from-record` take them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from abliterate.cli.config import written
from abliterate.cli.options import flag_of
from abliterate.config import RunSettings
from abliterate.record import read_record
from commandline import Result, abliterate
from planted import Planted, plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


def options(planted: Planted) -> str:
    return "\n".join(
        (
            f'model = "{planted.folder}"',
            f'harmful = "{planted.harmful}"',
            f'harmless = "{planted.harmless}"',
            f'borderline = "{planted.borderline}"',
            'method = "closed-form"',
            "max-new-tokens = 8",
            "no_cache = true",
            "no-control = true",
            "layers = [0, 1, 2, 3, 4]",
        )
    )


def file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*words: str) -> Result:
    return abliterate("run", *words, "--quiet")


def test_the_written_file_has_every_option_of_a_run_with_its_default() -> None:
    text = written("a/b")
    assert tomllib.loads(text) == {"model": "a/b"}
    used = "\n".join(
        line.removeprefix("# ") if " = " in line and line.startswith("# ") and line.split()[2] == "=" else line
        for line in text.splitlines()
    )
    values = tomllib.loads(used)
    for group in RunSettings.model_fields.values():
        for name, field in getattr(group.annotation, "model_fields", {}).items():
            flag = flag_of(name).removeprefix("--")
            assert f"# {flag} =" in text
            if field.default is not None:
                assert values[flag] in (field.default, str(field.default))


@pytest.mark.parametrize(
    ("key", "flag"), [("as", "--as"), ("realisation", "--as"), ("search", "--method"), ("method", "--method")]
)
def test_a_file_calls_an_option_as_the_command_line_or_the_settings_do(key: str, flag: str, tmp_path: Path) -> None:
    run("m", "--config", file(tmp_path, f'{key} = "nothing"'), "-o", "x").failed(f"{flag} nothing: input should be")
    run("m", "--config", file(tmp_path, 'az = "nothing"'), "-o", "x").failed("'az' is no option of run")


def test_a_file_takes_the_place_of_options_and_what_is_typed_comes_first(planted: Planted, tmp_path: Path) -> None:
    config = file(tmp_path, options(planted))
    assert run("--config", config, "-o", str(tmp_path / "out"), "--max-new-tokens", "6").code == 0
    settings = read_record(tmp_path / "out").settings
    assert settings["model"] == str(planted.folder)
    assert settings["searching"]["method"] == "closed-form"
    assert settings["evaluating"]["max_new_tokens"] == 6
    assert settings["editing"]["layers"] == "0,1,2,3,4"
    assert settings["evaluating"]["no_cache"]


def test_a_recorded_run_is_done_again_to_the_same_bytes(planted: Planted, tmp_path: Path) -> None:
    config = file(tmp_path, options(planted))
    first, again = tmp_path / "first", tmp_path / "again"
    assert run("--config", config, "-o", str(first)).code == 0
    done = run("--from-record", str(first), "-o", str(again))
    assert done.code == 0
    assert "Done again: all 1 files of weights have the SHA-256 of the record." in done.out
    assert read_record(first).output_sha256 == read_record(again).output_sha256
    other = run("--from-record", str(first / "abliteration.json"), "-o", str(tmp_path / "other"), "--strength", "0.5")
    assert "Done again: 0 of 1 files" in other.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "'stepz' is no option of run; did you mean steps?"),
        ('no-cache = "yes"', "no-cache: expected true or false, found 'yes'"),
        ("steps = true", "steps: expected another value, found True"),
        ("[prompts]\nlimit = 3", "'prompts' is no option of run"),
        ("[steps]\na = 3", "steps: expected a text, a number or a list of these, found an object"),
        ("points = 99", "--points 99: input should be less than or equal to 50"),
        ("steps =", "one that cannot be read"),
        ("trust-remote-code = true", "trust-remote-code: no file may say so; give it on the command line"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    result = run("m", "--config", file(tmp_path, text), "-o", str(tmp_path / "out"))
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1


def test_records_of_other_commands_are_no_run(planted: Planted, tmp_path: Path) -> None:
    result = run("--from-record", str(tmp_path), "-o", str(tmp_path / "out"))
    assert result.code == 2
