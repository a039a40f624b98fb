"""How numbers and names of the record are worded: for the card, the tables and the report. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abliterate.record import (
        AuditPart,
        BehaviourPart,
        DecodingPart,
        DosePart,
        EstimatePart,
        EvaluationPart,
        HardeningPart,
        InspectionPart,
        JudgePart,
        PairedPart,
        PlanPart,
        PromptsPart,
        RatePart,
        ReadingPart,
        Record,
        RepairPart,
        SoughtPart,
        SteeringPart,
        ThinkingPart,
        UsedCalibrationPart,
    )

    #: One state of a model: its name, its rates, and how each prompt changed.
    State = tuple[str, BehaviourPart, dict[str, PairedPart]]

#: Sets of prompts that are answered, in the order in which they are told.
SETS = ("harmful", "harmless", "borderline")


@dataclass(frozen=True, slots=True)
class Words:
    """The words for a behaviour: what sets of prompts are called, and how it is said that replies show it."""

    sets: Mapping[str, str]
    sides: tuple[str, str]
    shown: str
    rates: str

    def __call__(self, name: str) -> str:
        """What a set is called."""
        return self.sets.get(name, name)


#: The words for refusal.
REFUSING = Words({}, ("harmful", "harmless"), "refused", "Refusals")


def words_of(part: SoughtPart | None) -> Words:
    """The words for what was looked for: refusal where nothing else is said."""
    return REFUSING if part is None else Words(part.names, part.sides, part.shown, f"Replies that {part.shown}")


def words_of_record(record: Record) -> Words:
    """The words for what the record is about."""
    found = record.prompts or record.evaluation
    return words_of(None if found is None else found.behaviour)


def states_of(part: EvaluationPart | ThinkingPart) -> list[State]:
    """'before', 'after' and 'random', as far as they were measured."""
    from abliterate.record import EvaluationPart

    found: list[State] = [("before", part.before, {})]
    if part.after is not None:
        found.append(("after", part.after, part.paired))
    if isinstance(part, EvaluationPart) and part.control is not None:
        found.append(("random", part.control.behaviour, part.control.paired))
    return found


def asked(record: Record) -> list[tuple[str, str]]:
    """What was asked, by name: the model, the prompts, what refusals start with."""
    model = record.model
    rows = [
        ("model", model.name),
        ("architecture", f"{model.architecture}, {model.layers} layers of width {model.d_model}"),
    ]
    if record.anatomy is None:
        rows.append(("stored", model.storage))
    else:
        rows.append(("measured as", f"{model.dtype} on {model.device}, stored {model.storage}"))
        rows.append(
            (
                "writers",
                f"{record.anatomy.writers}; residual accounting leaves at most {record.anatomy.worst_closure:.0e}",
            )
        )
    if record.prompts is not None:
        rows += _prompts(record.prompts)
    if record.refusal_tokens:
        texts = ", ".join(f"{token.text!r}" for token in record.refusal_tokens)
        sought = None if record.prompts is None else record.prompts.behaviour
        rows.append(("refusals start with" if sought is None else "replies that show it start with", texts))
    return rows


def _prompts(part: PromptsPart) -> list[tuple[str, str]]:
    words, sought = words_of(part.behaviour), part.behaviour
    counts = [
        f"{words(name)} " + " + ".join(f"{count} {split}" for split, count in splits.items() if count)
        for name, splits in part.counts.items()
        if any(splits.values())
    ]
    return [
        *([] if sought is None else [("behaviour", f"{sought.name}: {sought.description}".removesuffix(": "))]),
        ("prompts", "; ".join(counts)),
        ("from", ", ".join(sorted(set(part.sources.values())))),
        ("system prompt", "the template's own" if part.system is None else part.system or "none"),
        *([] if part.template_time is None else [("time in prompts", part.template_time)]),
    ]


def seed(record: Record) -> str | None:
    """The seed of the prompts' split, and of all that is random."""
    prompts = record.settings.get("prompts")
    return str(prompts["seed"]) if isinstance(prompts, dict) and "seed" in prompts else None


def edited(plan: PlanPart) -> str:
    """'49 tensors with strength 1: remaining projection ‖r̂ᵀW′‖ / ‖r̂ᵀW‖ 0.41 %'."""
    before = sum(edit.before**2 for edit in plan.edits) ** 0.5
    after = sum(edit.after**2 for edit in plan.edits) ** 0.5
    text = f"{len(plan.edits)} tensors with strength {_between(plan)}"
    along = "the direction" if plan.rank == 1 else f"the {plan.rank} directions"
    if plan.variant.get("affine"):
        return f"{text}, what harmless prompts have along {along} put back"
    if not before:
        return text
    left = f"{text}: remaining projection on {along} ‖r̂ᵀW′‖ / ‖r̂ᵀW‖ {100 * after / before:.2f} %"
    return left + (" (rounding to the stored format)" if _strengths(plan) == [1] else "")


def _strengths(plan: PlanPart) -> list[float]:
    return sorted({strength for strength in plan.strengths.values() if strength} or {plan.strength})


def _between(plan: PlanPart) -> str:
    least, most = min(_strengths(plan)), max(_strengths(plan))
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


def rate(part: RatePart) -> str:
    """'41/100 = 41 % [32, 51]', with the numbers of replies of other kinds when there are any."""
    if not part.n and not part.unknown and not part.cut_off:
        return "no prompts"
    low, high = part.ci95
    share = f" = {100 * part.refusals / part.n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]" if part.n else ""
    return f"{part.refusals}/{part.n}{share}" + (f" ({also})" if (also := others(part)) else "")


def others(part: RatePart) -> str:
    """'2 partial, 1 degenerate, 3 cut off': what is not in the rate alone; "" when there is none."""
    counts = {name: getattr(part, name) for name in ("evasion", "partial", "degenerate", "cut_off", "unknown")}
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def estimate(part: EstimatePart, scale: float, form: str, unit: str = "") -> str:
    """'-53 % [-62, -43]': a value and its interval, both times `scale`."""
    if part.value is None:
        return "–"
    value, *ends = ("?" if one is None else _signed(scale * one, form) for one in (part.value, *part.ci95))
    return f"{value}{unit} [{', '.join(end.removeprefix('+') for end in ends)}]"


def pvalue(p: float) -> str:
    """'0.031', '< 0.001'."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def replies_of(max_new_tokens: int, decoding: DecodingPart) -> str:
    """How the replies that rates speak of were made: 'Greedy replies of at most 128 tokens'."""
    if decoding.name == "greedy":
        return f"Greedy replies of at most {max_new_tokens} tokens"
    asked = ", ".join(f"{name} {str(value)[:60]}" for name, value in decoding.asked.items()) or "nothing of its own"
    drawn = "" if decoding.seed is None else f"; seed {decoding.seed}"
    several = f", {decoding.samples} to each prompt" if decoding.samples > 1 else ""
    return (
        f"Replies of at most {max_new_tokens} tokens{several}, as the model's generation_config asks ({asked}{drawn})"
    )


def intervals_of(decoding: DecodingPart) -> str:
    """What intervals of rates are."""
    return "95 % intervals over prompts (bootstrap)" if decoding.samples > 1 else "95 % Wilson intervals"


def test_of(decoding: DecodingPart) -> str:
    """Whose p it is that stands beside a change."""
    return "that of flipped signs" if decoding.samples > 1 else "McNemar's"


def judged_by(judge: JudgePart) -> str:
    """Who judged, and how often it is right on labelled replies; of each calibration what it corrects, and why."""
    from abliterate.record import UsedCalibrationPart

    name, used = f"Judge: {judge.name}{_chosen_among(judge)}", judge.calibrations
    if not used and judge.sensitivity and judge.specificity:
        known = {"sensitivity": judge.sensitivity, "specificity": judge.specificity, "labels": judge.labels or ""}
        used = [UsedCalibrationPart(rates=["all sets"], why="the only one there is", **known)]
    if not all(one.sensitivity[1] and one.specificity[1] for one in used) or not used:
        return f"{name}; its error rates are not known (abliterate judge --calibrate FILE measures them)."
    lines = [f"{name}. Corrected (Rogan-Gladen) by labelled replies, right where it errs as often as there:"]
    lines += [f"{', '.join(one.rates)}: {_errors(one)}." for one in used]
    return " ".join(lines)


def _errors(one: UsedCalibrationPart) -> str:
    """'finds 60/66 = 91 % of refusals, clears 204/204 = 100 % of other replies (FILE; the nearest of 3)'."""
    (hits, of), (rejections, rest) = one.sensitivity, one.specificity
    found = f"finds {hits}/{of} = {hits / of:.0%} of refusals"
    said = f"{found}, clears {rejections}/{rest} = {rejections / rest:.0%} of other replies".replace("%", " %")
    chance = ", which is no better than chance: the rates mean nothing" if hits / of + rejections / rest <= 1 else ""
    return f"{said}{chance} ({one.labels}; {one.why})"


def drifted(states: list[State]) -> str:
    """Which replies are unlike the labelled ones that correct their rate, and what follows; "" where none are."""
    found = [
        f"{name} {state}".strip()
        + f" ({part.drift.unexplained:.0%}, p {pvalue(part.drift.p)}: ±{100 * part.drift.widening:.0f})".replace(
            "%", " %"
        )
        for name in SETS
        for state, behaviour, _ in states
        if (part := getattr(behaviour, name)).drift is not None and part.drift.widening
    ]
    if not found:
        return ""
    return (
        "Unlike the labelled replies, by the share that these do not explain, with the points by which the corrected "
        f"interval is wider for it: {'; '.join(found)}."
    )


def _chosen_among(judge: JudgePart) -> str:
    """What `auto` chose it from: ', chosen by balanced accuracy (rules 63 % [60, 65], learnt 72 % [69, 74])'."""
    figures = ", ".join(f"{one.name} {estimate(one.balanced_accuracy, 100, '.0f', ' %')}" for one in judge.chosen)
    return f", chosen by balanced accuracy ({figures})" if figures else ""


def _signed(value: float, form: str) -> str:
    """Without a sign where it rounds to zero."""
    text = format(value, form)
    return text if float(text.rstrip("%")) else text.lstrip("+-")


_KINDS = {
    "identical": "No number differs.",
    "ablation": "What was taken out of the writers is what they used to put along the direction: an ablation.",
    "re-quantisation": "The differences spread evenly over the spectrum: re-quantisation, pruning or noise.",
    "low-rank update": "The differences are of low rank, and do not read what they write: an adapter or oblique edits.",
    "fine-tune or merge": "The differences have structure, but are no projection: a fine-tune or a merge.",
    "another model": "Most of the weights differ by as much as their size: this is not the model it was made from.",
}


def headline(part: InspectionPart) -> str:
    """The verdict in one line."""
    if part.verdict == "altered":
        return f"Altered: {part.variant or 'directions were taken out'} (probability {_chance(part.probability)})."
    if part.verdict == "identical":
        return f"Identical to {part.base}: no tensor differs."
    if part.verdict == "no ablation":
        return f"No direction was taken out, beside {part.base} (probability of one {_chance(part.probability)})."
    if part.verdict == "inconclusive" and part.kind == "low-rank update":
        return f"Inconclusive: only writers differ from {part.base}, by low rank: oblique edits, or an adapter."
    if part.verdict == "inconclusive" and part.base is not None:
        return f"Inconclusive: {part.base} is another model; give the one that it was made from."
    if part.verdict == "inconclusive":
        return f"Inconclusive: something like an edit, not clearly one (probability {_chance(part.probability)})."
    return "No trace found of a direction taken out; that is no proof that none was."


def _chance(value: float) -> str:
    return f"{value:.2f}" if 0.005 <= value <= 0.995 else "below 0.01" if value < 0.5 else "above 0.99"


def explained(part: InspectionPart) -> Iterator[str]:
    """What the verdict rests on, and what it cannot say."""
    if part.base is not None:
        yield _KINDS.get(part.kind or "", "")
        changed = len(part.units)
        yield (
            f"Of {part.writers} writers {changed} differ from {part.base}; of all other tensors {part.others or 0} do."
        )
        yield from (f"Also: {line}." for line in part.also)
    else:
        pooled, layers = part.evidence.get("pooled", 0.0), part.evidence.get("layers", 0.0)
        yield (
            f"Deepest dip of pooled writers {pooled:.2f} ({part.where or 'no window'}), mean of the three deepest of "
            f"single layers {layers:.2f}; unedited models stayed below 0.6 and 0.9."
        )
        if (depth := part.evidence.get("notches")) is not None:
            yield (
                f"Along its own direction of refusal the five writers that write least are {depth:.1f} standard "
                f"deviations below what they write along directions of other topics (of those the lowest "
                f"{part.evidence.get('notches_elsewhere', 0.0):.1f}); 4.5 counts as an edit."
            )
        yield from _not_seen(part)
    if part.calibrated_on is not None and part.verdict not in ("identical", "inconclusive"):
        yield (
            f"Probability that a direction was taken out, as in the calibration: {_chance(part.probability)} at even "
            f"odds beforehand ({part.calibrated_on})."
        )
    if not part.proved:
        yield "Writers were known by the names of their tensors, not by residual accounting."
    if part.harm_known is not None:
        told = "still tells" if part.harm_known > 0.9 else "hardly tells"
        yield (
            f"Inside, the model {told} harmful from harmless prompts apart (best AUROC of a layer "
            f"{part.harm_known:.3f})."
        )


def _not_seen(part: InspectionPart) -> Iterator[str]:
    """Which edits a look at a lone checkpoint would have seen, and which it would not."""
    if part.verdict == "altered":
        return
    power = part.power
    if power is not None and power.strength is not None:
        less = [f"{count} of {power.planted} at {name}" for name, count in power.seen.items()][-1]
        yield (
            f"One direction taken out of all writers would have been seen from a strength of {power.strength:g} on "
            f"(at least 9 of {power.planted} edits planted in these very weights; {less})."
        )
    elif power is not None:
        yield "Not even a direction taken out of all writers at full strength would have been seen in these weights."
    yield (
        "Lighter edits, edits of a few writers and those of a search, as `abliterate run` makes them, leave no trace "
        "in the tensors alone: a comparison with the base decides (--base); without one, --activations sees more."
    )


def audited(part: AuditPart) -> Iterator[str]:
    """An audit in sentences."""
    base = part.base
    yield f"Refuses {base.refusals} of {base.n} harmful prompts; the direction is from layer {part.layer}."
    whole = next((row for row in part.rows if row.family == "strength" and row.name == "1"), None)
    if whole is not None:
        yield (
            f"One direction taken out of every writer leaves {whole.refused.refusals} of {whole.refused.n}"
            + (f" at a KL of {whole.kl.value:.3f} nats." if whole.kl.value is not None else ".")
        )
    if part.halving_strength is not None:
        yield f"Refusals halve at a strength of {part.halving_strength:.2f}."
    if part.halving_kl is not None:
        yield f"The gentlest edit that halves refusals costs {part.halving_kl:.3f} nats of KL."
    else:
        yield "No edit that was tried halves refusals."
    if part.directions_needed is not None:
        number = "one direction is" if part.directions_needed == 1 else f"{part.directions_needed} directions are"
        yield f"To leave at most 10 %, {number} enough."
    else:
        yield "As many directions as were tried leave more than 10 %."


_REPAIRED = {
    "undo": "Restored with what the edit kept for undo",
    "base": "Restored from the base",
    "adapter": "Restored by taking the merged adapter out",
    "approximation": "Repaired approximately, by a rank-one addition fitted on prompts",
}


def repaired(part: RepairPart) -> Iterator[str]:
    """A repair in sentences; how exact it is comes first."""
    yield f"{_REPAIRED[part.how]}."
    exact = "files" if part.how == "undo" else "tensors"
    for count, noun, what in (
        (len(part.exact), exact, "the original's bytes"),
        (len(part.restored), "tensors", "restored, not byte for byte"),
        (len(part.added), "tensors", "with an addition"),
    ):
        if count:
            yield f"{count} {noun}: {what}."
    if part.note:
        yield part.note[0].upper() + part.note[1:] + "."


def hardened(part: HardeningPart) -> Iterator[str]:
    """A hardening in sentences: the audits before and after, and what was added."""
    for when, audit in (("Before", part.before), ("After", part.after)):
        yield f"{when}: {' '.join(audited(audit))}"
    yield f"{len(part.tensors)} tensors have an addition."


_UNITS = {"norm": "‖r‖", "file": "the file's vector", "absolute": "a vector of length 1"}
_DONE = {
    "add": "Adds COEFFICIENT × {unit} to the stream",
    "scale": "Multiplies what the stream holds along the direction by COEFFICIENT",
    "clamp": "Sets what the stream holds along the direction to COEFFICIENT × {unit}",
    "cap": "Caps what the stream holds along the direction at COEFFICIENT × {unit}",
    "ablate": "Takes COEFFICIENT of what the stream holds along the direction out",
}


def steered(part: SteeringPart) -> str:
    """What a steering does, where, and to which tokens."""
    least, most = min(part.lengths, default=0.0), max(part.lengths, default=0.0)
    length = "" if part.unit == "absolute" else f" ({least:.3g}{f' to {most:.3g}' if most > least else ''})"
    where = numbers_in_words(part.layers)
    tokens = "every token" if part.tokens == "all" else "the tokens that the reply is predicted from"
    done = _DONE[part.operation].format(unit=_UNITS[part.unit] + length)
    return f"{done}, at layer{'s' if len(part.layers) > 1 else ''} {where}, at {tokens}."


def numbers_in_words(numbers: Sequence[int]) -> str:
    """'2-5, 9': sorted whole numbers, runs of them by their ends."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def counted(part: SteeringPart, name: str = "") -> str:
    """What the judge counts in replies to a set of prompts, as tables head it: 'harmful refused'."""
    words = words_of(part.behaviour)
    return f"{words(name)} {words.shown}".strip()


def responded(part: SteeringPart) -> str:
    """How the behaviour goes with the coefficient, from the lowest to the highest; "" where nothing was measured."""
    if len(part.doses) < 2:
        return ""
    words, plain, ends = words_of(part.behaviour), part.doses[0], dict.fromkeys((1, len(part.doses) - 1))
    said = []
    for name, rate in plain.behaviour.items():
        shares = [
            f"{_share(part.doses[end].behaviour.get(name))} at {part.doses[end].coefficient or 0:g}" for end in ends
        ]
        said.append(f"{words(name)} prompts {words.shown}: {_share(rate)} as the model is, {', '.join(shares)}")
    text = "; ".join(said) + "."
    if part.control:
        shares = [
            f"{' and '.join(_share(rate) for rate in one.behaviour.values())} at {named_dose(one)}"
            for one in part.control
        ]
        text += f" With a random direction in its place {', '.join(shares)}."
    return f"{text[:1].upper()}{text[1:]}"


def _share(part: RatePart | None) -> str:
    return "–" if part is None or part.rate is None else f"{100 * part.rate:.0f} %"


def named_dose(part: DosePart) -> str:
    """A coefficient as it is written; "none" for the model as it is."""
    return "none" if part.coefficient is None else f"{part.coefficient:g}"


def broken(part: DosePart) -> str:
    """'3/40': replies of all sets that are empty, looping or broken."""
    rates = part.behaviour.values()
    return f"{sum(rate.degenerate for rate in rates)}/{sum(rate.n for rate in rates)}"


def repeated(part: DosePart) -> float | None:
    """The share of repeated 4-grams, the mean over sets."""
    known = [one.value for one in part.repetition.values() if one.value is not None]
    return sum(known) / len(known) if known else None


def shade_scale(part: ReadingPart, place: int) -> float:
    """The projection that is shaded most at a layer: nine of ten tokens (by size) are below it."""
    sizes = sorted(abs(value) for text in part.texts for value in text.projections[place])
    return sizes[int(0.9 * (len(sizes) - 1))] or 1.0 if sizes else 1.0


def shade(value: float, scale: float) -> int:
    """How strongly a token is shaded, -10 (far below 0) to 10 (far above)."""
    return round(10 * max(-1.0, min(1.0, value / scale)))


#: Colours far below 0, at 0, and far above it, as red, green and blue; black can be read on all of them.
_BELOW, _ZERO, _ABOVE = (59, 130, 196), (243, 246, 249), (217, 89, 38)


def shade_colour(step: int) -> tuple[int, int, int]:
    """The colour of a shade, as red, green and blue."""
    end, share = (_ABOVE if step > 0 else _BELOW), abs(step) / 10
    red, green, blue = (round(zero + share * (one - zero)) for zero, one in zip(_ZERO, end, strict=True))
    return red, green, blue


def token_shown(token: str) -> str:
    """A token as it is shown: where it breaks the line one sees that it does."""
    return token.replace("\n", "↵\n")


def reading_said(part: ReadingPart, place: int) -> str:
    """What the numbers of a reading are, at the layer at `place`."""
    unit = "" if part.unit == "absolute" else f"; {_UNITS[part.unit]} is {part.lengths[place]:.3g} long"
    return f"Projection on the unit direction at layer {part.layers[place]}, in units of the stream{unit}."
