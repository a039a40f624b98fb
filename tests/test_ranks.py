"""Several processes find what one finds, and end together. Everything goes over the loopback of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from abliterate.errors import ModelError, UsageError
from abliterate.model._compat import division
from abliterate.model.placement import Needs, nearest, place_part
from abliterate.monitor import ranks
from calling import Cli
from families import COMMON, random_model, save
from planted import GOOD, Planted, plant, write_jsonl
from planted import prompts as some_prompts
from worlds import DIVIDED, FAMILIES, Ended, environment, free_port, measured, world

GB = 1_000_000_000
#: Windows has no lo; gloo is tested where torch is.
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def config_of(name: str, **changes: Any) -> Any:
    own: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 16},
        "gemma2": {"head_dim": 16, "attn_implementation": "eager"},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    return AutoConfig.for_model(name, **COMMON | {"num_key_value_heads": 4} | own.get(name, {}) | changes)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def place(planted: Planted) -> Path:
    """A folder with a model of every family, and with prompts that any model tells apart."""
    folder = planted.folder.parent / "families"
    for name in FAMILIES:
        save(random_model(config_of(name)), folder / name)
    ends = {"harmful": "ZZZZZZ!", "harmless": "aaaaaa.", "borderline": "mmmm"}
    for name, end in ends.items():
        write_jsonl(folder / f"{name}.jsonl", [f"{prompt} {end}" for prompt in some_prompts(GOOD, 60, len(name))])
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    return {name: measured(place / name, place) for name in FAMILIES}


@pytest.fixture(scope="module", params=[2, 4])
def together(place: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What each of several processes measured and exchanged."""
    count: int = request.param
    found = world(count, "exchanges,families", place / f"of-{count}")
    assert all(one.code == 0 for ended in found.values() for one in ended), [
        one.err for ended in found.values() for one in ended
    ]
    return {"count": count, **{job: [one.result for one in ended] for job, ended in found.items()}}


def same(found: Any, expected: Any, where: str = "") -> None:
    """Numbers alike to 1e-4, relative where they are large; everything else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value, f"{where} {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        numbers = torch.tensor(expected) if expected and all(isinstance(one, float) for one in expected) else None
        if numbers is not None:
            torch.testing.assert_close(
                torch.tensor(found), numbers, rtol=1e-4, atol=1e-4, msg=lambda text: f"{where}: {text}"
            )
            return
        for number, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where} {number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), where
    else:
        assert found == expected, where


def test_prompts_divided_give_what_one_process_finds(together: dict[str, Any], alone: dict[str, Any]) -> None:
    for result in together["families"]:
        same(result["data"], alone)


def test_models_divided_give_what_one_process_finds(together: dict[str, Any], alone: dict[str, Any]) -> None:
    for result in together["families"]:
        same(result["tensor"], {name: alone[name] for name in DIVIDED[together["count"]]})


def test_what_processes_tell_each_other(together: dict[str, Any]) -> None:
    count = together["count"]
    total = count * (count + 1) / 2
    for result in together["exchanges"]:
        assert result["summed"] == [[total, total]] * 4
        assert result["joined"] == [[float(rank)] * 3 for rank in range(count) for _ in range(rank)]
        assert result["agreed"] == {"rank": 0, "text": ""}
        assert result["nothing"] == ""
        assert result["limits"] == [count - 1, 0]
        assert result["led"] == [0.0, 0.0]
        assert result["nested"] == [3.0] * 4


def test_an_error_in_a_pass_of_one_process_is_one_in_all(together: dict[str, Any]) -> None:
    for rank, result in enumerate(together["exchanges"]):
        usage, odd, none = result["errors"]
        assert usage == "UsageError: no: do so"
        assert odd == "ValueError: odd" if rank == 1 else odd.startswith("AbliterateError: process 2 of ")
        assert none == ""


def test_memory_that_runs_out_in_one_process_makes_batches_smaller_in_all(together: dict[str, Any]) -> None:
    for result in together["exchanges"]:
        found, rows, steps = result["memory"]
        assert found == [float(row) for row in range(12)]
        assert (rows, steps) == (1, 12)


def test_alone_nothing_is_exchanged() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    assert ranks.summed(tensor) is tensor
    assert ranks.joined(tensor) is tensor
    assert ranks.agreed((1, 2)) == (1, 2)
    assert (ranks.count(), ranks.leads(), ranks.largest(4), ranks.least(4), ranks.name()) == (1, True, 4, 4, "")
    ranks.led(tensor)
    with ranks.one_pass([0, 1, 2], [tensor]) as mine:
        assert mine == [0, 1, 2]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How two processes end where one of them does."""
    return world(2, "follower,leader,fault,killed", tmp_path_factory.mktemp("endings"))


@pytest.mark.parametrize(
    ("job", "code", "speaker", "said"),
    [
        ("follower", 2, 1, "error: --device moon: not usable; give --device auto"),
        ("leader", 1, 0, "error: disk full"),
        ("fault", 1, 1, "ZeroDivisionError: a fault of ours"),
        ("killed", 1, 0, "error: another process of this run has ended"),
    ],
)
def test_what_ends_one_process_ends_all_with_one_message(
    endings: dict[str, list[Ended]], job: str, code: int, speaker: int, said: str
) -> None:
    found = endings[job]
    assert all(one.code != 0 for one in found), found
    assert found[speaker].code == code
    assert said in found[speaker].err
    assert found[1 - speaker].err == found[1 - speaker].out == ""
    if speaker == 1:
        assert found[1].err.startswith("process 2 of 2 (")


def settings(planted: Planted, out: Path) -> list[str]:
    files = {name: getattr(planted, name) for name in ("harmful", "harmless", "borderline")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    short = ["--search-tokens", "6", "--max-new-tokens", "8", "--steps", "6", "--points", "2", "--limit", "24"]
    return ["run", str(planted.folder), "-o", str(out), "--device", "cpu", "--dtype", "float32", *options, *short]


def test_torchrun_does_a_run_as_one_process_does(planted: Planted, tmp_path: Path, cli: Cli) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", str(free_port()), "-m", "abliterate"]
    env = {**os.environ, **environment(2, 0), "OMP_NUM_THREADS": "1", "ABLITERATE_CACHE": str(tmp_path / "cache")}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        del env[name]
    asked = [sys.executable, "-m", *launcher, *settings(planted, several)]
    done = subprocess.run(asked, env=env, capture_output=True, text=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr
    assert cli(*settings(planted, alone)).code == 0
    assert done.stdout.count("Took ") == done.stderr.count("load model") == 1
    assert "2 processes: each has the model, and runs a part of the prompts" in done.stderr
    expected, found = (json.loads((out / "abliteration.json").read_text()) for out in (alone, several))
    assert found["model"]["device"] == "cpu, 2 processes"
    for part in ("selection", "separation", "plan", "evaluation"):
        same(found[part], expected[part], part)
    for part in ("points", "chosen", "base"):
        same(found["search"][part], expected["search"][part], part)
    assert sorted(path.name for path in alone.rglob("*")) == sorted(path.name for path in several.rglob("*"))


def test_commands_that_one_process_does_are_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (environment(2, 1) | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    cli("undo", "out").failed(2, "undo: expected one of run, find, search, eval, verify in several processes")


def test_a_model_is_divided_among_several_processes_only(planted: Planted, cli: Cli, tmp_path: Path) -> None:
    out = str(tmp_path / "d.safetensors")
    cli("find", planted.folder, "-o", out, "--parallel", "tensor", "-q").failed(
        2, "--parallel tensor: expected several processes, found one; start them with torchrun"
    )


def test_models_that_cannot_be_divided_are_refused() -> None:
    few = random_model(config_of("llama", num_key_value_heads=2))
    with pytest.raises(ModelError, match="expected heads that 4 processes can share, found num_key_value_heads 2"):
        division(few, 4)
    assert division(few, 2)
    without = random_model(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    with pytest.raises(ModelError, match="transformers has no plan to divide a GPT2LMHeadModel; give --parallel data"):
        division(without, 2)


def test_the_part_of_each_process_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs(100 * GB, 100_000, 100_000)
    monkeypatch.setattr(ranks, "count", lambda: 8)
    assert place_part(needs, {0: 20 * GB, "cpu": 50 * GB}).device == "cuda:0"
    with pytest.raises(UsageError, match=r"does not fit: in each of 8 processes .* give more processes"):
        place_part(needs, {0: 10 * GB, "cpu": 50 * GB})
    assert "--parallel tensor" in nearest("auto", needs, {0: 20 * GB, "cpu": 10 * GB})
