"""Steering as data: what is done to the residual stream along a vector, where, to which tokens; and files of vectors.

Layer l is where the stream enters block l, the last one, L, where it leaves the last block. Libraries that add a
vector to what block N gives (steering-vectors, repeng, llama.cpp) number it N: that is layer N + 1 here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import ZERO_NORM
from abliterate.config import SteerSettings
from abliterate.config.natural import as_numbers, as_type
from abliterate.edit.direction import Direction, Site, load_direction, load_layered
from abliterate.edit.gguf import read_control_vector
from abliterate.edit.options import layer_numbers
from abliterate.edit.values import TensorValue
from abliterate.errors import UsageError

Operation = Literal["add", "scale", "clamp", "cap", "ablate"]
Tokens = Literal["all", "generated"]

#: What a coefficient of 1 is as long as: the measured norm ‖r‖, the vector as its file holds it, or 1.
Unit = Literal["norm", "file", "absolute"]

#: Operations whose coefficient is a length along the direction; that of the others is a factor.
LENGTHS = ("add", "clamp", "cap")

#: The coefficient that changes nothing, of operations that have one.
NEUTRAL = {"add": 0.0, "scale": 1.0, "ablate": 0.0}

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SteeringVectors(TensorValue):
    """Vectors [n, d] to steer along, each as long as what a coefficient of 1 adds, and the layers they are of.

    One vector may go to any layer; it may also have none of its own (`layers` is empty then). Several go to their own.
    `unit` says what their length is. `learnt_from` are fingerprints of prompts that must not be evaluated on.
    """

    vectors: Float[Tensor, "n d"]
    layers: tuple[int, ...]
    unit: Unit
    learnt_from: frozenset[str] = frozenset()

    @classmethod
    def natural(cls, value: Any) -> Self:
        """What it is already, or made of a direction, a file, {layer: vector}, or one vector [d]."""
        if isinstance(value, SteeringVectors):
            return value  # type: ignore[return-value]
        if isinstance(value, str | os.PathLike):
            return cls.load(Path(value))
        if isinstance(value, Mapping):
            return cls.by_layer({as_type("steering: layer", layer, int): one for layer, one in value.items()})
        return cls.of(value if isinstance(value, Direction) else Direction.natural(value))

    @classmethod
    def of(cls, direction: Direction) -> Self:
        """A direction, as long as it was measured where that is known.

        Raises `UsageError` for several directions, or an oblique one (LEACE).
        """
        if len(direction.basis) != 1:
            raise UsageError(f"direction: expected one to steer along, found {len(direction.basis)}")
        if direction.reader is not None:
            raise UsageError("direction: expected one that is read as it is written to steer along, found LEACE's")
        row = _unit(direction.basis)
        norm, site = _norm(direction), direction.site
        layers = () if site is None else (site.layer,)
        unit: Unit = "absolute" if norm is None else "norm"
        return cls(row * (norm or 1.0), layers, unit, direction.learnt_from)

    @classmethod
    def by_layer(cls, vectors: Mapping[int, Any]) -> Self:
        """One vector for each layer, as they are; one of zeros points nowhere, and is left out.

        Raises `UsageError` for none, for numbers that are none or not finite, or for other widths among them.
        """
        rows = {layer: as_numbers(f"steering: layer {layer}", vectors[layer], 1).float() for layer in sorted(vectors)}
        if len(widths := {len(row) for row in rows.values()}) > 1:
            raise UsageError(f"steering: expected vectors of one width, found {sorted(widths)}")
        if not all(layer >= 0 and bool(row.isfinite().all()) for layer, row in rows.items()):
            raise UsageError("steering: expected layers from 0 on with finite numbers, found others")
        rows = {layer: row for layer, row in rows.items() if float(row.norm()) > ZERO_NORM}
        if not rows:
            raise UsageError("steering: expected a vector for at least one layer, found none but zeros")
        return cls(torch.stack(list(rows.values())), tuple(rows), "file")

    @classmethod
    def load(cls, path: Path, site: tuple[int, int] | None = None) -> Self:
        """The vectors of a file: a direction file, a llama.cpp control vector (.gguf), or safetensors of `layer.N`.

        `site` is that of a candidate in a direction file. Raises `UsageError` for anything else (a pickle is never
        read), `CheckpointError` for a file that is damaged.
        """
        if path.suffix.lower() in _PICKLES:
            raise UsageError(
                f"direction file '{path}': expected safetensors or GGUF, found a pickle, which may run code and is "
                "never read; save a SteeringVector v with save_file of safetensors.torch, as the tensors "
                "{f'layer.{n}': t.contiguous() for n, t in v.layer_activations.items()}"
            )
        blocks = None
        if path.suffix.lower() == ".gguf":
            found = read_control_vector(path)
        elif (blocks := load_layered(path)) is not None:
            found = {block + 1: vector for block, vector in blocks.items()}
        else:
            return cls.of(load_direction(path).at(None if site is None else Site(*site)))
        if site is not None:
            raise UsageError(f"--site {site[0]}:{site[1]}: '{path}' holds vectors by layer and no candidates")
        return cls.by_layer(found)

    def fit(self, layers: int, d_model: int) -> Self:
        """The same, for a model with so many blocks. Raises `UsageError` for other widths or layers."""
        if self.vectors.shape[1] != d_model:
            raise UsageError(
                f"direction: expected vectors of the model's width {d_model}, found {self.vectors.shape[1]}"
            )
        if self.layers and self.layers[-1] > layers:
            raise UsageError(f"direction: expected layers up to the model's {layers}, found {self.layers[-1]}")
        return self

    def row(self, layer: int) -> int:
        """Which vector goes to a layer. Raises `UsageError` where none does."""
        if len(self.vectors) == 1:
            return 0
        if layer not in self.layers:
            have = ", ".join(map(str, self.layers))
            raise UsageError(f"--layers {layer}: expected a layer that the file has a vector for ({have})")
        return self.layers.index(layer)

    @property
    def lengths(self) -> list[float]:
        """What a coefficient of 1 is long, by vector."""
        found: list[float] = self.vectors.norm(dim=-1).tolist()
        return found

    @property
    def units(self) -> Float[Tensor, "n d"]:
        """Unit vectors r̂."""
        return _unit(self.vectors)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Steering(TensorValue):
    """What is done to the residual stream h at each of `layers`, with its unit vector r̂ and the length u of a unit.

    p = h·r̂ is the projection. `add`: h + c u r̂. `scale`: p becomes c p. `clamp`: p becomes c u. `cap`: p becomes
    c u where it is more. `ablate`: p becomes (1 − c) p. At every token, or at those that a token of the reply is
    predicted from: the prompt's last, and the reply's.
    """

    operation: Operation
    coefficient: float
    tokens: Tokens
    layers: tuple[int, ...]
    directions: Float[Tensor, "n d"]
    lengths: tuple[float, ...]

    def at(self, layer: int, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Activations at a layer, steered."""
        place, c = self.layers.index(layer), self.coefficient
        unit, length = self.directions[place].to(hidden), self.lengths[place]
        if self.operation == "add":
            return hidden + c * length * unit
        along = (hidden @ unit)[..., None]
        if self.operation == "clamp":
            moved = c * length - along
        elif self.operation == "cap":
            moved = (c * length - along).clamp_max(0)
        else:
            moved = ((c - 1) if self.operation == "scale" else -c) * along
        return hidden + moved * unit

    def by(self, coefficient: float) -> Steering:
        """The same with another coefficient."""
        return replace(self, coefficient=coefficient)

    def random(self, seed: int) -> Steering:
        """The same along random directions of the same lengths: one for all layers where they share one."""
        generator = torch.Generator().manual_seed(seed)
        shared = bool((self.directions == self.directions[0]).all())
        drawn = torch.randn(1 if shared else len(self.layers), self.directions.shape[1], generator=generator)
        return replace(self, directions=_unit(drawn).expand_as(self.directions).clone())

    def on(self, device: torch.device) -> Steering:
        """The same with its directions on a device."""
        return replace(self, directions=self.directions.to(device))

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return NEUTRAL.get(self.operation) != self.coefficient


def steering_of(vectors: SteeringVectors, settings: SteerSettings, layers: int, d_model: int) -> Steering:
    """What `settings` do along `vectors`, to a model with so many blocks.

    By default at the layers that the vectors are of; a direction is ablated at all.

    Raises `UsageError` for vectors of another model, and where no layer is known.
    """
    vectors = vectors.fit(layers, d_model)
    if settings.layers is not None:
        chosen = tuple(sorted(layer_numbers(settings.layers, "--layers", layers + 1, "layers")))
    elif settings.operation == "ablate" and len(vectors.vectors) == 1:
        chosen = tuple(range(layers + 1))
    else:
        chosen = vectors.layers
    if not chosen:
        raise UsageError(
            f"--layers: expected the layers to {settings.operation} at (0 to {layers}), found none: the direction does "
            "not say where it was measured"
        )
    rows = [vectors.row(layer) for layer in chosen]
    lengths = vectors.lengths
    return Steering(
        settings.operation,
        settings.coefficient,
        settings.tokens,
        chosen,
        vectors.units[rows],
        tuple(lengths[row] for row in rows),
    )


def _norm(direction: Direction) -> float | None:
    """‖r‖ as it was measured, where the direction knows it."""
    if direction.candidates is not None and direction.site is not None:
        return float(direction.difference_at(direction.site).norm())
    match direction.facts.get("chosen"):
        case {"norm": float(norm)} if 0 < norm < 1e9:
            return norm
    return None


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


__all__ = ["LENGTHS", "NEUTRAL", "Operation", "Steering", "SteeringVectors", "Tokens", "Unit", "steering_of"]
