"""An evaluation as it stands in the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from abliterate import record as rec
from abliterate.config import ReplySettings
from abliterate.evaluation.capability import Score, ScoreChange, change, score_changes
from abliterate.evaluation.examine import CapabilityScores, Evaluation, Sets
from abliterate.evaluation.judging import Judge, Tally, Verdict
from abliterate.evaluation.judging.auto import ChosenJudge, Measured
from abliterate.evaluation.judging.calibration import Calibration
from abliterate.evaluation.judging.correction import ChosenCalibration, choose_calibration
from abliterate.evaluation.judging.drift import Drift, bins_of, drift
from abliterate.evaluation.results import Answers, Shift, degenerate, manner, manner_change, paired, refused
from abliterate.evaluation.statistics import Z95, Estimate
from abliterate.model.decoding import Decoding
from abliterate.prompts import Behaviour
from abliterate.prompts.behaviour import REFUSAL

#: What corrects the rates of each set of prompts.
Corrections = Mapping[str, ChosenCalibration]


def evaluation_part(evaluation: Evaluation) -> rec.EvaluationPart:
    """The evaluation as it stands in the record, with answers to harmful prompts redacted unless asked for."""
    settings = evaluation.settings
    states = {"before": evaluation.before} | ({} if evaluation.after is None else {"after": evaluation.after})
    behaviour = evaluation.prompts.behaviour
    corrections = corrections_of(evaluation.judge, evaluation.model, list(states.values()), behaviour)
    rates = {name: behaviour_part(sets, corrections) for name, sets in states.items()}
    return rec.EvaluationPart(
        max_new_tokens=settings.max_new_tokens,
        decoding=decoding_part(evaluation.decoding, settings),
        before=rates["before"],
        after=rates.get("after"),
        behaviour=sought_part(behaviour),
        shift=None if evaluation.shift is None else shift_part(evaluation.shift),
        answers={
            name: answer_parts(sets, () if settings.keep_completions else evaluation.prompts.sensitive)
            for name, sets in states.items()
        },
        judge=judge_part(evaluation.judge, corrections),
        thinking_open=settings.thinking == "open",
        engine=evaluation.engine,
        sources=evaluation.prompts.sources,
        dropped=dict(evaluation.prompts.dropped),
        prompts_sha256=evaluation.prompts.sha256,
        paired=paired_parts(evaluation.before, evaluation.after),
        degenerate=paired_parts(evaluation.before, evaluation.after, degenerate),
        categories={
            name: {
                key: _corrected(one, corrections.get("harmful")) for key, one in sets["harmful"].by_category().items()
            }
            for name, sets in states.items()
        },
        paired_categories=paired_parts(_categories(evaluation.before), _categories(evaluation.after)),
        manner=manner_parts(evaluation.before, evaluation.after),
        control=_control_part(evaluation, corrections),
        thinking=_thinking_part(evaluation, corrections),
        capability=capability_parts(*evaluation.capability),
    )


def decoding_part(decoding: Decoding, settings: ReplySettings) -> rec.DecodingPart:
    """How replies were decoded."""
    seed = decoding.seed if decoding.samples else None
    return rec.DecodingPart(name=settings.decoding, asked=dict(decoding.asked), seed=seed, samples=settings.samples)


def corrections_of(
    judge: Judge, model: str, states: Sequence[Sets], behaviour: Behaviour
) -> dict[str, ChosenCalibration]:
    """What corrects the rates of each set of prompts: one calibration for all states of a model, chosen by them all.

    Nothing of another behaviour than refusal: judges are calibrated by that one's sets.
    Raises `AbliterateError` when a calibration is damaged.
    """
    found: dict[str, ChosenCalibration] = {}
    if behaviour.name != REFUSAL:
        return found
    for name in states[0]:
        bins = sum((_bins(sets[name]) for sets in states), Counter[str]())
        if (chosen := choose_calibration(judge, model, name, bins)) is not None:
            found[name] = chosen
    return found


def _bins(answers: Answers) -> Counter[str]:
    return bins_of(answers.verdicts, answers.texts)


def behaviour_part(answers: Sets, corrections: Corrections = MappingProxyType({})) -> rec.BehaviourPart:
    """Counts, rates and intervals of every set; of one that a behaviour does not have, nothing of nothing."""
    return rec.BehaviourPart(**{"borderline": rate_part(Tally(0, 0, 0)), **rate_parts(answers, corrections)})


def rate_parts(answers: Sets, corrections: Corrections = MappingProxyType({})) -> dict[str, rec.RatePart]:
    """The same of whatever sets there are."""
    return {name: _corrected(group, corrections.get(name)) for name, group in answers.items()}


def sought_part(behaviour: Behaviour) -> rec.SoughtPart | None:
    """The behaviour that was looked for; None of refusal."""
    if behaviour.name == REFUSAL:
        return None
    return rec.SoughtPart(
        name=behaviour.name,
        description=behaviour.description,
        shown=behaviour.said,
        names=behaviour.names,
        sides=behaviour.side_names,
        definition=behaviour.model_dump(mode="json", exclude_none=True),
    )


def _corrected(group: Answers, chosen: ChosenCalibration | None) -> rec.RatePart:
    if chosen is None:
        return rate_part(group.tally)
    return rate_part(group.tally, chosen.calibration, drift(chosen.calibration.profile, _bins(group)))


def rate_part(tally: Tally, calibration: Calibration | None = None, moved: Drift | None = None) -> rec.RatePart:
    """A tally with its rate and interval; corrected where the judge's errors are known.

    `moved` says how far the replies are unlike those of the calibration.
    """
    widening = 0.0 if moved is None else moved.widening
    share = tally.effective_n / tally.n if tally.n else 1.0
    corrected = None
    if calibration is not None:
        corrected = calibration.corrected(share * tally.refusals, share * tally.n, widening)
    return rec.RatePart(
        refusals=tally.refusals,
        degenerate=tally.degenerate,
        degenerate_ci95=tally.degenerate_ci95,
        n=tally.n,
        rate=rec.finite(tally.rate),
        ci95=tally.ci95,
        partial=tally.partial,
        unknown=tally.unknown,
        evasion=tally.evasion,
        cut_off=tally.cut_off,
        corrected=None if corrected is None else estimate_part(corrected),
        drift=None if corrected is None or moved is None else drift_part(moved),
    )


def drift_part(moved: Drift) -> rec.DriftPart:
    """How far replies are unlike those of a calibration."""
    return rec.DriftPart(unexplained=moved.unexplained, by_chance=moved.by_chance, p=moved.p, widening=moved.widening)


def estimate_part(estimate: Estimate) -> rec.EstimatePart:
    """A value with its interval; what is not finite was not measured."""
    low, high = estimate.ci95
    return rec.EstimatePart(value=rec.finite(estimate.value), ci95=(rec.finite(low), rec.finite(high)))


def judge_part(judge: Judge, corrections: Corrections = MappingProxyType({})) -> rec.JudgePart:
    """The judge, its known error rates by what they correct, and what it was chosen from."""
    rates: dict[tuple[str, str], list[str]] = {}
    for name, chosen in corrections.items():
        rates.setdefault((chosen.calibration.model_dump_json(), chosen.why), []).append(name)
    used = [used_part(corrections[names[0]], names) for names in rates.values()]
    candidates = [candidate_part(one) for one in judge.measured] if isinstance(judge, ChosenJudge) else []
    return rec.JudgePart(name=judge.name, fingerprint=judge.fingerprint, calibrations=used, chosen=candidates)


def used_part(chosen: ChosenCalibration, rates: list[str]) -> rec.UsedCalibrationPart:
    """The calibration that corrects `rates`, and why."""
    calibration = chosen.calibration
    return rec.UsedCalibrationPart(
        rates=rates,
        labels=calibration.source,
        sensitivity=tuple(calibration.recall),
        specificity=tuple(calibration.specificity),
        model=calibration.model,
        prompts=calibration.prompts,
        why=chosen.why,
    )


def candidate_part(measured: Measured) -> rec.CandidateJudgePart:
    """How a judge did that `auto` chose from."""
    return rec.CandidateJudgePart(
        name=measured.name,
        recall=tuple(measured.recall),
        specificity=tuple(measured.specificity),
        balanced_accuracy=estimate_part(Estimate(measured.balanced, measured.ci95)),
    )


def paired_parts(
    before: Sets | None, after: Sets | None, what: Callable[[Verdict], bool] = refused
) -> dict[str, rec.PairedPart]:
    """Each set before and after, prompt by prompt."""
    if before is None or after is None:
        return {}
    pairs = {name: paired(before[name], after[name], what) for name in before}
    fields = ("both", "before_only", "after_only", "neither", "unknown", "p")
    return {
        name: rec.PairedPart(**{field: getattr(pair, field) for field in fields}, change=estimate_part(pair.change))
        for name, pair in pairs.items()
    }


def _categories(sets: Sets | None) -> Sets | None:
    return None if sets is None else sets["harmful"].by_category()


def manner_parts(before: Sets, after: Sets | None) -> dict[str, rec.MannerPart]:
    """Length and repetition of the replies of every set; not where some were stopped early."""
    if after is None:
        return {}
    parts = {}
    for name in before:
        if any(reply.stopped for reply in (*before[name].replies, *after[name].replies)):
            continue
        first, second = manner(before[name]), manner(after[name])
        tokens, repetition = manner_change(before[name], after[name])
        estimates = {
            "tokens_before": first.tokens,
            "tokens_after": second.tokens,
            "tokens_change": tokens,
            "repetition_before": first.repetition,
            "repetition_after": second.repetition,
            "repetition_change": repetition,
        }
        parts[name] = rec.MannerPart(
            **{key: estimate_part(value) for key, value in estimates.items()},
            ended_before=rec.finite(first.ended),
            ended_after=rec.finite(second.ended),
        )
    return parts


def shift_part(shift: Shift) -> rec.ShiftPart:
    """Means and distribution of the shift."""
    numbers: dict[str, Any] = {}
    for name, spread in (("kl_first_token", shift.kl_first), ("kl_reply", shift.kl_reply)):
        if spread is None:
            numbers[name] = None
            continue
        ends = {"": spread.mean.value, "_se": spread.se, "_ci95": spread.mean.ci95}
        ends |= {"_median": spread.median, "_p95": spread.p95, "_max": spread.largest}
        numbers |= {name + end: value for end, value in ends.items()}
    return rec.ShiftPart(
        **numbers,
        nll_before=shift.nll_before,
        nll_after=shift.nll_after,
        nll_change=None if shift.nll_change is None else estimate_part(shift.nll_change),
        worst=[rec.MovedPart(prompt=prompt, kl_reply=kl) for prompt, kl in shift.worst],
        prompts=shift.prompts,
        tokens=shift.tokens,
    )


def _control_part(evaluation: Evaluation, corrections: Corrections) -> rec.ControlEffectPart | None:
    effect = evaluation.control
    if effect is None:
        return None
    return rec.ControlEffectPart(
        seed=effect.control.seed,
        behaviour=behaviour_part(effect.answers, corrections),
        paired=paired_parts(effect.before, effect.answers),
        degenerate=paired_parts(effect.before, effect.answers, degenerate),
        manner=manner_parts(effect.before, effect.answers),
        shift=shift_part(effect.shift),
        size=effect.control.size,
        size_of_edit=effect.control.size_of_edit,
    )


def _thinking_part(evaluation: Evaluation, corrections: Corrections) -> rec.ThinkingPart | None:
    if evaluation.thinking is None:
        return None
    before, after = evaluation.thinking
    return rec.ThinkingPart(
        max_new_tokens=evaluation.settings.max_new_tokens + evaluation.settings.thinking_tokens,
        before=behaviour_part(before, corrections),
        after=None if after is None else behaviour_part(after, corrections),
        paired=paired_parts(before, after),
    )


def capability_parts(before: CapabilityScores, after: CapabilityScores | None) -> list[rec.CapabilityPart]:
    """What a model can do, and how that changed, question by question."""
    parts = []
    for number, result in enumerate(before.files):
        part = rec.CapabilityPart(
            task=result.name,
            metric=f"accuracy, by {result.way}",
            n=len(result.correct),
            before=estimate_part(result.accuracy),
            chance=result.chance,
            above_chance=result.above_chance,
        )
        if after is not None:
            other = after.files[number]
            changed = change(result, other)
            part = part.model_copy(
                update={
                    "after": estimate_part(other.accuracy),
                    "change": estimate_part(changed.difference),
                    "p": changed.p,
                }
            )
        parts.append(part)
    changes = {} if after is None else {_key(one): one for one in score_changes(before.tasks, after.tasks)}
    errors = {} if after is None else {_key(score): score.stderr for score in after.tasks}
    for score in before.tasks:
        moved = changes.get(_key(score))
        metric = score.metric if score.filter in ("", "none") else f"{score.metric}, {score.filter}"
        part = rec.CapabilityPart(
            task=score.task, metric=metric, n=len(score.values), before=_normal(score.value, score.stderr)
        )
        if moved is not None:
            part = part.model_copy(
                update={
                    "after": _normal(moved.after, errors.get(_key(score))),
                    "change": _normal(moved.delta, moved.stderr),
                    "change_se": moved.stderr,
                }
            )
        parts.append(part)
    return parts


def _key(score: Score | ScoreChange) -> tuple[str, str, str]:
    return score.task, score.metric, score.filter


def _normal(value: float, error: float | None) -> rec.EstimatePart:
    """A value and the 95 % interval of its standard error, if it has one."""
    ends = (None, None) if error is None else (value - Z95 * error, value + Z95 * error)
    return rec.EstimatePart(value=value, ci95=ends)


def answer_parts(answers: dict[str, Answers], sensitive: Container[str]) -> dict[str, list[rec.AnswerPart]]:
    """Every judged reply; those to the sets named are redacted: to harmful prompts, unless they are to be kept."""
    parts: dict[str, list[rec.AnswerPart]] = {}
    for name, group in answers.items():
        redacted = name in sensitive
        parts[name] = [
            rec.AnswerPart(
                prompt=prompt,
                label=verdict.label.value,
                evidence="" if redacted else verdict.evidence,
                tokens=len(reply.tokens),
                text=rec.redact(reply.text) if redacted else reply.text,
                redacted=redacted,
            )
            for prompt, reply, verdict in zip(group.prompts, group.replies, group.verdicts, strict=True)
        ]
    return parts
