"""A model whose weights stay on disk, or are spread: all that is measured is what it is in memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from abliterate import pipeline
from abliterate.config import (
    EditSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import Direction
from abliterate.edit.hooks import ablation, addition, steered
from abliterate.edit.options import plan_for
from abliterate.edit.steering import Steering
from abliterate.edit.weights import edit_live
from abliterate.errors import UsageError
from abliterate.finding.find import best_separated
from abliterate.finding.search.gradient import Leg, descend
from abliterate.model.anatomy import study
from abliterate.model.batches import (
    BatchSize,
    Encoded,
    SharedPrefix,
    auto_batch_size,
    can_share,
    hooked,
    last_logits,
    on_output,
    rows_with_cache,
)
from abliterate.model.generation import complete
from abliterate.model.loading import LoadedModel, load, locate
from abliterate.model.offloaded import device_of, fetched, float_copy, is_offloaded, is_spread, recomputed, value_of
from abliterate.model.weights import numbers
from families import COMMON, save
from planted import D_MODEL, Planted, plant

CLOSE = 1e-4


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), shards=2)


@pytest.fixture(scope="module")
def plain(planted: Planted) -> LoadedModel:
    return load(locate(str(planted.folder)))


def settings(folder: Path, kept: str = "60KB") -> ModelSettings:
    """A little in memory, the rest on disk."""
    return ModelSettings(device="cpu", max_memory=f"cpu={kept}", offload=folder)


@pytest.fixture(scope="module", params=["60KB", "1KB"], ids=["some on disk", "all on disk"])
def away(planted: Planted, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> LoadedModel:
    loading = settings(tmp_path_factory.mktemp("offload"), request.param)
    return load(locate(str(planted.folder)), device="cpu", limits=loading.limits, offload=loading.offload)


def held(model: Any) -> list[str]:
    """Parameters whose numbers are in memory."""
    return [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]


def encoded(model: LoadedModel, texts: tuple[str, ...] = ("show a bomb", "tell me a poem today", "write")) -> Encoded:
    return Encoded((), tuple(tuple(model.tokenizer.encode(text)) for text in texts))


def logits(loaded: LoadedModel) -> torch.Tensor:
    return last_logits(loaded.model, SharedPrefix(loaded.model, ()), encoded(loaded).suffixes)


def test_weights_are_away_and_come_for_a_pass(plain: LoadedModel, away: LoadedModel) -> None:
    before = held(away.model)
    assert is_offloaded(away.model)
    assert not is_offloaded(plain.model)
    assert not is_spread(away.model)
    assert len(before) < len(held(plain.model))
    assert away.device == device_of(away.model) == torch.device("cpu")
    assert torch.allclose(logits(away), logits(plain), atol=CLOSE)
    assert held(away.model) == before


def test_accounting_fetches_block_by_block(plain: LoadedModel, away: LoadedModel) -> None:
    before = held(away.model)
    found, expected = study(away.model), study(plain.model)
    assert found.writers == expected.writers
    assert found.closure == pytest.approx(expected.closure, abs=1e-6)
    assert held(away.model) == before


def test_numbers_of_one_module_are_fetched(plain: LoadedModel, away: LoadedModel) -> None:
    for name in ("model.layers.3.mlp.down_proj", "model.embed_tokens"):
        ours, theirs = (one.model.get_submodule(name) for one in (away, plain))
        assert torch.equal(numbers(ours), numbers(theirs))
        assert torch.equal(value_of(away.model, f"{name}.weight"), theirs.weight)
        assert (ours.weight.device.type == "meta") == (f"{name}.weight" not in held(away.model))
    block = away.model.model.layers[4]
    with fetched(block):
        assert all(parameter.device.type == "cpu" for parameter in block.parameters())
    twin = float_copy(block)
    assert all(parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in twin.parameters())
    assert not any(hasattr(part, "_hf_hook") for part in twin.modules())


def test_hooks_do_the_same(plain: LoadedModel, away: LoadedModel, planted: Planted) -> None:
    anatomy = study(plain.model)
    for preserving in (False, True):
        plan = plan_for(anatomy, Direction(planted.direction[None]), EditSettings(norm_preserving=preserving))
        with ablation(plain.model, plan):
            expected = logits(plain)
        with ablation(away.model, plan):
            assert torch.allclose(logits(away), expected, atol=CLOSE)
        assert not torch.allclose(expected, logits(plain), atol=CLOSE), "the hooks do something"
    vector = planted.direction[None] * 3
    with addition(plain.model.model.layers[2], vector):
        expected = logits(plain)
    with addition(away.model.model.layers[2], vector):
        assert torch.allclose(logits(away), expected, atol=CLOSE)
    steering = Steering("clamp", 2.0, "generated", (2, 5), planted.direction.expand(2, -1), (1.0, 2.0))
    with steered(plain.model.model.layers, steering):
        expected = logits(plain)
    with steered(away.model.model.layers, steering):
        assert torch.allclose(logits(away), expected, atol=CLOSE)
    assert not torch.allclose(expected, logits(plain), atol=CLOSE)


def test_replies_are_the_same(plain: LoadedModel, away: LoadedModel) -> None:
    size = BatchSize(8, 1024)
    found, expected = (complete(one.model, one.tokenizer, encoded(one), 8, size) for one in (away, plain))
    assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]
    assert any(reply.tokens for reply in found)


def test_weights_edited_in_place_are_edited_as_they_come(
    plain: LoadedModel, away: LoadedModel, planted: Planted
) -> None:
    before = logits(plain)
    plan = plan_for(study(plain.model), Direction(planted.direction[None]), EditSettings())
    backs = [edit_live(one.model, plan) for one in (plain, away)]
    edited = logits(plain)
    assert not torch.allclose(edited, before, atol=CLOSE)
    assert torch.allclose(logits(away), edited, atol=CLOSE)
    again = edit_live(away.model, plan)  # several add up, and come off in turn
    again()
    assert torch.allclose(logits(away), edited, atol=CLOSE)
    for back in backs:
        back()
    assert torch.equal(logits(plain), before)
    assert torch.allclose(logits(away), before, atol=CLOSE)


def test_batches_hold_what_memory_holds(plain: LoadedModel, away: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(free: int) -> tuple[BatchSize, BatchSize]:
        monkeypatch.setattr("abliterate.model.batches.free_memory", lambda _: free)
        return auto_batch_size(plain.model), auto_batch_size(away.model)

    small, large = sizes(10**8), sizes(10**9)
    assert large[0].tokens == small[0].tokens == 1024
    assert large[1].tokens == pytest.approx(10 * small[1].tokens, rel=0.01)
    assert large[1].tokens > large[0].tokens
    assert auto_batch_size(away.model, 3).rows == 3
    rows = [rows_with_cache(away.model, BatchSize(10**6, 1), tokens) for tokens in (100, 1000)]
    assert rows[0] > 5 * rows[1] > 0
    assert rows_with_cache(plain.model, BatchSize(7, 1), 1000) == 7


def test_nothing_is_shared_where_a_prefix_is_one_more_pass(plain: LoadedModel, away: LoadedModel) -> None:
    sequences = [[*range(3, 12), *more] for more in ([1], [2, 4], [5, 6, 7])]
    assert can_share(plain.model, sequences)
    passes = []
    with_hook = away.model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert not can_share(away.model, sequences)
    with_hook.remove()
    assert len(passes) == 2


# --- the whole way


@pytest.fixture(scope="module")
def asked(planted: Planted) -> PromptSettings:
    return PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline), limit=16
    )


def opened(planted: Planted, asked: PromptSettings, loading: ModelSettings) -> pipeline.Session:
    return pipeline.open_session(str(planted.folder), loading=loading, prompts=asked)


def test_find_and_verify_measure_the_same(planted: Planted, asked: PromptSettings, tmp_path: Path) -> None:
    sessions = [opened(planted, asked, loading) for loading in (ModelSettings(device="cpu"), settings(tmp_path))]
    assert is_offloaded(sessions[1].model)
    passes: list[int] = []
    sessions[1].blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    finding = FindSettings()
    findings = [pipeline.find(session, finding) for session in sessions]
    expected, found = findings
    assert found.ids == expected.ids
    assert torch.allclose(found.candidates.raw, expected.candidates.raw, atol=CLOSE)
    passes.clear()
    chosen = [pipeline.choose(session, some, finding) for session, some in zip(sessions, findings, strict=True)]
    assert len(passes) <= 2 * 4, "all sites of a stage go through together, and the control"
    assert chosen[0].selection.chosen.layer == chosen[1].selection.chosen.layer
    for one, other in zip(chosen[0].selection.candidates, chosen[1].selection.candidates, strict=True):
        for name in ("bypass", "induce", "kl"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3)
    parts = [pipeline.verify(session, one.direction) for session, one in zip(sessions, chosen, strict=True)]
    assert parts[0].verified
    assert parts[1].verified
    assert parts[0].bypass == pytest.approx(parts[1].bypass, abs=1e-3)


def test_a_run_writes_the_same_model(planted: Planted, asked: PromptSettings, tmp_path: Path) -> None:
    def run(name: str, loading: ModelSettings) -> Any:
        output = OutputSettings(out=tmp_path / name)
        searching = SearchSettings(method="closed-form")
        settings = RunSettings(
            model=str(planted.folder), loading=loading, prompts=asked, output=output, searching=searching
        )
        return pipeline.run(settings)

    expected = run("plain", ModelSettings(device="cpu"))
    found = run("away", settings(tmp_path / "offload"))
    for shard in (tmp_path / "plain").glob("model*.safetensors"):
        tensors, ours = load_file(shard), load_file(tmp_path / "away" / shard.name)
        assert tensors.keys() == ours.keys()
        assert all(torch.allclose(ours[name], tensors[name], atol=CLOSE) for name in tensors)
    for name in ("before", "after"):
        one, other = (getattr(record.evaluation, name) for record in (expected, found))
        assert one == other
    assert not list((tmp_path / "offload").glob("*/*")), "the files of the model are read where they lie"


def test_a_gradient_is_the_same_and_holds_one_block(planted: Planted, asked: PromptSettings, tmp_path: Path) -> None:
    found = []
    for loading in (ModelSettings(device="cpu"), settings(tmp_path)):
        session = opened(planted, asked, loading)
        findings = pipeline.find(session, FindSettings())
        start = best_separated(session, findings, FindSettings())
        forwards = [block.forward for block in session.blocks]
        found.append(descend(session, findings.ids, start, EditSettings(), [Leg(40.0, 3)])[0])
        assert [block.forward for block in session.blocks] == forwards
    expected, ours = found
    assert ours.recipe is not None
    assert expected.recipe is not None
    assert ours.recipe.strengths == pytest.approx(expected.recipe.strengths, abs=1e-3)
    assert ours.per_writer is not None
    assert expected.per_writer is not None
    assert torch.allclose(ours.per_writer.basis, expected.per_writer.basis, atol=1e-2)


def test_a_backward_pass_fetches_each_block_twice(plain: LoadedModel, away: LoadedModel) -> None:
    fetches: dict[str, int] = {}
    gradients: list[torch.Tensor] = []
    for one in (plain, away):
        blocks = list(one.model.model.layers)
        step = torch.zeros(D_MODEL, requires_grad=True)
        handles = [blocks[0].register_forward_hook(on_output(functools.partial(torch.add, step)))]
        for name, part in blocks[4].named_modules():
            if isinstance(part, torch.nn.Linear):

                def count(*_: Any, name: str = name) -> None:
                    fetches[name] = fetches.get(name, 0) + 1

                handles.append(part.register_forward_hook(count))
        with hooked(handles), recomputed(one.model, blocks), torch.enable_grad():
            loss = one.model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits.square().sum()
            gradients += torch.autograd.grad(loss, [step])
    assert set(fetches.values()) <= {2, 3}  # once in memory; the last map need not finish when it is computed again
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert bool((gradients[0] != 0).any())


# --- weights that are changed while they are loaded are kept in the folder


def test_stacked_experts_are_written_into_the_folder_and_go_with_it(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
    torch.manual_seed(0)
    live = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **COMMON, **sizes))
    folder = save(live, tmp_path / "model")
    plain = load(locate(str(folder)), device="cpu")
    away = load(locate(str(folder)), device="cpu", limits={"cpu": 1000}, offload=tmp_path / "offload")
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        assert torch.allclose(away.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, atol=CLOSE)
    assert study(away.model).writers == study(plain.model).writers
    assert list((tmp_path / "offload").glob("*/*"))


def test_an_offload_folder_that_cannot_be_is_refused(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--offload .*file: expected a folder that can be written"):
        load(locate(str(planted.folder)), device="cpu", limits={"cpu": 1000}, offload=tmp_path / "file")


def test_a_model_that_fits_nowhere_is_refused_before_it_is_loaded(planted: Planted) -> None:
    with pytest.raises(UsageError, match="the model does not fit: "):
        load(locate(str(planted.folder)), device="cpu", limits={"cpu": 1000})


# --- on a GPU, where there is one


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limits", [None, {0: 60_000, "cpu": 10**9}, {0: 60_000, "cpu": 60_000}])
def test_a_gpu_computes_the_same(
    plain: LoadedModel, planted: Planted, tmp_path: Path, limits: dict[int | str, int] | None
) -> None:
    offload = None if limits is None else tmp_path
    away = load(locate(str(planted.folder)), device="cuda:0", limits=limits, offload=offload)
    assert away.device.type == "cuda"
    assert is_offloaded(away.model) == (limits is not None)
    assert torch.allclose(logits(away).cpu(), logits(plain), atol=1e-3)
    anatomy = study(away.model)
    assert [writer.name for writer in anatomy.writers] == [writer.name for writer in study(plain.model).writers]
    plan = plan_for(anatomy, Direction(planted.direction[None]), EditSettings())
    with ablation(plain.model, plan):
        expected = logits(plain)
    with ablation(away.model, plan):
        assert torch.allclose(logits(away).cpu(), expected, atol=1e-3)
