"""Directions: difference of means at every site, how well each separates, and the file they are kept in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import ZERO_NORM, orthonormal
from abliterate.config.natural import as_numbers, as_type, tensors
from abliterate.edit.values import TensorValue
from abliterate.errors import UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import parse_json, readable_size
from abliterate.files.checkpoint import Shard, read_shard
from abliterate.prompts.contrastive import fingerprint

#: How far rows that were orthonormalised in float64 and kept in float32 are from orthonormal, at most.
ROUNDING = 1e-6

#: The tensors of a direction file, and how large they may be together: candidates of the largest models take a tenth.
_TENSORS = ("basis", "candidates", "harmless_mean", "reader", "mean", "per_site", "writers.basis", "writers.reader")
_MOST_BYTES = 4 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")

#: Beyond this a strength is no edit (see `plan`).
_STRONGEST = 1e3

#: No model has so many layers, no template so many tokens.
_FAR = 2**16


class Site(NamedTuple):
    """Where in the model: layer 0..L (0 is the embedding's output), and position from the end (−1: the last token)."""

    layer: int
    position: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Candidates(TensorValue):
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

    def holds(self, site: Site) -> bool:
        """Whether there is a candidate at the site."""
        positions, sites, _ = self.raw.shape
        return 0 <= site.layer < sites and -positions <= site.position < 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PerWriter(TensorValue):
    """What is taken out of single writers, and what reads there how much of it: an oblique edit of each.

    `names` are writers by parameter, as in a recipe; `basis` holds L and `reader` R of `plan.Edit` for each, both
    [w, k, d], as the writer writes: before its post-norm.
    """

    names: tuple[str, ...]
    basis: Float[Tensor, "w k d"]
    reader: Float[Tensor, "w k d"]

    def __post_init__(self) -> None:
        """Lists and arrays of numbers become tensors. Raises `UsageError`, naming the field, for anything else."""
        object.__setattr__(self, "names", tuple(self.names))
        tensors(self, {"basis": 3, "reader": 3})
        if self.reader.shape != self.basis.shape or len(self.names) != len(self.basis):
            raise UsageError(
                f"PerWriter: expected a basis and a reader for each of {len(self.names)} writers, found "
                f"{list(self.basis.shape)} and {list(self.reader.shape)}"
            )

    def by_name(self) -> dict[str, tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]]:
        """L and R of each writer."""
        return dict(zip(self.names, zip(self.basis, self.reader, strict=True), strict=True))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a direction that was searched for is taken out: from which writers (by parameter) and how strongly.

    It is complete: with default settings the plan of the direction is the one that was measured.
    """

    strengths: Mapping[str, float]
    norm_preserving: bool = False
    biprojected: bool = False
    untie: bool = False


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Direction(TensorValue):
    """A direction, or several: `basis` [k, d], how it is taken out, and where it comes from.

    Rows are orthonormal unless there is a `reader` [k, d] (an oblique edit, see `plan.Edit`). `mean` [d] is what an
    affine edit puts back. A `recipe` says how it is taken out; without one it is taken out of every writer. `per_site`
    [L+1, k, d] holds other directions for what is written at each site (see `plan.Variant`), `per_writer` oblique
    edits of single writers, which come before both.

    `site` is where it was measured, `model` the name of the model that it was measured on, `learnt_from` holds the
    fingerprints of the prompts that it was made of and chosen by. `facts` is what its file says beside (hashes,
    counts, scores), kept as it is.
    """

    basis: Float[Tensor, "k d"]
    candidates: Candidates | None = None
    reader: Float[Tensor, "k d"] | None = None
    mean: Float[Tensor, " d"] | None = None
    recipe: Recipe | None = None
    per_site: Float[Tensor, "sites k d"] | None = None
    site: Site | None = None
    model: str | None = None
    learnt_from: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    per_writer: PerWriter | None = None

    def __post_init__(self) -> None:
        """Lists and arrays of numbers become tensors, one vector a basis of one row, a pair a site.

        Raises `UsageError`, naming the field, for anything else.
        """
        tensors(self, {"basis": 2, "reader": 2, "mean": 1, "per_site": 3})
        if self.reader is not None and self.reader.shape != self.basis.shape:
            raise UsageError(
                f"Direction: reader: expected {list(self.basis.shape)} like the basis, found {list(self.reader.shape)}"
            )
        object.__setattr__(self, "site", as_type("Direction: site", self.site, Site | None))
        object.__setattr__(self, "learnt_from", frozenset(self.learnt_from))

    @classmethod
    def natural(cls, value: Any) -> Direction:
        """A direction as it is, or made of a vector, several, or a file."""
        return load_direction(Path(value)) if isinstance(value, str | os.PathLike) else cls(value)

    @classmethod
    def from_activations(
        cls,
        harmful: Float[Tensor, "n d"] | Sequence[Sequence[float]],
        harmless: Float[Tensor, "m d"] | Sequence[Sequence[float]],
        *,
        site: tuple[int, int] | None = None,
        model: str | None = None,
        prompts: Iterable[str] = (),
    ) -> Direction:
        """The normalised difference of means of your own activations, which may be lists or arrays.

        `site` says where they were taken, `prompts` what the model read: it is never evaluated on then.

        Raises `UsageError` for anything but rows of numbers of one width, `NumericalError` for means that are equal.
        """
        sides = {"harmful": harmful, "harmless": harmless}
        both = [as_numbers(f"from_activations: {name}", value, 2) for name, value in sides.items()]
        if both[0].shape[1] != both[1].shape[1] or not all(map(len, both)):
            shapes = " and ".join(str(list(one.shape)) for one in both)
            raise UsageError(f"from_activations: expected rows [n, d] and [m, d] of one width, found {shapes}")
        means = [one.double().mean(0) for one in both]
        difference = orthonormal((means[0] - means[1])[None].float())
        seen = frozenset(fingerprint(prompt) for prompt in prompts)
        return cls(difference, site=as_type("from_activations: site", site, Site | None), model=model, learnt_from=seen)

    def at(self, site: tuple[int, int] | None, d_model: int | None = None) -> Direction:
        """The direction to use: this one, or its candidate at `site`.

        Raises `UsageError` when there is no such candidate, or when vectors have another width than `d_model`.
        """
        width = self.basis.shape[1]
        if d_model is not None and width != d_model:
            raise UsageError(f"direction: expected vectors of the model's width {d_model}, found {width}")
        if site is None:
            return self
        raw = self.difference_at(site)
        return Direction(
            raw[None] / raw.norm(),
            self.candidates,
            site=Site(*site),
            model=self.model,
            learnt_from=self.learnt_from,
            facts={name: fact for name, fact in self.facts.items() if name != "chosen"},  # said of the other site
        )

    def difference_at(self, site: tuple[int, int]) -> Float[Tensor, " d"]:
        """The difference of means r at one of the candidates' sites.

        Raises `UsageError` when there is none.
        """
        where: Site = as_type("site", site, Site)
        layer, position = where
        if self.candidates is None:
            raise UsageError(f"--site {layer}:{position}: the direction file holds no candidates, only one direction")
        if not self.candidates.holds(where):
            shape = self.candidates.raw.shape
            raise UsageError(
                f"--site {layer}:{position}: expected a layer below {shape[1]} and a position from -{shape[0]} to -1 "
                "among the file's candidates"
            )
        raw = self.candidates.at(layer, position)
        if float(raw.norm()) == 0:
            raise UsageError(f"--site {layer}:{position}: the classes do not differ there")
        return raw


def learnt_by(model: str) -> frozenset[str]:
    """What the direction beside an edited model was learnt from; nothing where MODEL is no such folder."""
    path = Path(model) / "direction.safetensors"
    return load_direction(path).learnt_from if path.is_file() else frozenset()


def save_direction(path: Path, direction: Direction) -> None:
    """Write `direction.safetensors` (see `Direction`), whole or not at all.

    Raises `CheckpointError` when it cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    candidates = direction.candidates
    held = {
        "basis": direction.basis,
        "candidates": None if candidates is None else candidates.raw,
        "harmless_mean": None if candidates is None else candidates.harmless_mean,
        "reader": direction.reader,
        "mean": direction.mean,
        "per_site": direction.per_site,
        "writers.basis": None if direction.per_writer is None else direction.per_writer.basis,
        "writers.reader": None if direction.per_writer is None else direction.per_writer.reader,
    }
    tensors = {name: tensor.float().contiguous() for name, tensor in held.items() if tensor is not None}
    # One key: the library writes several in random order, and equal runs shall leave equal bytes.
    write_atomically(path, save(tensors, metadata={"abliterate": json.dumps(_said(direction))}))


def _said(direction: Direction) -> dict[str, Any]:
    """What the file says of the direction, beside its tensors."""
    said = dict(direction.facts)
    if direction.site is not None:
        site = direction.site._asdict()
        said["chosen"] = {**site, **said.get("chosen", {}), **site}  # its facts never say another site
    if direction.model is not None:
        said["model"] = direction.model
    if direction.learnt_from:
        said["learnt_from"] = sorted(direction.learnt_from)
    if direction.recipe is not None:
        said["recipe"] = asdict(direction.recipe)
    if direction.per_writer is not None:
        said["writers"] = list(direction.per_writer.names)
    return said


def load_direction(path: Path, d_model: int | None = None) -> Direction:
    """Read a direction file of ours, or any safetensors file with a `basis` or a single vector.

    Raises `UsageError` when there is no such file or it does not fit the model, `CheckpointError` when damaged.
    """
    path = Path(path)
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
    reader, put_back = _oblique(path, tensors, basis)
    rows = orthonormal(basis)  # raises for what is none
    apart = (basis.double() @ basis.double().T - torch.eye(len(basis), dtype=torch.float64)).abs().max()
    if reader is not None or float(apart) < ROUNDING:
        rows = basis  # as it was saved, to the last bit
    metadata = _metadata(path, shard.metadata)
    per_site = tensors.get("per_site")
    if per_site is not None and (per_site.shape[1:] != basis.shape or not bool(per_site.isfinite().all())):
        raise UsageError(
            f"direction file '{path}': expected finite 'per_site' [sites, {len(basis)}, {basis.shape[1]}], found "
            f"{list(per_site.shape)}"
        )
    recipe, per_writer = _recipe(path, metadata), _per_writer(path, tensors, metadata, basis.shape[1])
    candidates = _candidates(path, tensors, basis)
    direction = Direction(rows, candidates, reader, put_back, recipe, per_site, per_writer=per_writer)
    return _with_origin(direction, metadata)


def load_layered(path: Path) -> dict[int, Float[Tensor, " d"]] | None:
    """The vectors of a safetensors file whose tensors are called `layer.N`, by N; None of any other file.

    Raises `UsageError` for vectors that are none, `CheckpointError` for a file that is damaged.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UsageError(f"direction file '{path}': expected a .safetensors file, found none")
    shard = read_shard(path)
    names = {name: re.fullmatch(r"layer\.(\d{1,5})", name) for name in shard.tensors}
    if not names or not all(names.values()):
        return None
    forms = {(info.dtype, info.shape) for info in shard.tensors.values()}
    widths = {shape for _, shape in forms}
    if len(widths) > 1 or len(min(widths)) != 1 or not {dtype for dtype, _ in forms} <= set(_FLOATS):
        raise UsageError(
            f"direction file '{path}': expected vectors 'layer.N' of floats of one width, found "
            + ", ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(forms)[:3])
        )
    with safe_open(path, "pt") as file:
        read = {int(match[1]): file.get_tensor(name).float() for name, match in names.items() if match is not None}
    if not all(bool(vector.isfinite().all()) for vector in read.values()):
        raise UsageError(f"direction file '{path}': expected finite numbers, found NaN or infinity")
    return read


def _candidates(path: Path, tensors: Mapping[str, Tensor], basis: Tensor) -> Candidates | None:
    """The candidates that the file holds, if it holds any."""
    if not {"candidates", "harmless_mean"} <= tensors.keys():
        return None
    raw, mean = tensors["candidates"].float(), tensors["harmless_mean"].float()
    width = raw.dim() == 3 and raw.shape[2] == basis.shape[1]
    if not width or raw.shape != mean.shape or not (raw + mean).isfinite().all():
        raise UsageError(
            f"direction file '{path}': expected finite 'candidates' and 'harmless_mean' [positions, sites, "
            f"{basis.shape[1]}], found {list(raw.shape)} and {list(mean.shape)}"
        )
    return Candidates(raw, mean)


def _with_origin(direction: Direction, said: dict[str, Any]) -> Direction:
    """The direction with what its file says of where it comes from; what is of another form is kept as a fact."""
    site = model = None
    learnt: frozenset[str] = frozenset()
    match said.get("chosen"):
        case {"layer": int(layer), "position": int(position), **rest} if 0 <= layer < _FAR and -_FAR <= position < 0:
            there = Site(layer, position)
            if direction.candidates is None or direction.candidates.holds(there):
                site, said = there, {key: value for key, value in said.items() if key != "chosen"}
                said |= {"chosen": rest} if rest else {}
    if isinstance(said.get("model"), str):
        model = said.pop("model")
    if isinstance(said.get("learnt_from"), list):
        learnt = frozenset(map(str, said.pop("learnt_from")))
    return replace(direction, site=site, model=model, learnt_from=learnt, facts=said)


def _floats(shard: Shard) -> dict[str, Tensor]:
    """The tensors that hold floats: others are no part of a direction, and torch knows not all of them."""
    from safetensors import safe_open

    floats = [info for info in shard.tensors.values() if info.dtype in _FLOATS and info.nbytes]
    if len(shard.tensors) > 1:
        floats = [info for info in floats if info.name in _TENSORS]
    if (size := sum(info.nbytes for info in floats)) > _MOST_BYTES:
        raise UsageError(
            f"direction file '{shard.path}': expected at most {readable_size(_MOST_BYTES)} of vectors, found "
            f"{readable_size(size)}; is it a model?"
        )
    with safe_open(shard.path, "pt") as file:
        return {info.name: file.get_tensor(info.name) for info in floats}


def _oblique(path: Path, tensors: Mapping[str, Tensor], basis: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The reader and the mean of an oblique or affine edit."""
    reader, mean = (None if (t := tensors.get(name)) is None else t.float() for name in ("reader", "mean"))
    for name, tensor, shape in (("reader", reader, basis.shape), ("mean", mean, basis.shape[1:])):
        if tensor is not None and (tensor.shape != shape or not bool(tensor.isfinite().all())):
            raise UsageError(
                f"direction file '{path}': expected finite '{name}' {list(shape)}, found {list(tensor.shape)}"
            )
    return reader, mean


def _per_writer(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any], width: int) -> PerWriter | None:
    """The edits of single writers that the file holds; their names are taken out of the rest of the metadata."""
    names = metadata.pop("writers", None)
    basis, reader = tensors.get("writers.basis"), tensors.get("writers.reader")
    if basis is None and reader is None and names is None:
        return None
    named = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    if not named or basis is None or reader is None:
        raise UsageError(
            f"direction file '{path}': expected 'writers.basis', 'writers.reader' and the 'writers' that they are for, "
            "found not all of them; was it made by a newer version?"
        )
    fits = basis.dim() == 3 and basis.shape == reader.shape and basis.shape[::2] == (len(names), width)
    if not fits or not bool((basis + reader).isfinite().all()):
        raise UsageError(
            f"direction file '{path}': expected finite 'writers.basis' and 'writers.reader' "
            f"[{len(names)}, k, {width}], found {list(basis.shape)} and {list(reader.shape)}"
        )
    return PerWriter(tuple(names), basis.float(), reader.float())


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
        } if all(isinstance(value, int | float) and abs(value) < _STRONGEST for value in strengths.values()):
            return Recipe({str(name): float(value) for name, value in strengths.items()}, norms, projected, untie)
    raise UsageError(
        f"direction file '{path}': expected a recipe with finite 'strengths' by parameter, 'norm_preserving', "
        "'biprojected' and 'untie', found another; was it made by a newer version?"
    )


def _metadata(path: Path, stored: Mapping[str, str]) -> dict[str, Any]:
    """What is said beside the tensors; what is no object is nobody's.

    An object that cannot be used is an error: without its recipe a direction would be taken out in another way.
    """
    text = stored.get("abliterate", "{}")
    try:
        value = parse_json(text)
    except ValueError as error:
        if not re.match(r'\s*\{\s*"', text):
            return {}
        raise UsageError(
            f"direction file '{path}': expected JSON as its metadata, found some that cannot be used ({error})"
        ) from error
    return value if isinstance(value, dict) else {}
