"""Undo: within one step of every format by arithmetic, bit for bit from the original, and never at a risk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_weights import D, basis_of, fp8, mxfp4, names_of, plan_of, randn, write, writer
from torch import Tensor

from abliterate.algebra import orthonormal
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.undo import Restored, restore, undo
from abliterate.edit.weights import Surgery, edit_checkpoint
from abliterate.errors import CheckpointError, UsageError
from abliterate.files.checkpoint import Checkpoint, open_checkpoint, resumable
from abliterate.files.formats import layout
from abliterate.files.local import seal
from abliterate.model.anatomy import Kind, Stored, Writer
from abliterate.monitor import Monitor
from abliterate.record import AnatomyPart, ModelPart, PlanPart, Record, sealed_parts, write_record
from steps import steps_apart

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def edit(source: Checkpoint, target: Path, plan: Plan, **names: tuple[Stored, ...]) -> Surgery:
    target.mkdir()
    return edit_checkpoint(source, target, plan, names or names_of(plan, source))


def taken_back(edited: Path, target: Path) -> Restored:
    target.mkdir()
    return restore(open_checkpoint(edited), sorted(edited.glob("undo.safetensors")), target)


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytearray:
    info = checkpoint.tensors[name]
    return bytearray(info.file.read_bytes()[info.start : info.end])


def worst(before: Checkpoint, after: Checkpoint) -> int:
    """The largest distance, in representable numbers, between the tensors of two checkpoints."""
    distances = [0]
    for name, info in before.tensors.items():
        if name.endswith(("_scale_inv", "_scales")):
            assert stored_bytes(before, name) == stored_bytes(after, name)
            continue
        steps = steps_apart(stored_bytes(before, name), stored_bytes(after, name), layout(before, info))
        distances.append(int(steps.max()))
    return max(distances)


def round_trip(tensors: dict[str, Tensor], plan: Plan, **names: tuple[Stored, ...]) -> tuple[int, int, int]:
    """Distance of the restored and of the edited tensors to the original ones, and the number of exceptions."""
    with TemporaryDirectory() as place:
        source, target, back = write(Path(place, "in"), tensors), Path(place, "out"), Path(place, "back")
        edit(source, target, plan, **names)
        taken_back(target, back)
        assert not (back / "undo.safetensors").exists()
        count = sum(
            int(value.sum())
            for path in target.glob("undo.safetensors")
            for name, value in load_file(path).items()
            if name.endswith(".counts")
        )
        original = open_checkpoint(source.folder)
        return worst(original, open_checkpoint(back)), worst(original, open_checkpoint(target)), count


SHAPES = [((D, 10), 0), ((D, D), 0), ((10, D), 1), ((3, D, 10), 1), ((3, 10, D), 2)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm_preserving", [False, True])
@pytest.mark.parametrize(("k", "strength"), [(1, 1.0), (3, 1.0), (2, 0.3), (2, -1.0)])
def test_undo_comes_within_one_step(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, norm_preserving: bool, k: int, strength: float
) -> None:
    plan = plan_of(Edit(writer(axis), basis_of(k), strength, norm_preserving=norm_preserving))
    restored, edited, _ = round_trip({"w": randn(*shape, dtype=dtype), "other": randn(3, dtype=dtype)}, plan)
    assert restored <= 1
    assert edited > 10  # control


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_undo_of_an_oblique_edit(shape: tuple[int, ...], axis: int) -> None:
    plan = plan_of(Edit(writer(axis), randn(2, D, seed=4), 0.8, randn(2, D, seed=5), norm_preserving=True))
    assert round_trip({"w": randn(*shape, dtype=torch.bfloat16)}, plan)[0] <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_undo_of_an_offset(dtype: torch.dtype, size: float) -> None:
    tensors = {"w": randn(10, D, dtype=dtype), "v": randn(D, 10, dtype=dtype), "b": randn(D, seed=1, dtype=dtype)}
    offset = size * randn(D, seed=2)
    embedding = Writer("embedding", Kind.EMBEDDING, None, "w", 1, None)
    biased = Writer("mlp", Kind.MLP, 0, "v", 0, "b")
    plan = plan_of(
        Edit(embedding, basis_of(), 1.0, offset=offset, norm_preserving=True),
        Edit(biased, basis_of(2), 0.0, offset=offset),
    )
    restored, edited, exceptions = round_trip(tensors, plan)
    assert restored <= 1
    assert edited > 10
    assert exceptions > 0


def test_undo_of_an_edit_at_strength_zero_is_exact() -> None:
    plan = plan_of(Edit(writer(), basis_of(), 0.0))
    assert round_trip({"w": randn(D, 10, dtype=torch.bfloat16)}, plan) == (0, 0, 0)


@pytest.mark.parametrize("strength", [1.0, -1.0])
@pytest.mark.parametrize("norm_preserving", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_undo_in_fp8(strength: float, norm_preserving: bool, axis: int) -> None:
    plan = plan_of(Edit(writer(axis), basis_of(2, 200), strength, norm_preserving=norm_preserving))
    restored, edited, _ = round_trip(fp8((200, 150) if axis == 0 else (150, 200)), plan)
    assert restored <= 1
    assert edited > 10


@pytest.mark.parametrize("strength", [1.0, -1.0])
@pytest.mark.parametrize("axis", [1, 2])
def test_undo_in_mxfp4(strength: float, axis: int) -> None:
    plan = plan_of(Edit(writer(axis, kind=Kind.EXPERTS), basis_of(2, 64), strength))
    tensors = mxfp4(2, 64, 96) if axis == 1 else mxfp4(2, 96, 64)
    restored, edited, _ = round_trip(tensors, plan, w=(Stored("w", "w_blocks", axis),))
    assert restored <= 1
    assert edited > 1


def adversarial(seed: int, dtype: torch.dtype, shape: Sequence[int], spread: float) -> Tensor:
    """Numbers of very different sizes: zeros, subnormal ones, powers of two and those next to them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.exp(exponents * spread)
    kind = torch.randint(0, 12, tuple(shape), generator=generator)
    numbers = torch.where(kind == 0, 0.0, numbers)
    numbers = torch.where(kind == 1, torch.exp2(numbers.abs().clamp_min(1e-30).log2().round()), numbers)
    numbers = torch.where(kind == 2, -torch.finfo(dtype).tiny * 0.25 * torch.rand_like(numbers), numbers)
    stored = numbers.clamp(-6e3, 6e3).to(dtype) if dtype == torch.float16 else numbers.to(dtype)
    return torch.where(kind == 3, torch.nextafter(stored, torch.zeros(()).to(dtype)), stored)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOATS),
    k=st.integers(1, 4),
    d=st.integers(2, 40),
    n=st.integers(1, 30),
    axis=st.integers(0, 1),
    strength=st.sampled_from([1.0, 0.5, -1.0, 1.7, -3.0]),
    spread=st.sampled_from([0.0, 3.0, 12.0, 40.0]),
    norm_preserving=st.booleans(),
    sparse=st.booleans(),
)
def test_undo_of_adversarial_numbers(
    seed: int,
    dtype: torch.dtype,
    k: int,
    d: int,
    n: int,
    axis: int,
    strength: float,
    spread: float,
    norm_preserving: bool,
    sparse: bool,
) -> None:
    weight = adversarial(
        seed, dtype, (d, n) if axis == 0 else (n, d), min(spread, 8) if dtype == torch.float16 else spread
    )
    direction = randn(min(k, d - 1), d, seed=seed + 1)
    if sparse:  # nearly one coordinate: some numbers are wholly taken out, others untouched
        direction = direction[:1] * torch.logspace(0, -12, d)
    plan = plan_of(Edit(writer(axis), orthonormal(direction), strength, norm_preserving=norm_preserving))
    assert round_trip({"w": weight}, plan)[0] <= 1


def test_undo_of_an_offset_that_cancels_what_is_taken_out() -> None:
    """A small number that was large on the way has lost its last places, though it did not grow."""
    row = torch.tensor([[2.0, 1e-6]], dtype=torch.bfloat16)
    embedding = Writer("embedding", Kind.EMBEDDING, None, "w", 1, None)
    plan = plan_of(Edit(embedding, torch.full((1, 2), 0.5**0.5), 1.0, offset=torch.ones(2)))
    restored, _, exceptions = round_trip({"w": row}, plan)
    assert restored <= 1
    assert exceptions == 1


def test_undo_does_not_round_the_largest_number_to_infinity() -> None:
    weight = torch.tensor([[65504.0], [48.0]], dtype=torch.float16)
    left, reader = torch.eye(2)[:1], torch.eye(2)[1:]
    assert round_trip({"w": weight}, plan_of(Edit(writer(), left, 1.0, reader))) == (0, 1, 0)
    assert torch.tensor(65456.0).half() + 48.0 == torch.inf  # control: that is what it would be


def test_exceptions_are_needed_and_few() -> None:
    """Without them numbers would come back far off; on normally distributed weights they are few in a hundred."""
    weight, plan = randn(512, 300, dtype=torch.bfloat16), plan_of(Edit(writer(), basis_of(1, 512), 1.0))
    restored, _, count = round_trip({"w": weight}, plan)
    assert restored == 1
    assert 0 < count < 0.02 * weight.numel()


def test_undo_file_can_be_read_by_others(tmp_path: Path) -> None:
    weight, basis = randn(D, 10), basis_of(2)
    plan = plan_of(Edit(writer(), basis, 1.0, norm_preserving=True), Edit(writer(weight="v"), basis, 0.5))
    surgery = edit(write(tmp_path / "in", {"w": weight, "v": randn(D, 10, seed=1)}), tmp_path / "out", plan)
    assert surgery.undo == ("undo.safetensors",)
    arrays = load_file(tmp_path / "out" / surgery.undo[0])
    by_tensor = {}
    with (tmp_path / "out" / surgery.undo[0]).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    said = json.loads(header["__metadata__"]["abliterate"])
    by_tensor = {entry["tensor"]: entry for entry in said["tensors"]}
    assert by_tensor["v"]["strength"] == 0.5
    assert by_tensor["v"]["basis"] == by_tensor["w"]["basis"] == "0/basis.0"
    torch.testing.assert_close(arrays[by_tensor["w"]["key"] + ".removed"][0], basis @ weight, rtol=1e-5, atol=1e-6)
    assert arrays[by_tensor["w"]["key"] + ".scales"].shape == (1, 10)
    assert by_tensor["v"]["key"] + ".scales" not in arrays
    assert torch.equal(arrays["0/basis.0"], basis)


@pytest.mark.parametrize("block_bytes", [400, 1 << 20])
def test_undo_does_not_depend_on_blocks(block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.edit.weights.tensors.BLOCK_BYTES", 800)
    plan = plan_of(
        Edit(writer(), basis_of(3), 1.0, norm_preserving=True), Edit(writer(1, weight="v"), basis_of(3), 1.0)
    )
    source = write(tmp_path / "in", {"w": adversarial(0, torch.bfloat16, (D, 90), 9), "v": randn(90, D)})
    edit(source, tmp_path / "out", plan)
    monkeypatch.setattr("abliterate.edit.weights.tensors.BLOCK_BYTES", block_bytes)
    taken_back(tmp_path / "out", tmp_path / "back")
    assert worst(source, open_checkpoint(tmp_path / "back")) <= 1


def test_exceptions_on_many_pages() -> None:
    weight = randn(D, 9000, dtype=torch.bfloat16)
    weight[:, 2000:] = 0  # every one of them would come back as what rounding left
    restored, _, count = round_trip({"w": weight.T.contiguous()}, plan_of(Edit(writer(1), basis_of(), -1.0)))
    assert restored <= 1
    weight[:2] = 1e-6 * randn(2, 9000)
    restored, _, count = round_trip({"w": weight}, plan_of(Edit(writer(), basis_of(), 1.0)))
    assert restored <= 1
    assert count > 6000


# --- a whole model folder


def sharded(folder: Path, seed: int = 0) -> Checkpoint:
    """Two shards in bf16, four tensors to be edited and one that is not."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(2):
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        tensors = {
            f"o.{shard}": randn(D, 30, seed=seed + shard, dtype=torch.bfloat16),
            f"d.{shard}": randn(D, 50, seed=seed + 10 + shard, dtype=torch.bfloat16),
            f"up.{shard}": randn(50, D, seed=seed + 20 + shard, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("the original")
    return open_checkpoint(folder)


def sharded_plan() -> Plan:
    return plan_of(*(Edit(writer(weight=f"{part}.{i}"), basis_of(2), 1.0) for i in range(2) for part in "od"))


def edited_model(tmp_path: Path, *, source_folder: bool = True) -> Path:
    """A model with its record, as a run leaves it."""
    source, out = sharded(tmp_path / "original"), tmp_path / "out"
    surgery = edit(source, out, sharded_plan())
    (out / "README.md").write_text("an edited model")
    model: dict[str, Any] = {
        "name": "m",
        "kind": "folder",
        "architecture": "A",
        "d_model": D,
        "layers": 2,
        "dtype": "bfloat16",
        "device": "cpu",
        "source_sha256": surgery.files.source_sha256,
        "companion_sha256": surgery.files.companion_sha256,
    }
    if source_folder:
        model["folder"] = str(source.folder)
    model["seal"] = seal(*sealed_parts(ModelPart(**model)))
    shards = [shard.path.name for shard in open_checkpoint(out).shards]
    record = Record(
        created="now",
        versions={},
        settings={},
        model=ModelPart(**model),
        anatomy=AnatomyPart(writers=4, worst_closure=0.0, tolerance=1e-3),
        plan=PlanPart(strength=1.0, rank=2, edits=list(surgery.residuals), left_alone={}, undo=list(surgery.undo)),
        output_sha256={name: surgery.files.sha256[name] for name in shards},
    )
    write_record(record, out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class _Counting(Monitor):
    """Adds up the progress it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[int] = []

    def advance(self, steps: int) -> None:
        self.counted.append(steps)


@pytest.mark.parametrize("given", [False, True], ids=["recorded", "given"])
@pytest.mark.parametrize("in_place", [False, True])
def test_undo_gives_the_original_bit_for_bit(given: bool, in_place: bool, tmp_path: Path) -> None:
    out = edited_model(tmp_path, source_folder=not given)
    before, original = contents(out), contents(tmp_path / "original")
    assert before.keys() >= {"abliteration.json", "undo.safetensors"}
    target = None if in_place else tmp_path / "back"
    monitor = _Counting()
    undone = undo(out, target=target, source=tmp_path / "original" if given else None, monitor=monitor)
    assert (undone.exact, undone.steps, undone.reason) == (True, 0, None)
    assert undone.folder == str(target or out)
    assert contents(target or out) == original
    assert sum(monitor.counted) == sum(map(len, original.values()))
    if not in_place:
        assert contents(out) == before


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("why", ["not recorded", "gone", "another"])
def test_undo_without_the_original(in_place: bool, why: str, tmp_path: Path) -> None:
    out = edited_model(tmp_path, source_folder=why != "not recorded")
    original = open_checkpoint(tmp_path / "original")
    kept = {name: stored_bytes(original, name) for name in original.tensors}
    layouts = {name: layout(original, info) for name, info in original.tensors.items()}
    shard = tmp_path / "original" / "model-00002-of-00002.safetensors"
    if why == "gone":
        shard.unlink()
    elif why == "another":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    before = contents(out)
    place = out if in_place else tmp_path / "back"
    undone = undo(out, target=None if in_place else place)
    assert undone.folder == str(place)
    assert (undone.exact, undone.steps) == (False, 1)
    assert set(undone.tensors) == {"o.0", "o.1", "d.0", "d.1"}
    assert undone.reason is not None
    assert {"not recorded": "does not say", "gone": "does not exist", "another": "00002-of-00002"}[why] in undone.reason
    back = open_checkpoint(place)
    for name, how in layouts.items():
        steps = int(steps_apart(kept[name], stored_bytes(back, name), how).max())
        assert steps <= (1 if name in undone.tensors else 0)
    assert sorted(contents(place)) == sorted(undone.files)
    assert {path.name for path in place.iterdir()} == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }  # and neither the record nor the card of the edited model
    if not in_place:
        assert contents(out) == before


def broken(out: Path, name: str, *, position: int = -1) -> None:
    data = bytearray((out / name).read_bytes())
    data[position] ^= 1
    (out / name).write_bytes(data)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shard", r"out/model-00001-of-00002.safetensors: is not as it was written"),
        ("record", "expected the record of a run"),
        ("hashes", "expected a record with hashes"),
        ("extra shard", "model-00001-of-00002.safetensors: is not known to the record"),
    ],
)
def test_undo_touches_nothing_when_the_model_is_not_the_recorded_one(
    exact: bool, what: str, message: str, tmp_path: Path
) -> None:
    out = edited_model(tmp_path, source_folder=exact)
    if what == "shard":
        broken(out, "model-00001-of-00002.safetensors")
    elif what == "record":
        (out / "abliteration.json").unlink()
    else:
        record = json.loads((out / "abliteration.json").read_text())
        if what == "hashes":
            record["output_sha256"] = {}
        else:
            del record["output_sha256"]["model-00001-of-00002.safetensors"]
        (out / "abliteration.json").write_text(json.dumps(record))
    before = contents(tmp_path)
    with pytest.raises((CheckpointError, UsageError), match=message):
        undo(out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("data", "its data are not what was written"),
        ("missing", "undo.safetensors: expected what undo needs, found none"),
        ("version", "expected an undo file of version 1"),
        ("tensors", "expected what undo needs of 'o.1', found nothing"),
    ],
)
def test_undo_touches_nothing_when_an_undo_file_is_wrong(what: str, message: str, tmp_path: Path) -> None:
    out = edited_model(tmp_path, source_folder=False)
    file = out / "undo.safetensors"
    if what == "data":
        broken(out, "undo.safetensors")
    elif what == "missing":
        file.unlink()
    elif what == "version":
        file.write_bytes(file.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    else:
        file.write_bytes(file.read_bytes().replace(b'\\"tensor\\": \\"o.1\\"', b'\\"tensor\\": \\"o.0\\"'))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        undo(out)
    assert contents(tmp_path) == before


def test_a_given_source_that_is_another_model_is_an_error(tmp_path: Path) -> None:
    out = edited_model(tmp_path)
    sharded(tmp_path / "other", seed=5)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"other/model-00001.*is not the one that was edited"):
        undo(out, source=tmp_path / "other")
    assert contents(tmp_path) == before


def test_an_adapter_has_nothing_to_undo(tmp_path: Path) -> None:
    out = edited_model(tmp_path)
    record = json.loads((out / "abliteration.json").read_text())
    record["plan"]["realisation"] = "lora"
    (out / "abliteration.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="edited weights, found lora"):
        undo(out)


# --- taken up again after a kill


def test_residuals_and_undo_files_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run had finished is not edited again, and all is there in the end."""
    source, plan = sharded(tmp_path / "original"), sharded_plan()
    whole = edit(source, tmp_path / "whole", plan)

    class Killed(BaseException):
        pass

    def die(done: int) -> None:
        if any((tmp_path).glob(".out.partial-*/journal.jsonl")) and len(finished()) > 1:
            raise Killed

    def finished() -> list[str]:
        (journal,) = tmp_path.glob(".out.partial-*/journal.jsonl")
        return journal.read_text().splitlines()

    # A process that is killed runs no clean-up: keep the folder that the failed run would remove.
    monkeypatch.setattr("abliterate.files.checkpoint.staging._discard", lambda place, out: None)
    with pytest.raises(Killed), resumable(tmp_path / "out", identity=b"1", source=source.folder) as staging:
        edit_checkpoint(
            source, staging.folder, plan, names_of(plan, source), journal=staging.journal, progress=_slow(die)
        )
    monkeypatch.undo()
    with resumable(tmp_path / "out", identity=b"1", source=source.folder) as staging:
        kept = set(staging.journal.finished)
        assert kept
        again = edit_checkpoint(source, staging.folder, plan, names_of(plan, source), journal=staging.journal)
    assert set(again.files.kept) == kept
    assert again.residuals == whole.residuals
    assert again.undo == whole.undo
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _slow(step: Any) -> Any:
    """Give the threads that finish files time to write to the journal."""
    import time

    def wait(done: int) -> None:
        time.sleep(0.05)
        step(done)

    return wait
