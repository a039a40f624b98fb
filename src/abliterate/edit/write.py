"""A plan written to OUT: as weights or a GGUF model, as a PEFT or GGUF adapter, as a GGUF control vector."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import orthonormal
from abliterate.config import EditSettings, FindSettings, OutputSettings
from abliterate.edit.convert import check_converts, convert, find_tools, without_code
from abliterate.edit.direction import Candidates, Direction, Site
from abliterate.edit.gguf import (
    architecture_of,
    require_library,
    residuals_in,
    stored_architecture,
    write_control_vector,
    write_gguf_lora,
)
from abliterate.edit.lora import LowRank, low_rank, low_rank_live, refuse_for_lora, write_peft
from abliterate.edit.modelfile import modelfile
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.edit.weights import Surgery, edit_checkpoint, planned_parameters, refusal
from abliterate.errors import UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.checkpoint import (
    CARD,
    Changes,
    Staging,
    bytes_to_write,
    ensure_space,
    left_bytes,
    open_checkpoint,
    resumable,
)
from abliterate.files.configuration import read_config
from abliterate.model.anatomy import Anatomy, Stored, names_on_disk
from abliterate.model.gguf_source import gguf_parts
from abliterate.model.loading import LoadedModel, load_tokenizer
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor
from abliterate.record import ResidualPart, grouped
from abliterate.texts import encodable

GGUF_LORA = "abliteration-lora.gguf"
CONTROL_VECTOR = "control-vector.gguf"
MODELFILE = "Modelfile"

#: What undo needs is at most this part of the edited tensors: measured 1 % to 15 %, twice while it is put together.
_UNDO_SHARE = 4

#: Less of the direction than this, back in numbers that were rounded, is not warned of.
_BACK = 0.05


@dataclass(frozen=True, slots=True)
class EditTarget:
    """What is edited: a model on disk with its anatomy, and a model for names: the live one, or its skeleton."""

    files: ModelOnDisk
    anatomy: Anatomy
    model: Any
    loaded: LoadedModel | None = None


@dataclass(frozen=True, slots=True)
class Realised:
    """What was written. `surgery`, `names` (where parameters lie on disk) and `copied` (new tensors, each with the
    bytes of another) are those of weights alone, `vectors` (to be added, by layer) those of a control vector,
    `residuals` (what is left of the direction in the stored numbers) those of a GGUF model.
    """

    written: tuple[str, ...]
    surgery: Surgery | None = None
    names: dict[str, tuple[Stored, ...]] | None = None
    copied: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[int, Float[Tensor, " d"]] = field(default_factory=dict)
    residuals: tuple[ResidualPart, ...] = ()


def dry_run_plan(anatomy: Anatomy, finding: FindSettings, editing: EditSettings, output: OutputSettings) -> None:
    """Raise what the plan of a direction that is still to be found would raise, before hours of work."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(finding.rank, anatomy.d_model, generator=generator)
    raw, mean = torch.randn(2, 1, anatomy.layers + 1, anatomy.d_model, generator=generator)
    reader = rows if finding.subspace == "leace" else None
    direction = Direction(orthonormal(rows), Candidates(raw, mean), reader, site=Site(0, -1))
    refuse(plan_for(anatomy, direction, editing), anatomy, output)


def refuse(plan: Plan, anatomy: Anatomy, output: OutputSettings) -> None:
    """Raise `UsageError`, naming the writer, for a plan that cannot be realised as `output` wants it."""
    if output.of_model:
        for edit in plan.edits:
            if edit.changes and (reason := refusal(edit)) is not None:
                raise UsageError(reason)
        _refuse_untying(plan, anatomy)
    elif output.realisation == "control-vector":
        _refuse_vector(plan, anatomy)
    else:
        refuse_for_lora(plan)
        if plan.untie:
            raise UsageError("--untie: an adapter cannot untie the head; write weights")


def _refuse_untying(plan: Plan, anatomy: Anatomy) -> None:
    if plan.untie and not any(writer.tied for writer in anatomy.writers):
        raise UsageError("--untie: expected an embedding tied to the head, found one that is not; leave it out")
    if plan.untie and not any(edit.writer.tied for edit in plan.edits):
        raise UsageError("--untie: expected the embedding among what is edited, found it left out; see --components")


def _refuse_vector(plan: Plan, anatomy: Anatomy) -> None:
    """What is added is the difference of means, so the edit must be one that takes out just that."""
    plain = (edit for edit in plan.edits if edit.writer.gain is None)
    if len(plan.direction) != 1 or not all(torch.equal(edit.basis, plan.direction) for edit in plain):
        raise UsageError("control vector: it adds one vector; subspaces and --biprojected edits cannot be had so")
    if any(len(set(strengths)) > 1 for strengths in _by_block(plan, anatomy).values()):
        raise UsageError("control vector: it is added to all of the stream; expected one strength for a whole block")
    if plan.untie or any(
        edit.norm_preserving or edit.offset is not None or edit.reader is not None for edit in plan.edits
    ):
        raise UsageError(
            "control vector: it adds a vector; norm-preserving, affine, LEACE and untied edits cannot be had so"
        )


def _by_block(plan: Plan, anatomy: Anatomy) -> dict[int, list[float | None]]:
    """The strength of every writer of each block, None where it is left alone."""
    strengths = {edit.writer.parameters: edit.strength for edit in plan.edits}
    found: dict[int, list[float | None]] = {block: [] for block in range(anatomy.layers)}
    for writer in anatomy.writers:
        if writer.block is not None:
            found[writer.block].append(strengths.get(writer.parameters))
    return found


def check_output_options(output: OutputSettings) -> None:
    """Raise, before a model is fetched, for options that do not go together, or programs that are not installed."""
    if output.shard_size is not None and output.realisation != "weights":
        raise UsageError(f"--shard-size: expected --as weights with it, found {output.realisation}")
    if output.gguf_type is not None and output.realisation != "gguf":
        raise UsageError(f"--gguf-type: expected --as gguf with it, found {output.realisation}")
    if output.realisation == "gguf":
        require_library()
        find_tools(output.gguf_type)


def check_realisation(files: ModelOnDisk, output: OutputSettings) -> None:
    """Raise, before any work, for weights that cannot be edited in place, converted, or for which there is no room."""
    if not output.of_model:
        return
    files.require_editable()
    needed = bytes_to_write(files.checkpoint)
    if output.realisation == "gguf":
        check_converts(find_tools(output.gguf_type), files.folder, trust_remote_code=files.trust_remote_code)
        needed = _room_for_gguf(needed, output)
    ensure_space(output.out.parent, needed - left_bytes(output.out))


def _room_for_gguf(edited: int, output: OutputSettings) -> int:
    """Bytes of the edited files, of their conversion, and of what that is quantised to, each taken for as large."""
    return edited * (2 if output.gguf_type is None else 3)


@contextlib.contextmanager
def opened(output: OutputSettings, target: EditTarget, plan: Plan) -> Iterator[Staging]:
    """The folder that becomes OUT when all is done. A run that was killed goes on where it was."""
    identity = _identity(output, plan)
    folder = target.files.folder
    with resumable(output.out, identity=identity, source=folder, overwrite=output.overwrite) as staging:
        yield staging


def _identity(output: OutputSettings, plan: Plan) -> bytes:
    """All that decides the bytes to be written, beside the source."""
    digest = hashlib.sha256(
        json.dumps([version("abliterate"), output.realisation, output.shard_size, output.gguf_type]).encode()
    )
    for edit in plan.edits:
        digest.update(f"{edit.writer.parameters} {edit.strength!r} {edit.norm_preserving} {plan.untie}".encode())
        for tensor in (edit.basis, edit.reader, edit.offset):
            digest.update(b"-" if tensor is None else tensor.float().contiguous().numpy().tobytes())
    return digest.digest()


def realise(
    plan: Plan, direction: Direction, target: EditTarget, staging: Staging, output: OutputSettings, monitor: Monitor
) -> Realised:
    """Write `plan` into the folder of `staging`.

    Raises `UsageError`, naming the writer, for an edit that this realisation cannot hold exactly.
    """
    refuse(plan, target.anatomy, output)
    for name, why in grouped(dict(plan.left_alone)):
        monitor.note(f"{name} left alone: {why}")
    if output.realisation == "weights":
        return _weights(plan, target, staging, output, monitor)
    if output.realisation == "gguf":
        return _gguf(plan, target, staging, output, monitor)
    if output.realisation == "control-vector":
        return _control_vector(plan, direction, target, staging.folder)
    with monitor.phase("factors of the adapter"):
        factors = _factors(plan, target)
    if output.realisation == "lora":
        folders = write_peft(staging.folder, factors, model=target.model, base_model=_base_model(target.files))
        return Realised(tuple(str(folder.relative_to(staging.folder)) for folder in folders))
    tied = bool(target.model.config.get_text_config().tie_word_embeddings)
    layers = target.anatomy.layers
    write_gguf_lora(staging.folder / GGUF_LORA, factors, architecture=_architecture(target), layers=layers, tied=tied)
    return Realised((GGUF_LORA,))


def realised_elsewhere(plan: Plan, direction: Direction, target: EditTarget, output: OutputSettings) -> Realised:
    """What `realise` says of a plan that another process writes, as far as a live model is measured by it."""
    if output.realisation == "weights":
        source = target.files.checkpoint
        return Realised((), names=names_on_disk(target.model, planned_parameters(plan), source.tensors))
    if output.realisation == "control-vector":
        return Realised((), vectors=_vectors(plan, direction, target))
    return Realised(())


def _weights(plan: Plan, target: EditTarget, staging: Staging, output: OutputSettings, monitor: Monitor) -> Realised:
    source = target.files.checkpoint
    names = names_on_disk(target.model, planned_parameters(plan), source.tensors)
    changes = _changes(plan, target, output)
    total = bytes_to_write(source, changes)
    planned = sum(source.tensors[place.tensor].nbytes for places in names.values() for place in places)
    ensure_space(staging.folder, total - staging.journal.kept_bytes + planned // _UNDO_SHARE)
    with monitor.phase("edit weights", total) as advance:
        surgery = edit_checkpoint(
            source, staging.folder, plan, names, changes=changes, journal=staging.journal, progress=advance
        )
    if surgery.files.kept:
        monitor.note(f"taken up from a run that was killed: {', '.join(surgery.files.kept)}")
    left_out = [name for name in surgery.files.left_out if name not in surgery.files.links]
    if copies := [name for name in left_out if encodable(name) == name]:
        monitor.warn(f"not copied, they would still hold the unedited model: {', '.join(copies)}")
    if odd := [encodable(name) for name in left_out if encodable(name) != name]:
        monitor.warn(f"not copied, their names are not UTF-8 and no record could hold them: {', '.join(odd)}")
    if surgery.files.links:
        monitor.warn(f"not followed, they are links out of the model's folder: {', '.join(surgery.files.links)}")
    copied = {name: info.name for name, info in changes.extra.items()}
    return Realised((*surgery.files.written, *surgery.undo), surgery, names, copied)


def _gguf(plan: Plan, target: EditTarget, staging: Staging, output: OutputSettings, monitor: Monitor) -> Realised:
    """The edited files, which do not stay, made one GGUF file. A run that was killed begins anew."""
    files, tools = target.files, find_tools(output.gguf_type)
    names = names_on_disk(target.model, planned_parameters(plan), files.checkpoint.tensors)
    changes = _changes(plan, target, output)
    total = bytes_to_write(files.checkpoint, changes)
    ensure_space(staging.folder, _room_for_gguf(total, output))
    edited = staging.journal.scratch / "edited"
    edited.mkdir()
    with monitor.phase("edit weights", total) as advance:
        surgery = edit_checkpoint(
            files.checkpoint, edited, plan, names, keep_undo=False, changes=changes, progress=advance
        )
    if not files.trust_remote_code:
        without_code(edited)
    name = "model.gguf" if output.gguf_type is None else f"model-{output.gguf_type}.gguf"
    made = edited.with_name(name)
    with monitor.phase("convert to GGUF"):
        called = f"{Path(files.name).name} abliterated"
        convert(tools, edited, made, gguf_type=output.gguf_type, name=called)
    with monitor.phase("measure what is stored"):
        residuals = residuals_in(made, open_checkpoint(edited), plan, names, surgery.residuals)
    _warn_of_rounding(residuals, surgery.residuals, output, monitor)
    for path in (edited / CARD, *edited.glob("LICENSE*")):  # whoever gets the file is told its licence
        if path.is_file():
            shutil.copy(path, staging.folder)
    shutil.rmtree(edited)
    os.replace(made, staging.folder / name)
    content = modelfile(name, load_tokenizer(files)[0])
    write_atomically(staging.folder / MODELFILE, content)
    return Realised((name, MODELFILE), residuals=residuals)


def _warn_of_rounding(
    stored: Sequence[ResidualPart], edited: Sequence[ResidualPart], output: OutputSettings, monitor: Monitor
) -> None:
    """Say how much of what was taken out stands in the stored numbers again, where that is much."""
    planned = {part.tensor: part.after for part in edited}
    before = math.hypot(*(part.before for part in stored))
    back = math.hypot(*(part.after for part in stored)) - math.hypot(*(planned[part.tensor] for part in stored))
    if before and back / before > _BACK:
        monitor.warn(
            f"stored as {output.gguf_type}, {back / before:.0%} of the direction is in the weights again: coarse "
            "numbers round the edit away; a finer --gguf-type keeps more of it, and the record has it for each tensor"
        )


def _changes(plan: Plan, target: EditTarget, output: OutputSettings) -> Changes:
    """New shards, and an untied head with its own copy of the embedding.

    There is always an index: without one vLLM takes direction.safetensors and undo.safetensors for weights.
    """
    if not plan.untie:
        return Changes(output.shard_bytes, indexed=True)
    model = target.model
    embedding, head = (_name_of(model, part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    config = {"config.json": untied_config(target.files.folder)}
    if f"{head}.weight" in target.files.checkpoint.tensors:
        return Changes(output.shard_bytes, replaced=config, indexed=True)
    (place,) = names_on_disk(model, {f"{embedding}.weight": 1}, target.files.checkpoint.tensors)[f"{embedding}.weight"]
    extra = {f"{head}.weight": target.files.checkpoint.tensors[place.tensor]}
    return Changes(output.shard_bytes, extra, config, indexed=True)


def _name_of(model: Any, part: nn.Module) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if module is part)
    return next(names)


def untied_config(folder: Path) -> bytes:
    """config.json with the ties cut, at the top and in the part for text."""
    config = read_config(folder)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def untied(model: Any, plan: Plan) -> Iterator[None]:
    """The live model with a head of its own, inside, when the plan asks for it."""
    head = model.get_output_embeddings()
    if not plan.untie or head.weight.device.type == "meta":  # one that is offloaded is fetched apart
        yield
        return
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    try:
        yield
    finally:
        head.weight = shared


def _factors(plan: Plan, target: EditTarget) -> list[LowRank]:
    """From the files; from the live model where their numbers can only be had through it."""
    if target.files.storage.editable:
        names = names_on_disk(target.model, planned_parameters(plan), target.files.checkpoint.tensors)
        return low_rank(target.files.checkpoint, plan, names)
    if target.loaded is None:
        raise UsageError("the weights are quantised: expected a loaded model to take the adapter from, found none")
    return low_rank_live(target.loaded.model, plan)


def _base_model(files: ModelOnDisk) -> str:
    return files.name if files.kind == "hub" else str(files.folder.resolve())


def _architecture(target: EditTarget) -> str:
    if target.files.kind == "gguf":
        return stored_architecture(gguf_parts(Path(os.path.expanduser(target.files.name)))[0])
    return architecture_of(str(target.model.config.get_text_config().model_type))


def _vectors(plan: Plan, direction: Direction, target: EditTarget) -> dict[int, Float[Tensor, " d"]]:
    """−s r where r was measured, or at the layers that the plan chooses: scale 1 works against the direction."""
    site = direction.site
    if direction.candidates is None or site is None:
        raise UsageError("control vector: expected a direction file with candidates and a chosen site; see `find`")
    layer, position = site
    strengths = {block: own[0] for block, own in _by_block(plan, target.anatomy).items() if own[0] is not None}
    everywhere = len(strengths) == target.anatomy.layers
    vectors = {}
    for at in [layer] if everywhere else sorted(strengths):
        vectors[at] = -strengths.get(at, plan.strength) * direction.candidates.at(at, position)
        if not bool(vectors[at].any()):
            raise UsageError(f"control vector: the classes do not differ at layer {at}, or its strength is 0")
    return vectors


def _control_vector(plan: Plan, direction: Direction, target: EditTarget, folder: Path) -> Realised:
    vectors = _vectors(plan, direction, target)
    architecture = _architecture(target)
    path = folder / CONTROL_VECTOR
    write_control_vector(path, vectors, architecture=architecture, layers=target.anatomy.layers)
    return Realised((CONTROL_VECTOR,), vectors=vectors)
