"""What an inspection of the weights found, and how brittle refusal is."""

from __future__ import annotations

from abliterate.record import InspectionPart, Record, WriterTracePart
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
    percent,
    rate_point,
    short,
)
from abliterate.report.wording import audited, explained, hardened, headline, repaired

#: Rows of a table at most.
_MOST = 300


def inspected(record: Record) -> Section | None:
    """The verdict, the strengths by block, and where the recovered direction separates."""
    part = record.inspection
    if part is None:
        return None
    figures = []
    if any(unit.edited for unit in part.units):
        figures.append(_strengths(part))
    if part.separation:
        figures.append(_separation(part))
    if part.behaviour is not None:
        figures.append(_behaviour(part))
    compared = "by itself" if part.base is None else f"beside {short(part.base, 80)}"
    return Section(
        "inspection",
        "Was a direction taken out?",
        [f"Inspected {compared}. {headline(part)}", *explained(part)],
        figures,
    )


def _strengths(part: InspectionPart) -> Figure:
    kinds = dict.fromkeys(unit.kind for unit in part.units)
    chart = {
        "kind": "lines",
        "least": 0,
        "log": False,
        "mark": [0, None],
        "series": [{"name": kind, "points": _points(part.units, kind)} for kind in kinds],
    }
    rows = [
        [
            unit.tensor or unit.kind,
            "–" if unit.block is None else str(unit.block),
            "yes" if unit.edited else "no",
            number(unit.strength, ".2f") if unit.edited else "–",
            number(unit.share, ".4f") if part.base is None else number(unit.size, ".4f"),
        ]
        for unit in part.units[:_MOST]
    ]
    last = "share along it" if part.base is None else "size of the change"
    more = f"{len(part.units) - _MOST} more in the record." if len(part.units) > _MOST else ""
    table = Table(["writer", "block", "edited", "strength", last], rows, more=more)
    note = "An estimate: 1 − √share, where 1 is an average direction." if part.base is None else ""
    return Figure("recovered-strengths", "Strength by block", table, chart, note)


def _points(units: list[WriterTracePart], kind: str) -> list[list[float | None]]:
    own = [unit for unit in units if unit.kind == kind and unit.block is not None]
    return [
        [float(unit.block or 0), round(unit.strength, 4) if unit.edited else 0.0]
        for unit in sorted(own, key=lambda unit: unit.block or 0)
    ]


def _separation(part: InspectionPart) -> Figure:
    names = ["own difference of means"]
    if part.separation[0].recovered is not None:
        names.insert(0, "recovered direction")
    series = [
        {
            "name": name,
            "points": [
                [layer.layer, layer.own if name.startswith("own") else layer.recovered] for layer in part.separation
            ],
        }
        for name in names
    ]
    chart = {"kind": "lines", "least": 0.5, "log": False, "mark": [0, None], "series": series}
    rows = [[str(layer.layer), number(layer.recovered), number(layer.own)] for layer in part.separation]
    title = f"Harmful against harmless prompts in {short(part.separation_in or '', 60)}, AUROC by layer"
    table = Table(["layer", "recovered direction", "own difference of means"], rows, words=frozenset())
    return Figure("recovered-separation", title, table, chart)


def _behaviour(part: InspectionPart) -> Figure:
    assert part.behaviour is not None
    rates = {name: getattr(part.behaviour, name) for name in ("harmful", "harmless", "borderline")}
    rates = {name: rate for name, rate in rates.items() if rate.n}
    chart = dots(
        list(rates),
        [dot_series("refused", [rate_point(rate) for rate in rates.values()], "after")],
        "% refused",
        least=0,
    )
    rows = [
        [name, f"{rate.refusals} of {rate.n}", number(percent(rate.rate), ".0f"), between(rate.ci95, 100, ".0f")]
        for name, rate in rates.items()
    ]
    return Figure(
        "inspected-behaviour", "Refusals of held-out prompts", Table(["set", "refused", "%", "95 %"], rows), chart
    )


def brittleness(record: Record) -> Section | None:
    """What is left of refusal under every plan of an audit."""
    part = record.audit
    if part is None:
        return None
    groups = ["nothing", *(f"{row.family} {row.name}" for row in part.rows)]
    points = [rate_point(part.base), *(rate_point(row.refused) for row in part.rows)]
    costs: list[Point] = [[0.0, 0.0, 0.0], *(estimate_point(row.kl) for row in part.rows)]
    rows = [
        [
            f"{row.family} {row.name}",
            f"{row.refused.refusals} of {row.refused.n}",
            f"{number(percent(row.refused.rate), '.0f')} {between(row.refused.ci95, 100, '.0f')}",
            f"{number(row.kl.value)} {between(row.kl.ci95)}",
            str(row.edits),
        ]
        for row in part.rows
    ]
    base = part.base
    rows.insert(0, ["nothing", f"{base.refusals} of {base.n}", f"{number(percent(base.rate), '.0f')}", "0", "0"])
    table = Table(["taken out", "refused", "% [95 %]", "KL [95 %]", "writers"], rows)
    left = dots(groups, [dot_series("harmful refused", points, "harmful")], "% refused", least=0)
    paid = dots(groups, [dot_series("KL", costs, "after")], "KL at the first token, nats", least=0)
    figures = [
        Figure("audit-rates", "Harmful prompts refused, by what is taken out", table, left),
        Figure("audit-kl", "What it costs harmless prompts, by what is taken out", table, paid),
    ]
    note = f"Protocol {part.protocol}; audits with the same one and the same prompts can be compared."
    return Section("audit", "How brittle is refusal?", [*audited(part), note], figures)


def changed_back(record: Record) -> Section | None:
    """What a repair restored, and how exactly."""
    if record.repair is None:
        return None
    return Section("repair", "How exact is the repair?", list(repaired(record.repair)))


def spread(record: Record) -> Section | None:
    """What spreading refusal over several directions is worth: audits of one protocol before and after."""
    part = record.hardening
    if part is None:
        return None
    after = {(row.family, row.name): row for row in part.after.rows}
    pairs = [(row, after[row.family, row.name]) for row in part.before.rows if (row.family, row.name) in after]
    series = [
        dot_series("before", [rate_point(part.before.base), *(rate_point(one.refused) for one, _ in pairs)], "before"),
        dot_series("after", [rate_point(part.after.base), *(rate_point(other.refused) for _, other in pairs)], "after"),
    ]
    chart = dots(["nothing", *(f"{one.family} {one.name}" for one, _ in pairs)], series, "% refused", least=0)
    rows = [
        [f"{one.family} {one.name}", *(f"{x.refusals} of {x.n}" for x in (one.refused, other.refused))]
        for one, other in pairs
    ]
    bases = (part.before.base, part.after.base)
    rows.insert(0, ["nothing", *(f"{base.refusals} of {base.n}" for base in bases)])
    table = Table(["taken out", "refused before", "refused after"], rows)
    title = "Harmful prompts refused before and after hardening, by what is taken out"
    return Section(
        "hardening",
        "Is the hardened model less brittle?",
        list(hardened(part)),
        [Figure("hardened", title, table, chart)],
    )
