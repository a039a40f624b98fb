"""The writers of a checkpoint as matrices, one tensor in memory at a time; nothing is built or run."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.errors import AnatomyError, CheckpointError, ModelError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, open_tensor, read_shard, sha256
from abliterate.files.formats import layout
from abliterate.files.storage import configuration
from abliterate.model.anatomy import Kind, names_on_disk
from abliterate.model.loading import locate
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor
from abliterate.report.assemble import build_record
from abliterate.session import warn_of_files

#: Output maps by the names that checkpoints give them, for files that come without a configuration.
_OUTPUTS = re.compile(
    r"(o_proj|out_proj|wo|c_proj|dense|down_proj|w2|fc2|fc_out|dense_4h_to_h|linear2|ffn_down|attn_output)\.weight$"
)
_ATTENTION = re.compile(r"att", re.IGNORECASE)
_EXPERT = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor that writes to the stream; `axis` runs over the stream, `gain` [d] is that of its post-norm."""

    info: TensorInfo
    axis: int
    block: int | None
    kind: Kind
    gain: Float[Tensor, " d"] | None = None


@dataclass(frozen=True, slots=True)
class InspectedModel:
    """A checkpoint whose writers are known: by residual accounting (`proved`), or by the names of its tensors.

    `files` is None for a single file.
    """

    name: str
    checkpoint: Checkpoint
    places: tuple[Place, ...]
    d_model: int
    proved: bool
    files: ModelOnDisk | None = None

    @property
    def layers(self) -> int:
        """Blocks that have a writer."""
        return 1 + max((place.block for place in self.places if place.block is not None), default=-1)

    @property
    def units(self) -> dict[tuple[int | None, Kind], tuple[Place, ...]]:
        """Tensors by layer and component: experts of one block are one unit."""
        found: dict[tuple[int | None, Kind], list[Place]] = {}
        for place in self.places:
            found.setdefault((place.block, place.kind), []).append(place)
        return {unit: tuple(places) for unit, places in found.items()}


def open_inspected(model: str | ModelOnDisk, *, trust_remote_code: bool = False) -> InspectedModel:
    """The writers of a hub id, a folder, a `.gguf` file, or one `.safetensors` file or shard.

    A single file, and a model whose writers cannot all be proved, is read by the names of its tensors.

    Raises `ModelError` when it cannot be found, `CheckpointError` when files are damaged or no writer is known.
    """
    if isinstance(model, str):
        path = Path(os.path.expanduser(model))
        if path.suffix == ".safetensors" and path.is_file():
            shard = read_shard(path)
            return _by_name(model, Checkpoint(path.parent, (shard,), shard.tensors, None))
        model = locate(model, trust_remote_code=trust_remote_code)
    try:
        return _by_anatomy(model)
    except (AnatomyError, ModelError):
        return _by_name(model.name, model.checkpoint, model)


def warn_of_inspected(inspected: InspectedModel, monitor: Monitor) -> None:
    """Say what is odd about the files of a model, or that its writers are known by names only."""
    if not inspected.proved:
        monitor.note(f"{inspected.name}: writers known by the names of their tensors only")
    elif inspected.files is not None:
        warn_of_files(inspected.files, monitor)


def _by_anatomy(files: ModelOnDisk) -> InspectedModel:
    anatomy, skeleton, checkpoint = files.anatomy(), files.skeleton(), files.checkpoint
    writers = {writer.weight: writer for writer in anatomy.writers if writer.weight is not None and not writer.tied}
    stored = names_on_disk(skeleton, {name: writer.axis for name, writer in writers.items()}, checkpoint.tensors)
    places = tuple(
        Place(checkpoint.tensors[place.tensor], place.axis, writer.block, writer.kind, writer.gain)
        for name, writer in writers.items()
        for place in stored[name]
        if len(checkpoint.tensors[place.tensor].shape) > 1
    )
    return InspectedModel(files.name, checkpoint, places, anatomy.d_model, proved=True, files=files)


def _by_name(name: str, checkpoint: Checkpoint, files: ModelOnDisk | None = None) -> InspectedModel:
    """Output maps by their names; the width of the stream is the one that most of them share."""
    found = {key: info for key, info in checkpoint.tensors.items() if _OUTPUTS.search(key) and len(info.shape) == 2}
    if checkpoint.absent:
        raise CheckpointError(
            f"{name}: its index lists {len(checkpoint.absent)} tensors that no file holds, {checkpoint.absent[0]}; "
            "download it again"
        )
    widths = Counter(size for info in found.values() for size in set(info.shape))
    if not widths:
        raise CheckpointError(
            f"{name}: expected tensors that write to the residual stream (o_proj, down_proj, …), found none of "
            f"{len(checkpoint.tensors)}; give the whole model, or a shard that holds blocks"
        )
    width = widths.most_common(1)[0][0]
    places = []
    for key, info in found.items():
        block = re.search(r"\.(\d{1,5})\.", key)
        if width in info.shape and block:
            kind = Kind.ATTENTION if _ATTENTION.search(key) else Kind.EXPERTS if _EXPERT.search(key) else Kind.MLP
            axis = 1 if "c_proj" in key or info.shape[0] != width else 0
            places.append(Place(info, axis, int(block[1]), kind))
    places.sort(key=lambda place: (place.block or 0, place.kind != Kind.ATTENTION))
    return InspectedModel(name, checkpoint, tuple(places), width, proved=False, files=files)


def inspected_record(
    inspected: InspectedModel, monitor: Monitor, settings: Mapping[str, Any], **parts: Any
) -> rec.Record:
    """The record of work on a checkpoint of which no live model was made."""
    files, checkpoint = inspected.files, inspected.checkpoint
    architectures = None if files is None else configuration(checkpoint).get("architectures")
    model = rec.ModelPart(
        name=inspected.name,
        kind="folder" if files is None else files.kind,
        folder=str(checkpoint.folder),
        storage="plain" if files is None else files.storage.method,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown",
        d_model=inspected.d_model,
        layers=inspected.layers,
        dtype="float32",
        device="cpu",
        source_sha256={shard.path.name: sha256(shard.path) for shard in checkpoint.shards},
    )
    return build_record(model, monitor, settings, **parts)


def numbers(checkpoint: Checkpoint, info: TensorInfo) -> Float[Tensor, "*shape"]:
    """The numbers of a stored tensor in float32 (float64 for F64).

    Raises `CheckpointError` for a format without numbers of its own, and for numbers that are not finite.
    """
    form = layout(checkpoint, info)
    with open_tensor(info) as reader:
        values = form.decode(reader.read(0, info.nbytes), 0).reshape(form.shape)
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"tensor '{info.name}': expected finite numbers, found NaN or infinity; not inspected")
    return values


def maps(checkpoint: Checkpoint, place: Place) -> Iterator[Float[Tensor, "d n"]]:
    """What a place writes, as matrices with the stream on the first axis: one, or one per expert."""
    values = numbers(checkpoint, place.info).float()
    gain = None if place.gain is None else place.gain.float()
    stacked = values.movedim(place.axis, -2) if place.axis != values.dim() - 2 else values
    for matrix in stacked.reshape(-1, *stacked.shape[-2:]):
        yield matrix if gain is None else matrix * gain[:, None]


__all__ = ["InspectedModel", "Place", "maps", "numbers", "open_inspected", "warn_of_inspected"]
