"""Record → page: the story in the order of the phases."""

from __future__ import annotations

from collections.abc import Iterator

from abliterate.record import BehaviourPart, EvaluationPart, Record
from abliterate.report.html.cost import cost, replies
from abliterate.report.html.finding import direction_found, separated
from abliterate.report.html.inspected import brittleness, changed_back, inspected, spread
from abliterate.report.html.parts import Page, Tile, between, number, percent, short
from abliterate.report.html.proving import edited_weights, front, proved
from abliterate.report.html.reproducing import glossary, question, reproduce
from abliterate.report.html.steered import dose_response
from abliterate.report.wording import SETS, audited, headline, repaired, responded, words_of_record

_SECTIONS = (
    question,
    separated,
    direction_found,
    proved,
    edited_weights,
    cost,
    replies,
    front,
    dose_response,
    inspected,
    changed_back,
    spread,
    brittleness,
    reproduce,
    glossary,
)


def page_of(record: Record) -> Page:
    """Every section that the record has something for."""
    sections = [section for build in _SECTIONS if (section := build(record)) is not None]
    model = record.model
    return Page(
        title=short(model.name.rstrip("/").rsplit("/", 1)[-1] or model.name, 120),
        subtitle=f"{_kind(record)} · {model.architecture}, {model.layers} layers of width {model.d_model} · "
        + record.created.replace("T", " ").replace("+00:00", " UTC"),
        answer=" ".join(answer(record)),
        tiles=list(_tiles(record)),
        sections=sections,
        warnings=record.warnings,
        made=f"Made by abliterate {record.versions.get('abliterate', '')} from the record beside this page.",
    )


def _kind(record: Record) -> str:
    if record.plan is None:
        kinds = {
            "Search of edits": record.search,
            "Hardened model": record.hardening,
            "Repaired model": record.repair,
            "Inspection": record.inspection,
            "Audit": record.audit,
            "Steering": record.steering,
        }
        return next((name for name, part in kinds.items() if part is not None), "Measurement")
    return {
        "weights": "Edited weights",
        "gguf": "Edited weights, as GGUF",
        "lora": "LoRA adapter",
        "gguf-lora": "GGUF adapter",
        "control-vector": "Control vector",
    }[record.plan.realisation]


def _measured(record: Record, evaluation: EvaluationPart, edited: BehaviourPart) -> Iterator[str]:
    """What the edit did to replies."""
    words = words_of_record(record)
    before, after = evaluation.before.harmful, edited.harmful
    random = ""
    if evaluation.control is not None:
        control = evaluation.control.behaviour.harmful
        random = f"; with a random direction in its place {control.refusals} of {control.n}"
    counted = (
        f"Of {after.n} harmful prompts the model refused {before.refusals} before the edit and {after.refusals}"
        if evaluation.behaviour is None
        else f"Of {after.n} replies to {words('harmful')} prompts {before.refusals} {words.shown} before the edit "
        f"and {after.refusals}"
    )
    yield (f"{counted} after it ({number(percent(after.rate), '.0f')} % {between(after.ci95, 100, '.0f')}{random}).")
    if evaluation.shift is not None and evaluation.shift.kl_first_token is not None:
        shift = evaluation.shift
        yield (
            f"Its answers to {words('harmless')} prompts moved by {shift.kl_first_token:.3f} "
            f"{between(shift.kl_first_token_ci95)} nats at the first token (KL)."
        )
    if record.plan is not None and record.plan.realisation == "gguf":
        yield "That was measured before the numbers were stored as they are in the file."


def answer(record: Record) -> Iterator[str]:
    """What came out, in a sentence or two."""
    evaluation, search = record.evaluation, record.search
    if evaluation is not None and evaluation.after is not None:
        yield from _measured(record, evaluation, evaluation.after)
    elif search is not None and (point := search.point) is not None:
        held, base = point.held_out or point.scores, search.base_held_out or search.base
        where = "held-out" if point.held_out else "validation"
        said = ", ".join(
            f"{name} {number(held.get(name))} {between(point.intervals.get(name))} (unedited {number(base.get(name))})"
            for name in search.objectives
        )
        yield f"Of {len(search.points)} edits number {point.number} was chosen. On {where} prompts: {said}."
    elif record.repair is not None:
        yield from list(repaired(record.repair))[:2]
    elif record.plan is None and record.inspection is not None:
        yield headline(record.inspection)
    elif record.plan is None and record.audit is not None:
        yield from list(audited(record.audit))[:2]
    elif record.plan is None and record.steering is not None:
        yield responded(record.steering)
    elif record.plan is not None:
        yield (
            f"{len(record.plan.edits) or len(record.plan.strengths)} tensors were edited with a direction that was "
            "found before. What that did to the model's behaviour was not measured here."
        )


def _tiles(record: Record) -> Iterator[Tile]:
    evaluation = record.evaluation
    if evaluation is None:
        return
    words = words_of_record(record)
    for name in SETS:
        before = getattr(evaluation.before, name)
        after = None if evaluation.after is None else getattr(evaluation.after, name)
        shown = before if after is None else after
        if not shown.n:
            continue
        value = f"{number(percent(shown.rate), '.0f')} %"
        if after is not None:
            value = f"{number(percent(before.rate), '.0f')} → {value}"
        yield Tile(
            f"{words(name)}: {words.shown}" if words.sets else f"{name} refused",
            value,
            f"95 % {between(shown.ci95, 100, '.0f')} of {shown.n}",
        )
    shift = evaluation.shift
    if shift is not None and shift.kl_first_token is not None:
        yield Tile("KL, first token", f"{shift.kl_first_token:.3f}", f"95 % {between(shift.kl_first_token_ci95)} nats")
    if shift is not None and shift.kl_reply is not None:
        yield Tile("KL, whole reply", f"{shift.kl_reply:.3f}", f"95 % {between(shift.kl_reply_ci95)} nats per token")
