"""Subspaces and other directions: what is planted is found, and what is claimed of each formula holds."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import planted
from abliterate.algebra import orthonormal
from abliterate.edit.direction import Candidates
from abliterate.edit.options import biprojected
from abliterate.errors import AbliterateError, NumericalError, UsageError
from abliterate.finding.estimate import difference_of_means
from abliterate.finding.subspaces import Samples, cluster_subspace, leace, svd_subspace
from abliterate.model.activations import MomentsFitter, stream_sites
from abliterate.model.batches import BatchSize, share_prefix

K, SITES, D = 3, 6, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int = 0) -> Tensor:
    """Two orthonormal rows."""
    return orthonormal(random(2, D, seed=seed))


def worst_cosine(found: Tensor, expected: Tensor) -> float:
    """Of the largest angle between two spans of rows."""
    return float(torch.linalg.svdvals(orthonormal(found.double()) @ orthonormal(expected.double()).T).min())


def outside(found: Tensor, expected: Tensor) -> float:
    """How much of a row lies outside the span of others, as a share of it: exact where a cosine is 1."""
    span = orthonormal(expected)
    return float((found - found @ span.T @ span).norm() / found.norm())


def two_groups(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Harmful activations, 30 away along the first row and 20 along the second in any order, and harmless ones."""
    mean = 5 * random(D, seed=9)
    away = 3 * torch.cat([basis[:1].expand(30, -1), basis[1:].expand(20, -1)])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    return mean + away[order] + 0.1 * random(50, D, seed=7), mean + 0.1 * random(40, D, seed=8)


# --- a model in which two directions mediate refusal


#: The block that writes the second direction; the first is written by block `planted.WRITES`.
WRITES_OTHER = planted.WRITES + 1


@dataclass(frozen=True)
class TwoReasons:
    """Activations [n, k, sites, d] of a model in which half of the bad words write one direction and half another."""

    directions: Tensor
    harmful: Tensor
    harmless: Tensor

    @property
    def candidates(self) -> Candidates:
        raw = self.harmful.double().mean(0) - self.harmless.double().mean(0)
        return Candidates(raw.float(), self.harmless.mean(0))


def two_reasons() -> tuple[Any, Tensor]:
    """The planted model, with a second feature for half of its bad words and a later block that writes for it."""
    live, r = planted.model()
    words = planted.tokenizer().get_vocab()
    embedding = live.get_input_embeddings().weight
    u = live.model.layers[planted.WRITES].self_attn.v_proj.weight[0] / 2
    # Codes of words that no prompt holds: nothing else lies along them.
    other_u, other_r = embedding[words["here"]].clone(), embedding[words["Sure"]].clone()
    for word in planted.BAD[::2]:
        embedding[words[word]] += other_u - u
    attention = live.model.layers[WRITES_OTHER].self_attn
    attention.q_proj.weight.zero_()
    attention.v_proj.weight[0] = 2 * other_u
    attention.o_proj.weight[:, 0] = 2 * other_r
    return live, torch.stack([r, other_r]).double()


def activations(live: Any, texts: list[str]) -> Tensor:
    """[n, k, sites, d], gathered in batches by one `Samples` a site."""
    tokenizer = planted.tokenizer()
    sequences = [
        tokenizer.encode(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )
        for text in texts
    ]
    positions, sites = planted.POSITIONS, planted.BLOCKS + 1
    prompts = share_prefix(sequences, keep=positions)
    samples = {(p, s): Samples(s, -1 - p) for p in range(positions) for s in range(sites)}
    moments = MomentsFitter(positions, sites, planted.D_MODEL)

    def consume(layer: int, rows: list[int], values: Tensor) -> None:
        moments.update(layer, rows, values)
        for one in samples.values():
            one.update(layer, rows, values)

    assert stream_sites(live, list(live.model.layers), prompts, positions, consume, BatchSize(7)) == len(texts)
    gathered = torch.stack(
        [torch.stack([samples[p, s].result() for s in range(sites)], 1) for p in range(positions)], 1
    )
    assert torch.allclose(gathered.double().mean(0), moments.result().mean, atol=1e-6)
    return gathered


@pytest.fixture(scope="module")
def model() -> TwoReasons:
    live, directions = two_reasons()
    harmful = activations(live, planted.prompts(planted.BAD, 60, 1))
    return TwoReasons(directions, harmful, activations(live, planted.prompts(planted.GOOD, 60, 2)))


def at(model: TwoReasons, layer: int) -> tuple[Tensor, Tensor]:
    return model.harmful[:, 0, layer], model.harmless[:, 0, layer]


@pytest.mark.parametrize("layer", range(WRITES_OTHER + 1, planted.BLOCKS))
def test_both_directions_of_a_model_are_found_in_its_clusters(model: TwoReasons, layer: int) -> None:
    found, one = (cluster_subspace(*at(model, layer), rank) for rank in (2, 1))
    assert worst_cosine(found.basis, model.directions) > 0.99
    assert float((one.basis.double() @ model.directions.T).abs().max()) < 0.95, "the control: one is a mixture"
    assert float(found.energy.sum()) > 0.95
    assert float(one.energy) < 0.7


def test_clusters_of_a_site_before_the_directions_are_written_are_others(model: TwoReasons) -> None:
    assert worst_cosine(cluster_subspace(*at(model, planted.WRITES), 2).basis, model.directions) < 0.5


def test_both_directions_of_a_model_are_found_in_candidates_of_its_sites(model: TwoReasons) -> None:
    """The sites between the two blocks that write show one direction, the later ones a mixture."""
    layers = range(planted.WRITES + 1, planted.BLOCKS)
    assert worst_cosine(svd_subspace(model.candidates, 2, layers=layers).basis, model.directions) > 0.99
    early = svd_subspace(model.candidates, 2, layers=range(planted.WRITES + 1, WRITES_OTHER + 1))
    assert worst_cosine(early.basis, model.directions) < 0.5
    assert float((early.basis[0].double() @ model.directions[0]).abs()) > 0.99


# --- singular vectors of candidates


def mixed_candidates(basis: Tensor, noise: float, seed: int = 0) -> Candidates:
    """Candidates along random mixtures of two directions, of very different lengths."""
    raw = random(K, SITES, 2, seed=seed) @ basis + noise * random(K, SITES, D, seed=seed + 1)
    raw = raw * torch.logspace(-2, 2, SITES)[:, None]
    return Candidates(raw.float(), torch.zeros_like(raw).float())


@pytest.mark.parametrize("seed", range(5))
def test_two_directions_are_found_in_mixtures_of_them(seed: int) -> None:
    basis = pair(seed)
    found = svd_subspace(mixed_candidates(basis, 0.01, seed), 2)
    assert worst_cosine(found.basis, basis) > 0.99
    assert float(found.energy.sum()) > 0.97
    assert found.basis.dtype == torch.float32
    control = svd_subspace(Candidates(random(K, SITES, D, seed=seed).float(), torch.zeros(K, SITES, D)), 2)
    assert worst_cosine(control.basis, basis) < 0.8
    assert float(control.energy.sum()) < 0.5


def test_only_chosen_sites_count_and_each_counts_the_same() -> None:
    a, b = pair()
    raw = torch.zeros(K, SITES, D)
    raw[0, 2], raw[0, 3], raw[1, 2], raw[1, 3] = 100 * a, a, b, b
    candidates = Candidates(raw, raw)
    found = svd_subspace(candidates, 1, layers=[2, 3], positions=[-1])
    assert torch.allclose(found.basis[0].double(), a, atol=1e-6)
    assert float(found.energy) == pytest.approx(1)
    assert torch.allclose(svd_subspace(candidates, 1, positions=[-2, -3]).basis[0].double(), b, atol=1e-6)
    assert svd_subspace(candidates, 2).energy.tolist() == pytest.approx([0.5, 0.5])


@given(st.integers(1, 6), st.integers(0, 999))
def test_basis_is_orthonormal_and_energy_is_that_of_the_projection(rank: int, seed: int) -> None:
    candidates = Candidates(random(K, SITES, D, seed=seed), torch.zeros(K, SITES, D))
    found = svd_subspace(candidates, rank)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(rank).double(), atol=1e-10)
    units = candidates.units.flatten(0, 1)
    kept = (units @ found.basis.T @ found.basis).square().sum() / units.square().sum()
    assert float(found.energy.sum()) == pytest.approx(float(kept))
    assert bool((found.energy.diff() <= 1e-12).all())
    others = orthonormal(random(rank, D, seed=seed + 1))
    assert float((units @ others.T).square().sum() / len(units)) < float(kept), "no other subspace keeps more"


def test_rows_point_along_the_mean_candidate() -> None:
    candidates = mixed_candidates(pair(), 0.1)
    found, turned = svd_subspace(candidates, 2), svd_subspace(Candidates(-candidates.raw, candidates.raw), 2)
    assert float((found.basis @ candidates.units.flatten(0, 1).mean(0)).min()) > 0
    assert torch.allclose(found.basis, -turned.basis)


@pytest.mark.parametrize(
    ("rank", "layers", "positions", "message"),
    [
        (3, None, None, "a rank from 1 to 2 .* found 3"),
        (0, None, None, "a rank from 1 to 2 .* found 0"),
        (1, [0], None, "a rank from 1 to 0 .* found 1"),
        (1, [SITES], None, f"layers among 0 … {SITES - 1}, found \\[{SITES}\\]"),
        (1, [-1], None, "layers among"),
        (1, None, [0], "positions among -1 … -3, found"),
        (1, None, [], "positions among .* found none"),
    ],
)
def test_rank_and_sites_that_there_are_not_are_refused(
    rank: int, layers: list[int] | None, positions: list[int] | None, message: str
) -> None:
    candidates = mixed_candidates(pair(), 0)
    candidates.raw[:, 0] = 0
    with pytest.raises(UsageError, match=message):
        svd_subspace(candidates, rank, layers=layers, positions=positions)


# --- clusters


@pytest.mark.parametrize("seed", range(5))
def test_both_directions_are_found_in_clusters(seed: int) -> None:
    basis = pair(seed)
    harmful, harmless = two_groups(basis)
    found = cluster_subspace(harmful.float(), harmless.float(), 2, seed)
    assert worst_cosine(found.basis, basis) > 0.99
    assert float(found.basis[0].double() @ basis[0]) > 0.99, "the larger cluster comes first, and keeps its sign"
    assert float(found.basis[1].double() @ basis[1]) > 0.99
    control = cluster_subspace(harmful, harmless + 3 * random(D, seed=50), 2, seed)
    assert worst_cosine(control.basis, basis) < 0.5


@pytest.mark.parametrize("seed", range(10))
def test_six_overlapping_clusters_are_found_from_any_seed(seed: int) -> None:
    """One start of k-means, or one round of it, finds them in some of these cases only."""
    basis = orthonormal(random(6, D, seed=seed))
    harmful = torch.cat([6 * row + random(40 + i, D, seed=100 * seed + i) for i, row in enumerate(basis)])
    assert worst_cosine(cluster_subspace(harmful, random(200, D, seed=77), 6, seed).basis, basis) > 0.95


@given(st.integers(0, 999), st.integers(2, 20))
def test_one_cluster_is_the_difference_of_means(seed: int, count: int) -> None:
    harmful, harmless = 1 + random(count, D, seed=seed), random(7, D, seed=seed + 1)
    found = cluster_subspace(harmful, harmless, 1, seed)
    r = harmful.mean(0) - harmless.mean(0)
    assert torch.allclose(found.basis[0], r / r.norm(), atol=1e-12)


@given(st.integers(0, 99), st.integers(1, 5), st.booleans())
def test_clusters_are_the_same_in_any_order_and_place(seed: int, rank: int, turned: bool) -> None:
    """k-means knows only distances: turning everything turns the subspace, shuffling prompts changes nothing."""
    centres = 20 * random(rank, D, seed=seed)
    harmful = torch.cat([c + 0.1 * random(8 + i, D, seed=seed + i) for i, c in enumerate(centres)])
    harmless = random(9, D, seed=seed + 50)
    found = cluster_subspace(harmful, harmless, rank, seed)
    assert torch.equal(found.basis, cluster_subspace(harmful, harmless, rank, seed).basis)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(rank).double(), atol=1e-10)
    rotation = torch.linalg.qr(random(D, D, seed=seed))[0] if turned else torch.eye(D).double()
    order = torch.randperm(len(harmful), generator=torch.Generator().manual_seed(seed))
    other = cluster_subspace(harmful[order] @ rotation, harmless @ rotation, rank, seed + 1)
    assert torch.allclose(other.basis, found.basis @ rotation, atol=1e-6)
    assert torch.allclose(other.energy, found.energy)


def test_every_prompt_its_own_cluster_spans_them_all() -> None:
    harmful, harmless = random(4, D), random(5, D, seed=1)
    found = cluster_subspace(harmful, harmless, 4)
    assert outside(found.basis, harmful - harmless.mean(0)) < 1e-7
    assert float(found.energy.sum()) == pytest.approx(1)


def few_kinds() -> Tensor:
    return random(2, D).repeat(5, 1)


CLUSTERS_REFUSED: dict[str, tuple[type[AbliterateError], str, Tensor, Tensor, int]] = {
    "no cluster": (UsageError, "rank from 1 to 4 .* found 0", random(4, D), random(4, D), 0),
    "more clusters than prompts": (UsageError, "rank from 1 to 4 .* found 5", random(4, D), random(4, D), 5),
    "fewer kinds of prompts": (NumericalError, "expected 3 .* found 2;", few_kinds(), random(4, D, seed=1), 3),
    "dependent means": (
        NumericalError,
        "expected 2 .* found 1;",
        torch.cat([torch.ones(3, D), 2 * torch.ones(3, D)]),
        torch.zeros(4, D),
        2,
    ),
    "no difference": (NumericalError, "expected 1 .* found 0;", random(4, D), random(4, D), 1),
    "other widths": (UsageError, "of one width, found \\[4, 32\\] and \\[4, 2\\]", random(4, D), random(4, 2), 1),
    "no harmless prompts": (UsageError, "found \\[4, 32\\] and \\[0, 32\\]", random(4, D), random(0, D), 1),
    "infinity": (NumericalError, "expected finite", torch.full((4, D), math.inf), random(4, D), 1),
}


@pytest.mark.parametrize(
    ("kind", "message", "harmful", "harmless", "rank"), CLUSTERS_REFUSED.values(), ids=CLUSTERS_REFUSED
)
def test_clusters_that_cannot_be_had_are_refused_with_the_number_there_are(
    kind: type[AbliterateError], message: str, harmful: Tensor, harmless: Tensor, rank: int
) -> None:
    with pytest.raises(kind, match=message) as caught:
        cluster_subspace(harmful, harmless, rank)
    assert str(caught.value).isprintable()


# --- samples


@given(st.permutations(range(7)), st.integers(1, 7))
def test_samples_come_in_the_order_of_the_prompts(order: list[int], size: int) -> None:
    values = random(7, K, D).float()
    samples = Samples(layer=1, position=-2)
    for start in range(0, 7, size):
        rows = order[start : start + size]
        for layer in range(3):
            samples.update(layer, rows, values[rows] + layer)
    assert torch.equal(samples.result(), values[:, 1] + 1)


def test_samples_of_a_layer_that_never_came_are_refused() -> None:
    samples = Samples(layer=9, position=-1)
    samples.update(0, [0], random(1, K, D))
    with pytest.raises(UsageError, match="layer 9, found none"):
        samples.result()


# --- least-squares concept erasure


@pytest.fixture(scope="module")
def concept_erasure() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it compiles a function with torch.jit
        return pytest.importorskip("concept_erasure")


def two_classes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of unequal size, far from the origin, with a covariance far from round."""
    mixing = random(D, D, seed=seed) * torch.logspace(-1, 1, D)
    mean, r = 10 * random(D, seed=seed + 1), random(D, seed=seed + 2)
    harmless = mean + random(count // 3, D, seed=seed + 4) @ mixing
    return mean + r + random(count, D, seed=seed + 3) @ mixing, harmless


def erased(x: Tensor, harmful: Tensor, harmless: Tensor) -> Tensor:
    found = leace(harmful, harmless)
    return x - ((x - found.mean) @ found.reader.T) @ found.basis


def share_explained(harmful: Tensor, harmless: Tensor) -> float:
    """R² of the best linear probe for the class, by least squares."""
    x = torch.cat([harmful, harmless])
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1).double()], 1)
    z = torch.cat([torch.ones(len(harmful), 1), torch.zeros(len(harmless), 1)]).double()
    wrong = z - x @ torch.linalg.lstsq(x, z, driver="gelsd").solution
    return 1 - float(wrong.square().sum() / (z - z.mean()).square().sum())


def by_hand(harmful: Tensor, harmless: Tensor) -> tuple[Any, Any]:
    """L and R of two classes from Δ and Σ⁻¹Δ in numpy, Σ mixed with the identity (Bodnar et al. 2014)."""
    x, delta = np.concatenate([harmful.numpy(), harmless.numpy()]), (harmful.mean(0) - harmless.mean(0)).numpy()
    n, d = x.shape
    sample = np.cov(x, rowvar=False, bias=True)
    trace = np.trace(sample)
    mixed = (trace**2 / n) / ((sample**2).sum() - trace**2 / d)
    sigma = (1 - mixed) * sample + mixed * trace / d * np.eye(d)
    weights = np.linalg.solve(sigma, delta)
    length = np.linalg.norm(delta)
    return delta / length, weights * length / (delta @ weights)


@pytest.mark.usefixtures("concept_erasure")
@pytest.mark.parametrize("count", [2000, 60, 12], ids=["many prompts", "as many as axes", "fewer than axes"])
def test_no_linear_probe_tells_the_classes_apart_after_erasure(count: int) -> None:
    harmful, harmless = two_classes(count)
    assert share_explained(harmful, harmless) > 0.05, "the control: it does learn something before"
    after = erased(harmful, harmful, harmless), erased(harmless, harmful, harmless)
    assert torch.allclose(after[0].mean(0), after[1].mean(0), atol=1e-9)
    if count > D:  # a probe with more weights than prompts fits anything
        assert abs(share_explained(*after)) < 1e-9
    both = torch.cat([harmful, harmless])
    assert torch.allclose(torch.cat(after).mean(0), both.mean(0), atol=1e-9)


@pytest.mark.usefixtures("concept_erasure")
@pytest.mark.parametrize("count", [2000, 60, 12])
def test_erasure_is_the_formula_for_two_classes(count: int) -> None:
    harmful, harmless = two_classes(count)
    found = leace(harmful, harmless)
    left, right = by_hand(harmful, harmless)
    assert np.allclose(found.basis[0].numpy(), left, atol=1e-8)
    assert np.allclose(found.reader[0].numpy(), right, rtol=1e-6, atol=1e-6 * np.abs(right).max())
    assert torch.allclose(found.mean, torch.cat([harmful, harmless]).mean(0), atol=1e-9)
    assert float(found.basis.norm()) == pytest.approx(1)
    assert float(found.reader @ found.basis.T) == pytest.approx(1)


def test_erasure_is_what_the_published_implementation_does(concept_erasure: Any) -> None:
    harmful, harmless = two_classes(90)
    both = torch.cat([harmful, harmless])
    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    theirs = concept_erasure.LeaceEraser.fit(both, labels)
    assert torch.allclose(theirs(both), erased(both, harmful, harmless), atol=1e-9)
    assert torch.allclose(leace(harmless, harmful).basis, -leace(harmful, harmless).basis, atol=1e-9)


@pytest.mark.usefixtures("concept_erasure")
def test_erasure_changes_less_than_moving_all_to_the_mean_along_the_difference() -> None:
    """Both make the class means equal; erasure is the smaller change of the two."""
    harmful, harmless = two_classes(2000)
    both = torch.cat([harmful, harmless])
    basis = leace(harmful, harmless).basis
    moved = both - (both - both.mean(0)) @ basis.T @ basis
    change = (erased(both, harmful, harmless) - both).square().sum(1).mean()
    assert float(change) < 0.8 * float((moved - both).square().sum(1).mean())


@pytest.mark.usefixtures("concept_erasure")
def test_erasure_of_single_precision_activations_is_single_precision() -> None:
    harmful, harmless = two_classes(90)
    found, wide = leace(harmful.float(), harmless.float()), leace(harmful, harmless)
    assert {found.basis.dtype, found.reader.dtype, found.mean.dtype} == {torch.float32}
    assert torch.allclose(found.reader.double(), wide.reader, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("concept_erasure")
@pytest.mark.parametrize(
    ("harmful", "harmless", "message"),
    [
        (random(9, D), random(9, D), "expected classes that a linear probe tells apart, found 9 harmful and 9"),
        (random(99, D), random(99, D) + 1e-4, "expected classes that a linear probe tells apart"),
        (torch.ones(9, D), torch.ones(8, D), "expected classes that a linear probe tells apart"),
        (torch.full((9, D), torch.nan), random(9, D), "expected finite"),
    ],
    ids=["the same twice", "hardly another", "no spread", "NaN"],
)
def test_classes_that_do_not_differ_are_refused(harmful: Tensor, harmless: Tensor, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        leace(harmful, harmless)


def test_erasure_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(UsageError, match=r"pip install 'abliterate\[leace\]'"):
        leace(random(9, D), random(9, D, seed=1))


# --- directions per layer


@pytest.mark.parametrize("tilt", [1.0, 1e-3])
def test_direction_of_each_layer_is_orthogonal_to_that_layers_harmless_mean(tilt: float) -> None:
    means = 100 * random(SITES, D)
    r = means[2] + tilt * random(D, seed=1)
    found = biprojected(r, means)
    assert torch.allclose(found.norm(dim=1), torch.ones(SITES).double())
    assert float((found * means).sum(1).abs().max()) < 1e-9
    span = torch.stack([r, means[4]])
    assert outside(found[4:5], span) < 1e-7, "it lies in the plane of r and the mean"
    assert float(found[4] @ r) > 0
    assert float(torch.cosine_similarity(means, r[None]).abs().min()) > 1e-4, "the control"


def test_direction_that_is_orthogonal_already_and_a_layer_without_mean_are_left_alone() -> None:
    r, means = torch.zeros(D), torch.zeros(3, D)
    r[0], means[1, 1] = 4, 7
    assert torch.equal(biprojected(r, means), (r / 4).expand(3, D))


def test_at_its_own_layer_it_is_the_projected_difference_of_means() -> None:
    live = random(20, K, SITES, D) + 2, random(20, K, SITES, D, seed=1) + 1
    fitted = [MomentsFitter(K, SITES, D) for _ in live]
    for fitter, values in zip(fitted, live, strict=True):
        for layer in range(SITES):
            fitter.update(layer, list(range(20)), values[:, :, layer])
    plain = difference_of_means(fitted[0].result(), fitted[1].result())
    projected = difference_of_means(fitted[0].result(), fitted[1].result(), projected=True)
    found = biprojected(plain.at(3, -2), plain.harmless_mean[1])
    assert torch.allclose(found[3], projected.units[1, 3], atol=1e-6)
    assert not torch.allclose(found[2], projected.units[1, 2], atol=1e-2)


@pytest.mark.parametrize("scale", [-3.0, 1e-4, 0.0])
def test_direction_along_the_mean_of_a_layer_is_refused_by_the_layers_number(scale: float) -> None:
    means = random(SITES, D).float()
    with pytest.raises(NumericalError, match=f"at layer {4 if scale else 0};"):
        biprojected(scale * means[4], means)


def test_direction_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="expected finite"):
        biprojected(torch.full((D,), torch.nan), random(SITES, D))
