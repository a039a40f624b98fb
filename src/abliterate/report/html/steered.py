"""What steering does by coefficient: behaviour and damage, and replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.record import DosePart, Record, SteeringPart
from abliterate.report.html.parts import Figure, Section, Table, between, number, percent, short
from abliterate.report.wording import broken, counted, named_dose, repeated, replies_of, responded, steered, words_of

#: Prompts of each set whose replies are shown.
_MOST = 8


def dose_response(record: Record) -> Section | None:
    """Rates, KL and broken replies against the coefficient."""
    part = record.steering
    if part is None or not part.doses:
        return None
    text = [steered(part), responded(part), f"{replies_of(part.max_new_tokens, part.decoding)}."]
    figures = [_rates(part), _damage(part), _replies(part)]
    return Section("steering", "What does steering do?", [line for line in text if line], figures)


def _rates(part: SteeringPart) -> Figure:
    sets = list(part.doses[0].behaviour)
    series = [
        {
            "name": counted(part, name),
            "role": name,
            "points": _points(part.doses, lambda one, name=name: _rate(one, name)),
        }
        for name in sets
    ]
    series.append({"name": "broken", "role": "before", "points": _points(part.doses, _broken)})
    if part.control and (name := next(iter(sets), None)) is not None:
        points = _points(part.control, lambda one, name=name: _rate(one, name))
        series.append({"name": f"{counted(part, name)}, random direction", "role": "random", "points": points})
    chart = _lines(series, "coefficient", "%", 0.0, [0, None])
    rows = []
    for called, one in _named(part):
        cells = [called]
        for name in sets:
            rate = one.behaviour.get(name)
            cells.append(
                "–" if rate is None else f"{number(percent(rate.rate), '.0f')} {between(rate.ci95, 100, '.0f')}"
            )
        rows.append([*cells, broken(one)])
    head = ["coefficient", *(f"{counted(part, name)}, % [95 %]" for name in sets), "broken"]
    table = Table(head, rows, frozenset({0}), frozenset())
    return Figure(
        "dose-rates", f"{counted(part, 'Held-out prompts')}, and broken replies, by coefficient", table, chart
    )


def _damage(part: SteeringPart) -> Figure:
    series: list[dict[str, Any]] = [
        {"name": "KL, first token, nats", "role": "after", "points": _points(part.doses, lambda one: one.kl.value)}
    ]
    chart = _lines(series, "coefficient", "nats", 0.0, [0, None])
    rows = []
    for called, one in _named(part):
        share = repeated(one)
        scores = [number(one.score.get(name), ".2f") for name in one.score]
        kl = f"{number(one.kl.value)} {between(one.kl.ci95)}"
        rows.append([called, kl, "–" if share is None else f"{100 * share:.1f} %", " / ".join(scores)])
    head = ["coefficient", "KL [95 %]", "repeated 4-grams", f"score of first tokens, {' / '.join(part.doses[0].score)}"]
    table = Table(head, rows, frozenset({0}), frozenset())
    return Figure(
        "dose-kl",
        f"How far first tokens of {words_of(part.behaviour)('harmless')} prompts move, by coefficient",
        table,
        chart,
    )


def _replies(part: SteeringPart) -> Figure:
    rows = []
    _, plain = next(iter(part.answers.items()), ("", {}))
    for name, answers in plain.items():
        for place, answer in enumerate(answers[:_MOST]):
            for dose, sets in part.answers.items():
                given = sets.get(name, [])[place : place + 1]
                rows += [[name, short(answer.prompt), dose, one.label, short(one.text)] for one in given]
    words = frozenset({0, 1, 3, 4})
    table = Table(["set", "prompt", "coefficient", "verdict", "reply"], rows, words=words)
    note = "The first prompts of each set; the record has all replies."
    return Figure("dose-replies", "Replies by coefficient", table, note=note)


def _lines(series: list[dict[str, Any]], x: str, y: str, least: float, mark: list[float | None]) -> dict[str, Any]:
    return {"kind": "lines", "x": x, "y": y, "half": True, "least": least, "log": False, "mark": mark, "series": series}


def _points(doses: Sequence[DosePart], value: Any) -> list[list[float | None]]:
    return [[one.coefficient, value(one)] for one in doses if one.coefficient is not None]


def _rate(one: DosePart, name: str) -> float | None:
    return None if name not in one.behaviour else percent(one.behaviour[name].rate)


def _broken(one: DosePart) -> float | None:
    count = sum(rate.n for rate in one.behaviour.values())
    return 100 * sum(rate.degenerate for rate in one.behaviour.values()) / count if count else None


def _named(part: SteeringPart) -> list[tuple[str, DosePart]]:
    """Every row of the tables: coefficients, and those of a random direction."""
    own = [(named_dose(one), one) for one in part.doses]
    return own + [(f"random {named_dose(one)}", one) for one in part.control]
