"""Figures of results, by matplotlib (extra notebook). A notebook shows what is returned; nothing is shown here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from abliterate.api.results import FoundDirection, Front


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


def _points(axes: Any, scores: Any, across: str, up: str, label: str) -> None:
    ordered = sorted((one[across], one[up]) for one in scores)
    axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o", ms=4, lw=1, label=label)
