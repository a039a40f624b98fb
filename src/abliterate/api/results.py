"""What `find`, `search` and `sweep` give: a direction and its sites, edits to pick from, behaviour by coefficient."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from abliterate.api.show import as_html, as_text, table_html
from abliterate.edit.direction import Direction, Site, save_direction
from abliterate.errors import UsageError
from abliterate.finding.find import Findings
from abliterate.finding.search.points import Point
from abliterate.record import SearchPart, SelectionPart, SteeringPart
from abliterate.report.wording import repeated

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, repr=False)
class FoundDirection:
    """A direction, every site it was chosen among, and how it was chosen.

    `direction` goes wherever a direction is taken. `selection` has the scores of the sites that were tried out by
    intervention, `findings` the refusal tokens, all candidates, and how well each separates the two sets.
    """

    direction: Direction
    selection: SelectionPart
    findings: Findings

    @property
    def site(self) -> Site:
        """Where it was measured."""
        assert self.direction.site is not None
        return self.direction.site

    @property
    def passed(self) -> bool:
        """Whether it met the rule: bypasses, induces, costs little KL."""
        return self.selection.met_rule

    def rows(self) -> list[dict[str, Any]]:
        """One row for each site: layer, position, norm (‖r‖), auroc and dprime on validation prompts.

        Of the sites that were tried out also bypass and induce (mean refusal scores, log-odds) and kl (nats). `chosen`
        marks the one that was taken.
        """
        sites = [*self.selection.candidates, *([] if self.selection.chosen is None else [self.selection.chosen])]
        tried = {(one.layer, one.position): one for one in sites}
        separation, norms = self.findings.separation, self.findings.candidates.norms
        rows = []
        for row, position in enumerate(self.findings.candidates.positions):
            for layer in range(norms.shape[1]):
                one = tried.get((layer, position))
                found: dict[str, Any] = {
                    "layer": layer,
                    "position": position,
                    "norm": float(norms[row, layer]),
                    "auroc": float(separation.auroc[row, layer]),
                    "dprime": float(separation.dprime[row, layer]),
                }
                found |= {name: None if one is None else getattr(one, name) for name in ("bypass", "induce", "kl")}
                rows.append({**found, "chosen": (layer, position) == tuple(self.site)})
        return rows

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a frame (needs the extra notebook)."""
        return frame(self.rows())

    def plot(self) -> Figure:
        """AUROC by layer, and bypass, induce and KL of the sites that were tried out (needs the extra notebook)."""
        figure: Figure = plots().found(self)
        return figure

    def save(self, path: str | PathLike[str]) -> None:
        """Write the direction file, with all candidates."""
        save_direction(path, self.direction)  # type: ignore[arg-type] # a text is a path too

    def __repr__(self) -> str:
        """In a line."""
        chosen = self.selection.chosen
        scores = (
            "" if chosen is None else f", bypass {chosen.bypass:.2f}, induce {chosen.induce:.2f}, KL {chosen.kl:.3f}"
        )
        return (
            f"FoundDirection(layer {self.site.layer}, position {self.site.position} of "
            f"{self.direction.model}{scores}{'' if self.passed else ', not passed'})"
        )

    def _repr_html_(self) -> str:
        """The sites that were tried out, best first, the chosen one marked."""
        tried = [row for row in self.rows() if row["bypass"] is not None]
        tried.sort(key=lambda row: (not row["chosen"], float(row["bypass"])))
        names = [name for name in tried[0] if name != "chosen"] if tried else []
        return f"<p>{repr(self)[15:-1]}</p>" + table_html(names, [[row[n] for n in names] for row in tried[:12]], 0)


@dataclass(frozen=True, slots=True, repr=False)
class Front(Sequence[Point]):
    """Edits between none and the closed form, from strong to light: each a `Point` with what it scored.

    `front[0]` is the first; `best` the one that was chosen. A point goes wherever a direction is taken. `part` is the
    search as it stands in a record.
    """

    points: tuple[Point, ...]
    chosen: int
    part: SearchPart

    @property
    def best(self) -> Point:
        """The chosen point."""
        return self.points[self.chosen]

    def __len__(self) -> int:
        """How many points."""
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Point, ...]: ...
    def __getitem__(self, index: int | slice) -> Point | tuple[Point, ...]:
        """A point by its place, counted from 0 as everywhere in Python (`--pick` counts from 1)."""
        return self.points[index]

    def __iter__(self) -> Iterator[Point]:
        """The points in order."""
        return iter(self.points)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point: its scores on validation prompts, and on held-out ones where they were measured."""
        rows = []
        for index, point in enumerate(self.points):
            row: dict[str, Any] = {"point": index, "chosen": index == self.chosen, **point.scores}
            row |= {f"held_out_{name}": value for name, value in (point.held_out or {}).items()}
            rows.append({**row, "origin": point.origin})
        return rows

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a frame (needs the extra notebook)."""
        return frame(self.rows())

    def plot(self) -> Figure:
        """The objectives against each other, with intervals where they are known (needs the extra notebook)."""
        figure: Figure = plots().front(self)
        return figure

    def __repr__(self) -> str:
        """In a line."""
        scores = ", ".join(f"{name} {value:.3g}" for name, value in self.best.scores.items())
        return f"Front({len(self)} points, best [{self.chosen}]: {scores})"

    def __str__(self) -> str:
        """The points as a table."""
        return as_text(self.part) or repr(self)

    def _repr_html_(self) -> str | None:
        """The same for a notebook."""
        return as_html(self.part)


@dataclass(frozen=True, slots=True, repr=False)
class DoseResponse:
    """What a steering does by coefficient. `part` is the same as it stands in a record, with all replies."""

    part: SteeringPart

    def rows(self) -> list[dict[str, Any]]:
        """One row for each coefficient, the model as it is (None) first, and last those of a `random` direction.

        By set of prompts the rate of what the judge counts (`harmful`, `harmless`, with `_low` and `_high` of the 95 %
        interval) and the mean refusal score of first tokens (`_score`, log-odds); `kl` of the first token (nats), and
        the shares of `broken` replies and of `repeated` 4-grams.
        """
        rows = []
        for place, one in enumerate((*self.part.doses, *self.part.control)):
            row: dict[str, Any] = {"coefficient": one.coefficient, "random": place >= len(self.part.doses)}
            for name, rate in one.behaviour.items():
                row |= {name: rate.rate, f"{name}_low": rate.ci95[0], f"{name}_high": rate.ci95[1]}
                row[f"{name}_score"] = one.score.get(name)
            rates = one.behaviour.values()
            count = sum(rate.n for rate in rates)
            broken = sum(rate.degenerate for rate in rates) / count if count else None
            rows.append({**row, "kl": one.kl.value, "broken": broken, "repeated": repeated(one)})
        return rows

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a frame (needs the extra notebook)."""
        return frame(self.rows())

    def plot(self) -> Figure:
        """Rates and KL against the coefficient (needs the extra notebook)."""
        figure: Figure = plots().response(self)
        return figure

    def __repr__(self) -> str:
        """In a line."""
        doses = [one.coefficient for one in self.part.doses if one.coefficient is not None]
        return f"DoseResponse({self.part.operation} at layers {self.part.layers}, coefficients {doses})"

    def __str__(self) -> str:
        """The table."""
        return as_text(self.part) or repr(self)

    def _repr_html_(self) -> str | None:
        """The same for a notebook."""
        return as_html(self.part)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a pandas frame. Raises `UsageError` without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise _without("pandas") from error
    made: pd.DataFrame = pandas.DataFrame(rows)
    return made


def plots() -> Any:
    """The module that draws. Raises `UsageError` without matplotlib."""
    try:
        return importlib.import_module("abliterate.api.plots")
    except ImportError as error:
        raise _without("matplotlib") from error


def _without(library: str) -> UsageError:
    return UsageError(f"it needs {library}: pip install 'abliterate[notebook]'")
