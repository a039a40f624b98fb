"""The front of a search, the proof by intervention, and what was edited."""

from __future__ import annotations

import re
from typing import Any

from abliterate.record import PlanPart, Record, SearchPart, grouped
from abliterate.report.html.parts import (
    Figure,
    Section,
    Table,
    between,
    dot_series,
    dots,
    number,
    rate_point,
    short,
)
from abliterate.report.wording import edited, states_of, words_of, words_of_record

#: Rows of tables of which the record has all.
_MOST = 300


def front(record: Record) -> Section | None:
    """Every point of the search, on validation and on held-out prompts."""
    part = record.search
    if part is None or not part.points:
        return None
    limits = ", ".join(f"{name} ≤ {limit:.3g}" for name, limit in part.limits.items())
    text = (
        f"{len(part.points)} edits between less {' and less '.join(part.objectives)} ({part.method}, "
        f"{part.seconds:.0f} s; constraints: {limits or 'none'}). They were chosen on validation prompts; "
        "held-out prompts were used neither to find nor to choose an edit."
    )
    return Section("search", "Which edits were there to choose from?", [text], [_points(part)])


def _points(part: SearchPart) -> Figure:
    names = list(dict.fromkeys([*part.objectives, *part.base]))
    head, rows = ["point"], []
    for name in names:
        head += [f"{name}, validation", f"{name}, held-out [95 %]"]
    head += ["keeps constraints", "on the front"]
    base_held = part.base_held_out or {}
    cells = [text for name in names for text in (number(part.base.get(name)), number(base_held.get(name)))]
    rows.append(["unedited", *cells, "", ""])
    for point in part.points:
        row = [f"{point.number}{' (chosen)' if point.number == part.chosen else ''}"]
        for name in names:
            held = (point.held_out or {}).get(name)
            row += [number(point.scores.get(name)), f"{number(held)} {between(point.intervals.get(name))}".strip()]
        rows.append([*row, "yes" if point.feasible else "no", "yes" if point.on_front else "no"])
    marked = frozenset(i + 1 for i, point in enumerate(part.points) if point.number == part.chosen)
    table = Table(head, rows, marked)
    return Figure("front", "The front", table, _front_chart(part), "Whiskers: 95 % intervals of held-out prompts.")


def _front_chart(part: SearchPart) -> dict[str, Any] | None:
    if len(part.objectives) < 2:
        return None
    x, y = part.objectives[1], part.objectives[0]

    def at(scores: dict[str, float | None] | None, label: str) -> list[Any] | None:
        if scores is None or scores.get(x) is None or scores.get(y) is None:
            return None
        return [scores[x], scores[y], label]

    held = [
        [*found, list(point.intervals.get(x, ())), list(point.intervals.get(y, ()))]
        for point in part.points
        if (found := at(point.held_out, f"point {point.number}, held-out")) is not None
    ]
    chosen = part.point
    return {
        "kind": "front",
        "x": x,
        "y": y,
        "validation": [f for p in part.points if (f := at(p.scores, f"point {p.number}, validation")) is not None],
        "held": held,
        "chosen": None if chosen is None else at(chosen.held_out or chosen.scores, "chosen"),
        "base": at(part.base_held_out or part.base, "unedited"),
    }


def proved(record: Record) -> Section | None:
    """Before, and as written: the same prompts."""
    figures = [figure for figure in (_refusals(record), _scores(record)) if figure is not None]
    if not figures:
        return None
    text = (
        "An intervention that only takes the direction out of what writers write, on the original weights, shows that "
        "the direction carries the behaviour; what is then written into the weights must do the same."
    )
    return Section("proof", "Did intervention prove it?", [text], figures)


def _refusals(record: Record) -> Figure | None:
    """Refused harmful prompts in every state that was measured."""
    evaluation = record.evaluation
    if evaluation is None or evaluation.after is None:
        return None
    measured = {name: behaviour.harmful for name, behaviour, _ in states_of(evaluation)}
    points = {name: rate_point(part) for name, part in measured.items()}
    # What the chart calls a state, its colour, and what the table calls it.
    shown = [
        (label, role, title, measured.get(name), points[name])
        for name, label, role, title in (
            ("before", "before", "before", "before"),
            ("after", "baked", "after", "baked"),
            ("random", "random", "random", "random"),
        )
        if name in points
    ]
    rows = [
        [
            title,
            "" if part is None else f"{part.refusals}/{part.n}",
            "–" if point is None else f"{number(point[0], '.0f')} %",
            "" if point is None else between(point[1:], 1, ".0f"),
        ]
        for _, _, title, part, point in shown
    ]
    series = [
        dot_series(label, [point if at == place else None for at in range(len(shown))], role)
        for place, (label, role, _, _, point) in enumerate(shown)
    ]
    words = words_of(evaluation.behaviour)
    axis = f"% of held-out {words('harmful')} prompts {words.shown}"
    chart = dots([label for label, *_ in shown], series, axis, least=0) | {"plain": True}
    note = (
        "Baked: read back from what was written. Random: a random direction on the same writers, as strongly, through "
        "hooks, on the first prompts of each set."
    )
    table = Table(["state", words.shown, "rate", "95 %"], rows)
    title = f"{words.rates}{' of' if not words.sets else ','} {words('harmful')} prompts"
    return Figure("proof", title, table, chart, note, folded=False)


def _scores(record: Record) -> Figure | None:
    """Refusal scores with the chosen site's direction taken out and put in, beside a random one."""
    part = record.selection
    if part is None or part.chosen is None:
        return None
    site, control, (more, less) = part.chosen, part.control, words_of_record(record).sides
    table = Table(
        ["intervention", f"bypass ({more} prompts)", f"induce ({less} prompts)", "KL"],
        [
            ["none", f"{part.harmful:.2f}", f"{part.harmless:.2f}", "0"],
            ["the direction out, or in", f"{site.bypass:.2f}", f"{site.induce:.2f}", f"{site.kl:.3f}"],
            ["random control", f"{control.bypass:.2f}", f"{control.induce:.2f}", f"{control.kl:.3f}"],
        ],
        frozenset({1}),
    )
    by_replies = part.by == "replies"
    scores = "Shares of replies" if by_replies else "Refusal scores" if more == "harmful" else "Scores"
    title = f"{scores} through hooks, layer {site.layer}, position {site.position}, full strength"
    note = "Shares of short replies" if by_replies else "Log-odds of first tokens"
    return Figure("scores", title, table, note=f"{note}, validation prompts.", folded=False)


def edited_weights(record: Record) -> Section | None:
    """What is left along the direction in every edited tensor, and how much of it changed."""
    plan = record.plan
    if plan is None:
        return None
    anatomy = record.anatomy
    text = []
    if anatomy is not None:
        text.append(
            f"Every block's output was accounted for by the {anatomy.writers} writers known; in the worst block to a "
            f"relative error of {anatomy.worst_closure:.1e}."
        )
    if plan.edits:
        text.append(f"Edited: {edited(plan)}.")
    elif plan.strengths:
        text.append(f"{len(plan.strengths)} writers are edited by {', '.join(plan.files) or plan.realisation}.")
    figures = [_rests(plan)] if plan.edits else [_strengths(plan)] if plan.strengths else []
    if plan.left_alone:
        rows = [[short(names, 120), why] for names, why in grouped(plan.left_alone)]
        table = Table(["writers", "why"], rows, words=frozenset({0, 1}))
        figures.append(Figure("left-alone", "Left alone", table))
    return Section("weights", "What was edited?", text, figures)


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d{1,9})\.", f".{name}.")
    return int(found[1]) if found else None


def _rests(plan: PlanPart) -> Figure:
    most = sorted(range(len(plan.edits)), key=lambda row: -plan.edits[row].change)[:_MOST]
    shown = [plan.edits[row] for row in sorted(most)]
    chart = _rests_chart(plan)
    rows = [
        [
            short(e.tensor, 100),
            e.kind,
            e.format or e.dtype,
            _strength(plan, e.tensor),
            f"{e.before:.4g}",
            f"{e.after:.4g}",
            f"{100 * e.ratio:.2f} %",
            f"{100 * e.change:.3f} %",
            f"{100 * e.rounding:.3f} %",
        ]
        for e in shown
    ]
    head = [
        "tensor",
        "kind",
        "format",
        "strength",
        "‖r̂ᵀW‖ before",
        "after",
        "left",
        "change",
        "of it rounding",
    ]
    more = (
        "" if len(shown) == len(plan.edits) else f"The {_MOST} that changed most; the record has all {len(plan.edits)}."
    )
    table = Table(head, rows, words=frozenset({0, 1, 2}), more=more)
    note = "How much each still writes along the direction, in % of what it wrote, and ‖W′ − W‖ / ‖W‖."
    return Figure("rests", "Edited tensors", table, chart, note)


def _strength(plan: PlanPart, tensor: str) -> str:
    return f"{plan.strengths.get(tensor, plan.strength):.3g}"


def _strengths(plan: PlanPart) -> Figure:
    rows = [[short(name, 100), f"{strength:.3g}"] for name, strength in list(plan.strengths.items())[:_MOST]]
    more = "" if len(rows) == len(plan.strengths) else f"The first {_MOST}; the record has all {len(plan.strengths)}."
    return Figure("strengths", "Strength by writer", Table(["writer", "strength"], rows, more=more))


def _rests_chart(plan: PlanPart) -> dict[str, Any]:
    """What is left and what changed by layer, a series for each kind of writer; −1 is the embedding."""
    points: dict[str, dict[int, tuple[float, float, str]]] = {}
    for edit in plan.edits:  # of many experts in a layer the one that changed most
        layer = _layer(edit.tensor)
        place = -1 if layer is None else layer
        by_layer = points.setdefault(edit.kind, {})
        if place not in by_layer or edit.change > by_layer[place][1]:
            by_layer[place] = (100 * edit.ratio, 100 * edit.change, short(edit.tensor, 80))
    return {
        "kind": "rests",
        "series": [
            {"name": kind, "points": [[layer, *values] for layer, values in sorted(by_layer.items())]}
            for kind, by_layer in points.items()
        ],
        "embedding": any(-1 in by_layer for by_layer in points.values()),
    }
