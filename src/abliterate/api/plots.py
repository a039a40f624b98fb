"""Figures of results, by matplotlib (extra notebook). A notebook shows what is returned; nothing is shown here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from abliterate.report.wording import counted

if TYPE_CHECKING:
    from abliterate.api.results import DoseResponse, FoundDirection, Front


class Shown(Figure):
    """A figure that a notebook shows, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png", dpi=90)
        return drawn.getvalue()


_CHOSEN: dict[str, Any] = {"marker": "*", "s": 180, "color": "crimson", "zorder": 3, "label": "chosen"}


def found(result: FoundDirection) -> Figure:
    """AUROC of every site by layer, one line a position; below it the scores of the sites that were tried out."""
    rows = result.rows()
    figure = Shown(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for position in sorted({row["position"] for row in rows}, reverse=True):
        here = [row for row in rows if row["position"] == position]
        above.plot([row["layer"] for row in here], [row["auroc"] for row in here], label=f"position {position}", lw=1)
    site = next(row for row in rows if row["chosen"])
    above.scatter([site["layer"]], [site["auroc"]], **_CHOSEN)
    above.set(ylabel="AUROC, validation", title=f"Directions of {result.direction.model}")
    above.legend(fontsize="small", ncols=3)
    tried = sorted((row for row in rows if row["bypass"] is not None), key=lambda row: row["layer"])
    layers = [row["layer"] for row in tried]
    below.scatter(layers, [row["bypass"] for row in tried], label="bypass (low is good)", s=16)
    below.scatter(layers, [row["induce"] for row in tried], label="induce (high is good)", s=16)
    if site["bypass"] is not None:
        below.scatter([site["layer"]] * 2, [site["bypass"], site["induce"]], **{**_CHOSEN, "label": None})
    below.axhline(0, color="grey", lw=0.8)
    below.set(xlabel="layer", ylabel="refusal score, log-odds")
    below.legend(fontsize="small")
    return figure


def front(result: Front) -> Figure:
    """The first two objectives of every point; held-out values with their 95 % intervals beside."""
    across, up = (result.part.objectives[::-1] * 2)[:2] if len(result.part.objectives) > 1 else ("kl", "refusals")
    figure = Shown(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    _points(axes, [point.scores for point in result], across, up, "validation")
    held = [point.held_out for point in result if point.held_out is not None]
    if held:
        _points(axes, held, across, up, "held out")
        for point in result:
            if point.held_out is not None and point.intervals and up in point.intervals:
                low, high = point.intervals[up]
                axes.vlines(point.held_out[across], low, high, color="C1", lw=1)
    base = result.part.base
    axes.scatter([base[across] or 0], [base[up] or 0], marker="x", color="grey", label="unedited")
    axes.scatter([result.best.scores[across]], [result.best.scores[up]], **_CHOSEN)
    axes.set(xlabel=across, ylabel=up, title="Edits found; lower left is better")
    axes.legend(fontsize="small")
    return figure


def response(result: DoseResponse) -> Figure:
    """Rates by set with their 95 % intervals, and broken replies, against the coefficient; below it KL."""
    found = [row for row in result.rows() if row["coefficient"] is not None]
    rows, random = ([row for row in found if row["random"] == drawn] for drawn in (False, True))
    doses = [row["coefficient"] for row in rows]
    figure = Shown(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for place, name in enumerate(result.part.doses[0].behaviour):
        colour = {"harmful": "C3", "harmless": "C0"}.get(name, f"C{place}")
        known = [row for row in rows if row.get(name) is not None]
        x, y = [row["coefficient"] for row in known], [100 * row[name] for row in known]
        above.plot(x, y, marker="o", ms=4, lw=1.5, color=colour, label=counted(result.part, name))
        low, high = ([100 * row[f"{name}_{end}"] for row in known] for end in ("low", "high"))
        above.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    for name, colour in (("harmful", "C3"), ("harmless", "C0")):
        drawn = [row for row in random if row.get(name) is not None]
        x, y = [row["coefficient"] for row in drawn], [100 * row[name] for row in drawn]
        above.scatter(x, y, marker="x", color=colour, label=f"{name}, random direction" if drawn else None)
    above.plot(doses, [100 * row["broken"] for row in rows], marker=".", lw=1, color="grey", label="broken")
    above.set(ylabel="% of replies", ylim=(-3, 103), title=f"{result.part.operation}, by coefficient")
    above.legend(fontsize="small")
    below.plot(doses, [row["kl"] for row in rows], marker="o", ms=4, lw=1.5, color="C2")
    below.set(xlabel="coefficient", ylabel="KL, first token (nats)")
    return figure


def _points(axes: Any, scores: Any, across: str, up: str, label: str) -> None:
    ordered = sorted((one[across], one[up]) for one in scores)
    axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o", ms=4, lw=1, label=label)
