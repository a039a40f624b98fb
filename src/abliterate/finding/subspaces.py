"""Subspaces and other directions: when one difference of means per model is not what is wanted.

Everything here is a pure function of candidates or activations, in float64 inside; results have the dtype of what
they were made from. Bases have rows: V [k, d], and V Vᵀ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.algebra import INDEPENDENT, ZERO_NORM, check_finite, orthonormal
from abliterate.edit.direction import Candidates
from abliterate.errors import NumericalError, UsageError
from abliterate.monitor import ranks

#: k-means finds the nearest of many optima: the best of so many starts is kept.
RESTARTS = 8
MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Subspace:
    """Orthonormal rows, and the share of the sum of squares of the vectors they were made from along each."""

    basis: Float[Tensor, "k d"]
    energy: Float[Tensor, " k"]


@dataclass(frozen=True, slots=True)
class Erasure:
    """x' = x - (R (x - μ)) L: an oblique projection, so R (what is read) and L (what is taken out) differ.

    `basis` is L, of length one and along mean(harmful) - mean(harmless); `reader` is R, with R Lᵀ = 1; `mean` is μ.
    """

    basis: Float[Tensor, "1 d"]
    reader: Float[Tensor, "1 d"]
    mean: Float[Tensor, " d"]


@dataclass(slots=True)
class Samples:
    """Keeps the activations of one site as they are; `update` is a consumer of `stream_sites`.

    Takes n * d * 4 bytes, twice that while `result` joins the batches. `position` is negative, and among those that
    are streamed.
    """

    layer: int
    position: int
    _rows: list[int] = field(init=False, default_factory=list)
    _values: list[Tensor] = field(init=False, default_factory=list)

    def update(self, layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        """Take in one batch of one layer."""
        if layer == self.layer:
            self._rows += rows
            # A copy: a view would keep the other positions in memory.
            self._values.append(values[:, -1 - self.position].float().clone())

    def merge(self) -> None:
        """Take in what its likes in other processes hold, of other prompts."""
        values = torch.cat(self._values) if self._values else torch.zeros(0, 0)
        self._rows = ranks.joined(torch.tensor(self._rows, dtype=torch.int64)[:, None])[:, 0].tolist()
        self._values = [ranks.joined(values)]

    def result(self) -> Float[Tensor, "n d"]:
        """The activations in the order of the prompts, however these were batched.

        Raises `UsageError` when none were taken in.
        """
        if not self._values:
            raise UsageError(f"samples: expected activations of layer {self.layer}, found none; ask for another layer")
        return torch.cat(self._values)[torch.tensor(self._rows).argsort()]


def svd_subspace(
    candidates: Candidates,
    rank: int,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Subspace:
    """The `rank` directions that the candidates of the chosen sites (all: None) have most in common.

    The candidates r / ‖r‖ are the rows of U [sites, d], those without a difference left out. With U = A S V, the
    first rows of V span the subspace of that rank that leaves least of U (Eckart & Young 1936), and `energy` is
    s² / Σ s². The rows point along the mean candidate.

    Raises `UsageError` for sites that there are not, and when fewer than `rank` candidates are independent.
    """
    units = _units(candidates, layers, positions)
    found = _independent(units)
    if not 1 <= rank <= found:
        raise UsageError(f"subspace: expected a rank from 1 to {found} (independent candidates), found {rank}")
    basis = torch.linalg.svd(units, full_matrices=False)[2][:rank]
    backwards = basis @ units.mean(0) < 0
    basis = torch.where(backwards[:, None], -basis, basis)
    return _subspace(basis, units, candidates.raw.dtype)


def cluster_subspace(
    harmful: Float[Tensor, "n d"], harmless: Float[Tensor, "m d"], rank: int, seed: int = 0
) -> Subspace:
    """Differences of means when prompts are refused for several reasons: one per cluster of harmful activations.

    The harmful activations of one site are divided by k-means (Lloyd 1982, started by k-means++, Arthur &
    Vassilvitskii 2007) into `rank` clusters C; the rows mean(C) - mean(harmless), largest cluster first, are made
    orthonormal. Piras et al. 2025 (arXiv 2511.08379) do so with the units of a self-organising map. Rank 1 is the
    difference of means. `energy` is the share of Σ ‖x - mean(harmless)‖² over the harmful x.

    Raises `UsageError` when there are fewer prompts than clusters, `NumericalError` when activations are not finite
    or when fewer than `rank` cluster means are independent.
    """
    inside, outside = _classes("cluster subspace", harmful, harmless)
    if not 1 <= rank <= len(inside):
        raise UsageError(f"cluster subspace: expected a rank from 1 to {len(inside)} (harmful prompts), found {rank}")
    centred = inside - outside.mean(0)
    means = torch.stack([centred[members].mean(0) for members in _k_means(centred, rank, seed)])
    found = _independent(means)
    if found < rank:
        raise NumericalError(
            f"cluster subspace: expected {rank} clusters with independent means, found {found}; ask for a lower rank"
        )
    return _subspace(orthonormal(means), centred, harmful.dtype)


def leace(harmful: Float[Tensor, "n d"], harmless: Float[Tensor, "m d"]) -> Erasure:
    """Least-squares concept erasure: the smallest affine change after which no linear probe tells the classes apart.

    Belrose et al. 2023 (arXiv 2306.03819), as fitted by `concept-erasure`. With W = Σ^(-½), labels z and the unit
    vector u along W Σ_xz: L = W⁻¹ u, R = uᵀ W, and μ the mean of all activations. For two classes L lies along the
    difference of means and R along Σ⁻¹ times it, as in linear discriminant analysis.

    Σ is the sample covariance, mixed with a multiple of the identity of equal trace in the ratio of Bodnar et al. 2014
    (arXiv 1308.2608). With n + m well above d that changes little. Below d the sample covariance has no inverse, and
    the mixing is what keeps R from reading the noise of these prompts; the class means become equal in either case,
    and only "smallest" is then an estimate. Takes several times 8 d² bytes, and time as d³.

    Raises `UsageError` without the extra, `NumericalError` when activations are not finite or cannot be told apart.
    """
    try:
        from concept_erasure import LeaceFitter
    except ImportError as error:
        raise UsageError("leace: this method needs an extra; pip install 'abliterate[leace]'") from error
    inside, outside = _classes("leace", harmful, harmless)
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).double()
    # The limit on the trace is for maps that would raise it. This one lowers it by ‖W⁻¹u‖², and mixing in another
    # projection, as the limit does, would give up that the class means become equal.
    eraser = LeaceFitter.fit(torch.cat([inside, outside]), labels, constrain_cov_trace=False).eraser
    gap = inside.mean(0) - outside.mean(0)
    left, right = eraser.proj_left[:, 0], eraser.proj_right[0]
    length = left.norm().copysign(left @ gap)
    basis, reader = left / length, right * length
    if not bool((gap - (gap @ reader) * basis).norm() < INDEPENDENT * gap.norm()):
        raise NumericalError(
            f"leace: expected classes that a linear probe tells apart, found {len(inside)} harmful and {len(outside)} "
            "harmless activations that none does; take another site or more prompts"
        )
    dtype = harmful.dtype
    return Erasure(basis[None].to(dtype), reader[None].to(dtype), eraser.bias.to(dtype))


def _units(
    candidates: Candidates, layers: Sequence[int] | None, positions: Sequence[int] | None
) -> Float[Tensor, "sites d"]:
    """Unit candidates of the chosen sites that have one."""
    chosen_layers = _chosen("layers", layers, range(candidates.raw.shape[1]))
    chosen_positions = _chosen("positions", positions, candidates.positions)
    raw = torch.stack([candidates.at(layer, position) for position in chosen_positions for layer in chosen_layers])
    check_finite("subspace", raw)
    return _normalised(raw.double())


def _chosen(what: str, asked: Sequence[int] | None, there: Sequence[int]) -> Sequence[int]:
    if asked is None:
        return there
    if not asked or not set(asked) <= set(there):
        raise UsageError(f"subspace: expected {what} among {there[0]} … {there[-1]}, found {list(asked) or 'none'}")
    return asked


def _normalised(rows: Float[Tensor, "k d"]) -> Float[Tensor, "j d"]:
    """The rows at length one, those without a length left out."""
    norms = rows.norm(dim=1)
    units: Tensor = (rows / norms[:, None])[norms > ZERO_NORM]
    return units


def _subspace(basis: Float[Tensor, "k d"], vectors: Float[Tensor, "n d"], dtype: torch.dtype) -> Subspace:
    energy = ((vectors @ basis.T) ** 2).sum(0) / (vectors**2).sum()
    return Subspace(basis.to(dtype).contiguous(), energy)


def _classes(
    name: str, harmful: Float[Tensor, "n d"], harmless: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    if not len(harmful) or not len(harmless) or harmful.shape[1] != harmless.shape[1]:
        raise UsageError(
            f"{name}: expected harmful and harmless activations of one width, found {list(harmful.shape)} and "
            f"{list(harmless.shape)}"
        )
    check_finite(name, harmful, harmless)
    return harmful.double(), harmless.double()


def _independent(rows: Float[Tensor, "k d"]) -> int:
    """How many of the rows are independent, whatever their lengths."""
    units = _normalised(rows)
    return int(torch.linalg.matrix_rank(units, rtol=INDEPENDENT)) if len(units) else 0


def _k_means(points: Float[Tensor, "n d"], clusters: int, seed: int) -> list[Int[Tensor, " members"]]:
    """Indices of the members of each cluster, the largest first; clusters that stay empty are left out."""
    generator = torch.Generator().manual_seed(seed)
    labels = min(
        (_lloyd(points, _plus_plus(points, clusters, generator)) for _ in range(RESTARTS)),
        key=lambda run: run[0],
    )[1]
    groups = [(labels == cluster).nonzero().flatten() for cluster in range(clusters)]
    # Numbers of clusters are chance; sizes, and between equal ones the first member, are not.
    return sorted((group for group in groups if len(group)), key=lambda group: (-len(group), int(group[0])))


def _plus_plus(points: Float[Tensor, "n d"], clusters: int, generator: torch.Generator) -> Float[Tensor, "c d"]:
    """Starting centres: each further one a point drawn with chances as its squared distance to those there are."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        chances = _distances(points, centres).amin(1).square().cpu()
        if not bool(chances.sum() > 0):
            break  # fewer different points than clusters
        drawn = torch.multinomial(chances, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    return centres


def _lloyd(points: Float[Tensor, "n d"], centres: Float[Tensor, "c d"]) -> tuple[float, Int[Tensor, " n"]]:
    """Sum of squared distances and labels when neither changes any more."""
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(MAX_ROUNDS):
        distances = _distances(points, centres)
        nearest = distances.argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = torch.nn.functional.one_hot(labels, len(centres)).double()
        counts = members.sum(0)[:, None]
        centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
    return float(distances.amin(1).square().sum()), labels


def _distances(points: Float[Tensor, "n d"], centres: Float[Tensor, "c d"]) -> Float[Tensor, "n c"]:
    # By differences: by matrix product, equal points would lie apart by rounding.
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
