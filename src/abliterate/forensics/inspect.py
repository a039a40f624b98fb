"""An inspection from end to end: tensors, then activations and behaviour where they are asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.config import InspectSettings, MeasureSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Direction, Recipe, save_direction
from abliterate.errors import UsageError
from abliterate.files.atomic import refuse_other_kinds
from abliterate.files.local import reserved
from abliterate.finding.estimate import auroc, difference_of_means
from abliterate.forensics import difference, single
from abliterate.forensics.notches import Notches, notches
from abliterate.forensics.power import Power
from abliterate.forensics.reading import InspectedModel, inspected_record, open_inspected, warn_of_inspected
from abliterate.forensics.verdict import NOTCHED, calibration, judge_difference, judge_notches
from abliterate.model.activations import MomentsFitter, ProjectionFitter
from abliterate.monitor import Monitor
from abliterate.pipeline import evaluate
from abliterate.prompts.behaviour import REFUSAL
from abliterate.report.assemble import check_beside, write_beside
from abliterate.session import Session, open_session

_PLAIN = InspectSettings()


def inspect(
    model: str,
    settings: InspectSettings = _PLAIN,
    measuring: MeasureSettings = MeasureSettings(),
    monitor: Monitor | None = None,
) -> rec.InspectionPart:
    """Whether directions were taken out of MODEL, which, where, and how strongly (see `recover`)."""
    return recover(model, settings, measuring, monitor)[0]


def recover(
    model: str,
    settings: InspectSettings = _PLAIN,
    measuring: MeasureSettings = MeasureSettings(),
    monitor: Monitor | None = None,
) -> tuple[rec.InspectionPart, Direction | None]:
    """Whether directions were taken out of MODEL, and the recovered ones ([k, d], with strengths by tensor).

    Without `settings.base` only the model's own tensors are read, twice at most, and nothing is run. The direction
    file is written where `settings.save` says, record and report where `settings.out` does.

    Raises `UsageError` for settings that do not go together, and the errors of `open_inspected`.
    """
    _check(model, settings)
    with contextlib.nullcontext() if settings.out is None else reserved(settings.out):
        return _inspected(model, settings, measuring, monitor or Monitor())


def _inspected(
    model: str, settings: InspectSettings, measuring: MeasureSettings, monitor: Monitor
) -> tuple[rec.InspectionPart, Direction | None]:
    started = time.perf_counter()
    subject, part, recovered = _look(model, settings, measuring.loading, monitor)
    update: dict[str, object] = {}
    if recovered is not None and settings.save is not None:
        save_direction(settings.save, recovered)
        update["directions"] = str(settings.save)
    if settings.activations or settings.behavioural:
        if measuring.prompts.behaviour != REFUSAL:
            raise UsageError(f"--behaviour {measuring.prompts.behaviour}: an inspection is about refusal; leave it out")
        spec = subject.files or model
        session = open_session(
            spec,
            loading=measuring.loading,
            prompts=measuring.prompts,
            reply_tokens=measuring.evaluating.longest_reply,
            monitor=monitor,
        )
        if settings.activations:
            update |= _activations(session, settings, recovered, measuring.prompts)
            if settings.base is None:
                update |= _notched(part, notches(session, subject))
        if settings.behavioural:
            update["behaviour"] = evaluate(session, measuring.evaluating).before
    update["seconds"] = round(time.perf_counter() - started, 2)
    part = part.model_copy(update=update)
    if settings.out is not None:
        write_beside(
            settings.out, {"inspection": part}, lambda: inspected_record(subject, monitor, {}, inspection=part), monitor
        )
    return part, recovered


def _look(
    model: str, settings: InspectSettings, loading: ModelSettings, monitor: Monitor
) -> tuple[InspectedModel, rec.InspectionPart, Direction | None]:
    """What the tensors say, by themselves or beside a base."""
    trust = loading.trust_remote_code
    with monitor.phase("find the writers"):
        subject = open_inspected(model, trust_remote_code=trust)
        base = None if settings.base is None else open_inspected(settings.base, trust_remote_code=trust)
    for opened in (subject, base):
        if opened is not None:
            warn_of_inspected(opened, monitor)
    total = sum(place.info.nbytes for place in subject.places)
    if base is None:
        with monitor.phase("look at what is not written", total) as advance:
            trace = single.inspect(subject, device=_device(loading), progress=advance, with_power=True)
            return subject, *_alone(subject, trace, settings.rule_out)
    with monitor.phase("compare with the base", total) as advance:
        return subject, *_beside(subject, base, difference.compare(subject, base, progress=advance))


def _check(model: str, settings: InspectSettings) -> None:
    if settings.rule_out is not None and settings.base is not None:
        raise UsageError("--rule-out: does nothing beside a --base, which rules out all strengths")
    if settings.reference is not None and not settings.activations:
        raise UsageError("--reference: does nothing without --activations; add it or leave the reference out")
    if settings.save is not None and settings.save.suffix != ".safetensors":
        raise UsageError(f"--save {settings.save}: expected a name that ends in .safetensors")
    if settings.save is not None:
        refuse_other_kinds(settings.save)
    check_beside(settings.out)
    runs = settings.activations or settings.behavioural
    if runs and Path(model).suffix == ".safetensors":
        raise UsageError(f"{model}: expected a whole model to run, found a single file; give the folder")


def _device(loading: ModelSettings) -> str:
    """Where d × d matrices are made and factored: an accelerator makes large models a matter of reading."""
    if loading.device not in ("auto", "balanced"):
        return loading.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _alone(
    subject: InspectedModel, trace: single.Trace, rule_out: float | None
) -> tuple[rec.InspectionPart, Direction | None]:
    window = trace.window
    where = None
    if window is not None:
        where = f"{window.components} writers of blocks {window.first} to {window.last}"
        where += ", rows levelled" if window.levelled else ""
    edited = set(trace.edited)
    units = [
        rec.WriterTracePart(
            block=unit.block, kind=unit.kind.value, strength=unit.strength, edited=unit in edited, share=unit.share
        )
        for unit in trace.written
    ]
    part = rec.InspectionPart(
        model=subject.name,
        verdict=trace.verdict.word,
        decided=_decided(trace, rule_out),
        probability=trace.verdict.probability,
        calibrated_on=calibration().lone,
        power=None if trace.power is None else _power(trace.power),
        variant=trace.variant,
        evidence={"pooled": trace.evidence.pooled, "layers": trace.evidence.layers},
        where=where,
        proved=subject.proved,
        writers=len(subject.places),
        layers=list(trace.layers) if trace.verdict.word == "altered" else [],
        rank=0 if trace.per_layer else len(trace.directions),
        per_layer=trace.per_layer,
        units=units,
    )
    if not len(trace.directions):
        return part, None
    strongest = min(trace.written, key=lambda unit: unit.share).direction
    basis = trace.directions[strongest : strongest + 1] if trace.per_layer else trace.directions
    strengths = {
        place.info.name: unit.strength
        for unit in trace.edited
        for place in subject.units.get((unit.block, unit.kind), ())
    }
    return part, _direction(subject, basis, strengths, "a lone checkpoint")


def _decided(trace: single.Trace, rule_out: float | None) -> bool:
    """Whether the verdict on a lone checkpoint may be relied on, when edits from a strength on are to be ruled out."""
    if trace.verdict.word != "no trace":
        return trace.verdict.word == "altered"
    least = None if trace.power is None else trace.power.strength
    return rule_out is not None and least is not None and least <= rule_out


def _power(found: Power) -> rec.PowerPart:
    seen = {f"{strength:g}": count for strength, count in found.seen.items()}
    return rec.PowerPart(strength=found.strength, planted=found.planted, seen=seen)


def _word(found: difference.Difference) -> tuple[Literal["altered", "identical", "no ablation", "inconclusive"], float]:
    """The verdict on a difference, and the probability that directions were taken out."""
    if found.verdict == "ablation":
        return "altered", judge_difference(True)
    of_writers_alone = found.verdict == "low-rank update" and not found.others  # as oblique edits are
    if found.verdict == "another model" or of_writers_alone:
        return "inconclusive", 0.5
    if found.verdict == "identical" and not (found.missing or found.added):
        return "identical", 0.0
    return "no ablation", judge_difference(False)


def _beside(
    subject: InspectedModel, base: InspectedModel, found: difference.Difference
) -> tuple[rec.InspectionPart, Direction | None]:
    verdict, probability = _word(found)
    altered = verdict == "altered"
    units = [
        rec.WriterTracePart(
            block=writer.block,
            kind=writer.kind.value,
            strength=writer.strength,
            edited=altered and writer.ablated,
            tensor=writer.tensor,
            size=writer.size,
            read=writer.read,
        )
        for writer in found.writers
    ]
    part = rec.InspectionPart(
        model=subject.name,
        base=base.name,
        verdict=verdict,
        decided=verdict != "inconclusive",
        probability=probability,
        calibrated_on=calibration().beside,
        kind=found.verdict,
        variant=found.variant,
        also=[*found.also, *_names(found.missing, "are missing"), *_names(found.added, "are new")],
        proved=subject.proved,
        writers=len(subject.places),
        layers=sorted({unit.block for unit in units if unit.edited and unit.block is not None}),
        rank=0 if found.per_layer else len(found.directions),
        per_layer=found.per_layer,
        units=units,
        unchanged=found.unchanged,
        others=len(found.others),
    )
    if not len(found.directions):
        return part, None
    ablated = [writer for writer in found.writers if writer.ablated]
    basis = found.directions
    if found.per_layer:
        loudest = max(range(len(found.writers)), key=lambda index: found.writers[index].size)
        basis = basis[loudest : loudest + 1]
    return part, _direction(subject, basis, {writer.tensor: writer.strength for writer in ablated}, base.name)


def _names(tensors: Sequence[str], what: str) -> list[str]:
    """'2 tensors are new (a, b)'; nothing for none."""
    shown = ", ".join(tensors[:3]) + (", …" if len(tensors) > 3 else "")
    return [f"{len(tensors)} tensors {what} ({shown})"] if tensors else []


def _direction(
    subject: InspectedModel, basis: Float[Tensor, "k d"], strengths: dict[str, float], source: str
) -> Direction:
    rows = torch.linalg.qr(basis.float().T).Q.T.contiguous()
    return Direction(rows, recipe=Recipe(strengths), facts={"recovered_from": subject.name, "with": source})


def _activations(
    mine: Session, settings: InspectSettings, found: Direction | None, prompts: PromptSettings
) -> dict[str, object]:
    """Where the recovered direction separates, and whether the inspected model still tells harm from harmlessness."""
    other = settings.reference or settings.base
    basis = None if found is None else found.basis
    own = separations(mine, basis)
    known = max(layer.own for layer in own)
    if other is None:
        return {"separation_in": mine.loaded.files.name, "separation": own, "harm_known": known}
    reference = open_session(other, loading=mine.loading, prompts=prompts, monitor=mine.monitor)
    if reference.anatomy.d_model != mine.anatomy.d_model:
        raise UsageError(
            f"{other}: expected a stream of width {mine.anatomy.d_model}, found {reference.anatomy.d_model}"
        )
    return {"separation_in": other, "separation": separations(reference, basis), "harm_known": known}


def _notched(part: rec.InspectionPart, found: Notches | None) -> dict[str, object]:
    """What writers show along the model's own direction, and the verdict where they decide it."""
    if found is None:
        return {}
    evidence = {**part.evidence, "notches": found.depth, "notches_elsewhere": max(found.others)}
    if part.verdict == "altered" or found.depth < NOTCHED:
        return {"evidence": evidence}
    units = [
        rec.WriterTracePart(
            block=notch.place.block,
            kind=notch.place.kind.value,
            strength=max(0.0, 1 - notch.share**0.5) if notch.edited else 0.0,
            edited=notch.edited,
            tensor=notch.place.info.name,
            share=notch.share,
        )
        for notch in found.writers
    ]
    layers = sorted({unit.block for unit in units if unit.edited and unit.block is not None})
    variant = "too little is written along the model's own direction of refusal"
    told = {"verdict": "altered", "decided": True, "variant": variant, "evidence": evidence, "units": units}
    how_sure = {"probability": judge_notches(), "calibrated_on": calibration().notches}
    return {**told, **how_sure, "layers": layers, "per_layer": True}


def separations(session: Session, basis: Float[Tensor, "k d"] | None) -> list[rec.LayerSeparationPart]:
    """AUROC of harmful against harmless validation prompts at the last token of every layer.

    Along the recovered direction (of a subspace: the best of its rows, either sign), and along each layer's own
    difference of means on training prompts.
    """
    sites, width = session.anatomy.layers + 1, session.anatomy.d_model
    moments = {}
    total = sum(len(session.encoded[name, split]) for name in ("harmful", "harmless") for split in ("train", "val"))
    with session.monitor.phase("activations", total) as advance:
        for name in ("harmful", "harmless"):
            fitter = MomentsFitter(session.positions, sites, width)
            session.stream(session.encoded[name, "train"], fitter.update, advance)
            moments[name] = fitter.result()
        units = difference_of_means(moments["harmful"], moments["harmless"]).units[:1]
        rows = units if basis is None else torch.cat([units, basis[:, None, :].expand(-1, sites, -1)])
        values = []
        for name in ("harmful", "harmless"):
            encoded = session.encoded[name, "val"]
            projection = _LastToken(ProjectionFitter(rows, len(encoded)))
            session.stream(encoded, projection.update, advance)
            values.append(projection.fitter.values)
    found = auroc(*values)
    return [
        rec.LayerSeparationPart(
            layer=layer,
            own=float(found[0, layer]),
            recovered=None if basis is None else float(torch.maximum(found[1:, layer], 1 - found[1:, layer]).max()),
        )
        for layer in range(sites)
    ]


class _LastToken:
    """Gives a fitter of several directions the last token only, once for each of them."""

    def __init__(self, fitter: ProjectionFitter) -> None:
        self.fitter = fitter

    def update(self, layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        """Take in one batch of one layer."""
        last = values[:, :1].expand(-1, len(self.fitter.units), -1)
        self.fitter.update(layer, rows, last)
