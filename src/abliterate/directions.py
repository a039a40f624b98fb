"""Directions: difference of means at every site, how well each separates, and the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.activations import Moments
from abliterate.checkpoint import read_shard
from abliterate.errors import CheckpointError, NumericalError, UsageError

#: Norms below this are the same activation in both classes (site 0 at a template token), not a direction.
ZERO_NORM = 1e-6


@dataclass(frozen=True, slots=True)
class Candidates:
    """One candidate direction per site.

    `raw` is r = mean(harmful) - mean(harmless), `harmless_mean` is μ, both [k, L+1, d] in float32, with positions
    -1 … -k along the first axis.
    """

    raw: Float[Tensor, "k sites d"]
    harmless_mean: Float[Tensor, "k sites d"]

    @property
    def positions(self) -> list[int]:
        """Positions along the first axis: [-1, -2, …, -k]."""
        return [-1 - i for i in range(self.raw.shape[0])]

    @property
    def norms(self) -> Float[Tensor, "k sites"]:
        """‖r‖ per site, in units of the residual stream."""
        norms: Tensor = self.raw.norm(dim=-1)
        return norms

    @property
    def units(self) -> Float[Tensor, "k sites d"]:
        """r̂ = r / ‖r‖ per site; zero where there is no difference."""
        norms = self.norms[..., None]
        return torch.where(norms > ZERO_NORM, self.raw / norms.clamp_min(ZERO_NORM), torch.zeros_like(self.raw))

    def at(self, layer: int, position: int) -> Float[Tensor, " d"]:
        """The raw difference r at one site (`position` is negative)."""
        return self.raw[-1 - position, layer]


@dataclass(frozen=True, slots=True)
class Separation:
    """How far apart the classes lie along each site's own direction, on prompts it was not made from.

    `dprime` = (mean difference) / sqrt(mean of the variances); `auroc` = P(harmful > harmless), 0.5 is chance.
    """

    dprime: Float[Tensor, "k sites"]
    auroc: Float[Tensor, "k sites"]


def difference_of_means(harmful: Moments, harmless: Moments, *, projected: bool = False) -> Candidates:
    """r = mean(harmful) - mean(harmless) at every site (Arditi et al. 2024, eq. 2).

    `projected` removes from each r its component along the harmless mean of the same site, which is what harmless
    prompts need most.

    Raises `NumericalError` when a mean is not finite.
    """
    raw = harmful.mean - harmless.mean
    if not bool(torch.isfinite(raw).all()):
        raise NumericalError("difference of means: expected finite numbers, found NaN or infinity")
    if projected:
        raw = project_out(raw, harmless.mean)
    return Candidates(raw.float(), harmless.mean.float())


def project_out(r: Float[Tensor, "*site d"], mean: Float[Tensor, "*site d"]) -> Float[Tensor, "*site d"]:
    """r - (r·m̂) m̂, twice: one pass of Gram-Schmidt leaves rounding behind when r is nearly parallel to m."""
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
    for _ in range(2):
        r = r - (r * unit).sum(-1, keepdim=True) * unit
    return r


def separation(harmful: Float[Tensor, "n k sites"], harmless: Float[Tensor, "m k sites"]) -> Separation:
    """d′ and AUROC of the projections of two classes, per site."""
    spread = ((harmful.var(0) + harmless.var(0)) / 2).sqrt()
    dprime = (harmful.mean(0) - harmless.mean(0)) / spread.clamp_min(1e-12)
    return Separation(dprime, auroc(harmful, harmless))


def auroc(positive: Float[Tensor, n * rest], negative: Float[Tensor, m * rest]) -> Float[Tensor, "*rest"]:
    """P(positive > negative) + ½ P(equal): the Mann-Whitney statistic over all pairs."""
    pairs = positive[:, None] - negative[None]
    wins: Tensor = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean((0, 1))
    return wins


def orthonormal(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """An orthonormal basis of the span of `rows`, in float64 inside; the first row keeps its sign.

    Raises `NumericalError` when the rows are not finite or not independent.
    """
    wide = rows.double()
    if not bool(torch.isfinite(wide).all()) or bool((wide.norm(dim=1) < ZERO_NORM).any()):
        raise NumericalError("direction: expected finite non-zero vectors, found NaN, infinity or zero")
    q, r = torch.linalg.qr(wide.T)
    diagonal = r.diagonal()
    if len(wide) > wide.shape[1] or bool((diagonal.abs() < 1e-9 * wide.norm(dim=1)).any()):
        raise NumericalError("direction: expected independent vectors, found one in the span of the others")
    basis: Tensor = (q * diagonal.sign()).T.to(rows.dtype).contiguous()
    return basis


def save_direction(
    path: Path,
    basis: Float[Tensor, "k d"],
    *,
    candidates: Candidates | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `direction.safetensors`: `basis`, and `candidates` with `harmless_mean` when there are any."""
    from safetensors.torch import save

    tensors = {"basis": basis.float().contiguous()}
    if candidates is not None:
        tensors["candidates"] = candidates.raw.float().contiguous()
        tensors["harmless_mean"] = candidates.harmless_mean.float().contiguous()
    # One key: the library writes several in random order, and equal runs shall leave equal bytes.
    data = save(tensors, metadata={"abliterate": json.dumps(dict(metadata or {}))})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class Direction:
    """What a direction file holds: `basis` [k, d] orthonormal rows, and what its maker said of it."""

    basis: Float[Tensor, "k d"]
    metadata: dict[str, Any]
    candidates: Candidates | None = None


def load_direction(path: Path, d_model: int | None = None) -> Direction:
    """Read a direction file of ours, or any safetensors file with a `basis` or a single vector.

    Raises `UsageError` when there is no such file or it does not fit the model, `CheckpointError` when damaged.
    """
    if not path.is_file():
        raise UsageError(f"direction file '{path}': expected a .safetensors file, found none")
    shard = read_shard(path)  # refuses anything malformed before another library maps it
    from safetensors.torch import load_file

    tensors = load_file(path)
    basis = tensors.get("basis")
    if basis is None and len(tensors) == 1:
        basis = next(iter(tensors.values()))
    if basis is None or not basis.is_floating_point() or basis.dim() not in (1, 2) or not basis.numel():
        raise UsageError(
            f"direction file '{path}': expected a tensor 'basis' [k, d_model] or a single vector, found "
            f"{', '.join(f'{name} {list(t.shape)}' for name, t in tensors.items()) or 'nothing'}"
        )
    basis = basis.float().reshape(-1, basis.shape[-1])
    if d_model is not None and basis.shape[1] != d_model:
        raise UsageError(
            f"direction file '{path}': expected vectors of the model's width {d_model}, found {basis.shape[1]}"
        )
    candidates = None
    if {"candidates", "harmless_mean"} <= tensors.keys():
        raw, mean = tensors["candidates"].float(), tensors["harmless_mean"].float()
        if raw.dim() != 3 or raw.shape[2] != basis.shape[1] or raw.shape != mean.shape or not raw.isfinite().all():
            raise UsageError(
                f"direction file '{path}': expected finite 'candidates' and 'harmless_mean' [positions, sites, "
                f"{basis.shape[1]}], found {list(raw.shape)} and {list(mean.shape)}"
            )
        candidates = Candidates(raw, mean)
    return Direction(orthonormal(basis), _metadata(shard.metadata), candidates)


def _metadata(stored: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(stored.get("abliterate", "{}"))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
