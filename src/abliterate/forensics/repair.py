"""An edit taken back: from its undo file, from the base, from the adapter that made it, or approximately.

Without any of them nobody knows what the writers used to put along the direction. What can be done is to give a few
of them a rank-one addition that writes the direction again where the model still tells harmful prompts from harmless
ones: it does, since the edit took out how harm is *reported*, not how it is recognised.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.config import MeasureSettings, RepairSettings
from abliterate.edit import undo as restoring
from abliterate.edit.adapters import read_adapter_config, refuse_other_changes, scale_of
from abliterate.edit.additions import Addition, adding, can_add, changes_of, write_additions
from abliterate.edit.direction import load_direction
from abliterate.errors import CheckpointError, GateNotMet, UsageError
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.examine import exam_of, examine, examiner_of, open_judged
from abliterate.evaluation.parts import evaluation_part
from abliterate.evaluation.probe import Level, Measured, Probe
from abliterate.evaluation.results import degenerate, refused
from abliterate.files.checkpoint import Checkpoint, bytes_to_write, check_output, ensure_space, read_shard, staged
from abliterate.files.local import reserved
from abliterate.finding.estimate import auroc
from abliterate.finding.find import refusal_tokens
from abliterate.finding.search.objectives import share_of
from abliterate.forensics import difference, single
from abliterate.forensics.reading import (
    InspectedModel,
    inspected_record,
    numbers,
    open_inspected,
    warn_of_inspected,
)
from abliterate.model.activations import stream_sites
from abliterate.model.anatomy import Kind, Writer, names_on_disk
from abliterate.monitor import Monitor
from abliterate.report.assemble import files_below, write_record_and_report
from abliterate.session import Session

#: First tokens of refusals, for a model that does not refuse and cannot be asked for its own.
USUAL_REFUSALS = "I,Sorry,As,Unfortunately"
#: What rounding leaves of a difference at most, in parts of the tensor, by how its numbers are stored.
_ROUNDING = {"F64": 1e-14, "F32": 1e-6, "F16": 2e-3, "BF16": 1.2e-2}
#: What is tried: the direction's length at harmful prompts in parts of the stream's mean length, with either sign.
_SIZES = (0.3, 0.45, 0.6, 0.9)
#: Part of the depth whose writers get an addition: refusal is decided there.
_FROM, _UNTIL = 0.2, 0.75
#: AUROC of the best MLP's reader below which attention's outputs get additions too.
_TOLD = 0.98
#: Ridge, in parts of the mean squared length of what a map takes.
_RIDGE = 0.1
#: More refusals of harmless prompts than this, or broken replies, count against a trial twice.
_PRICE = 4.0
_GAINED = share_of("harmful", refused)
_PAID = (share_of("harmless", refused), share_of("harmful", degenerate), share_of("harmless", degenerate))


def repair(
    model: str,
    out: Path,
    settings: RepairSettings = RepairSettings(),
    measuring: MeasureSettings = MeasureSettings(),
    *,
    overwrite: bool = False,
    monitor: Monitor | None = None,
) -> rec.RepairPart:
    """Write a repaired MODEL to `out`: from what undo needs, a base or an adapter; else approximately.

    Raises `UsageError` for what does not go together, `GateNotMet` when nothing is found that could be repaired, or no
    addition makes the model refuse more.
    """
    monitor = monitor or Monitor()
    given = [name for name, value in settings if value is not None]
    if len(given) > 1:
        raise UsageError("repair: expected one of --base, --adapter and --direction, found several")
    place = _Place(out, overwrite, {"model": model, "repair": settings.model_dump(mode="json")}, monitor)
    with reserved(out):
        check_output(out, overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
        if not given and _can_undo(Path(model)):
            return _undone(Path(model), place)
        return _repaired(model, settings, place, measuring)


def _undone(model: Path, place: _Place) -> rec.RepairPart:
    done = restoring.undo(model, target=place.out, monitor=place.monitor)
    close = "at an unknown distance" if done.steps is None else f"within {done.steps} step of the stored format"
    note = "" if done.exact else f"{close} ({done.reason})"
    exact = done.files if done.exact else []
    return rec.RepairPart(folder=str(place.out), how="undo", exact=exact, restored=done.tensors, note=note)


def _repaired(model: str, settings: RepairSettings, place: _Place, measuring: MeasureSettings) -> rec.RepairPart:
    trust = measuring.loading.trust_remote_code
    if settings.base is not None:
        return _from_base(model, settings.base, place, trust)
    if settings.adapter is not None:
        return _from_adapter(model, settings.adapter, place, trust)
    return _approximately(model, settings.direction, place, measuring)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a repaired model goes, and what its record says was asked."""

    out: Path
    overwrite: bool
    asked: Mapping[str, Any]
    monitor: Monitor

    def finish(self, subject: InspectedModel, part: rec.RepairPart, folder: Path) -> None:
        """Put record and report beside the model, before it appears."""
        whole = {"repair": part, "evaluation": part.evaluation, "output": str(self.out)}
        record = inspected_record(subject, self.monitor, self.asked, **whole)
        write_record_and_report(record, folder, self.monitor, *files_below(folder))


def _can_undo(folder: Path) -> bool:
    """Whether a record and what undo needs, or the original, are there."""
    return (folder / "undo.safetensors").is_file() and (folder / "abliteration.json").is_file()


# --- from the base ----------------------------------------------------------------------------------------------------


def _from_base(model: str, base: str, place: _Place, trust: bool) -> rec.RepairPart:
    """Ablated writers become the base's: whole where nothing else changed in them, else along the direction only."""
    with place.monitor.phase("find the writers"):
        subject, origin = (open_inspected(spec, trust_remote_code=trust) for spec in (model, base))
    for opened in (subject, origin):
        warn_of_inspected(opened, place.monitor)
    total = sum(place.info.nbytes for place in subject.places)
    with place.monitor.phase("compare with the base", total) as advance:
        found = difference.compare(subject, origin, progress=advance)
    if found.verdict != "ablation":
        raise GateNotMet(f"{model}: no direction was taken out of it, beside {base}: {found.verdict}")
    places = {place.info.name: place for place in subject.places}
    whole, along = [], {}
    for writer in found.writers:
        name, rows = writer.tensor, found.left.get(writer.tensor)
        mine, theirs = places[name].info, origin.checkpoint.tensors[name]
        same = (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        if same and (writer.columns_kept or writer.rows_kept or writer.rest < _ROUNDING.get(mine.dtype, 0.0)):
            whole.append(name)
        elif rows is not None:
            along[name] = functools.partial(_as_in, origin.checkpoint, name, rows, places[name].axis)
    axes = {name: places[name].axis for name in along}
    note = "" if not along else "the rest of these tensors stays as it is: something else was done to them too"
    part = rec.RepairPart(folder=str(place.out), how="base", exact=whole, restored=list(along), note=note)
    copies = dict.fromkeys(whole, origin.checkpoint)
    with _written(
        subject.checkpoint, place.out, place.overwrite, _Changes(along, axes, copies), place.monitor
    ) as folder:
        place.finish(subject, part, folder)
    return part


def _as_in(base: Checkpoint, name: str, rows: Tensor, axis: int, weight: Float[Tensor, "d n"]) -> Tensor:
    """The weight with the base's component along `rows`."""
    old = numbers(base, base.tensors[name]).movedim(axis, 0).to(weight).reshape(weight.shape)
    basis = rows.to(weight)
    flat = (old - weight).reshape(len(weight), -1)
    return weight + (basis.T @ (basis @ flat)).reshape(weight.shape)


# --- from an adapter --------------------------------------------------------------------------------------------------


def _from_adapter(model: str, adapter: Path, place: _Place, trust: bool) -> rec.RepairPart:
    """W − B A of every tensor that a merged LoRA adapter (PEFT) changed: the original to within rounding, twice."""
    factors = read_adapter(adapter)
    with place.monitor.phase("find the writers"):
        subject = open_inspected(model, trust_remote_code=trust)
    warn_of_inspected(subject, place.monitor)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, (down, up) in factors.items():
        tensor = _tensor_named(subject.checkpoint, name)
        shape = subject.checkpoint.tensors[tensor].shape
        if shape != (up.shape[0], down.shape[1]):
            raise UsageError(
                f"{adapter}: expected changes of '{tensor}' {list(shape)}, found {[up.shape[0], down.shape[1]]}; is it "
                f"the adapter that was merged into {model}?"
            )
        changes[tensor] = functools.partial(_without, up, down)
    note = "what rounding took stays: up to half a step of the merged number and half a step of the restored one"
    part = rec.RepairPart(folder=str(place.out), how="adapter", restored=list(changes), note=note)
    all_changes = _Changes(changes, dict.fromkeys(changes, 0), {})
    with _written(subject.checkpoint, place.out, place.overwrite, all_changes, place.monitor) as folder:
        place.finish(subject, part, folder)
    return part


def _without(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    return weight - (up.to(weight) @ down.to(weight))


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scaled B of each linear module of an adapter of PEFT, for weights as they are stored.

    Raises `UsageError`, naming it, for an option by which the adapter would do something else.
    """
    from safetensors import safe_open

    config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not file.is_file():
        raise UsageError(
            f"--adapter {folder}: expected adapter_config.json and adapter_model.safetensors, found neither or one"
        )
    config = read_adapter_config(folder)
    refuse_other_changes(config, config_file)
    read_shard(file)  # refuses anything malformed before another library maps it
    found = {}
    with safe_open(file, "pt") as content:
        names = set(content.keys())
        for name in sorted(names):
            if not name.endswith(".lora_A.weight"):
                if not name.endswith(".lora_B.weight"):
                    raise UsageError(f"{file}: expected LoRA of linear modules only, found '{name}'; use --base")
                continue
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in names:
                raise CheckpointError(f"{file}: expected '{other}' beside '{name}', found none")
            module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
            down, up = content.get_tensor(name).float(), content.get_tensor(other).float()
            if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
                shapes = f"{list(down.shape)} and {list(up.shape)}"
                raise CheckpointError(f"{file}: expected A [r, n] and B [d, r] of '{module}', found {shapes}")
            up = scale_of(config, module, len(down), config_file) * up
            found[module] = (up.T, down.T) if config.fan_in_fan_out else (down, up)
    if not found:
        raise UsageError(f"{file}: expected LoRA of linear modules, found none")
    return found


def _tensor_named(checkpoint: Checkpoint, module: str) -> str:
    """The stored weight of a module, whatever prefix the checkpoint has."""
    wanted = f"{module}.weight"
    found = [
        name
        for name in checkpoint.tensors
        if name == wanted or wanted.endswith(f".{name}") or name.endswith(f".{wanted}")
    ]
    if len(found) != 1:
        raise UsageError(f"adapter: expected one tensor for module '{module}', found {len(found)}")
    return found[0]


# --- approximately ----------------------------------------------------------------------------------------------------


def _approximately(model: str, direction: Path | None, place: _Place, measuring: MeasureSettings) -> rec.RepairPart:
    evaluating, finding, monitor = measuring.evaluating, measuring.finding, place.monitor
    exam = exam_of(evaluating, measuring.prompts.seed)
    session, judge = open_judged(model, measuring, monitor)
    subject = open_inspected(session.loaded.files)
    basis, blocks = _direction(subject, direction, monitor)
    given = finding if finding.refusal_tokens else finding.model_copy(update={"refusal_tokens": USUAL_REFUSALS})
    tokens = [token.token for token in refusal_tokens(session, given)]
    writers, readers = _telling(session, blocks)
    short = evaluating.model_copy(update={"max_new_tokens": min(24, evaluating.max_new_tokens)})
    size, additions = _best_addition(Probe(session, tokens, "val", judge, short), writers, readers, basis)
    examiner = examiner_of(session, evaluating, judge)
    original = as_loaded(session, evaluating)
    evaluation = evaluation_part(examine(examiner, exam, original, with_additions(session, additions)))

    def finish(folder: Path, tensors: tuple[str, ...]) -> rec.RepairPart:
        part = rec.RepairPart(
            folder=str(place.out),
            how="approximation",
            added=list(tensors),
            note="an approximation: nothing is known of what the writers used to put along the direction",
            size=size,
            evaluation=evaluation,
        )
        place.finish(subject, part, folder)
        return part

    return write_hooked(session, additions, place.out, place.overwrite, finish)


def _telling(session: Session, blocks: Sequence[int]) -> tuple[list[Writer], list[Tensor]]:
    """Writers whose maps tell harmful from harmless prompts apart, each with its reader: MLPs where those suffice."""
    writers = _chosen(session, blocks)
    mlps = [writer for writer in writers if writer.kind is Kind.MLP]
    readers, told = fit_readers(session, mlps or writers)
    if mlps and told < _TOLD:
        readers, told = fit_readers(session, writers)
    else:
        writers = mlps or writers
    session.monitor.note(
        f"{len(writers)} writers tell harmful from harmless prompts apart, the best with AUROC {told:.3f}"
    )
    return writers, readers


def _best_addition(
    probe: Probe, writers: Sequence[Writer], readers: Sequence[Tensor], basis: Float[Tensor, "k d"]
) -> tuple[float, list[Addition]]:
    """The size, with its sign, of the addition that makes the model refuse most for its price.

    Raises `GateNotMet` when none makes it refuse more.
    """
    session = probe.session
    length = stream_length(session)
    trials = [(sign * size, index) for size in _SIZES for sign in (1.0, -1.0) for index in range(len(basis))]
    best, chosen, value = None, 0.0, worth_of(probe.measure(None, Level.REPLIES))
    start = value
    with session.monitor.phase("try additions", len(trials)) as advance:
        for size, index in trials:
            additions = _additions(writers, readers, basis[index], size * length)
            worth = worth_of(probe.measure(with_additions(session, additions), Level.REPLIES))
            if worth > value:
                best, chosen, value = additions, size, worth
            advance(1)
    if best is None:
        name = session.loaded.files.name
        raise GateNotMet(
            f"{name}: no addition along the direction made it refuse more harmful prompts; nothing written"
        )
    session.monitor.note(
        f"size {chosen:+g} of the stream's length: refusals less their price {start:.2f} → {value:.2f}"
    )
    return chosen, best


def _direction(
    subject: InspectedModel, file: Path | None, monitor: Monitor
) -> tuple[Float[Tensor, "k d"], tuple[int, ...]]:
    """What was taken out, and of which blocks (empty: of all)."""
    if file is not None:
        return load_direction(file, subject.d_model).basis, ()
    with monitor.phase("look at what is not written", sum(place.info.nbytes for place in subject.places)) as advance:
        trace = single.inspect(subject, progress=advance)
    if not len(trace.directions):
        raise GateNotMet(
            f"{subject.name}: no direction was found that has been taken out; give the --base, the --adapter or a "
            "--direction"
        )
    if trace.per_layer:
        written = min(trace.edited or trace.written, key=lambda unit: unit.share)
        return trace.directions[written.direction : written.direction + 1], trace.layers
    return trace.directions, trace.layers


def _chosen(session: Session, blocks: Sequence[int]) -> list[Writer]:
    """Edited writers in the part of the depth where refusal is decided."""
    layers = session.anatomy.layers
    fitting = [
        writer
        for writer in session.anatomy.writers
        if can_add(writer)
        and writer.block is not None
        and _FROM <= writer.block / layers < _UNTIL
        and not writer.post_norms
    ]
    chosen = [writer for writer in fitting if not blocks or writer.block in blocks] or fitting
    if not chosen:
        raise UsageError("repair: expected writers that an addition can be put on, found none in this architecture")
    return chosen


def fit_readers(session: Session, writers: Sequence[Writer]) -> tuple[list[Float[Tensor, " n"]], float]:
    """For each writer a vector a [n] of what its map takes: aᵀx ≈ 1 on harmful prompts and 0 on harmless ones.

    Ridge regression through the origin on the session's positions of the training prompts, in its dual form. The model
    is run as it is: inside `session.ablated` the readers are those of the ablated model. The second value is the best
    AUROC of a reader on validation prompts; readers that are worse than that by more than 0.02 are zero.
    """
    train = _taken(session, writers, "train")
    readers = []
    for harmful, harmless in zip(train["harmful"], train["harmless"], strict=True):
        x = torch.cat([harmful.flatten(0, 1), harmless.flatten(0, 1)]).double()
        y = torch.zeros(len(x), dtype=x.dtype)
        y[: harmful.shape[0] * harmful.shape[1]] = 1.0
        kernel = x @ x.T
        kernel.diagonal().add_(_RIDGE * float(kernel.diagonal().mean()))
        readers.append((x.T @ torch.linalg.solve(kernel, y)).float())
    del train
    held = _taken(session, writers, "val")
    told = [
        float(auroc(harmful[:, 0] @ reader, harmless[:, 0] @ reader))
        for reader, harmful, harmless in zip(readers, held["harmful"], held["harmless"], strict=True)
    ]
    best = max(told)
    return [reader if found > best - 0.02 else 0 * reader for reader, found in zip(readers, told, strict=True)], best


def _taken(session: Session, writers: Sequence[Writer], split: str) -> dict[str, list[Float[Tensor, "prompts k n"]]]:
    """What the maps of writers take at the session's positions, by class."""
    modules = [session.model.get_submodule(writer.module) for writer in writers]
    found = {}
    total = sum(len(session.encoded[name, split]) for name in ("harmful", "harmless"))
    with session.monitor.phase(f"fit on {split} prompts", total) as advance:
        for name in ("harmful", "harmless"):
            kept: list[list[Tensor]] = [[] for _ in modules]

            def consume(layer: int, _: list[int], values: Tensor, kept: list[list[Tensor]] = kept) -> None:
                if layer < len(kept):  # the last one is an output
                    kept[layer].append(values)

            prompts = session.encoded[name, split]
            stream_sites(session.model, modules, prompts, session.positions, consume, session.size, progress=advance)
            found[name] = [torch.cat(parts) for parts in kept]
    return found


def stream_length(session: Session) -> float:
    """Mean length of the stream in the middle of the model, at the last token of harmless prompts."""
    prompts, middle = session.encoded["harmless", "val"], session.anatomy.layers // 2
    lengths: list[float] = []

    def consume(layer: int, _: list[int], values: Float[Tensor, "b k d"]) -> None:
        if layer == middle:
            lengths.extend(values[:, 0].norm(dim=1).tolist())

    session.stream(prompts, consume, lambda _: None)
    return sum(lengths) / len(lengths)


def _additions(
    writers: Sequence[Writer], readers: Sequence[Tensor], direction: Float[Tensor, " d"], size: float
) -> list[Addition]:
    used = [(writer, reader) for writer, reader in zip(writers, readers, strict=True) if bool(reader.any())]
    return [
        Addition(writer, (size / len(used) / (writer.multiplier or 1.0)) * direction[None], reader[None])
        for writer, reader in used
    ]


def with_additions(session: Session, additions: Sequence[Addition]) -> ModelState:
    """The session's model with additions as hooks."""
    return ModelState(session, functools.partial(adding, session.model, additions))


def worth_of(measured: Measured) -> float:
    """Share of harmful prompts refused, less what harmless ones pay."""
    price = sum(measure(measured) for measure in _PAID)
    return _GAINED(measured) - _PRICE * price


# --- writing ----------------------------------------------------------------------------------------------------------


_T = TypeVar("_T")


def write_hooked(
    session: Session,
    additions: Sequence[Addition],
    out: Path,
    overwrite: bool,
    finish: Callable[[Path, tuple[str, ...]], _T],
) -> _T:
    """A copy of the session's model on disk in OUT, with additions that were tried as hooks.

    `finish` gets the folder before it appears, and the names of the changed tensors.
    """
    source = session.loaded.files.checkpoint
    axes = {str(one.writer.weight): one.writer.axis for one in additions}
    names = names_on_disk(session.named_model, axes, source.tensors)
    changes, stored_axes = changes_of(additions, names)
    with _written(source, out, overwrite, _Changes(changes, stored_axes, {}), session.monitor) as folder:
        return finish(folder, tuple(changes))


@dataclass(frozen=True, slots=True)
class _Changes:
    """Tensors that become others, with the axis of the stream in each, and tensors taken whole from a checkpoint."""

    changed: Mapping[str, Callable[[Tensor], Tensor]]
    axes: Mapping[str, int]
    whole: Mapping[str, Checkpoint]


@contextlib.contextmanager
def _written(source: Checkpoint, out: Path, overwrite: bool, changes: _Changes, monitor: Monitor) -> Iterator[Path]:
    """A changed copy of `source` in a folder that becomes OUT, in one step, when the body is done."""
    with staged(out, overwrite=overwrite, source=source.folder) as folder:
        total = bytes_to_write(source)
        ensure_space(folder, total)
        with monitor.phase("write", total) as advance:
            files = write_additions(
                source, folder, changes.changed, changes.axes, whole=changes.whole, progress=advance
            )
        if files.links:
            monitor.warn(f"not followed, they are links out of the model's folder: {', '.join(files.links)}")
        yield folder


__all__ = [
    "fit_readers",
    "read_adapter",
    "repair",
    "stream_length",
    "with_additions",
    "worth_of",
    "write_hooked",
]
