"""One plan, two realisations: hooks on a live model and weights in a checkpoint say the same, for every family."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.algebra import orthonormal
from abliterate.edit.hooks import ablation, addition
from abliterate.edit.plan import Plan, Variant, make_plan
from abliterate.edit.weights import Surgery, edit_checkpoint, planned_parameters, weights_from
from abliterate.errors import CheckpointError, NumericalError, UsageError
from abliterate.files.checkpoint import Checkpoint, open_checkpoint
from abliterate.model.anatomy import Anatomy, Writer, find_blocks, names_on_disk, stream_out, study
from abliterate.model.batches import SharedPrefix, hooked, last_logits, share_prefix
from families import BLOCKS, BY_NAME, D_MODEL, FAMILIES, Family, load, save

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

IDS = torch.randint(0, 256, (3, 14), generator=torch.Generator().manual_seed(3))


@cache
def model_of(family: str) -> Any:
    return BY_NAME[family].model()


@cache
def anatomy_of(family: str) -> Anatomy:
    return study(model_of(family))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family's name to its checkpoint in float32, written once."""

    @cache
    def write(family: str) -> Path:
        return save(model_of(family), tmp_path_factory.mktemp(family), tokenizer=False)

    return write


def random_direction(k: int = 1, seed: int = 0) -> Tensor:
    # Not the seeds of the models: with those the direction would be an embedding's first row.
    return orthonormal(torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(1000 + seed)))


def plan_for(family: str, *, k: int = 1, strength: float = 1.0, seed: int = 0) -> Plan:
    return make_plan(anatomy_of(family), random_direction(k, seed), strength=strength)


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def operate(source: Path, target: Path, model: Any, plan: Plan) -> Surgery:
    """Write `source` with `plan` applied into the new folder `target`."""
    target.mkdir()
    checkpoint = open_checkpoint(source)
    names = names_on_disk(model, planned_parameters(plan), checkpoint.tensors)
    return edit_checkpoint(checkpoint, target, plan, names)


def agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1.0))


def hooks_on(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- hooks = weights


@each_family
@pytest.mark.parametrize(
    ("k", "strength"), [(1, 1.0), pytest.param(2, 1.0, marks=pytest.mark.contract), (1, 0.5), (1, -0.5)]
)
def test_hooks_and_reloaded_weights_agree(
    family: Family, k: int, strength: float, originals: Any, tmp_path: Path
) -> None:
    model, plan = model_of(family.name), plan_for(family.name, k=k, strength=strength)
    before = logits_of(model)
    with ablation(model, plan):
        hooks = logits_of(model)
    surgery = operate(originals(family.name), tmp_path / "out", model, plan)
    weights = logits_of(load(tmp_path / "out", attention=model.config._attn_implementation))
    assert agree(hooks, weights)
    assert (hooks - before).abs().max() > 0.02 * before.std()  # control: the edit does something
    assert len(surgery.residuals) == len(planned_parameters(plan))
    assert all(
        residual.after == pytest.approx(abs(1 - strength) * residual.before, abs=1e-4) for residual in surgery.residuals
    )


@each_family
@pytest.mark.contract
def test_hooks_and_reloaded_weights_agree_on_writers_own_edits(family: Family, originals: Any, tmp_path: Path) -> None:
    """Each writer with a basis and a reader of its own, also before a post-norm."""
    model, plain = model_of(family.name), plan_for(family.name)
    rows = {
        edit.writer.name: (random_direction(seed=2 * i), 0.3 * random_direction(seed=2 * i + 1))
        for i, edit in enumerate(plain.edits)
    }
    plan = make_plan(anatomy_of(family.name), random_direction(), variant=Variant(per_writer=rows))
    before = logits_of(model)
    with ablation(model, plan):
        hooks = logits_of(model)
    operate(originals(family.name), tmp_path / "out", model, plan)
    weights = logits_of(load(tmp_path / "out", attention=model.config._attn_implementation))
    assert agree(hooks, weights)
    assert (hooks - before).abs().max() > 0.002 * before.std()  # control: the edit does something


def expected_edits(family: Family) -> list[str]:
    return [name for name in family.writers if not (family.tied and name == family.embeddings[0])]


@each_family
def test_plan_covers_every_writer_but_a_tied_embedding(family: Family) -> None:
    plan = plan_for(family.name)
    assert [edit.writer.module for edit in plan.edits] == expected_edits(family)
    assert [name for name, _ in plan.left_alone] == ([family.embeddings[0]] if family.tied else [])


# --- the direction is gone


def contributions(model: Any, writers: list[Writer]) -> dict[str, Tensor]:
    """What each writer sends to the stream, after its post-norm."""
    seen: dict[str, Tensor] = {}
    handles = []
    for writer in writers:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = writer.module) -> None:
            seen[name] = output.detach().clone()

        last = writer.post_norms[-1] if writer.post_norms else writer.module
        handles.append(model.get_submodule(last).register_forward_hook(keep))
    with hooked(handles):
        logits_of(model)
    return seen


def share_along(y: Tensor, basis: Tensor) -> float:
    """Largest |V y| / |y| over tokens."""
    return float(((y @ basis.T).norm(dim=-1) / y.norm(dim=-1)).max())


@each_family
@pytest.mark.parametrize("realisation", ["hooks", "weights"])
def test_direction_is_absent_after_every_writer(
    family: Family, realisation: str, originals: Any, tmp_path: Path
) -> None:
    model, plan = model_of(family.name), plan_for(family.name, k=2)
    writers = [edit.writer for edit in plan.edits]
    untouched = contributions(model, writers)
    if realisation == "hooks":
        with ablation(model, plan):
            found = contributions(model, writers)
    else:
        operate(originals(family.name), tmp_path / "out", model, plan)
        found = contributions(load(tmp_path / "out", attention=model.config._attn_implementation), writers)
    assert list(found) == expected_edits(family)
    for name, y in found.items():
        assert share_along(y, plan.direction) < 1e-5, name
        assert share_along(untouched[name], plan.direction) > 0.05, name
        assert share_along(y, random_direction(2, seed=9)) > 0.05, name  # other directions are still there


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt2", "granite", "falcon-new", "mpt"])
def test_direction_is_absent_from_the_whole_stream(family: str) -> None:
    model, plan = model_of(family), plan_for(family, k=2)
    _, blocks = find_blocks(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(stream_out(output))

    with ablation(model, plan), hooked([block.register_forward_hook(keep) for block in blocks]):
        logits_of(model)
    assert len(seen) == BLOCKS
    assert max(share_along(hidden, plan.direction) for hidden in seen) < 1e-5


# --- the right side of a square matrix


@pytest.mark.parametrize(
    ("family", "tensor", "axis"),
    [
        ("llama", "model.layers.1.self_attn.o_proj.weight", 0),
        ("gpt2", "transformer.h.1.attn.c_proj.weight", 1),
    ],
)
def test_square_matrix_is_edited_on_the_side_of_the_stream(
    family: str, tensor: str, axis: int, originals: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    direction = torch.arange(1.0, D_MODEL + 1)[None]  # nothing about it is symmetric
    plan = make_plan(anatomy_of(family), direction)
    operate(originals(family), tmp_path / "out", model_of(family), plan)
    old = load_file(originals(family) / "model.safetensors")[tensor]
    new = load_file(tmp_path / "out" / "model.safetensors")[tensor]
    assert old.shape == (D_MODEL, D_MODEL)
    r = direction[0] / direction.norm()
    expected = old - torch.outer(r, r @ old) if axis == 0 else old - torch.outer(old @ r, r)
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)
    right, wrong = (r @ new, new @ r) if axis == 0 else (new @ r, r @ new)
    assert right.norm() < 1e-5
    assert wrong.norm() > 0.1


def test_only_the_planned_block_is_edited_in_a_deep_model(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model(num_hidden_layers=12)
    whole = make_plan(study(model), random_direction())
    edits = tuple(edit for edit in whole.edits if edit.writer.block == 1)
    plan = Plan(edits, whole.direction, whole.strength, whole.left_alone)
    source = save(model, tmp_path / "in", tokenizer=False)
    operate(source, tmp_path / "out", model, plan)
    assert changed_tensors(source, tmp_path / "out") == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


# --- files


def tensor_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        name: info.file.read_bytes()[info.start : info.end]
        for shard in checkpoint.shards
        for name, info in shard.tensors.items()
    }


def changed_tensors(source: Path, target: Path) -> set[str]:
    old, new = tensor_bytes(open_checkpoint(source)), tensor_bytes(open_checkpoint(target))
    assert list(old) == list(new)
    return {name for name, data in old.items() if new[name] != data}


@each_family
def test_strength_zero_changes_no_byte(family: Family, originals: Any, tmp_path: Path) -> None:
    model, plan = model_of(family.name), plan_for(family.name, strength=0.0)
    source, target = originals(family.name), tmp_path / "out"
    assert operate(source, target, model, plan).residuals == ()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    before, hooks = logits_of(model), hooks_on(model)
    with ablation(model, plan):
        assert torch.equal(logits_of(model), before)
        assert hooks_on(model) == hooks


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "gpt2", "olmo2", "granite", "opt", "cohere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shards", [1, 4])
def test_half_precision_checkpoints(family: str, dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    model = BY_NAME[family].model().to(dtype)
    source, target = save(model, tmp_path / "in", dtype=dtype, shards=shards), tmp_path / "out"
    plan = make_plan(study(model), random_direction())
    old = open_checkpoint(source)
    assert (old.index is not None) == (shards > 1)
    assert len(old.shards) > 1 if shards > 1 else len(old.shards) == 1

    surgery = operate(source, target, model, plan)

    places = names_on_disk(model, planned_parameters(plan), old.tensors)
    assert all(len(found) == 1 for found in places.values())
    tensors = [found[0].tensor for found in places.values()]
    assert changed_tensors(source, target) == set(tensors)
    assert [residual.tensor for residual in surgery.residuals] == tensors
    for residual in surgery.residuals:
        size = residual.before / max(residual.change, 1e-9)  # ‖W‖, as ‖W′ − W‖ = ‖VW‖
        assert residual.dtype == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert residual.ratio == residual.after / residual.before
        assert residual.ratio < 0.05 or len(residual.shape) == 1
        assert residual.after < 0.005 * size  # of the whole tensor: also where it held little of the direction
        assert residual.change > 0
    new = open_checkpoint(target)
    for before, after in zip(old.shards, new.shards, strict=True):
        assert (before.path.name, before.metadata) == (after.path.name, after.metadata)
        head = before.header_bytes
        assert before.path.read_bytes()[:head] == after.path.read_bytes()[:head]
    undo = {Path(name).parts[0] for name in surgery.undo}
    assert undo
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()} | undo
    for path in source.glob("*.json"):
        assert path.read_bytes() == (target / path.name).read_bytes()
    if old.index is not None and new.index is not None:
        assert set(json.loads(new.index.read_text())["weight_map"]) == set(new.tensors)
    assert torch.isfinite(logits_of(load(target, dtype=dtype))).all()


def test_many_blocks_of_rows_give_what_one_gives(
    originals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = model_of("gpt2"), plan_for("gpt2", k=2)
    whole = operate(originals("gpt2"), tmp_path / "whole", model, plan)
    monkeypatch.setattr("abliterate.edit.weights.tensors.BLOCK_BYTES", 1000)
    parts = operate(originals("gpt2"), tmp_path / "parts", model, plan)
    old, new = tensor_bytes(open_checkpoint(tmp_path / "whole")), tensor_bytes(open_checkpoint(tmp_path / "parts"))
    for name, data in old.items():
        expected = torch.frombuffer(bytearray(data), dtype=torch.float32)
        found = torch.frombuffer(bytearray(new[name]), dtype=torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, many in zip(whole.residuals, parts.residuals, strict=True):
        assert many.before == pytest.approx(one.before, rel=1e-4)
        assert many.change == pytest.approx(one.change, rel=1e-4)


def test_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    plan = plan_for("llama")
    source = save(BY_NAME["llama"].model(hidden_size=32), tmp_path / "in", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight': expected shape \[264, 48\].*found \[264, 32\]"):
        operate(source, tmp_path / "out", model_of("llama"), plan)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    plan = make_plan(study(model), random_direction())
    model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.inf
    source = save(model, tmp_path / "in", tokenizer=False)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*NaN or infinity"):
        operate(source, tmp_path / "out", model, plan)


# --- several plans at once


@each_family
def test_plans_at_once_equal_each_alone(family: Family) -> None:
    model = model_of(family.name)
    plans = [plan_for(family.name, k=2, seed=seed) for seed in range(3)]
    with ablation(model, *plans):
        together = logits_of(model, IDS.repeat(3, 1)).chunk(3)
    for plan, found in zip(plans, together, strict=True):
        with ablation(model, plan):
            assert agree(found, logits_of(model))
    assert not agree(together[0], together[1])


@pytest.mark.contract
@each_family
def test_plans_at_once_share_a_prefix(family: Family) -> None:
    model = model_of(family.name)
    plans = [plan_for(family.name, seed=seed) for seed in range(2)]
    sequences = [[*IDS[0, :6].tolist(), i, *IDS[1, : 3 * i + 1].tolist()] for i in range(3)]
    prompts = share_prefix(sequences)
    assert len(prompts.prefix) == 6
    with ablation(model, *plans):
        shared = SharedPrefix(model, prompts.prefix, copies=2)
        together = last_logits(model, shared, prompts.suffixes * 2).chunk(2)
    for plan, found in zip(plans, together, strict=True):
        with ablation(model, plan):
            alone = torch.stack([logits_of(model, torch.tensor([ids]))[0, -1] for ids in sequences])
        assert agree(found, alone)


# --- contexts restore the model


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    with pytest.raises(KeyboardInterrupt):
        yield


@each_family
@pytest.mark.parametrize("fails", [False, True], ids=["normal exit", "exception"])
def test_model_is_restored_after_every_context(family: Family, fails: bool, originals: Any, tmp_path: Path) -> None:
    model, plan = model_of(family.name), plan_for(family.name)
    before, hooks = logits_of(model), hooks_on(model)
    operate(originals(family.name), tmp_path / "out", model, plan)
    names = names_on_disk(model, planned_parameters(plan), open_checkpoint(tmp_path / "out").tensors)
    _, blocks = find_blocks(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for context in (
        lambda: ablation(model, plan),
        lambda: addition(blocks[1], random_direction()),
        lambda: weights_from(model, tmp_path / "out", plan, names),
    ):
        with interrupted() if fails else contextlib.nullcontext(), context():
            assert not agree(logits_of(model), before)
            if fails:
                raise KeyboardInterrupt
        assert torch.equal(logits_of(model), before)
        assert hooks_on(model) == hooks
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.contract
@each_family
def test_stored_weights_in_a_live_model_equal_the_reloaded_model(
    family: Family, originals: Any, tmp_path: Path
) -> None:
    model, plan = model_of(family.name), plan_for(family.name, k=2)
    before = logits_of(model)
    operate(originals(family.name), tmp_path / "out", model, plan)
    names = names_on_disk(model, planned_parameters(plan), open_checkpoint(tmp_path / "out").tensors)
    reloaded = logits_of(load(tmp_path / "out", attention=model.config._attn_implementation))
    with weights_from(model, tmp_path / "out", plan, names) as swapped:
        assert torch.equal(logits_of(model), reloaded)
        with swapped.original():
            assert torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(model), reloaded)
    assert torch.equal(logits_of(model), before)


# --- addition


@pytest.mark.contract
@each_family
def test_addition_reaches_the_stream_at_its_layer(family: Family) -> None:
    model = model_of(family.name)
    _, blocks = find_blocks(model)
    vectors = torch.stack([random_direction(seed=seed)[0] * 3 for seed in range(3)])
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    for vector in (None, vectors):
        with contextlib.ExitStack() as stack:
            if vector is not None:
                stack.enter_context(addition(blocks[1], vector))
            stack.enter_context(hooked([blocks[1].register_forward_pre_hook(keep, with_kwargs=True)]))
            logits_of(model)
    torch.testing.assert_close(seen[1] - seen[0], vectors[:, None].expand_as(seen[0]), rtol=1e-4, atol=1e-4)


# --- plans that make no sense


def test_plans_that_make_no_sense_are_refused() -> None:
    anatomy = anatomy_of("llama")
    with pytest.raises(UsageError, match="width 48, found 47"):
        make_plan(anatomy, torch.ones(1, 47))
    for strength in (float("nan"), float("inf"), -1e4):
        with pytest.raises(UsageError, match="finite number"):
            make_plan(anatomy, random_direction(), strength=strength)
    for direction in (torch.zeros(1, D_MODEL), torch.full((1, D_MODEL), torch.nan), torch.ones(2, D_MODEL)):
        with pytest.raises(NumericalError):
            make_plan(anatomy, direction)
