"""A real llama.cpp under our adapters and control vectors, against transformers under the same edit.

`python scripts/llama_cpp.py FOLDER` builds it, the environment variable ABLITERATE_LLAMA_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from abliterate.edit.gguf import stored_architecture, write_control_vector, write_gguf_lora
from abliterate.edit.hooks import ablation, addition
from abliterate.edit.lora import low_rank_live
from abliterate.edit.plan import Plan, make_plan
from abliterate.evaluation.judging import Label, judge
from abliterate.model.anatomy import study
from abliterate.model.loading import load, locate
from abliterate.prompts import ChatRenderer
from abliterate.prompts.sources import load_builtin
from families import BLOCKS, BY_NAME, D_MODEL, random_model

pytestmark = [pytest.mark.llama_cpp, pytest.mark.usefixtures("llama_cpp")]

LLAMA_PYTHON = os.environ.get("ABLITERATE_LLAMA_PYTHON", sys.executable)
PROMPTS = [[5, 77, 130, 200, 9], [1, 2, 3], [250, 40, 40, 7, 8, 99, 101]]


@pytest.fixture(scope="module")
def llama_cpp() -> None:
    found = subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("llama_cpp is not installed: python scripts/llama_cpp.py FOLDER, then set ABLITERATE_LLAMA_PYTHON")


def run_llama(
    folder: Path, model: Path, prompts: Sequence[Sequence[int]], runs: Mapping[str, Mapping[str, Path]], new: int = 0
) -> Any:
    """What `llama_worker.py` finds: NAME.logits and NAME.replies per run."""
    job, out = folder / "job.json", folder / "out.npz"
    given = {name: {what: str(path) for what, path in run.items()} for name, run in runs.items()}
    job.write_text(json.dumps({"model": str(model), "prompts": prompts, "runs": given, "new_tokens": new}))
    worker = Path(__file__).with_name("llama_worker.py")
    subprocess.run([LLAMA_PYTHON, str(worker), str(job), str(out)], check=True, capture_output=True, timeout=900)
    return np.load(out)


def as_llama_reads(path: Path) -> Path:
    """A control vector as llama.cpp's loader hands it on (`common_control_vector_load`): layer N at row N − 1."""
    rows = {int(tensor.name.removeprefix("direction.")) - 1: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    table = np.zeros((max(rows) + 1, len(next(iter(rows.values())))), dtype=np.float32)
    for row, vector in rows.items():
        table[row] = vector
    np.save(path.with_suffix(".npy"), table)
    return path.with_suffix(".npy")


def write_model(path: Path, model: Any, architecture: str) -> Path:
    """A transformers model without its tokenizer as GGUF, in float32, for architectures that store all as it is."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    if architecture == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    for name, value in _split_experts(model.state_dict()):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored + ("" if stored.endswith((".weight", ".bias")) else ".weight"), value.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def _split_experts(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", part), half.contiguous()
        else:
            yield name, value


def write_lora(path: Path, model: Any, plan: Plan, architecture: str) -> None:
    factors, config = low_rank_live(model, plan), model.config
    write_gguf_lora(
        path, factors, architecture=architecture, layers=config.num_hidden_layers, tied=config.tie_word_embeddings
    )


def logits_of(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


def random_basis(k: int, seed: int, d: int = D_MODEL) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0].T
    return basis.contiguous()


def tiny(name: str) -> tuple[Any, str]:
    if name == "qwen2":
        return BY_NAME["qwen2"].model(), "qwen2"
    options = dict(BY_NAME["qwen3"].config().to_dict(), moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2)
    options = {key: value for key, value in options.items() if key not in ("model_type", "architectures")}
    return random_model(
        AutoConfig.for_model("qwen3_moe", **options, norm_topk_prob=True, mlp_only_layers=[])
    ), "qwen3moe"


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_llama_cpp_computes_what_the_hooks_do(tmp_path: Path, name: str) -> None:
    """A tiny model in float32: adapters on embedding, attention, MLP and experts, against the same plan as hooks."""
    model, architecture = tiny(name)
    anatomy, wanted = study(model), {"base": logits_of(model)}
    runs: dict[str, dict[str, Path]] = {"base": {}}
    for seed in (1, 2):
        plan, run, path = make_plan(anatomy, random_basis(2, seed)), f"lora {seed}", tmp_path / f"{seed}.gguf"
        assert len(plan.edits) == 1 + 2 * BLOCKS
        write_lora(path, model, plan, architecture)
        runs[run] = {"lora": path}
        with ablation(model, plan):
            wanted[run] = logits_of(model)
    found = run_llama(tmp_path, write_model(tmp_path / "model.gguf", model, architecture), PROMPTS, runs)
    for run, logits in wanted.items():
        torch.testing.assert_close(torch.tensor(found[f"{run}.logits"]), logits, rtol=1e-4, atol=1e-4)
    assert (wanted["lora 1"] - wanted["base"]).abs().max() > 0.1
    assert (wanted["lora 1"] - wanted["lora 2"]).abs().max() > 0.1


def test_llama_cpp_adds_a_control_vector_where_we_do(tmp_path: Path) -> None:
    model, architecture = tiny("qwen2")
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    runs: dict[str, dict[str, Path]] = {}
    for layer in (2, BLOCKS):
        path = tmp_path / f"{layer}.gguf"
        write_control_vector(path, {layer: vector}, architecture=architecture, layers=BLOCKS)
        runs[f"at {layer}"] = {"vector": as_llama_reads(path)}
    found = run_llama(tmp_path, write_model(tmp_path / "model.gguf", model, architecture), PROMPTS, runs)
    wanted = {}
    for layer in (1, 2):
        with addition(model.model.layers[layer], vector[None]):
            wanted[layer] = logits_of(model)
    with addition(model.model.norm, vector[None]):
        wanted[BLOCKS] = logits_of(model)
    for layer in (2, BLOCKS):
        torch.testing.assert_close(torch.tensor(found[f"at {layer}.logits"]), wanted[layer], rtol=1e-4, atol=1e-4)
    assert (wanted[1] - wanted[2]).abs().max() > 0.1, "a layer beside it would show"


# A real chat model in a quantised file. llama.cpp rounds activations too, so numbers agree only so far.

DEMO = (
    Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser()
    / "models"
    / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
)
#: Where the whole job finds the direction of this model.
LAYER, POSITION = 19, -2


@dataclass(frozen=True, slots=True)
class Demo:
    """The model as transformers has it, its tokens for prompts of both kinds, and r at one site."""

    model: Any
    tokenizer: Any
    harmful: list[list[int]]
    harmless: list[list[int]]
    direction: Tensor


@pytest.fixture(scope="module")
def demo() -> Demo:
    loaded = load(locate(str(DEMO)), dtype="float32", device="cpu")
    render = ChatRenderer(loaded.tokenizer)
    harmful, harmless = load_builtin("harmful"), load_builtin("harmless")
    means = [_mean(loaded.model, render.encode(prompts["train"][:24])) for prompts in (harmful, harmless)]
    tokens = [render.encode(prompts["test"][:12]) for prompts in (harmful, harmless)]
    return Demo(loaded.model, loaded.tokenizer, tokens[0], tokens[1], means[0] - means[1])


def _mean(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    with torch.no_grad():
        states = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[LAYER] for p in prompts]
    return torch.stack([state[0, POSITION] for state in states]).mean(0)


def disagreement(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """How far two changes [prompts, vocabulary] of log-probabilities are apart, in parts of the wanted one.

    Weighted by the probabilities: below a millionth both are noise.
    """
    weight = (base.exp() + (base + wanted).exp()) / 2
    return float(((weight * (found - wanted) ** 2).sum() / (weight * wanted**2).sum()).sqrt())


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here: python scripts/demo_model.py qwen")
def test_a_real_model_changes_alike_in_llama_cpp(tmp_path: Path, demo: Demo) -> None:
    model, prompts = demo.model, demo.harmful[:4] + demo.harmless[:4]
    anatomy, architecture = study(model), stored_architecture(DEMO)
    base = logits_of(model, prompts).log_softmax(-1)
    wanted: dict[str, Tensor] = {}
    runs: dict[str, dict[str, Path]] = {"base": {}}
    for name, r in (("found", demo.direction), ("random", random_basis(1, 5, anatomy.d_model)[0])):
        r = r * (demo.direction.norm() / r.norm())
        plan = make_plan(anatomy, r[None] / r.norm())
        with ablation(model, plan):
            wanted[f"{name} removed"] = logits_of(model, prompts).log_softmax(-1) - base
        with addition(model.model.layers[LAYER], r[None]):
            wanted[f"{name} added"] = logits_of(model, prompts).log_softmax(-1) - base
        path, vector = tmp_path / f"{name}.gguf", tmp_path / f"{name}-vector.gguf"
        write_lora(path, model, plan, architecture)
        write_control_vector(vector, {LAYER: r}, architecture=architecture, layers=anatomy.layers)
        runs |= {f"{name} removed": {"lora": path}, f"{name} added": {"vector": as_llama_reads(vector)}}
    found = run_llama(tmp_path, DEMO, prompts, runs)
    start = torch.tensor(found["base.logits"]).log_softmax(-1)
    changes = {run: torch.tensor(found[f"{run}.logits"]).log_softmax(-1) - start for run in wanted}
    table = {(a, b): disagreement(changes[a], wanted[b], base) for a in changes for b in wanted}
    assert table["found removed", "found removed"] < 0.15, table
    assert table["found added", "found added"] < 0.15, table
    assert table["random removed", "found removed"] > 0.5, table
    assert table["random added", "found added"] > 0.5, table


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here: python scripts/demo_model.py qwen")
def test_a_real_model_refuses_less_in_llama_cpp(tmp_path: Path, demo: Demo) -> None:
    anatomy = study(demo.model)
    runs: dict[str, dict[str, Path]] = {"base": {}}
    for name, r in (("found", demo.direction), ("random", random_basis(1, 5, anatomy.d_model)[0])):
        write_lora(tmp_path / name, demo.model, make_plan(anatomy, r[None] / r.norm()), stored_architecture(DEMO))
        runs[name] = {"lora": tmp_path / name}
    found = run_llama(tmp_path, DEMO, demo.harmful, runs, new=24)
    refused = {
        name: sum(judge(demo.tokenizer.decode(reply)).label is Label.REFUSAL for reply in found[f"{name}.replies"])
        for name in runs
    }
    assert refused["base"] >= 4, refused
    assert 3 * refused["found"] <= refused["base"], refused
    assert 2 * refused["random"] >= refused["base"], refused
