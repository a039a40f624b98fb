"""Surgery on files: every shape of writer, every variant, every format; what it measures, keeps and refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abliterate.algebra import orthonormal, remove_from_weight
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.weights import edit_checkpoint, planned_parameters, refusal, removed_rows, weights_from
from abliterate.errors import CheckpointError, ModelError, NumericalError, UsageError
from abliterate.files.checkpoint import Checkpoint, open_checkpoint
from abliterate.files.formats import layout
from abliterate.model.anatomy import Kind, Stored, Writer

D = 24
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Half a step of each format, relative.
STEP = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis_of(k: int = 1, d: int = D, seed: int = 1000) -> Tensor:
    return orthonormal(randn(k, d, seed=seed))


def writer(axis: int = 0, *, kind: Kind = Kind.MLP, weight: str | None = "w", bias: str | None = None) -> Writer:
    return Writer("module", kind, 0, weight, axis, bias)


def write(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def plan_of(*edits: Edit, **options: Any) -> Plan:
    return Plan(edits, edits[0].basis, edits[0].strength, (), **options)


def names_of(plan: Plan, checkpoint: Checkpoint) -> dict[str, tuple[Stored, ...]]:
    """Every parameter in the tensor of its name, with the axes as in memory."""
    return {
        name: (Stored(name, name, axis % len(layout(checkpoint, checkpoint.tensors[name]).shape)),)
        for name, axis in planned_parameters(plan).items()
    }


@contextlib.contextmanager
def operated(tensors: dict[str, Tensor], plan: Plan, **options: Any) -> Iterator[tuple[dict[str, Tensor], Any, Path]]:
    """The tensors after `plan`, what surgery says, and the folder."""
    with TemporaryDirectory() as place:
        source, target = write(Path(place, "in"), tensors), Path(place, "out")
        target.mkdir()
        surgery = edit_checkpoint(source, target, plan, names_of(plan, source), **options)
        yield load_file(target / "model.safetensors"), surgery, target


def operate(tensors: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], Any]:
    with operated(tensors, plan) as (found, surgery, _):
        return found, surgery


def along(weight: Tensor, reader: Tensor, axis: int) -> Tensor:
    """R W with the stream's axis last."""
    return weight.double().movedim(axis, -1) @ reader.double().T


SHAPES = (
    pytest.param((D, 10), 0, id="Linear"),
    pytest.param((D, D), 0, id="square Linear"),
    pytest.param((10, D), 1, id="Conv1D"),
    pytest.param((D, D), 1, id="square Conv1D"),
    pytest.param((3, D, 10), 1, id="experts [E, d, n]"),
    pytest.param((3, D, D), 1, id="square experts [E, d, n]"),
    pytest.param((3, 10, D), 2, id="experts [E, n, d]"),
    pytest.param((2, 3, D, 5), 2, id="[A, E, d, n]"),
    pytest.param((D, 4, 5), 0, id="[d, a, b]"),
    pytest.param((D, 1), 0, id="one column"),
    pytest.param((1, D), 1, id="one row"),
)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("k", "strength"), [(1, 1.0), (3, 1.0), (2, 0.4), (2, -0.7)])
def test_every_shape_equals_the_algebra(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, k: int, strength: float
) -> None:
    weight, other = randn(*shape, dtype=dtype), randn(5, 7, dtype=dtype)
    basis = basis_of(k)
    found, surgery = operate({"w": weight, "other": other}, plan_of(Edit(writer(axis), basis, strength)))
    expected = remove_from_weight(weight.float(), basis, strength, axis)
    tolerance = max(2 * STEP[dtype], 1e-6)
    torch.testing.assert_close(found["w"].float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found["other"], other)
    (residual,) = surgery.residuals
    before, after = along(weight, basis, axis).norm(), along(found["w"], basis, axis).norm()
    assert residual.before == pytest.approx(float(before), rel=1e-4)
    assert residual.after == pytest.approx(float(after), rel=1e-3, abs=1e-5)
    change = (found["w"].double() - weight.double()).norm() / weight.double().norm()
    assert residual.change == pytest.approx(float(change), rel=1e-3)
    assert residual.rounding < STEP[dtype]
    assert residual.shape == list(shape)
    if strength == 1.0:
        size = float(weight.double().norm())
        assert residual.after < max(STEP[dtype], 1e-7) * 2 * size
        assert residual.before > 10 * residual.after  # control: there was something to take out


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_blocks_of_any_size_give_the_same_bytes(
    shape: tuple[int, ...], axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, plan = randn(*shape, dtype=torch.bfloat16), plan_of(Edit(writer(axis), basis_of(2), 1.0))
    whole, first = operate({"w": weight}, plan)
    monkeypatch.setattr("abliterate.edit.weights.tensors.BLOCK_BYTES", 400)
    parts, second = operate({"w": weight}, plan)
    torch.testing.assert_close(parts["w"].float(), whole["w"].float(), rtol=2**-7, atol=1e-6)
    assert second.residuals[0].change == pytest.approx(first.residuals[0].change, rel=1e-3)
    assert second.residuals[0].before == pytest.approx(first.residuals[0].before, rel=1e-4)


@pytest.mark.parametrize("shape", [(D,), (4, D)], ids=["bias", "biases of experts"])
def test_biases(shape: tuple[int, ...]) -> None:
    weight, bias, basis = randn(*shape, 10), randn(*shape, seed=1), basis_of(2)
    edited = writer(len(shape) - 1, bias="b", kind=Kind.MLP if len(shape) == 1 else Kind.EXPERTS)
    found, surgery = operate({"w": weight, "b": bias}, plan_of(Edit(edited, basis, 1.0, norm_preserving=True)))
    expected = remove_from_weight(bias, basis, 1.0, len(shape) - 1)
    torch.testing.assert_close(found["b"], expected)  # and not rescaled
    assert [residual.tensor for residual in surgery.residuals] == ["w", "b"]
    only = Writer("module", Kind.MLP, 0, None, 0, "b")
    found, _ = operate({"w": weight, "b": bias}, plan_of(Edit(only, basis, 1.0)))
    assert torch.equal(found["w"], weight)
    torch.testing.assert_close(found["b"], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strength_zero_changes_no_byte(dtype: torch.dtype) -> None:
    weight = randn(D, 10, dtype=dtype)
    with operated({"w": weight}, plan_of(Edit(writer(), basis_of(), 0.0, norm_preserving=True))) as (
        found,
        surgery,
        folder,
    ):
        assert torch.equal(found["w"].view(torch.uint8), weight.view(torch.uint8))
        assert surgery.residuals == () == surgery.undo
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_float64_is_edited_in_float64() -> None:
    weight, basis = randn(D, 10, dtype=torch.float64), orthonormal(randn(1, D, dtype=torch.float64))
    found, _ = operate({"w": weight}, plan_of(Edit(writer(), basis, 1.0)))
    assert along(found["w"], basis, 0).abs().max() < 1e-14


# --- variants


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_kept_norms(shape: tuple[int, ...], axis: int, dtype: torch.dtype, strength: float) -> None:
    weight, basis = randn(*shape, dtype=dtype), basis_of(2)
    found, surgery = operate({"w": weight}, plan_of(Edit(writer(axis), basis, strength, norm_preserving=True)))
    old, new = (tensor.double().movedim(axis, -1).norm(dim=-1) for tensor in (weight, found["w"]))
    torch.testing.assert_close(new, old, rtol=max(2 * STEP[dtype], 1e-5), atol=0)
    if strength == 1.0:
        assert surgery.residuals[0].after < max(STEP[dtype], 1e-6) * 3 * float(weight.double().norm())
    plain = remove_from_weight(weight.float(), basis, strength, axis).movedim(axis, -1)
    cosine = torch.cosine_similarity(plain.double(), found["w"].double().movedim(axis, -1), dim=-1)
    assert cosine.min() > 1 - 1e-4  # only the length is another
    assert (plain.norm(dim=-1) - old).abs().max() > 0.01  # control: without it, it is another


def test_columns_of_nothing_but_direction_are_not_blown_up() -> None:
    basis = basis_of()
    weight = torch.cat((basis.T, basis.T * 3 + 1e-5 * randn(D, 1), torch.zeros(D, 1), randn(D, 1)), 1)
    found, _ = operate({"w": weight}, plan_of(Edit(writer(), basis, 1.0, norm_preserving=True)))
    assert found["w"][:, :3].norm() < 1e-3
    assert found["w"][:, 3].norm() == pytest.approx(float(weight[:, 3].norm()), rel=1e-5)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("norm_preserving", [False, True])
def test_oblique(shape: tuple[int, ...], axis: int, norm_preserving: bool) -> None:
    reader, left = randn(2, D, seed=5), randn(2, D, seed=6)
    left = torch.linalg.solve(left @ reader.T, left)  # R Lᵀ = 1: a projection, not an orthogonal one
    weight = randn(*shape)
    edit = Edit(writer(axis), left, 1.0, reader, norm_preserving)
    found, surgery = operate({"w": weight}, plan_of(edit))
    size = float(weight.norm() * reader.norm())
    assert surgery.residuals[0].after < 1e-5 * size
    assert along(found["w"], left, axis).norm() > 0.05  # control: L is read by nobody
    if norm_preserving:
        new, old = (tensor.movedim(axis, -1).norm(dim=-1) for tensor in (found["w"], weight))
        torch.testing.assert_close(new, old, rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(
            found["w"], remove_from_weight(weight, left, 1.0, axis, reader), rtol=1e-4, atol=1e-5
        )


def test_offset_lies_in_the_bias_alone() -> None:
    weight, bias, basis, offset = randn(D, 10), randn(D, seed=1), basis_of(), randn(D, seed=2)
    edit = Edit(writer(bias="b"), basis, 1.0, offset=offset)
    found, _ = operate({"w": weight, "b": bias}, plan_of(edit))
    torch.testing.assert_close(found["b"], remove_from_weight(bias, basis, 1.0, 0) + offset)
    torch.testing.assert_close(found["w"], remove_from_weight(weight, basis, 1.0, 0))


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_offset_lies_in_every_row_of_an_embedding(strength: float) -> None:
    weight, basis, offset = randn(10, D), basis_of(), randn(D, seed=2)
    edit = Edit(writer(1, kind=Kind.EMBEDDING), basis, strength, offset=offset)
    found, _ = operate({"w": weight}, plan_of(edit))
    torch.testing.assert_close(found["w"], remove_from_weight(weight, basis, strength, 1) + offset)


def test_offset_alone_leaves_the_weight_beside_a_bias() -> None:
    weight, bias, offset = randn(D, 10), randn(D, seed=1), randn(D, seed=2)
    plan = plan_of(Edit(writer(bias="b"), basis_of(), 0.0, offset=offset))
    assert list(planned_parameters(plan)) == ["b"]
    found, _ = operate({"w": weight, "b": bias}, plan)
    torch.testing.assert_close(found["b"], bias + offset)
    assert torch.equal(found["w"], weight)


# --- refusals, before anything is written


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Edit(writer(), basis_of(), 1.0, offset=randn(D)), "expected a bias to hold a constant"),
        (Edit(writer(1, kind=Kind.EXPERTS, bias="b"), basis_of(), 1.0, offset=randn(D)), "weighted by a router"),
        (Edit(writer(bias="b"), basis_of(), 1.0, offset=randn(3)), r"offset of shape \[24\], found \[3\]"),
        (Edit(writer(), basis_of(2), 1.0, reader=randn(1, D)), r"one shape \[k, d\], found \[2, 24\] and \[1, 24\]"),
        (Edit(writer(), basis_of(), float("nan")), "finite strength"),
        (Edit(writer(weight=None), basis_of(), 1.0), "no weights"),
    ],
    ids=["no bias", "experts", "width", "reader", "strength", "nothing"],
)
def test_what_weights_cannot_hold_is_refused_by_name(edit: Edit, reason: str, tmp_path: Path) -> None:
    plan = plan_of(Edit(writer(weight="other"), basis_of(), 1.0), edit)
    source, target = write(tmp_path / "in", {"w": randn(D, 10), "other": randn(D, 10)}), tmp_path / "out"
    target.mkdir()
    names = {name: (Stored(name, name, 0),) for name in ("w", "b", "other")}
    assert refusal(plan.edits[0]) is None
    with pytest.raises(UsageError, match=rf"writer 'module'.*{reason}"):
        edit_checkpoint(source, target, plan, names)
    assert list(target.iterdir()) == []


def test_tied_embedding_is_refused_until_it_is_untied(tmp_path: Path) -> None:
    edit = Edit(replace(writer(1, kind=Kind.EMBEDDING), tied=True), basis_of(), 1.0)
    with pytest.raises(UsageError, match="tied to the head"):
        operate({"w": randn(10, D)}, plan_of(edit))
    found, _ = operate({"w": randn(10, D)}, plan_of(edit, untie=True))
    assert along(found["w"], basis_of(), 1).abs().max() < 1e-5


def test_tensor_edited_twice_is_refused(tmp_path: Path) -> None:
    plan = plan_of(Edit(writer(), basis_of(), 1.0), Edit(writer(), basis_of(), 0.5))
    with pytest.raises(CheckpointError, match="tensor 'w': expected one edit of it"):
        operate({"w": randn(D, 10)}, plan)


def test_tensor_of_another_width_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'w'.*axis 0 to have the model's width 24, found shape \[10, 24\]"):
        operate({"w": randn(10, D)}, plan_of(Edit(writer(), basis_of(), 1.0)))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    plan = plan_of(Edit(writer(), basis_of(), 1.0))
    source = write(tmp_path / "in", {"v": randn(D, 10)})
    with pytest.raises(CheckpointError, match="expected tensor 'w', found none"):
        list(removed_rows(source, plan, {"w": (Stored("w", "w", 0),)}))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'w'.*found I8"):
        operate({"w": torch.ones(D, 10, dtype=torch.int8)}, plan_of(Edit(writer(), basis_of(), 1.0)))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(("axis", "dtype"), [(0, torch.bfloat16), (1, torch.float32), (0, torch.float64)])
def test_numbers_that_are_not_finite_are_refused(value: float, axis: int, dtype: torch.dtype) -> None:
    weight = randn(D, D, dtype=dtype)
    weight[3, 4] = value
    with pytest.raises(NumericalError, match=r"tensor 'w' in .*: expected finite numbers"):
        operate({"w": weight}, plan_of(Edit(writer(axis), basis_of(), 1.0)))


def test_numbers_that_overflow_the_format_are_refused() -> None:
    weight = torch.full((D, 4), 6e4, dtype=torch.float16)
    basis = torch.full((1, D), D**-0.5)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        operate({"w": weight}, plan_of(Edit(writer(), basis, -1.0)))
    found, _ = operate({"w": weight}, plan_of(Edit(writer(), basis, 0.5)))  # control
    assert found["w"].isfinite().all()


def test_large_numbers_whose_squares_overflow_are_edited() -> None:
    weight = randn(D, 6, dtype=torch.bfloat16) * 1e25
    found, surgery = operate({"w": weight}, plan_of(Edit(writer(), basis_of(), 1.0)))
    assert found["w"].isfinite().all()
    assert 0.05 < surgery.residuals[0].change < 1
    assert surgery.residuals[0].ratio < 0.05


# --- coarse formats


def fp8(shape: tuple[int, ...], block: int = 128) -> dict[str, Tensor]:
    """A weight in FP8 with a scale for each block, as DeepSeek and Qwen store it."""
    numbers = randn(*shape)
    rows, columns = (-(-size // block) for size in shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale[i, j] = numbers[part].abs().max() / 448
            codes[part] = (numbers[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return {"w": codes, "w_scale_inv": scale}


def mxfp4(experts: int, d: int, n: int) -> dict[str, Tensor]:
    """Experts [E, d, n] in MXFP4, as gpt-oss stores them."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, d, n // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 122, (experts, d, n // 32), generator=generator, dtype=torch.uint8)
    return {"w_blocks": blocks, "w_scales": scales}


def numbers_of(checkpoint: Checkpoint, name: str) -> Tensor:
    info = checkpoint.tensors[name]
    how = layout(checkpoint, info)
    data = bytearray(info.file.read_bytes()[info.start : info.end])
    return how.decode(data, 0).clone().view(how.shape)


@pytest.mark.parametrize(("kind", "axis"), [("FP8-block", 0), ("FP8-block", 1), ("MXFP4", 1), ("MXFP4", 2)])
def test_coarse_formats_keep_the_edit(kind: str, axis: int, tmp_path: Path) -> None:
    d = 512
    name = "w" if kind == "FP8-block" else "w_blocks"
    if kind == "FP8-block":
        tensors = fp8((d, 200) if axis == 0 else (200, d))
    else:
        tensors = mxfp4(2, d, 64) if axis == 1 else mxfp4(2, 64, d)
    source, target = write(tmp_path / "in", tensors), tmp_path / "out"
    target.mkdir()
    basis = basis_of(d=d)
    plan = plan_of(Edit(writer(axis), basis, 1.0))
    surgery = edit_checkpoint(source, target, plan, {"w": (Stored("w", name, axis),)})
    old, new = numbers_of(source, name), numbers_of(open_checkpoint(target), name)
    (residual,) = surgery.residuals
    assert (residual.format, residual.dtype) == (kind, source.tensors[name].dtype)
    assert residual.shape == list(old.shape)
    assert residual.before == pytest.approx(float(along(old, basis, axis).norm()), rel=1e-3)
    assert residual.after == pytest.approx(float(along(new, basis, axis).norm()), rel=1e-3)
    assert residual.ratio < 0.2
    assert residual.change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-3)
    assert 0.001 < residual.rounding < 0.2
    other = [other for other in tensors if other != name]
    kept, written = load_file(tmp_path / "in" / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.equal(kept[other_name], written[other_name]) for other_name in other)


# --- what was taken out, without writing


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_removed_rows(shape: tuple[int, ...], axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.edit.weights.tensors.BLOCK_BYTES", 400)
    weight, reader = randn(*shape), randn(2, D, seed=5)
    plan = plan_of(Edit(writer(axis, bias="b"), basis_of(2), 0.5, reader))
    source = write(tmp_path / "in", {"w": weight, "b": randn(D, seed=1)})
    (first, stored, removed), (_, bias, of_bias) = removed_rows(source, plan, names_of(plan, source))
    assert first is plan.edits[0]
    assert (stored, bias) == (Stored("w", "w", axis), Stored("b", "b", 0))
    expected = (weight.movedim(axis, -1) @ reader.T).movedim(-1, axis)
    torch.testing.assert_close(removed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_bias, randn(D, seed=1) @ reader.T, rtol=1e-4, atol=1e-5)
    assert removed.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- saved tensors in a live model


class Experts(nn.Module):
    """Holds what transformers would have in memory."""

    def __init__(self, w: Tensor, b: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)
        self.b = nn.Parameter(torch.zeros(0) if b is None else b, requires_grad=False)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n", [10, D], ids=["oblong", "square"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_live_parameters_hold_what_was_saved(turned: bool, n: int, one_by_one: bool, tmp_path: Path) -> None:
    experts = randn(3, D, n)
    stored = {f"e.{i}": experts[i] for i in range(3)} if one_by_one else {"e": experts}
    memory = experts.mT.contiguous() if turned else experts.clone()
    model = Experts(w=memory, b=randn(3, D, seed=1))
    plan = plan_of(Edit(writer(2 if turned else 1, kind=Kind.EXPERTS, bias="b"), basis_of(), 1.0))
    source, target = write(tmp_path / "in", {**stored, "b": model.b}), tmp_path / "out"
    places = tuple(Stored("w", f"e.{i}", 0, i) for i in range(3)) if one_by_one else (Stored("w", "e", 1),)
    names = {"w": places, "b": (Stored("b", "b", 1),)}
    target.mkdir()
    edit_checkpoint(source, target, plan, names)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with weights_from(model, target, plan, names) as swapped:
        assert along(model.w, basis_of(), 2 if turned else 1).abs().max() < 1e-5
        assert along(model.b, basis_of(), 1).abs().max() < 1e-5
        expected = remove_from_weight(experts, basis_of(), 1.0, 1)
        torch.testing.assert_close(model.w.mT if turned else model.w.data, expected)
        with swapped.original():
            assert torch.equal(model.w, before["w"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert along(model.w, basis_of(), 2 if turned else 1).abs().max() > 0.1  # control


def test_live_parameters_from_mxfp4(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", mxfp4(2, D, 32)), tmp_path / "out"
    target.mkdir()
    model = Experts(w=numbers_of(source, "w_blocks").mT.contiguous().bfloat16())
    plan = plan_of(Edit(writer(2, kind=Kind.EXPERTS), basis_of(), 1.0))
    names = {"w": (Stored("w", "w_blocks", 1),)}
    edit_checkpoint(source, target, plan, names)
    with weights_from(model, target, plan, names):
        expected = numbers_of(open_checkpoint(target), "w_blocks").mT.bfloat16()
        assert torch.equal(model.w, expected)
    assert not torch.equal(model.w, expected)


def test_quantised_live_parameters_are_refused(tmp_path: Path) -> None:
    model = Experts(w=torch.zeros(D, 4, dtype=torch.float8_e4m3fn))
    plan = plan_of(Edit(writer(), basis_of(), 1.0))
    write(tmp_path / "in", {"w": randn(D, 4)})
    names = {"w": (Stored("w", "w", 0),)}
    with pytest.raises(ModelError, match=r"parameter 'w'.*float8"), weights_from(model, tmp_path / "in", plan, names):
        pass


# --- properties


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 4),
    rows=st.integers(2, 40),
    columns=st.integers(1, 40),
    axis=st.integers(0, 1),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
)
def test_the_direction_is_gone_and_nothing_else(
    seed: int, k: int, rows: int, columns: int, axis: int, scale: float
) -> None:
    shape = (rows, columns) if axis == 0 else (columns, rows)
    k = min(k, rows - 1)
    weight, basis = randn(*shape, seed=seed) * scale, basis_of(k, rows, seed=seed + 1)
    found, _ = operate({"w": weight}, plan_of(Edit(writer(axis), basis, 1.0)))
    size = float(weight.double().norm())
    assert along(found["w"], basis, axis).norm() < 1e-6 * size
    rest = found["w"].double() - weight.double()
    inside = rest.movedim(axis, -1) @ basis.double().T @ basis.double()
    assert (rest.movedim(axis, -1) - inside).norm() < 1e-6 * size
    again, _ = operate({"w": found["w"]}, plan_of(Edit(writer(axis), basis, 1.0)))
    assert (again["w"].double() - found["w"].double()).norm() < 1e-6 * size
