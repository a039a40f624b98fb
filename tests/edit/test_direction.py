"""Directions: the algebra against its definition, and files of ours and of others."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from abliterate.algebra import orthonormal
from abliterate.edit.direction import Candidates, Direction, Recipe, Site, load_direction, save_direction
from abliterate.errors import AbliterateError, CheckpointError, NumericalError, UsageError
from abliterate.finding.estimate import auroc, difference_of_means, separation
from abliterate.model.activations import Moments, MomentsFitter

K, SITES, D = 3, 5, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(values: Tensor) -> Moments:
    """Moments of activations [n, k, sites, d]."""
    return Moments(len(values), values.mean(0), values.var(0))


def candidates(seed: int = 0) -> Candidates:
    return Candidates(random(K, SITES, D, seed=seed).float(), random(K, SITES, D, seed=seed + 1).float())


# --- difference of means


def test_direction_is_the_difference_of_the_class_means_at_each_site() -> None:
    harmful, harmless = random(40, K, SITES, D) + 1, random(30, K, SITES, D, seed=1)
    found = difference_of_means(moments(harmful), moments(harmless))
    for layer in range(SITES):
        for position in (-1, -2, -3):
            harmful_here, harmless_here = harmful[:, -1 - position, layer], harmless[:, -1 - position, layer]
            naive = harmful_here.sum(0) / 40 - harmless_here.sum(0) / 30
            assert torch.allclose(found.at(layer, position).double(), naive, atol=1e-6)
    assert found.positions == [-1, -2, -3]
    assert found.raw.dtype == torch.float32


def test_small_difference_between_large_activations_survives() -> None:
    """Means are subtracted in float64: in float32, 1e-4 beside 1e4 would be rounding."""
    base = 1e4 * (1 + random(1, 1, 1, D).abs())
    r = 1e-4 * random(1, 1, 1, D, seed=1)
    found = difference_of_means(moments((base + r).expand(4, 1, 1, D)), moments(base.expand(4, 1, 1, D)))
    assert torch.allclose(found.raw[0, 0].double(), r[0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("tilt", [1.0, 1e-3, 1e-7, 1e-10])
def test_projected_direction_is_orthogonal_to_the_harmless_mean_even_if_nearly_parallel(tilt: float) -> None:
    mean = 100 * random(1, K, SITES, D)
    raw = mean + tilt * random(1, K, SITES, D, seed=1)
    harmful, harmless = moments((mean + raw).expand(4, K, SITES, D)), moments(mean.expand(4, K, SITES, D))
    plain = difference_of_means(harmful, harmless)
    found = difference_of_means(harmful, harmless, projected=True)
    assert float(torch.cosine_similarity(plain.raw, plain.harmless_mean, dim=-1).abs().min()) > 0.1, "the control"
    assert float(torch.cosine_similarity(found.raw, found.harmless_mean, dim=-1).abs().max()) < 1e-6
    assert float(found.norms.min()) > 0


def test_projecting_leaves_a_direction_that_is_orthogonal_already_and_a_zero_mean_alone() -> None:
    r, mean = torch.zeros(1, 1, 2, D).double(), torch.zeros(1, 1, 2, D).double()
    r[..., 0], mean[0, 0, 0, 1] = 3.0, 5.0
    found = difference_of_means(
        moments((r + mean).expand(4, -1, -1, -1)), moments(mean.expand(4, -1, -1, -1)), projected=True
    )
    assert torch.equal(found.raw, r[0].float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_means_that_are_not_finite_are_refused(bad: float) -> None:
    values = random(4, K, SITES, D)
    values[2, 1, 3, 0] = bad
    with pytest.raises(NumericalError, match="difference of means"):
        difference_of_means(moments(values), moments(random(4, K, SITES, D)))


def test_sites_without_a_difference_have_no_unit_direction() -> None:
    raw = candidates().raw
    raw[1, 2] = 0
    raw[0, 0] = 1e-9
    found = Candidates(raw, raw)
    assert float(found.units[1, 2].norm()) == float(found.units[0, 0].norm()) == 0
    others = found.units.norm(dim=-1).flatten()
    assert sorted(others.tolist())[2:] == pytest.approx([1.0] * (K * SITES - 2), abs=1e-6)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 99))
def test_moments_do_not_depend_on_how_prompts_are_batched(sizes: list[int], seed: int) -> None:
    values = 50 + random(sum(sizes), 2, 3, 4, seed=seed)
    fitter = MomentsFitter(positions=2, sites=3, d_model=4)
    start = 0
    for size in sizes:
        for layer in range(3):
            fitter.update(layer, list(range(start, start + size)), values[start : start + size, :, layer])
        start += size
    result = fitter.result()
    assert result.count == len(values)
    assert torch.allclose(result.mean, values.mean(0), atol=1e-10)
    if len(values) > 1:
        assert torch.allclose(result.variance, values.var(0), atol=1e-10)


# --- separation


def brute_auroc(positive: list[float], negative: list[float]) -> float:
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@given(numbers, numbers)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half(positive: list[float], negative: list[float]) -> None:
    found = auroc(torch.tensor(positive), torch.tensor(negative))
    assert float(found) == pytest.approx(brute_auroc(positive, negative))
    assert float(auroc(torch.tensor(negative), torch.tensor(positive))) == pytest.approx(1 - float(found))


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0, 2.0], 0.0), ([1.0, 1.0], [1.0], 0.5), ([0.0, 2.0], [1.0], 0.5)],
)
def test_auroc_of_known_cases(positive: list[float], negative: list[float], expected: float) -> None:
    assert float(auroc(torch.tensor(positive), torch.tensor(negative))) == expected


def test_separation_is_computed_for_every_site_on_its_own() -> None:
    harmful, harmless = random(50, K, SITES), random(60, K, SITES, seed=1)
    harmful[:, 1, 2] += 2
    found = separation(harmful, harmless)
    assert found.auroc.shape == found.dprime.shape == (K, SITES)
    assert float(found.dprime[1, 2]) == pytest.approx(2, abs=0.6)
    assert float(found.auroc[1, 2]) == pytest.approx(0.92, abs=0.05)
    assert int(found.auroc.argmax()) == int(found.dprime.argmax()) == 1 * SITES + 2
    a, b = harmful[:, 0, 4], harmless[:, 0, 4]
    naive = (a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt()
    assert float(found.dprime[0, 4]) == pytest.approx(float(naive))


def test_separation_of_classes_without_spread_is_finite() -> None:
    found = separation(torch.ones(4, 1, 1), torch.ones(5, 1, 1))
    assert float(found.dprime) == 0
    assert float(found.auroc) == 0.5


# --- orthonormal bases


@given(st.integers(1, 4), st.integers(0, 999), st.floats(1e-3, 1e3))
def test_basis_is_orthonormal_and_spans_the_same(rows: int, seed: int, scale: float) -> None:
    vectors = scale * random(rows, D, seed=seed)
    basis = orthonormal(vectors)
    assert torch.allclose(basis @ basis.T, torch.eye(rows).double(), atol=1e-12)
    assert torch.allclose(vectors @ basis.T @ basis, vectors, atol=1e-9 * scale)
    assert float(basis[0] @ vectors[0]) > 0


def test_one_vector_is_only_normalised() -> None:
    vector = torch.tensor([[3.0, -4.0, 0.0]])
    assert torch.allclose(orthonormal(vector), torch.tensor([[0.6, -0.8, 0.0]]))
    assert torch.equal(orthonormal(orthonormal(vector)), orthonormal(vector))


# --- files


def test_direction_file_round_trip(tmp_path: Path) -> None:
    made, basis = candidates(), orthonormal(random(2, D).float())
    facts = {"chosen": {"norm": 2.5, "met_rule": True}, "trained_on": {"harmful": 4}}
    written = Direction(
        basis, made, site=Site(3, -2), model="owner/größe", learnt_from=frozenset({"aa", "bb"}), facts=facts
    )
    save_direction(tmp_path / "new" / "x.safetensors", written)
    read = load_direction(tmp_path / "new" / "x.safetensors", D)
    assert torch.allclose(read.basis, basis, atol=1e-7)
    assert (read.site, read.model, read.learnt_from) == (written.site, written.model, written.learnt_from)
    assert read.facts == facts
    assert read.candidates is not None
    assert torch.equal(read.candidates.raw, made.raw)
    assert torch.equal(read.candidates.harmless_mean, made.harmless_mean)
    assert read.reader is None
    assert read.mean is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]
    with safe_open(tmp_path / "new" / "x.safetensors", framework="np") as opened:
        assert json.loads(opened.metadata()["abliterate"]) == {
            "chosen": {"layer": 3, "position": -2, "norm": 2.5, "met_rule": True},
            "trained_on": {"harmful": 4},
            "model": "owner/größe",
            "learnt_from": ["aa", "bb"],
        }


def test_oblique_direction_keeps_its_rows_as_they_are(tmp_path: Path) -> None:
    """With a reader the rows need not be orthonormal: making them so would change the edit."""
    made = Direction(3 * random(2, D).float(), reader=random(2, D, seed=1).float(), mean=random(D, seed=2).float())
    save_direction(tmp_path / "x.safetensors", made)
    read = load_direction(tmp_path / "x.safetensors", D)
    assert read.reader is not None
    assert read.mean is not None
    assert made.reader is not None
    assert made.mean is not None
    assert torch.equal(read.basis, made.basis)
    assert torch.equal(read.reader, made.reader)
    assert torch.equal(read.mean, made.mean)
    save_direction(tmp_path / "plain.safetensors", Direction(made.basis))
    plain = load_direction(tmp_path / "plain.safetensors").basis
    assert torch.allclose(plain @ plain.T, torch.eye(2), atol=1e-6), "the control"


CHOSEN: dict[str, tuple[object, tuple[int, int] | None]] = {
    "in the file": ({"layer": 4, "position": -3}, (4, -3)),
    "with more said of it": ({"layer": 0, "position": -1, "norm": 2.0}, (0, -1)),
    "a layer too deep": ({"layer": SITES, "position": -1}, None),
    "a layer before the first": ({"layer": -1, "position": -1}, None),
    "a position too far": ({"layer": 0, "position": -K - 1}, None),
    "a position counted from the left": ({"layer": 0, "position": 0}, None),
    "text": ({"layer": "4", "position": "-1"}, None),
    "half": ({"layer": 4}, None),
    "a list": ([4, -1], None),
    "nothing": (None, None),
}


@pytest.mark.parametrize(("said", "site"), CHOSEN.values(), ids=CHOSEN)
def test_chosen_site_is_believed_only_where_the_file_holds_it(
    tmp_path: Path, said: object, site: tuple[int, int] | None
) -> None:
    file, made = tmp_path / "x.safetensors", candidates()
    tensors = {"basis": torch.eye(1, D), "candidates": made.raw, "harmless_mean": made.harmless_mean}
    save_file(tensors, file, {"abliterate": json.dumps({"chosen": said})})
    assert load_direction(file).site == site


def test_at_another_site_nothing_is_said_that_was_found_at_the_first() -> None:
    made = candidates()
    facts = {"chosen": {"norm": 2.5, "met_rule": True}, "trained_on": {"harmful": 4}}
    first = Direction(orthonormal(random(1, D).float()), made, site=Site(3, -2), model="m", facts=facts)
    assert first.at(None) is first
    other = first.at(Site(1, -1))
    raw = made.at(1, -1)
    assert torch.allclose(other.basis[0], raw / raw.norm(), atol=1e-6)
    assert (other.site, other.model, other.candidates) == (Site(1, -1), "m", made)
    assert other.facts == {"trained_on": {"harmful": 4}}


def test_directions_compare_number_by_number_are_pickled_and_print_in_a_line() -> None:
    def make(**changes: Any) -> Direction:
        made = Direction(random(1, D), candidates(), recipe=Recipe({"w": 1.0}), site=Site(3, -2), facts={"layers": 4})
        return replace(made, **changes)

    assert make() == make() == pickle.loads(pickle.dumps(make()))
    nudged = random(1, D)
    nudged[0, 3] += 1e-9
    others = (
        make(basis=nudged),
        make(basis=random(1, D).float()),
        make(candidates=candidates(seed=1)),
        make(candidates=None),
        make(recipe=Recipe({"w": 0.9})),
        make(site=Site(3, -1)),
        make(facts={}),
    )
    assert all(make() != other for other in others)
    assert repr(make()).startswith(f"Direction(basis=[1, {D}], candidates=Candidates(raw=[{K}, {SITES}, {D}]")
    assert "\n" not in repr(make())


def test_direction_file_holds_what_other_programs_rely_on(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_direction(file, Direction(random(1, D), candidates(), facts={"layers": 4}))
    with safe_open(file, framework="np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        metadata = opened.metadata()
    shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    assert shapes == {
        "basis": ("F32", [1, D]),
        "candidates": ("F32", [K, SITES, D]),
        "harmless_mean": ("F32", [K, SITES, D]),
    }
    assert json.loads(metadata["abliterate"]) == {"layers": 4}


def test_equal_directions_are_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        save_direction(file, Direction(random(1, D), candidates(), facts={"b": 1, "a": 2}))
    assert len({file.read_bytes() for file in files}) == 1


FOREIGN: dict[str, dict[str, Tensor]] = {
    "only a basis": {"basis": random(2, D).float()},
    "a basis beside other tensors": {"basis": random(1, D).float(), "layer": torch.tensor([3])},
    "one vector of any name": {"refusal_dir": random(D).float()},
    "one row of any name": {"v": random(1, D).float()},
    "not normalised": {"basis": 1000 * random(3, D).float()},
    "half precision": {"v": random(D).to(torch.bfloat16)},
    "double precision": {"v": random(D)},
}


@pytest.mark.parametrize("tensors", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_read_as_an_orthonormal_basis(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "abliterate": "not JSON"})
    read = load_direction(tmp_path / "x.safetensors", D)
    stored = tensors.get("basis", next(iter(tensors.values()))).float().reshape(-1, D)
    assert read.basis.dtype == torch.float32
    assert torch.allclose(read.basis @ read.basis.T, torch.eye(len(stored)), atol=1e-6)
    assert torch.allclose(stored @ read.basis.T @ read.basis, stored, rtol=1e-4, atol=1e-3)
    assert (read.site, read.model, read.learnt_from, read.facts) == (None, None, frozenset(), {})
    assert read.candidates is None


BAD: dict[str, tuple[type[AbliterateError], str, dict[str, Tensor]]] = {
    "wrong width": (UsageError, f"the model's width {D}, found 48", {"basis": torch.eye(1, 48)}),
    "several tensors, none a basis": (UsageError, "found a [16], b [16]", {"a": torch.ones(D), "b": torch.ones(D)}),
    "whole numbers": (UsageError, "expected a tensor 'basis'", {"basis": torch.ones(D, dtype=torch.int64)}),
    "three axes": (UsageError, "found x [2, 3, 16]", {"x": torch.ones(2, 3, D)}),
    "a scalar": (UsageError, "found x []", {"x": torch.tensor(1.0)}),
    "no tensors": (UsageError, "found nothing", {}),
    "empty vector": (UsageError, "found basis [0]", {"basis": torch.zeros(0)}),
    "no rows": (UsageError, "found basis [0, 16]", {"basis": torch.zeros(0, D)}),
    "zero vector": (NumericalError, "NaN, infinity or zero", {"basis": torch.zeros(1, D)}),
    "one zero row": (
        NumericalError,
        "NaN, infinity or zero",
        {"basis": torch.eye(3, D) * torch.tensor([[1], [0], [1]])},
    ),
    "NaN": (NumericalError, "NaN, infinity or zero", {"x": torch.full((D,), torch.nan)}),
    "infinity": (NumericalError, "NaN, infinity or zero", {"x": torch.full((D,), torch.inf)}),
    "dependent rows": (NumericalError, "independent vectors", {"basis": torch.ones(2, D)}),
    "more rows than width": (NumericalError, "independent vectors", {"basis": random(D + 1, D).float()}),
    "candidates of another width": (
        UsageError,
        "expected finite 'candidates' and 'harmless_mean' [positions, sites, 16]",
        {"basis": torch.eye(1, D), "candidates": torch.ones(1, 2, 8), "harmless_mean": torch.ones(1, 2, 8)},
    ),
    "candidates without sites": (
        UsageError,
        "found [2, 16] and [2, 16]",
        {"basis": torch.eye(1, D), "candidates": torch.ones(2, D), "harmless_mean": torch.ones(2, D)},
    ),
    "reader of another shape": (
        UsageError,
        "expected finite 'reader' [1, 16], found [2, 16]",
        {"basis": torch.eye(1, D), "reader": torch.ones(2, D)},
    ),
    "mean of another width": (
        UsageError,
        "expected finite 'mean' [16], found [8]",
        {"basis": torch.eye(1, D), "mean": torch.ones(8)},
    ),
    "reader with NaN": (
        UsageError,
        "expected finite 'reader'",
        {"basis": torch.eye(1, D), "reader": torch.full((1, D), torch.nan)},
    ),
    "edits of writers without names": (
        UsageError,
        "expected 'writers.basis', 'writers.reader' and the 'writers' that they are for, found not all of them",
        {"basis": torch.eye(1, D), "writers.basis": torch.ones(2, 1, D), "writers.reader": torch.ones(2, 1, D)},
    ),
    "oblique rows with NaN": (
        NumericalError,
        "NaN, infinity or zero",
        {"basis": torch.full((1, D), torch.nan), "reader": torch.ones(1, D)},
    ),
    "harmless means with infinity": (
        UsageError,
        "expected finite",
        {
            "basis": torch.eye(1, D),
            "candidates": torch.ones(1, 2, D),
            "harmless_mean": torch.full((1, 2, D), torch.inf),
        },
    ),
    "candidates with NaN": (
        UsageError,
        "expected finite",
        {
            "basis": torch.eye(1, D),
            "candidates": torch.full((1, 2, D), torch.nan),
            "harmless_mean": torch.ones(1, 2, D),
        },
    ),
}


@pytest.mark.parametrize(("kind", "part", "tensors"), BAD.values(), ids=BAD)
def test_unusable_file_is_explained_in_one_line(
    tmp_path: Path, kind: type[AbliterateError], part: str, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(kind) as caught:
        load_direction(tmp_path / "x.safetensors", D)
    assert part in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("names", "left", "reader", "part"),
    [
        (["a", "b"], torch.ones(2, 1, D), torch.ones(1, 1, D), "[2, k, 16], found [2, 1, 16] and [1, 1, 16]"),
        (["a"], torch.ones(2, 1, D), torch.ones(2, 1, D), "[1, k, 16], found [2, 1, 16] and [2, 1, 16]"),
        (["a"], torch.ones(1, D), torch.ones(1, D), "[1, k, 16], found [1, 16]"),
        (["a"], torch.ones(1, 1, 8), torch.ones(1, 1, 8), "found [1, 1, 8]"),
        (["a"], torch.ones(1, 1, D), torch.full((1, 1, D), torch.nan), "expected finite 'writers.basis'"),
        (["a", "a"], torch.ones(2, 1, D), torch.ones(2, 1, D), "found not all of them"),
        (["a", 1], torch.ones(2, 1, D), torch.ones(2, 1, D), "found not all of them"),
        ("ab", torch.ones(2, 1, D), torch.ones(2, 1, D), "found not all of them"),
        (["a"], None, torch.ones(1, 1, D), "found not all of them"),
    ],
)
def test_edits_of_writers_that_do_not_fit_are_explained_in_one_line(
    tmp_path: Path, names: object, left: Tensor | None, reader: Tensor, part: str
) -> None:
    held = {"basis": torch.eye(1, D), "writers.reader": reader} | ({} if left is None else {"writers.basis": left})
    save_file(held, tmp_path / "x.safetensors", metadata={"abliterate": json.dumps({"writers": names})})
    with pytest.raises(UsageError) as caught:
        load_direction(tmp_path / "x.safetensors", D)
    assert part in str(caught.value)
    assert str(caught.value).isprintable()


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(UsageError, match=r"expected a \.safetensors file, found none") as caught:
            load_direction(path)
        assert str(path) in str(caught.value)


def damaged(data: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["basis"]["data_offsets"] = [0, 2**40]
    far = json.dumps(header).encode()
    return {
        "empty": b"",
        "truncated": data[:-1],
        "longer": data + b"\0",
        "huge header": struct.pack("<Q", 2**60) + data[8:],
        "data beyond the end": struct.pack("<Q", len(far)) + far + data[8 + length :],
        "pickle": b"\x80\x04K\x00." * 9,
        "text": b"refusal direction",
    }


@pytest.mark.parametrize("kind", damaged(struct.pack("<Q", 13) + b'{"basis": {}}'))
def test_damaged_file_is_refused_before_it_is_mapped(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    save_direction(file, Direction(random(1, D)))
    file.write_bytes(damaged(file.read_bytes())[kind])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
        load_direction(file)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("stored", ["[1, 2]", '"text"', "{", "null", "12"])
def test_metadata_of_another_kind_is_ignored(tmp_path: Path, stored: str) -> None:
    save_file({"basis": torch.eye(1, D)}, tmp_path / "x.safetensors", {"abliterate": stored})
    assert load_direction(tmp_path / "x.safetensors").facts == {}


@pytest.mark.parametrize("strength", ["Infinity", "NaN", "-1e400", "1e200", "1" * 5000, "1}", '1, "w": 2'])
def test_a_recipe_that_cannot_be_read_is_not_left_out(tmp_path: Path, strength: str) -> None:
    said = f'{{"strengths": {{"w": {strength}}}, "norm_preserving": false, "biprojected": false, "untie": false}}'
    save_file({"basis": torch.eye(1, D)}, tmp_path / "x.safetensors", {"abliterate": f'{{"recipe": {said}}}'})
    with pytest.raises(UsageError, match="expected JSON as its metadata") as caught:
        load_direction(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_direction_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_direction(tmp_path / "file" / "x.safetensors", Direction(random(1, D)))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_direction(tmp_path / "folder.safetensors", Direction(random(1, D)))


def test_saving_over_a_direction_replaces_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    save_direction(file, Direction(torch.eye(1, D)))

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_direction(file, Direction(2 * torch.eye(1, D)))
    assert torch.equal(load_direction(file).basis, torch.eye(1, D))
