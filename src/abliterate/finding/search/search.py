"""The search itself: propose, measure, choose, measure again on prompts that nothing was chosen by."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.config import EditSettings, EvalSettings, FindSettings, OutputSettings, SearchSettings
from abliterate.edit.direction import Direction
from abliterate.edit.options import by_recipe
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.meter import Meter, Stage
from abliterate.finding.find import Findings
from abliterate.finding.search import gradient
from abliterate.finding.search import pareto as front
from abliterate.finding.search.blackbox import first_token_objectives, optimise
from abliterate.finding.search.objectives import OBJECTIVES, constrained, intervals, limits_of, objectives_named, values
from abliterate.finding.search.points import Point
from abliterate.finding.search.space import Space
from abliterate.model.anatomy import Anatomy
from abliterate.session import Session


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    `points` are those measured by replies, the first objective rising; `chosen` is an index into them, `why` says by
    what. `base` and `base_held_out` are the unedited model's values, `limits` the constraints in numbers.
    `evaluations` counts measured edits by stage, `seconds` is until the choice, without the held-out prompts.
    """

    method: str
    objectives: tuple[str, ...]
    constraints: str
    limits: Mapping[str, float]
    points: tuple[Point, ...]
    chosen: int
    why: str
    base: Mapping[str, float]
    base_held_out: Mapping[str, float] | None
    evaluations: Mapping[str, int]
    seconds: float

    @property
    def point(self) -> Point:
        """The chosen point."""
        return self.points[self.chosen]

    def on_front(self) -> list[int]:
        """Indices of points that no other is better than in all objectives."""
        return front.nondominated([_values(point.scores, self.objectives) for point in self.points])

    def feasible(self, point: Point) -> bool:
        """Whether a point keeps the constraints."""
        return all(point.scores[name] <= most for name, most in self.limits.items())


def method_of(
    settings: SearchSettings, finding: FindSettings, editing: EditSettings, output: OutputSettings | None = None
) -> str:
    """The method that settings ask for. `auto` is the gradient, unless the edit is fixed or cannot be had by it."""
    if settings.method != "auto":
        return settings.method
    fixed = editing.strength != EditSettings().strength or editing.strengths or editing.affine
    other = finding.subspace == "leace" or (output is not None and output.realisation == "control-vector")
    return "closed-form" if fixed or other else "gradient"


def check_search(settings: SearchSettings, method: str, finding: FindSettings, editing: EditSettings) -> None:
    """Raise what a search would raise, before hours of work.

    Raises `UsageError` for objectives and constraints that cannot be read, and for options that do not go together.
    """
    if method == "closed-form":
        return
    objectives_named(settings.objectives)
    constrained(settings.constraints)
    if editing.affine or finding.subspace == "leace":
        raise UsageError(f"--method {method}: an affine or LEACE edit cannot be searched; give --method closed-form")
    if editing.strength <= 0:
        raise UsageError(f"--strength {editing.strength:g}: nothing to search; give --method closed-form")
    if method != "gradient" and importlib.util.find_spec("optuna") is None:
        raise UsageError(f"--method {method}: it needs an extra; pip install 'abliterate[search]'")


def search(
    session: Session,
    findings: Findings,
    start: Direction,
    settings: SearchSettings,
    method: str,
    judge: Judge,
    *,
    finding: FindSettings = FindSettings(),
    editing: EditSettings = EditSettings(),
    evaluating: EvalSettings = EvalSettings(),
    seed: int = 0,
    journal: Path | None = None,
    norms: bool = True,
    force: bool = False,
) -> Search:
    """Search from `start`. `norms`: edits may be norm-preserving.

    Raises `UsageError` for settings that do not go together, `GateNotMet` when no point keeps the constraints.
    """
    began, monitor = time.perf_counter(), session.monitor
    named, limited = objectives_named(settings.objectives), constrained(settings.constraints)
    wanted = tuple(dict.fromkeys((*named, *limited, OBJECTIVES["kl"])))
    names = tuple(objective.name for objective in named)
    tokens = [token.token for token in findings.tokens]
    editing = within(session.anatomy, editing)
    with monitor.phase("measure the unedited model"):
        short = evaluating.model_copy(update={"max_new_tokens": settings.search_tokens})
        meter = Meter(session, tokens, judge, short)
        base = values(meter.measure(None, Stage.REPLIES), wanted)
        monitor.note(f"unedited: {_said(base)}")
    limits = limits_of(settings.constraints, base) | {"kl": finding.max_kl}
    attempt = _Attempt(session, meter, tokens, start, settings, finding, editing, seed, journal, norms)
    proposals = attempt.propose(method)
    stage = max(Stage.REPLIES, *(objective.stage for objective in wanted))
    measured = []
    with monitor.phase("measure points by replies", len(proposals)) as advance:
        for direction, origin in proposals:
            found = meter.measure(session.plan(direction), stage)
            measured.append(Point(direction, origin, values(found, wanted), stage))
            monitor.note(f"{origin}: {_said(measured[-1].scores)}")
            advance(1)
    points = tuple(sorted(measured, key=lambda point: _values(point.scores, names)))
    counts = {stage.name.lower(): count for stage, count in meter.counts.items()}
    seconds = time.perf_counter() - began
    result = Search(method, names, settings.constraints, limits, points, 0, "", base, None, counts, seconds)
    try:
        result = choose(result, settings, finding)
    except GateNotMet as gate:
        if not force:
            raise
        monitor.warn(f"{gate} (forced)")
        result = choose(replace(result, limits={}), settings.model_copy(update={"max_refusals": None}), FindSettings())
    monitor.note(f"chosen: point {result.chosen + 1} ({result.why}), {_said(result.point.scores)}")
    if settings.no_held_out:
        return result
    with monitor.phase("measure points on held-out prompts", len(points) + 1) as advance:
        return _held_out(result, Meter(session, tokens, judge, evaluating, "test"), advance)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the methods work with."""

    session: Session
    meter: Meter
    tokens: Sequence[int]
    start: Direction
    settings: SearchSettings
    finding: FindSettings
    editing: EditSettings
    seed: int
    journal: Path | None
    norms: bool

    def propose(self, method: str) -> list[tuple[Direction, str]]:
        """Directions that may lie on the front, with where each comes from; at most as many as there are points."""
        if method == "closed-form":
            return [(by_recipe(self.session.anatomy, self.start, self.editing), "closed form")]
        refined = self._descend() if method in ("gradient", "both") else []
        if method == "gradient":
            return refined
        trials = self._trials([direction for direction, _ in refined])
        tried = [trial for trial in trials if trial.stage == Stage.ALL]
        scores = [_values(trial.scores, first_token_objectives(self.settings.objectives)) for trial in tried]
        best = front.nondominated(scores)
        kept = [best[i] for i in front.thin([scores[i] for i in best], self.settings.points)]
        return refined + [(tried[i].direction, tried[i].origin) for i in kept]

    def _descend(self) -> list[tuple[Direction, str]]:
        settings = self.settings
        way = gradient.legs(settings.points, settings.steps)
        with self.session.monitor.phase("descend the gradient", sum(leg.steps for leg in way)) as advance:
            found = gradient.descend(
                self.session,
                self.tokens,
                self.start,
                self.editing,
                way,
                refine=not settings.keep_direction,
                seed=self.seed,
                progress=advance,
            )
        return [
            (direction, f"gradient, weight of KL {leg.weight:.3g}") for direction, leg in zip(found, way, strict=True)
        ]

    def _trials(self, refined: Sequence[Direction]) -> list[Point]:
        if self.start.candidates is None:
            raise UsageError("search: expected a direction with candidates at every site, found none; see `find`")
        session, editing = self.session, self.editing
        space = Space(
            session.anatomy,
            self.start.candidates,
            self.finding,
            editing,
            extra=refined,
            variants=self.norms,
        )
        known = tuple(
            OBJECTIVES[name] for name in dict.fromkeys([*first_token_objectives(self.settings.objectives), "kl"])
        )

        def measure(direction: Direction, stage: Stage) -> dict[str, float]:
            return values(self.meter.measure(session.plan(direction), stage), known)

        with session.monitor.phase("trials of the black box", self.settings.trials) as advance:
            return optimise(
                measure,
                space,
                self.settings,
                constraints={"kl": self.finding.max_kl},
                seed=self.seed,
                journal=self.journal,
                seeds=[found for direction in refined if (found := space.encode(direction)) is not None],
                facts=self._facts(),
                progress=advance,
            )

    def _facts(self) -> dict[str, Any]:
        """What scores depend on beside the settings of the search: a search cannot go on with other ones."""
        session = self.session
        return {
            "model": session.loaded.files.name,
            "dtype": str(session.loaded.dtype),
            "prompts": session.prompts.sha256,
            "rendering": [session.loading.system, session.loading.chat_template],
            "tokens": self.tokens,
        }


def within(anatomy: Anatomy, editing: EditSettings) -> EditSettings:
    """The writers that are searched: those asked for, else all of blocks from a quarter of the depth on.

    Edits of the first quarter and of the embedding gain nothing that was measurable, and they cost.
    """
    if editing.layers is not None or editing.components is not None or editing.untie:
        return editing
    return editing.model_copy(update={"layers": f"{anatomy.layers // 4}-"})


def choose(result: Search, settings: SearchSettings, finding: FindSettings = FindSettings()) -> Search:
    """The same points with one chosen: picked by number, by `--max-refusals` or `--max-kl`, or the knee.

    Raises `UsageError` when there is no point of that number, `GateNotMet` when none keeps what is asked for.
    """
    if settings.pick is not None and settings.pick != "knee":
        number = int(settings.pick)
        if number > len(result.points):
            raise UsageError(f"--pick {number}: expected a point from 1 to {len(result.points)}")
        return replace(result, chosen=number - 1, why="picked")
    asked = {}
    if settings.max_refusals is not None:
        asked["refusals"] = settings.max_refusals
    if finding.max_kl != FindSettings().max_kl:
        asked["kl"] = finding.max_kl
    feasible = [result.feasible(point) for point in result.points]
    if not any(feasible):  # for the sake of its message
        names = tuple(dict.fromkeys((*result.objectives, *asked, *result.limits)))
        scores = [_values(point.scores, names) for point in result.points]
        front.choose(scores, names, {**result.limits, **asked})
    names = tuple(dict.fromkeys((*result.objectives, *asked)))
    scores = [
        _values(point.scores, names) if kept else (math.nan,) * len(names)
        for point, kept in zip(result.points, feasible, strict=True)
    ]
    best = front.choose(scores, names, asked)
    why = ", ".join(f"--max-{name} {most:g}" for name, most in asked.items()) or "knee"
    return replace(result, chosen=best, why=why)


def _held_out(result: Search, meter: Meter, progress: Callable[[int], None]) -> Search:
    """The same with all points measured on held-out prompts."""
    names = [OBJECTIVES[name] for name in result.point.scores]
    stage = max(Stage.REPLIES, *(objective.stage for objective in names))
    base = values(meter.measure(None, Stage.REPLIES), names)
    progress(1)
    points = []
    for point in result.points:
        found = meter.measure(meter.session.plan(point.direction), stage)
        points.append(replace(point, held_out=values(found, names), intervals=intervals(found, names)))
        progress(1)
    return replace(result, points=tuple(points), base_held_out=base)


def _values(scores: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    return tuple(scores[name] for name in names)


def _said(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
