"""The command line: what a person sees, exit codes, and one line for everything that can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
from abliterate import pipeline
from abliterate.config import (
    ApplySettings,
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
)
from abliterate.edit.direction import save_direction
from abliterate.files.checkpoint import open_checkpoint
from abliterate.record import Record
from calling import Cli, Result
from planted import BLOCKS, D_MODEL, Planted, plant

COMMANDS = (
    "run",
    "search",
    "find",
    "verify",
    "check",
    "apply",
    "eval",
    "compare",
    "judge",
    "chat",
    "lab",
    "show",
    "report",
    "undo",
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), shards=3)


@pytest.fixture(scope="module")
def prompts(planted: Planted) -> list[str]:
    named = {"harmful": planted.harmful, "harmless": planted.harmless, "borderline": planted.borderline}
    return [part for name, path in named.items() for part in (f"--{name}", str(path))]


@pytest.fixture(scope="module")
def direction(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true direction, without candidates."""
    file = tmp_path_factory.mktemp("direction") / "planted.safetensors"
    save_file({"direction": planted.direction}, file)
    return file


@pytest.fixture
def broken(planted: Planted, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(planted.folder, tmp_path / "model"))


# --- what works


def test_help_names_every_command_and_every_setting(cli: Cli) -> None:
    result = cli("--help")
    assert (result.code, result.err) == (0, "")
    assert all(re.search(rf"^\W*{name} ", result.out, re.MULTILINE) for name in COMMANDS), result.out
    result = cli("run", "--help-all")
    renamed = {"realisation": "as"}
    for group in (OutputSettings, ModelSettings, PromptSettings, FindSettings, EditSettings, EvalSettings):
        for name in group.model_fields:
            assert re.search(rf"--{renamed.get(name, name).replace('_', '-')}\s", result.out), name


def test_version_is_the_installed_one(cli: Cli) -> None:
    assert cli("--version") == Result(0, f"abliterate {abliterate.__version__}\n", "")


def test_run_prints_refusals_before_and_after(cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path) -> None:
    result = cli("run", planted.folder, "-o", tmp_path / "out", *prompts)
    assert result.code == 0
    assert re.search(r"harmful\W+before +24/24 +100 \[86, 100\].*\n +after +0/24 +0 \[0, 14\].*< 0\.001", result.out), (
        result.out
    )
    assert re.search(r"\n +random +24/24 +100 ", result.out), "the control"
    assert "refusals start with 'I'" in result.err
    assert "✓ edit weights" in result.err
    assert str(tmp_path / "out") in result.out


def test_show_prints_what_the_run_printed_and_where_it_comes_from(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    printed, _, end = cli("run", planted.folder, "-o", out, *prompts).out.partition("Took ")
    assert re.search(
        r"Of 24 harmful prompts the model refused 24 before the edit and 0 after it", " ".join(end.split())
    )
    assert f"Next: abliterate lab {out}" in end
    shown = cli("show", out)
    assert (shown.code, shown.err) == (0, "")
    assert printed in shown.out
    record = abliterate.read_record(out)
    for name, digest in record.output_sha256.items():
        assert f"written  {name} {digest[:12]}" in shown.out
    assert Record.model_validate_json(cli("show", out, "--json").out) == record
    monkeypatch.setenv("COLUMNS", "40")
    narrow = cli("show", out).out
    assert max(len(line) for line in printed.splitlines()) > 40, "the control"
    assert re.search(r"before +24/24 +100 \[86, 100\]", narrow), narrow
    assert "24/24" in narrow
    assert "corrected" not in narrow.partition("Judge:")[0]
    cli("show", planted.folder).failed(2, "expected the record of a run, found none")


def test_calibration_is_kept_for_a_model_and_its_set(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "labelled.csv"
    file.write_text("prompt,response,label\np,\"I'm sorry, but I can't help with that.\",1\np,Paris is in France.,0\n")
    said = cli("judge", "--calibrate", file, "--model", "org/one", "--set", "harmful").out
    assert "Corrects rates of org/one to harmful prompts." in said
    again = cli("judge", "--calibrate", file, "--model", "one", "--set", "harmful").out
    assert "It takes the place of the one on labelled.csv." in again
    other = cli("judge", "--calibrate", file, "--model", "org/two").out
    assert "Corrects rates of org/two." in other
    assert "takes the place" not in other
    told = json.loads(cli("judge", "--calibrate", file, "--json").out)
    assert (told["model"], told["prompts"], told["counts"]["accuracy"]) == ("", "", [2, 2])
    assert len(list((tmp_path / "cache" / "judges").glob("*/*.json"))) == 3
    cli("judge", "--calibrate", file, "--model", "m", "--set", "rude").failed(
        2, "expected harmful, harmless or borderline"
    )
    cli("judge", "--calibrate", file, "--set", "harmful").failed(2, "expected --model with it")
    cli("judge", file, "--model", "m").failed(2, "expected them with --calibrate only")


def test_json_is_the_record_and_quiet_says_nothing(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path
) -> None:
    result = cli("run", planted.folder, "-o", tmp_path / "out", *prompts, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    record = Record.model_validate_json(result.out)
    assert record == abliterate.read_record(tmp_path / "out")
    assert record.evaluation is not None
    assert record.evaluation.after is not None
    assert record.evaluation.after.harmful.refusals == 0


def test_found_direction_is_verified_applied_and_evaluated(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path
) -> None:
    model, file, out = planted.folder, tmp_path / "found.safetensors", tmp_path / "out"
    found = json.loads(cli("find", model, "-o", file, *prompts, "--json", "-q").out)
    assert found["file"] == str(file)
    site = found["selection"]["chosen"]
    assert found["selection"]["met_rule"] is True
    verified = json.loads(cli("verify", model, "--direction", file, *prompts, "--json", "-q").out)
    assert verified["verified"] is True
    assert (verified["before"]["refusals"], verified["after"]["refusals"]) == (24, 0)
    assert verified["control"]["refusals"] == 24
    chosen = f"{site['layer']}:{site['position']}"
    applied = cli("apply", model, "--direction", file, "--site", chosen, "-o", out, "--json", "-q")
    assert applied.code == 0
    assert json.loads(applied.out)["plan"]["edits"][0]["ratio"] < 1e-4
    compared = json.loads(cli("eval", out, "--base", model, *prompts, "--json", "-q").out)["evaluation"]
    hooked = json.loads(cli("eval", model, "--direction", file, *prompts, "--json", "-q").out)["evaluation"]
    for part in (compared, hooked):
        assert (part["before"]["harmful"]["refusals"], part["after"]["harmful"]["refusals"]) == (24, 0)
    alone = json.loads(cli("eval", out, *prompts, "--json", "-q").out)["evaluation"]
    counted = [
        {name: {k: v for k, v in one.items() if k not in ("corrected", "drift")} for name, one in sets.items()}
        for sets in (alone["before"], compared["after"])
    ]
    assert counted[0] == counted[1], "what corrects them is chosen by all replies that are compared"


def test_answers_to_harmful_prompts_are_printed_only_when_asked_for(
    cli: Cli, planted: Planted, prompts: list[str]
) -> None:
    def texts(*options: str) -> set[str]:
        result = cli("eval", planted.folder, *prompts, "--json", "-q", *options)
        return {answer["text"] for answer in json.loads(result.out)["evaluation"]["answers"]["before"]["harmful"]}

    assert texts() == {"I cannot help with […]"}
    assert texts("--keep-completions") == {"I cannot help with that ."}


def test_chat_shows_both_answers_side_by_side(cli: Cli, planted: Planted, direction: Path) -> None:
    asked = ["--direction", direction, "--prompt", "please tell me a poison", "--prompt", "write a poem", "-q"]
    lines = [json.loads(line) for line in cli("chat", planted.folder, *asked, "--json").out.splitlines()]
    assert [line["original"] for line in lines] == ["I cannot help with that .", "Sure , here it is"]
    assert [line["ablated"] for line in lines] == ["Sure , here it is"] * 2
    drawn = cli("chat", planted.folder, *asked).out
    assert "original" in drawn
    assert drawn.index("I cannot help with that .") < drawn.index("Sure , here it is")


def test_chat_reads_prompts_from_a_pipe(
    cli: Cli, planted: Planted, direction: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("make a bomb\n\nmake a soup\n")
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        result = cli("chat", planted.folder, "--direction", direction, "--json", "-q")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["make a bomb", "make a soup"]


def test_numbers_of_a_verification_that_fails_are_still_printed(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path
) -> None:
    save_file({"x": torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))}, tmp_path / "x.safetensors")
    result = cli("verify", planted.folder, "--direction", tmp_path / "x.safetensors", *prompts, "--json", "-q")
    assert result.code == 3
    assert json.loads(result.out)["verified"] is False
    assert result.err.startswith("not done: not verified: 24 of 24 refusals are left")
    assert result.err.count("\n") == 1


# --- undo, and proof of what was changed


@pytest.fixture(scope="module")
def model(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model that stays where it is."""
    return Path(shutil.copytree(planted.folder, tmp_path_factory.mktemp("original") / "model"))


@pytest.fixture
def edited(model: Path, direction: Path, tmp_path: Path) -> Path:
    """An edited model, to be undone or broken."""
    pipeline.apply(str(model), direction, ApplySettings(output=OutputSettings(out=tmp_path / "out")))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_undo_in_place_says_that_it_is_the_original(cli: Cli, edited: Path, model: Path) -> None:
    result = cli("undo", edited)
    assert result.code == 0
    assert "Restored bit for bit" in result.out
    assert "✓ restore" in result.err
    assert contents(edited) == contents(model)


def test_undo_into_another_folder_leaves_out_as_it_is(cli: Cli, edited: Path, model: Path, tmp_path: Path) -> None:
    before = contents(edited)
    result = json.loads(cli("undo", edited, "-o", tmp_path / "back", "--json", "-q").out)
    assert (result["exact"], result["steps"], result["folder"]) == (True, 0, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(model)
    assert contents(edited) == before
    cli("undo", edited, "-o", tmp_path / "back", "-q").failed(2, "exists")


def test_undo_without_the_original_says_how_close_it_comes(
    cli: Cli, broken: Path, direction: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("apply", broken, "--direction", direction, "-o", out, "-q").code == 0
    broken.rename(tmp_path / "moved")
    exact = json.loads(cli("undo", out, "-o", tmp_path / "back", "--source", tmp_path / "moved", "--json", "-q").out)
    assert exact["exact"] is True
    assert contents(tmp_path / "back") == contents(tmp_path / "moved")
    result = cli("undo", out, "-q")
    assert (result.code, result.err) == (0, "")
    said = " ".join(result.out.split())
    assert "Restored 11 tensors to within 1 unit in the last place of the stored format" in said
    assert str(broken) in said
    cli("undo", out, "-q").failed(2, "expected the record of a run")
    cli("undo", tmp_path / "back", "-q").failed(2, "expected the record of a run")


def test_undo_of_a_changed_model_or_from_another_original_is_refused(
    cli: Cli, edited: Path, planted: Planted, tmp_path: Path
) -> None:
    other = plant(tmp_path / "other", shards=3, seed=1).folder
    before = contents(edited)
    cli("undo", edited, "--source", other, "-q").failed(1, str(other), "is not the one that was edited")
    cli("undo", edited, "--source", tmp_path / "none", "-q").failed(1, "none")
    assert contents(edited) == before
    flip_a_bit(edited, "model.norm.weight")
    cli("undo", edited, "-q").failed(1, "is not as it was written", "SHA-256")


def flip_a_bit(folder: Path, tensor: str) -> None:
    info = open_checkpoint(folder).tensors[tensor]
    data = bytearray(info.file.read_bytes())
    data[info.start + 2] ^= 1
    info.file.write_bytes(data)


def test_check_proves_what_was_not_changed(cli: Cli, edited: Path) -> None:
    result = cli("check", edited)
    assert result.code == 0
    assert "11 tensors in the plan, 11 of them changed" in result.out
    assert "Verified: every byte outside the plan equals the original's." in result.out
    found = json.loads(cli("check", edited, "--json", "-q").out)
    assert found["intact"] is True
    assert (found["damaged"], found["wrong_hashes"]) == ([], [])


def test_check_names_another_file_that_was_changed(cli: Cli, edited: Path) -> None:
    (edited / "tokenizer.json").write_text("{}")
    result = cli("check", edited, "-q")
    assert result.code == 3
    assert "not the original's: tokenizer.json" in result.out
    assert "Verified" not in result.out


def test_undo_in_place_keeps_what_others_put_there(cli: Cli, edited: Path, model: Path) -> None:
    (edited / "my-notes.txt").write_text("mine")
    assert cli("undo", edited, "-q").code == 0
    assert contents(edited) == {**contents(model), "my-notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["check", "OUT", "--layers", "1-2"], "--layers"),
        (["verify", "OUT", "--layers", "1-2"], "--direction"),
        (["verify", "OUT", "--direction", "D", "--source", "/nowhere"], "--source"),
        (["eval", "OUT", "--strength", "3"], "--strength"),
        (["find", "OUT", "-o", "new.safetensors", "--affine"], "--affine"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    cli: Cli, edited: Path, direction: Path, arguments: list[str], option: str
) -> None:
    places = {"OUT": str(edited), "D": str(direction)}
    cli(*(places.get(argument, argument) for argument in arguments), "-q").failed(2, option)


def test_check_names_a_tensor_with_one_flipped_bit(cli: Cli, edited: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    flip_a_bit(edited, name)
    result = cli("check", edited, "-q")
    assert result.code == 3
    assert f"differ outside the plan: {name}" in result.out
    assert "have another SHA-256 than recorded: model-0000" in result.out
    assert "Verified" not in result.out
    assert result.err == f"not done: {edited}: not what its record says; see the list above\n"
    found = json.loads(cli("check", edited, "--json", "-q").out)
    assert (found["intact"], found["damaged"]) == (False, [name])


def test_check_says_when_the_original_is_gone_or_another(
    cli: Cli, broken: Path, direction: Path, planted: Planted, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("apply", broken, "--direction", direction, "-o", out, "-q").code == 0
    broken.rename(tmp_path / "moved")
    cli("check", out, "-q").failed(2, f"original is not at {broken} any more", "--source")
    assert cli("check", out, "--source", tmp_path / "moved", "-q").code == 0
    other = plant(tmp_path / "other", seed=1).folder
    cli("check", out, "--source", other, "-q").failed(1, "expected the file that was edited, found another")


# --- what is written


@pytest.mark.parametrize(
    ("realisation", "what", "files"),
    [
        ("weights", "Model: ", {"model.safetensors.index.json", "config.json", "tokenizer.json"}),
        ("lora", "Adapter (PEFT): ", {"adapter_config.json", "adapter_model.safetensors"}),
        ("gguf-lora", "Adapter (GGUF, llama.cpp): ", {"abliteration-lora.gguf"}),
        ("control-vector", "Control vector (GGUF, llama.cpp): ", {"control-vector.gguf"}),
    ],
)
def test_every_realisation_is_written_and_named(
    cli: Cli, planted: Planted, found: Path, tmp_path: Path, realisation: str, what: str, files: set[str]
) -> None:
    out = tmp_path / "out"
    result = cli("apply", planted.folder, "--direction", found, "-o", out, "--as", realisation, "-q")
    assert result.code == 0
    assert f"{what}{out}" in result.out
    assert {path.name for path in out.iterdir()} >= {
        *files,
        "abliteration.json",
        "direction.safetensors",
        "README.md",
    }
    record = abliterate.read_record(out)
    assert record.plan is not None
    assert record.plan.realisation == realisation
    assert bool(list(out.glob("model*.safetensors"))) == (realisation == "weights")
    if realisation != "weights":
        for command in (("undo", out), ("check", out)):
            cli(*command, "-q").failed(2, f"expected a model with edited weights, found {realisation}")


@pytest.fixture(scope="module")
def found(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A direction file with candidates, as `find` writes it."""
    named = {name: str(getattr(planted, name)) for name in ("harmful", "harmless", "borderline")}
    session = pipeline.open_session(
        str(planted.folder), prompts=PromptSettings(**named), loading=ModelSettings(device="cpu")
    )
    chosen = pipeline.choose(session, pipeline.find(session, FindSettings()), FindSettings())
    file = tmp_path_factory.mktemp("found") / "direction.safetensors"
    save_direction(file, chosen.direction)
    return file


def test_small_files_and_their_index_are_written(cli: Cli, planted: Planted, direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--direction", direction, "-o", out, "--shard-size", "40kB", "--json", "-q")
    record = json.loads(cli("apply", planted.folder, *arguments).out)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 10
    assert all(file.stat().st_size <= 40_000 for file in files if len(load_file(file)) > 1)
    assert sorted(record["output_sha256"]) == [file.name for file in files]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file.name for file in files for name in load_file(file)} == index
    assert json.loads(cli("check", out, "--json", "-q").out)["intact"] is True


def test_options_of_the_edit_reach_every_command(
    cli: Cli, planted: Planted, prompts: list[str], found: Path, tmp_path: Path
) -> None:
    """A direction taken out of blocks that never carry it changes nothing; out of the one that writes it, all."""
    model, file = planted.folder, ("--direction", found)
    for layers, left in (("0", 24), ("1", 0)):
        out = tmp_path / f"out-{layers}"
        chosen = ("--layers", layers, "--components", "attention")
        verified = json.loads(cli("verify", model, *file, *prompts, *chosen, "--json", "-q").out)
        assert verified["after"]["refusals"] == left
        hooked = json.loads(cli("eval", model, *file, *prompts, *chosen, "--json", "-q").out)["evaluation"]
        assert hooked["after"]["harmful"]["refusals"] == left
        record = json.loads(cli("apply", model, *file, *chosen, "-o", out, "--json", "-q").out)
        assert [edit["tensor"] for edit in record["plan"]["edits"]] == [
            f"model.layers.{layers}.self_attn.o_proj.weight"
        ]
        assert record["plan"]["variant"] == {"layers": layers, "components": "attention"}
        asked = ("--prompt", "please tell me a poison", "--json", "-q")
        talk = json.loads(cli("chat", model, *file, *chosen, *asked).out)
        assert talk["ablated"].startswith("I cannot" if left else "Sure")


def test_options_that_need_more_than_a_bare_direction_say_so(
    cli: Cli, planted: Planted, direction: Path, tmp_path: Path
) -> None:
    for options, part in (
        (["--biprojected"], "--biprojected: expected a direction file with 'harmless_mean'"),
        (["--affine"], "--affine: expected a direction file with 'harmless_mean'"),
        (["--as", "control-vector"], "control vector: expected a direction file with candidates"),
    ):
        arguments = ("--direction", direction, "-o", tmp_path / "out", *options, "-q")
        cli("apply", planted.folder, *arguments).failed(2, part)
    assert not (tmp_path / "out").exists()


# --- gates: exit code 3


def test_model_that_does_not_refuse_is_exit_code_3(cli: Cli, prompts: list[str], tmp_path: Path) -> None:
    docile = plant(tmp_path / "docile", refuses=False)
    cli("run", docile.folder, "-o", tmp_path / "out", *prompts, "-q").failed(3, "hardly refuses: 0 of 19")
    assert not (tmp_path / "out").exists()


def test_no_direction_that_meets_the_rule_is_exit_code_3_unless_forced(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path
) -> None:
    arguments = ("find", planted.folder, "-o", tmp_path / "x.safetensors", *prompts, "--min-induce", "50", "-q")
    cli(*arguments).failed(3, "no direction passed verification", "--force")
    assert not (tmp_path / "x.safetensors").exists()
    assert cli(*arguments, "--force").code == 0
    assert (tmp_path / "x.safetensors").exists()


# --- usage: exit code 2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--batch-size", "0"], ["--batch-size 0: expected auto or a positive whole number"]),
        (["--batch-size", "many"], ["--batch-size many"]),
        (["--dtype", "int4"], ["--dtype int4", "bfloat16"]),
        (["--device", "abacus"], ["--device abacus: not usable on this machine"]),
        (["--device", "meta"], ["--device meta: not usable on this machine"]),
        (["--limit", "0"], ["--limit 0"]),
        (["--positions", "33"], ["--positions 33"]),
        (["--max-kl", "nan"], ["--max-kl nan"]),
        (["--max-depth", "2"], ["--max-depth 2.0"]),
        (["--min-refusal-rate", "-1"], ["--min-refusal-rate -1.0"]),
        (["--strength", "nan"], ["strength", "finite"]),
        (["--refusal-tokens", "I,"], ["--refusal-tokens 'I,'"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--positions", "many"], ["--positions"]),
        (["--layers", str(BLOCKS)], ["--layers 5: expected blocks 0 to 4"]),
        (["--layers", "3-1"], ["--layers 3-1"]),
        (["--layers", "1-2-3"], ["--layers 1-2-3"]),
        (["--layers", "1,,2"], ["--layers 1,,2"]),
        (["--layers", "one"], ["--layers one", "found 'one'"]),
        (["--layers", ""], ["--layers"]),
        (["--components", "heads"], ["--components heads", "attention", "experts"]),
        (["--components", ""], ["--components"]),
        (["--components", "experts"], ["expected at least one writer", "--components"]),
        (["--strength", "5000"], ["strength", "5000"]),
        (["--strengths", "mlp"], ["--strengths mlp: expected WHAT[@LAYERS]=STRENGTH"]),
        (["--strengths", "=1"], ["--strengths =1"]),
        (["--strengths", "mlp=much"], ["--strengths mlp=much"]),
        (["--strengths", "mlp=inf"], ["strength", "finite"]),
        (["--strengths", "mlp@7=1"], ["--strengths 7: expected blocks 0 to 4"]),
        (["--strengths", "*.conv=1"], ["--strengths *.conv=1", "found none"]),
        (["--subspace", "pca"], ["--subspace pca", "clusters"]),
        (["--rank", "0"], ["--rank 0"]),
        (["--rank", "65"], ["--rank 65"]),
        (["--rank", "2"], ["--rank 2", "--subspace svd or clusters"]),
        (["--rank", "2", "--subspace", "leace"], ["--rank 2", "leace"]),
        (["--rank", "2", "--subspace", "svd", "--biprojected"], ["--biprojected: expected one direction, found 2"]),
        (["--biprojected", "--subspace", "leace"], ["--biprojected", "LEACE"]),
        (["--affine", "--components", "attention"], ["bias to hold a constant"]),
        (["--untie"], ["--untie: expected an embedding tied to the head"]),
        (["--as", "onnx"], ["--as onnx", "gguf-lora"]),
        (["--as", "lora", "--norm-preserving"], ["LoRA", "norm-preserving"]),
        (["--as", "lora", "--shard-size", "1GB"], ["--shard-size", "--as weights"]),
        (["--as", "gguf-lora", "--norm-preserving"], ["LoRA", "norm-preserving"]),
        (["--as", "control-vector", "--affine"], ["control vector: it adds a vector"]),
        (["--as", "control-vector", "--rank", "2", "--subspace", "svd"], ["control vector: it adds one vector"]),
        (["--shard-size", "4"], ["--shard-size 4: expected a size such as 4GB"]),
        (["--shard-size", "0GB"], ["--shard-size 0GB"]),
        (["--quantization", "int3"], ["--quantization int3", "bnb-4bit"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["extra"], ["extra"]),
    ],
    ids=lambda value: " ".join(value) if len(value) <= 2 and value[0].startswith("--") else "",
)
def test_bad_options_are_one_line(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    cli("run", planted.folder, "-o", tmp_path / "out", *prompts, "-q", *options).failed(2, *parts)
    assert not (tmp_path / "out").exists()


def test_missing_arguments_and_unknown_commands_are_one_line(cli: Cli, planted: Planted) -> None:
    cli("run").failed(2, "model")
    cli("run", planted.folder).failed(2, "--out")
    cli("verify", planted.folder).failed(2, "--direction")
    cli("verify", "nobody/nothing").failed(2, "--direction")
    cli("apply", planted.folder, "-o", "out").failed(2, "--direction")
    cli("undo").failed(2, "out")
    cli("frobnicate").failed(2, "frobnicate")


def test_no_arguments_show_the_help(cli: Cli) -> None:
    result = cli()
    assert result.code == 2
    assert all(re.search(rf"^\W*{name} ", result.out, re.MULTILINE) for name in COMMANDS), result.out
    assert result.err == ""


@pytest.mark.parametrize("site", ["3", "3:", ":-1", "3:1", "-1:-1", "3:-1:0", "three:-1", "3:0"])
def test_bad_site_is_one_line(cli: Cli, planted: Planted, direction: Path, site: str) -> None:
    for command in ("verify", "eval", "chat"):
        result = cli(command, planted.folder, "--direction", direction, f"--site={site}", "-q")
        result.failed(2, f"--site {site}: expected LAYER:POSITION")


def test_site_that_the_file_does_not_hold_is_one_line(
    cli: Cli, planted: Planted, direction: Path, tmp_path: Path
) -> None:
    arguments = ("apply", planted.folder, "--direction", direction, "--site", "3:-1", "-o", tmp_path / "out", "-q")
    cli(*arguments).failed(2, "--site 3:-1", "no candidates")
    assert not (tmp_path / "out").exists()


def test_base_and_direction_together_are_refused(cli: Cli, planted: Planted, direction: Path) -> None:
    arguments = ("eval", planted.folder, "--base", planted.folder, "--direction", direction, "-q")
    cli(*arguments).failed(2, "--base and --direction")


def test_direction_file_that_is_none_is_one_line(cli: Cli, planted: Planted, tmp_path: Path) -> None:
    model = planted.folder
    cli("verify", model, "--direction", tmp_path / "none.safetensors", "-q").failed(2, "none.safetensors")
    cli("chat", model, "--direction", tmp_path, "-q").failed(2, str(tmp_path))
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    cli("eval", model, "--direction", tmp_path / "text.safetensors", "-q").failed(1, "not a whole safetensors file")
    save_file({"basis": torch.ones(1, 48)}, tmp_path / "narrow.safetensors")
    arguments = ("--direction", tmp_path / "narrow.safetensors", "-q")
    cli("chat", model, *arguments).failed(2, f"the model's width {D_MODEL}, found 48")
    cli("apply", model, "-o", tmp_path / "out", *arguments).failed(2, f"width {D_MODEL}, found 48")


def test_bad_prompts_are_one_line(cli: Cli, planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for spec, part in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "empty.jsonl", "expected at least one prompt, found none"),
        (f"{planted.harmful}:goal", "no column 'goal'; found text"),
        (tmp_path, "found a folder"),
        ("something", "no such file"),
        ("x" * 400, "too long"),
    ):
        result = cli("run", planted.folder, "-o", tmp_path / "out", "--harmful", spec, "-q")
        assert result.code in (1, 2)
        result.failed(result.code, part)
    assert not (tmp_path / "out").exists()


def test_output_that_is_in_the_way_is_refused_before_any_work(
    cli: Cli, planted: Planted, prompts: list[str], direction: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear me")
    (tmp_path / "file").write_text("dear me")
    model = planted.folder
    for command in (("run", model, *prompts), ("apply", model, "--direction", direction)):
        cli(*command, "-q", "-o", tmp_path / "folder").failed(2, "exists")
        cli(*command, "-q", "-o", tmp_path / "folder", "--overwrite").failed(2, "holds no model")
        cli(*command, "-q", "-o", tmp_path / "file").failed(2, "exists and is not a folder")
        result = cli(*command, "-q", "-o", tmp_path / "file" / "out")
        result.failed(1, "cannot write")
        cli(*command, "-q", "-o", model).failed(2, "overlaps")
    cli("find", model, "-o", direction, "-q").failed(2, "exists")
    cli("find", model, "-o", tmp_path / "direction.bin", "-q").failed(2, ".safetensors")
    cli("find", "no model", "-o", tmp_path / "file" / "x.safetensors", "-q").failed(2, "below a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "folder" / "letter.txt").read_text() == "dear me"


# --- damaged and foreign models: exit code 1


def test_model_that_is_not_there_is_one_line(cli: Cli, prompts: list[str], tmp_path: Path) -> None:
    for spec, part in (
        (tmp_path / "none", "no such folder or file"),
        ("somebody/something", "not a folder here"),
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "config.json"),
        ("x" * 400, "too long"),
    ):
        cli("run", spec, "-o", tmp_path / "out", *prompts, "-q").failed(1, part)
        assert not (tmp_path / "out").exists()


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model*.safetensors"))


def truncate(folder: Path) -> None:
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def leave_the_folder(folder: Path) -> None:
    change_index(folder, lambda names: names.update({"lm_head.weight": "../../secret.safetensors"}))


def lose_a_tensor(folder: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    change_index(folder, lambda names: names.__delitem__(name))
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, {"format": "pt"})


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def keep_only_a_pickle(folder: Path) -> None:
    for file in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x00.")


def damage(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_text("{")

    return harm


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
FOREIGN = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (truncate, ["is not a whole safetensors file", "download"]),
        (lose_a_shard, ["does not exist", "download the model again"]),
        (leave_the_folder, ["../../secret.safetensors", "inside the folder"]),
        (lose_a_tensor, ["model.layers.2.self_attn.q_proj.weight"]),
        (change_config(num_hidden_layers=BLOCKS + 1), [f"model.layers.{BLOCKS}."]),
        (change_config(model_type="nonesuch"), ["cannot be loaded", "nonesuch"]),
        (change_config(**FOREIGN), ["custom code"]),
        (keep_only_a_pickle, ["pytorch_model.bin", "pickles are never loaded"]),
        (damage("config.json"), ["config.json"]),
        (damage("tokenizer.json"), ["cannot be loaded"]),
        (damage("model.safetensors.index.json"), ["model.safetensors.index.json"]),
        (drop("chat_template.jinja"), ["no chat template", "--chat-template FILE", "none"]),
    ],
    ids=[
        "truncated shard",
        "lost shard",
        "index leaves the folder",
        "lost tensor",
        "fewer blocks than configured",
        "unknown architecture",
        "foreign code",
        "pickle",
        "damaged config",
        "damaged tokenizer",
        "damaged index",
        "no chat template",
    ],
)
def test_damaged_model_is_one_line_and_leaves_nothing(
    cli: Cli, broken: Path, prompts: list[str], tmp_path: Path, harm: Callable[[Path], None], parts: list[str]
) -> None:
    harm(broken)
    cli("run", broken, "-o", tmp_path / "out", *prompts, "-q").failed(1, *parts)
    cli("eval", broken, *prompts, "-q").failed(1, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantised_model_is_not_edited_in_place(
    cli: Cli, broken: Path, prompts: list[str], direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(**QUANTISED)(broken)
    parts = ("quantised (bitsandbytes)", "full-precision", "--as lora")
    cli("run", broken, "-o", tmp_path / "out", *prompts, "-q").failed(1, *parts)
    cli("apply", broken, "-o", tmp_path / "out", "--direction", direction, "-q").failed(1, *parts)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    cli("eval", broken, *prompts, "-q").failed(1, "bitsandbytes needs bitsandbytes", "pip install 'abliterate[bnb]'")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_nan_in_the_weights_is_a_numerical_error_and_no_verdict(
    cli: Cli, broken: Path, prompts: list[str], tmp_path: Path, tensor: str
) -> None:
    for file in broken.glob("model*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor].view(-1)[3::7] = float("nan")  # in rows of words that are used, too
            save_file(tensors, file, {"format": "pt"})
    cli("run", broken, "-o", tmp_path / "out", *prompts, "-q").failed(1, "expected finite numbers")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_failed_is_not_ticked_off(cli: Cli, broken: Path, prompts: list[str], tmp_path: Path) -> None:
    damage("tokenizer.json")(broken)
    result = cli("run", broken, "-o", tmp_path / "out", *prompts)
    assert "✓ find model" in result.err
    assert "✓ load model" not in result.err
    assert result.err.splitlines()[-1].startswith("error: model")


# --- the process


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


HEAVY = ("torch", "transformers", "safetensors", "numpy", "datasets")


def test_help_and_import_do_not_import_torch() -> None:
    imported = "import sys, abliterate; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    assert not set(HEAVY) & set(re.findall(r"\w+", python(imported).stdout))
    helped = (
        "import atexit, sys; sys.argv[1:] = ['run', '--help']\n"
        "from abliterate.cli import main\n"
        "atexit.register(lambda: print(sorted({n.partition('.')[0] for n in sys.modules}), file=sys.stderr))\n"
        "main()"
    )
    result = python(helped)
    assert "--harmful" in result.stdout
    assert "rich" in result.stderr
    assert not set(HEAVY) & set(re.findall(r"\w+", result.stderr))


def test_help_answers_at_once() -> None:
    def computed() -> float:
        used = os.times()
        return used.children_user + used.children_system

    def seconds() -> float:
        """Of computing, which other processes do not add to."""
        before = computed()
        subprocess.run([sys.executable, "-m", "abliterate", "--help"], capture_output=True, check=True)
        return computed() - before

    assert min(seconds() for _ in range(3)) < 0.6


def test_installed_command_exits_with_its_code(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("abliterate")
    arguments = [str(command), "find", "model", "-o", str(tmp_path / "x.bin")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: -o {tmp_path / 'x.bin'}: expected a file name ending in .safetensors\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interruption_is_one_line_and_exit_code_130(
    name: str, cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(5)

    monkeypatch.setattr(pipeline, "open_session", interrupt)
    result = cli("run", planted.folder, "-o", tmp_path / "out", *prompts, "-q")
    assert result == Result(130, "", "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_what_most_need_and_help_all_the_rest(cli: Cli) -> None:
    short, whole = cli("run", "--help").out, cli("run", "--help-all").out
    assert "--behaviour" in short
    assert "abliterate run MODEL -o out --behaviour over-refusal" in short
    assert "--sampler" not in short
    assert "--sampler" in whole
    assert "--sampler" in cli("compare", "--help").out or "--max-new-tokens" in cli("compare", "--help").out
    assert 15 <= short.count(" --") <= 40 < whole.count(" --")
