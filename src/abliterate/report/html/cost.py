"""What it cost: over-refusal, KL, likelihood, capability, worst prompts, a random control; and the judged replies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from abliterate.record import AnswerPart, EvaluationPart, PairedPart, RatePart, Record, ShiftPart
from abliterate.report.html.parts import (
    Figure,
    Point,
    Section,
    Table,
    between,
    dot_series,
    dots,
    estimate_point,
    number,
    rate_point,
    short,
)
from abliterate.report.wording import (
    SETS,
    drifted,
    estimate,
    intervals_of,
    judged_by,
    others,
    pvalue,
    replies_of,
    states_of,
    test_of,
    words_of,
)

#: Replies of each set that are shown.
_MOST = 100


def cost(record: Record) -> Section | None:
    """Everything that was measured on held-out prompts, beside a random direction."""
    evaluation = record.evaluation
    if evaluation is None:
        return None
    figures = [_rates(evaluation), *_categories(evaluation), *_shift(evaluation), *_capability(evaluation)]
    figures += [*_worst(evaluation), *_manner(evaluation)]
    text = [
        f"{replies_of(evaluation.max_new_tokens, evaluation.decoding)} to prompts that the direction never saw; "
        f"those of rates are {intervals_of(evaluation.decoding)}, p is {test_of(evaluation.decoding)} on the same "
        "prompts before and after."
    ]
    control = evaluation.control
    if control is not None and control.size is not None and control.size_of_edit is not None:
        text.append(
            f"The edit changes the weights it edits by {100 * control.size_of_edit:.2f} % of their norm, the random "
            f"direction, on the same writers and as strongly, by {100 * control.size:.2f} %."
        )
    if evaluation.judge is not None:
        text.append(judged_by(evaluation.judge))
    if unlike := drifted(states_of(evaluation)):
        text.append(unlike)
    title = "How does it behave?" if evaluation.after is None else "What did it cost?"
    return Section("cost", title, text, figures)


def _rates(evaluation: EvaluationPart) -> Figure:
    states = states_of(evaluation)
    words, rows = words_of(evaluation.behaviour), list[list[str]]()
    marked = set()
    sets = [name for name in SETS if not words.sets or any(getattr(found, name).n for _, found, _ in states)]
    for name in sets:
        for state, behaviour, pairs in states:
            part: RatePart = getattr(behaviour, name)
            if state == "after":
                marked.add(len(rows))
            corrected = "" if part.corrected is None else estimate(part.corrected, 100, ".0f")
            rows.append(
                [words(name), state, *_rate_cells(part), corrected, *_paired_cells(pairs.get(name)), others(part)]
            )
    head = ["prompts", "state", words.shown, "% [95 %]", "corrected [95 %]", "change [95 %]", "p", "also"]
    table = Table(head, rows, frozenset(marked), frozenset({0, 1}))
    series = [
        dot_series(state, [rate_point(getattr(behaviour, name)) for name in sets]) for state, behaviour, _ in states
    ]
    chart = dots([words(name) for name in sets], series, f"% {words.shown}", least=0)
    note = f"Degenerate replies count as not {words.shown}." if not words.sets else "Degenerate replies do not count."
    return Figure("rates", f"{words.rates} on held-out prompts", table, chart, note, folded=False)


def _rate_cells(part: RatePart) -> list[str]:
    share = "–" if part.rate is None else f"{100 * part.rate:.0f} {between(part.ci95, 100, '.0f')}"
    return [f"{part.refusals}/{part.n}", share]


def _paired_cells(part: PairedPart | None) -> list[str]:
    return ["", ""] if part is None else [estimate(part.change, 100, "+.0f"), pvalue(part.p)]


def _categories(evaluation: EvaluationPart) -> Iterator[Figure]:
    before, after = evaluation.categories.get("before", {}), evaluation.categories.get("after", {})
    if len(before) < 2:
        return
    names, words = list(before), words_of(evaluation.behaviour)
    rows = [
        [short(name, 60), *_rate_cells(before[name])]
        + ([*_rate_cells(after[name]), *_paired_cells(evaluation.paired_categories.get(name))] if name in after else [])
        for name in names
    ]
    head = ["category", "before", "% [95 %]"] + (["after", "% [95 %]", "change [95 %]", "p"] if after else [])
    series = [
        dot_series(state, [rate_point(parts[name]) if name in parts else None for name in names])
        for state, parts in evaluation.categories.items()
    ]
    chart = dots([short(name, 24) for name in names], series, f"% {words.shown}", least=0)
    title = f"{words('harmful').capitalize()} prompts by category"
    yield Figure("categories", title, Table(head, rows), chart)


def _shift(evaluation: EvaluationPart) -> Iterator[Figure]:
    shift, less = evaluation.shift, words_of(evaluation.behaviour)("harmless")
    if shift is None:
        return
    control = None if evaluation.control is None else evaluation.control.shift
    states = [("edit", shift), *([("random", control)] if control is not None else [])]
    rows: list[list[str]] = []
    names = (("kl_first_token", "KL, first token"), ("kl_reply", "KL, whole reply"))
    for field, label in names:
        for state, part in states:
            spread = [number(getattr(part, f"{field}_{end}")) for end in ("median", "p95", "max")]
            interval = between(getattr(part, f"{field}_ci95"))
            rows.append([label, state, number(getattr(part, field)), interval, *spread])
    for state, part in states:
        if (change := part.nll_change) is not None:
            interval = between(change.ci95, 1, "+.3f")
            rows.append(["ΔNLL of own replies", state, number(change.value, "+.3f"), interval, "", "", ""])
    series = [
        dot_series(
            state,
            [*(_kl_point(part, field) for field, _ in names), estimate_point(part.nll_change)],
            "after" if state == "edit" else state,
        )
        for state, part in states
    ]
    head = ["", "", "mean", "95 %", "median", "p95", "worst"]
    table = Table(head, rows, words=frozenset({0, 1}))
    chart = dots([*(label for _, label in names), "ΔNLL of own replies"], series, "nats per token")
    fewer = "" if control is None else f"; of the random direction {control.prompts} and {control.tokens}"
    note = (
        f"{shift.prompts} {less} prompts, {shift.tokens} tokens{fewer}. KL(original ‖ edited); ΔNLL is "
        "the change of the negative log-likelihood of the original's own replies "
        f"({number(shift.nll_before)} → {number(shift.nll_after)} nats per token)."
    )
    yield Figure("shift", f"Shift on {less} prompts", table, chart, note)


def _kl_point(part: ShiftPart, field: str) -> Point:
    value, ends = getattr(part, field), getattr(part, f"{field}_ci95")
    return None if value is None else [value, *(ends or (None, None))]


def _capability(evaluation: EvaluationPart) -> Iterator[Figure]:
    parts = evaluation.capability
    if not parts:
        return
    rows = [
        [
            short(part.task, 60),
            part.metric,
            str(part.n),
            estimate(part.before, 1, ".3f"),
            "" if part.after is None else estimate(part.after, 1, ".3f"),
            "" if part.change is None else estimate(part.change, 1, "+.3f"),
            "" if part.p is None else pvalue(part.p),
            number(part.chance),
        ]
        for part in parts
    ]
    head = ["task", "metric", "questions", "before [95 %]", "after [95 %]", "change [95 %]", "p", "guessing"]
    series = [
        dot_series("before", [estimate_point(part.before) for part in parts]),
        dot_series("after", [estimate_point(part.after) for part in parts]),
    ]
    chart = dots([short(f"{p.task} {p.metric}", 28) for p in parts], series, "score")
    yield Figure("capability", "Capability", Table(head, rows, words=frozenset({0, 1})), chart)


def _worst(evaluation: EvaluationPart) -> Iterator[Figure]:
    if evaluation.shift is not None and evaluation.shift.worst:
        rows = [[short(moved.prompt), f"{moved.kl_reply:.4f}"] for moved in evaluation.shift.worst]
        less = words_of(evaluation.behaviour)("harmless").capitalize()
        yield Figure("worst", f"{less} prompts whose answers moved most", Table(["prompt", "KL over the reply"], rows))


def _manner(evaluation: EvaluationPart) -> Iterator[Figure]:
    rows = [
        [
            words_of(evaluation.behaviour)(name),
            estimate(part.tokens_before, 1, ".1f"),
            estimate(part.tokens_after, 1, ".1f"),
            estimate(part.tokens_change, 1, "+.1f"),
            estimate(part.repetition_change, 100, "+.1f", " %"),
        ]
        for name, part in evaluation.manner.items()
    ]
    if rows:
        head = ["prompts", "tokens before [95 %]", "after [95 %]", "change [95 %]", "change of repeated 4-grams"]
        yield Figure("manner", "Length and repetition of replies", Table(head, rows))


def replies(record: Record) -> Section | None:
    """Judged replies side by side, those whose verdict changed first; redacted as the record has them."""
    evaluation = record.evaluation
    if evaluation is None or not any(evaluation.answers.values()):
        return None
    figures = [figure for name in SETS if (figure := _replies(name, evaluation)) is not None]
    redacted = any(
        answer.redacted for sets in evaluation.answers.values() for answers in sets.values() for answer in answers
    )
    name = words_of(evaluation.behaviour)("harmful")
    text = [f"Of replies to {name} prompts the record holds the first words and the verdict only."] if redacted else []
    return Section("replies", "What did it say?", text, figures) if figures else None


def _replies(name: str, evaluation: EvaluationPart) -> Figure | None:
    before = evaluation.answers.get("before", {}).get(name, [])
    after = evaluation.answers.get("after", {}).get(name, [])
    pairs: list[tuple[AnswerPart, AnswerPart | None]] = list(itertools.zip_longest(before, after[: len(before)]))
    if not pairs:
        return None
    pairs.sort(key=lambda pair: pair[1] is None or pair[0].label == pair[1].label)  # stable: changed verdicts first
    words = words_of(evaluation.behaviour)
    labels = {"refusal": words.shown, "compliance": f"not {words.shown}"} if words.sets else {}

    def said(one: AnswerPart) -> list[str]:
        return [labels.get(one.label, one.label), short(one.text)]

    rows = [[short(one.prompt), *said(one), *([] if other is None else said(other))] for one, other in pairs[:_MOST]]
    head = ["prompt", "before", "reply"] + (["after", "reply"] if after else [])
    changed = sum(other is not None and one.label != other.label for one, other in pairs)
    more = "" if len(rows) == len(pairs) else f"{len(rows)} of {len(pairs)}; the record has all."
    note = f"{changed} of {len(pairs)} verdicts changed; these come first." if after else ""
    table = Table(head, rows, words=frozenset(range(len(head))), more=more)
    return Figure(f"replies-{name}", f"{words(name).capitalize()} prompts", table, note=note)
