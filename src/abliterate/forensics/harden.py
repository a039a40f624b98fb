"""Making refusal harder to take out, without training.

An ablation of one direction takes out what is *reported* along it; the model goes on telling harmful prompts from
harmless ones. So refusal is spread: writers at several depths each get a detector (a rank-one addition) that reads
harm from what its map takes while the model's own direction is ablated, and writes along a direction of its own,
orthogonal to that direction and to each other's. Each direction is the one along which a small step at that depth
raises the refusal score most, again while the model's own is ablated: one backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.algebra import orthonormal
from abliterate.config import HardenSettings, MeasureSettings
from abliterate.edit.additions import Addition, adding, can_add
from abliterate.edit.plan import Plan
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.examine import exam_of, examine, examiner_of, open_judged
from abliterate.evaluation.parts import evaluation_part
from abliterate.evaluation.probe import Level, Probe
from abliterate.evaluation.scores import refusal_score
from abliterate.files.checkpoint import check_output
from abliterate.files.local import reserved
from abliterate.finding.find import Findings, Found, choose, find
from abliterate.forensics.audit import audit_session
from abliterate.forensics.repair import fit_readers, stream_length, with_additions, worth_of, write_hooked
from abliterate.model.anatomy import Kind, Writer
from abliterate.model.batches import hooked, on_output
from abliterate.model.offloaded import recomputed
from abliterate.model.weights import numbers
from abliterate.monitor import Monitor
from abliterate.report.assemble import files_below, session_record, write_record_and_report
from abliterate.session import Session

#: What is tried: each detector's length at harmful prompts, in parts of the stream's mean length.
_SIZES = (0.1, 0.2, 0.4, 0.8)
#: Part of the depth over which detectors are spread.
_FROM, _UNTIL = 0.4, 0.95
#: Harmless prompts whose refusal score is differentiated.
_PROMPTS = 16


def harden(
    model: str,
    out: Path,
    settings: HardenSettings = HardenSettings(),
    measuring: MeasureSettings = MeasureSettings(),
    *,
    overwrite: bool = False,
    monitor: Monitor | None = None,
) -> rec.HardeningPart:
    """Write MODEL to `out` with its refusal spread over several directions (and strengthened, if asked for).

    Raises `GateNotMet` when the model hardly refuses, or no size of the additions keeps refusals under the ablation
    without refusing harmless prompts.
    """
    if not settings.detectors and not settings.strengthen:
        raise UsageError("harden: expected --detectors or --strengthen above 0, found neither")
    with reserved(out):
        check_output(out, overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
        return _hardened(model, _Place(out, overwrite, monitor or Monitor()), settings, measuring)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a hardened model goes."""

    out: Path
    overwrite: bool
    monitor: Monitor


def _hardened(model: str, place: _Place, settings: HardenSettings, measuring: MeasureSettings) -> rec.HardeningPart:
    out, overwrite, monitor = place.out, place.overwrite, place.monitor
    evaluating = measuring.evaluating
    exam = exam_of(evaluating, measuring.prompts.seed)
    session, judge = open_judged(model, measuring, monitor)
    findings, found = _found(session, measuring)
    before = audit_session(session, findings, found, measuring, judge)
    direction = found.basis[:1]
    fixed = _strengthened(session, direction[0], settings.strengthen) if settings.strengthen else []
    size, additions = 0.0, fixed
    if settings.detectors:
        probe = Probe(session, findings.ids, "val", judge, evaluating.model_copy(update={"max_new_tokens": 24}))
        size, additions = _detectors(probe, direction, settings.detectors, fixed)
    examiner = examiner_of(session, evaluating, judge)
    original, hardened = as_loaded(session, evaluating), with_additions(session, additions)
    evaluation = evaluation_part(examine(examiner, exam, original, hardened))
    with session.changed(adding(session.model, additions)):
        after = audit_session(session, *_found(session, measuring), measuring, judge)

    def finish(folder: Path, tensors: tuple[str, ...]) -> rec.HardeningPart:
        part = rec.HardeningPart(
            folder=str(out), tensors=list(tensors), size=size, before=before, after=after, evaluation=evaluation
        )
        said = {"hardening": settings.model_dump(mode="json"), **measuring.model_dump(mode="json")}
        record = session_record(session, said, hardening=part, evaluation=evaluation, audit=after, output=str(out))
        write_record_and_report(record, folder, monitor, *files_below(folder))
        return part

    return write_hooked(session, additions, out, overwrite, finish)


def _found(session: Session, measuring: MeasureSettings) -> tuple[Findings, Found]:
    findings = find(session, measuring.finding)
    return findings, choose(session, findings, measuring.finding, force=True)


def _strengthened(session: Session, direction: Float[Tensor, " d"], strength: float) -> list[Addition]:
    """W + s r̂ r̂ᵀ W of every writer that can be added to."""
    found = []
    for writer in session.anatomy.writers:
        if can_add(writer) and not writer.post_norms:
            weight = numbers(session.model.get_submodule(writer.module))
            found.append(Addition(writer, strength * direction[None].cpu(), (direction.cpu() @ weight.cpu())[None]))
    return found


def _detectors(
    probe: Probe, direction: Float[Tensor, "1 d"], count: int, fixed: Sequence[Addition]
) -> tuple[float, list[Addition]]:
    """The additions whose size keeps most refusals when the model's own direction is ablated."""
    session = probe.session
    writers, plan = _spread(session, count), session.plan(direction)
    with session.ablated(plan):
        readers, _ = fit_readers(session, writers)
    slopes = refusal_slopes(session, probe.tokens, plan, [int(writer.block or 0) for writer in writers])
    rows = orthonormal(torch.cat([direction.cpu(), slopes]))[1:]
    rows = rows * (rows * slopes).sum(1).sign()[:, None]
    length = stream_length(session)
    best, chosen, value = None, 0.0, worth_of(probe.measure(plan, Level.REPLIES))
    start = value
    with session.monitor.phase("try detectors", len(_SIZES)) as advance:
        for size in _SIZES:
            additions = [
                *fixed,
                *(
                    Addition(writer, (size * length / (writer.multiplier or 1.0)) * row[None], reader[None])
                    for writer, row, reader in zip(writers, rows, readers, strict=True)
                ),
            ]
            attacked = worth_of(probe.measure(_both(session, additions, plan), Level.REPLIES))
            plain = worth_of(probe.measure(with_additions(session, additions), Level.REPLIES))
            if min(attacked, plain) > value:
                best, chosen, value = additions, size, min(attacked, plain)
            advance(1)
    if best is None:
        raise GateNotMet(
            "harden: no size of the detectors kept refusals without refusing harmless prompts; nothing written"
        )
    session.monitor.note(
        f"detectors of size {chosen:g}: under ablation, refusals less their price {start:.2f} → {value:.2f}"
    )
    return chosen, best


def _both(session: Session, additions: Sequence[Addition], plan: Plan) -> ModelState:
    """The hardened model under the ablation of the original's direction."""
    return ModelState(session, functools.partial(_attacked, session, additions, plan))


@contextlib.contextmanager
def _attacked(session: Session, additions: Sequence[Addition], plan: Plan) -> Iterator[None]:
    with adding(session.model, additions), session.ablated(plan):
        yield


def _spread(session: Session, count: int) -> list[Writer]:
    """MLP outputs (else others) at even distances."""
    layers = session.anatomy.layers
    fitting = [
        writer
        for writer in session.anatomy.writers
        if can_add(writer)
        and writer.block is not None
        and not writer.post_norms
        and _FROM <= writer.block / layers < _UNTIL
    ]
    chosen = [writer for writer in fitting if writer.kind is Kind.MLP] or fitting
    if len(chosen) < count:
        raise UsageError(f"--detectors {count}: expected at most {len(chosen)}, the writers that can hold one")
    step = (len(chosen) - 1) / max(1, count - 1)
    return [chosen[round(index * step)] for index in range(count)]


def refusal_slopes(session: Session, tokens: Sequence[int], plan: Plan, blocks: Sequence[int]) -> Float[Tensor, "n d"]:
    """For each block the unit direction along which a step behind it raises the refusal score most.

    The mean gradient over harmless validation prompts, all positions moved alike, under `plan`.
    """
    prompts = session.encoded["harmless", "val"]
    steps = [torch.zeros(session.anatomy.d_model, device=session.loaded.device, requires_grad=True) for _ in blocks]

    def mover(step: Tensor) -> Callable[..., Any]:
        return on_output(lambda hidden: (hidden.float() + step).to(hidden.dtype))

    handles: list[Any] = []
    total = [torch.zeros(session.anatomy.d_model) for _ in blocks]
    away = recomputed(session.model, session.blocks)
    with hooked(handles), session.ablated(plan), torch.enable_grad(), away:
        for block, step in zip(blocks, steps, strict=True):
            handles.append(session.blocks[block].register_forward_hook(mover(step)))
        for suffix in prompts.suffixes[:_PROMPTS]:
            ids = torch.tensor([[*prompts.prefix, *suffix]], device=session.loaded.device)
            logits = session.model(input_ids=ids, use_cache=False).logits[:, -1].float()
            gradients = torch.autograd.grad(refusal_score(logits, list(tokens)).sum(), steps)
            for mean, gradient in zip(total, gradients, strict=True):
                mean += gradient.float().cpu() / min(_PROMPTS, len(prompts))
    return torch.nn.functional.normalize(torch.stack(total), dim=1)


__all__ = ["harden", "refusal_slopes"]
