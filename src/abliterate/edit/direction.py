"""Directions: difference of means at every site, how well each separates, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import ZERO_NORM, orthonormal
from abliterate.errors import UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.checkpoint import Shard, read_shard


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
class Recipe:
    """How a direction that was searched for is taken out: from which writers (by parameter) and how strongly.

    It is complete: with default settings the plan of the direction is the one that was measured.
    """

    strengths: Mapping[str, float]
    norm_preserving: bool = False
    biprojected: bool = False
    untie: bool = False


@dataclass(frozen=True, slots=True)
class Direction:
    """What a direction file holds: `basis` [k, d], and what its maker said of it.

    Rows are orthonormal unless there is a `reader` [k, d] (an oblique edit, see `plan.Edit`). `mean` [d] is what an
    affine edit puts back. A `recipe` says how it is taken out; without one it is taken out of every writer. `per_site`
    [L+1, k, d] holds other directions for what is written at each site (see `plan.Variant`).
    """

    basis: Float[Tensor, "k d"]
    metadata: dict[str, Any]
    candidates: Candidates | None = None
    reader: Float[Tensor, "k d"] | None = None
    mean: Float[Tensor, " d"] | None = None
    recipe: Recipe | None = None
    per_site: Float[Tensor, "sites k d"] | None = None

    @property
    def learnt_from(self) -> frozenset[str]:
        """Fingerprints of the prompts it was made of and chosen by, where its file says so."""
        said = self.metadata.get("learnt_from")
        return frozenset(map(str, said)) if isinstance(said, list) else frozenset()


def learnt_by(model: str) -> frozenset[str]:
    """What the direction beside an edited model was learnt from; nothing where MODEL is no such folder."""
    path = Path(model) / "direction.safetensors"
    return load_direction(path).learnt_from if path.is_file() else frozenset()


def save_direction(path: Path, direction: Direction, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `direction.safetensors` (see `Direction`), with other `metadata` than the direction's where given."""
    from safetensors.torch import save

    candidates = direction.candidates
    found = {
        "basis": direction.basis,
        "candidates": None if candidates is None else candidates.raw,
        "harmless_mean": None if candidates is None else candidates.harmless_mean,
        "reader": direction.reader,
        "mean": direction.mean,
        "per_site": direction.per_site,
    }
    tensors = {name: tensor.float().contiguous() for name, tensor in found.items() if tensor is not None}
    metadata = dict(direction.metadata if metadata is None else metadata)
    if direction.recipe is not None:
        metadata["recipe"] = asdict(direction.recipe)
    # One key: the library writes several in random order, and equal runs shall leave equal bytes.
    write_atomically(path, save(tensors, metadata={"abliterate": json.dumps(metadata)}))


def chosen_site(direction: Direction) -> tuple[int, int] | None:
    """Layer and position that the direction was measured at, where its file says so and holds it."""
    match direction.metadata.get("chosen"):
        case {"layer": int(layer), "position": int(position)}:
            candidates = direction.candidates
            if candidates is None or (
                0 <= layer < candidates.raw.shape[1] and -candidates.raw.shape[0] <= position < 0
            ):
                return layer, position
    return None


def load_direction(path: Path, d_model: int | None = None) -> Direction:
    """Read a direction file of ours, or any safetensors file with a `basis` or a single vector.

    Raises `UsageError` when there is no such file or it does not fit the model, `CheckpointError` when damaged.
    """
    if not path.is_file():
        raise UsageError(f"direction file '{path}': expected a .safetensors file, found none")
    shard = read_shard(path)  # refuses anything malformed before another library maps it
    tensors = _floats(shard)
    basis = tensors.get("basis")
    if basis is None and len(shard.tensors) == 1:
        basis = next(iter(tensors.values()), None)
    if basis is None or basis.dim() not in (1, 2):
        found = ", ".join(f"{name} {list(info.shape)}" for name, info in shard.tensors.items())
        raise UsageError(
            f"direction file '{path}': expected a tensor 'basis' [k, d_model] or a single vector, found "
            f"{found or 'nothing'}"
        )
    basis = basis.float().reshape(-1, basis.shape[-1])
    if d_model is not None and basis.shape[1] != d_model:
        raise UsageError(
            f"direction file '{path}': expected vectors of the model's width {d_model}, found {basis.shape[1]}"
        )
    candidates: Candidates | None = None
    if {"candidates", "harmless_mean"} <= tensors.keys():
        raw, mean = tensors["candidates"].float(), tensors["harmless_mean"].float()
        if (
            raw.dim() != 3
            or raw.shape[2] != basis.shape[1]
            or raw.shape != mean.shape
            or not (raw + mean).isfinite().all()
        ):
            raise UsageError(
                f"direction file '{path}': expected finite 'candidates' and 'harmless_mean' [positions, sites, "
                f"{basis.shape[1]}], found {list(raw.shape)} and {list(mean.shape)}"
            )
        candidates = Candidates(raw, mean)
    reader, put_back = _oblique(path, tensors, basis)
    rows = orthonormal(basis)  # raises for what is none
    rows = rows if reader is None else basis
    metadata = _metadata(shard.metadata)
    per_site = tensors.get("per_site")
    if per_site is not None and (per_site.shape[1:] != basis.shape or not bool(per_site.isfinite().all())):
        raise UsageError(
            f"direction file '{path}': expected finite 'per_site' [sites, {len(basis)}, {basis.shape[1]}], found "
            f"{list(per_site.shape)}"
        )
    return Direction(rows, metadata, candidates, reader, put_back, _recipe(path, metadata), per_site)


def _floats(shard: Shard) -> dict[str, Tensor]:
    """The tensors that hold floats: others are no part of a direction, and torch knows not all of them."""
    from safetensors import safe_open

    with safe_open(shard.path, "pt") as file:
        return {
            name: file.get_tensor(name)
            for name, info in shard.tensors.items()
            if info.dtype in ("F64", "F32", "F16", "BF16") and info.nbytes
        }


def _oblique(path: Path, tensors: Mapping[str, Tensor], basis: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The reader and the mean of an oblique or affine edit."""
    reader, mean = (None if (t := tensors.get(name)) is None else t.float() for name in ("reader", "mean"))
    for name, tensor, shape in (("reader", reader, basis.shape), ("mean", mean, basis.shape[1:])):
        if tensor is not None and (tensor.shape != shape or not bool(tensor.isfinite().all())):
            raise UsageError(
                f"direction file '{path}': expected finite '{name}' {list(shape)}, found {list(tensor.shape)}"
            )
    return reader, mean


def _recipe(path: Path, metadata: dict[str, Any]) -> Recipe | None:
    """The recipe, taken out of the rest of the metadata."""
    match metadata.pop("recipe", None):
        case None:
            return None
        case {
            "strengths": dict(strengths),
            "norm_preserving": bool(norms),
            "biprojected": bool(projected),
            "untie": bool(untie),
        } if all(isinstance(value, int | float) and math.isfinite(value) for value in strengths.values()):
            return Recipe({str(name): float(value) for name, value in strengths.items()}, norms, projected, untie)
    raise UsageError(
        f"direction file '{path}': expected a recipe with finite 'strengths' by parameter, 'norm_preserving', "
        "'biprojected' and 'untie', found another; was it made by a newer version?"
    )


def _metadata(stored: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(stored.get("abliterate", "{}"))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
