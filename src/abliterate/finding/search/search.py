"""The search itself: propose, measure, choose; and measure again on prompts that nothing was chosen by."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from abliterate.config import EditSettings, FindSettings, OutputSettings, RunSettings, SearchSettings
from abliterate.edit.direction import Direction
from abliterate.edit.options import by_recipe
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.examine import Evaluation, Sets
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.probe import Level, Measured, Probe
from abliterate.finding.find import Findings
from abliterate.finding.search import gradient, pareto
from abliterate.finding.search.blackbox import Journal, first_token_objectives, optimise
from abliterate.finding.search.objectives import (
    OBJECTIVES,
    Objective,
    constrained,
    intervals,
    limits_of,
    objectives_named,
    values,
    with_keep,
)
from abliterate.finding.search.points import Point
from abliterate.finding.search.space import Space
from abliterate.model.anatomy import Anatomy
from abliterate.monitor import Monitor, ranks
from abliterate.prompts import Behaviour
from abliterate.session import Session

#: Edits that leave at most this share of refusals are alike good: of these, the one with the least damage is chosen.
ENOUGH = 0.05


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    `points` are those measured by replies, the first objective rising; `chosen` is an index into them, `why` says by
    what. `base` and `base_held_out` are the unedited model's values, `limits` the constraints in numbers. Values on
    held-out prompts are there once they were measured (`held_out`, `evaluated`).
    `evaluations` counts measured edits by level, `seconds` is until the choice, `prompts` are the harmful validation
    prompts that rates are shares of.
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
    prompts: int = 0

    @property
    def point(self) -> Point:
        """The chosen point."""
        return self.points[self.chosen]

    def on_front(self) -> list[int]:
        """Indices of points that no other is better than in all objectives."""
        return pareto.nondominated([_values(point.scores, self.objectives) for point in self.points])

    def feasible(self, point: Point) -> bool:
        """Whether a point keeps the constraints."""
        return all(point.scores[name] <= most for name, most in self.limits.items())


def method_of(
    settings: SearchSettings,
    finding: FindSettings,
    editing: EditSettings,
    output: OutputSettings | None = None,
    *,
    behaviour: Behaviour | None = None,
) -> str:
    """The method that settings ask for. `auto` is the gradient, unless the edit is fixed or cannot be had by it.

    Raises `UsageError` for a search that first tokens would have to guide, where they do not tell the behaviour; of
    pairs the gradient is guided by whole replies.
    """
    if behaviour is not None and not behaviour.shows.first_tokens and finding.refusal_tokens is None:
        known = ("auto", "closed-form", *(["gradient"] if behaviour.paired else []))
        if settings.method not in known:
            raise UsageError(
                f"--method {settings.method}: it is guided by first tokens, and the behaviour does not show in them; "
                "give --refusal-tokens, or --method closed-form"
            )
        if scores := [name for name in ("refusal-score", "over-refusal-score") if name in settings.objectives]:
            raise UsageError(f"--objectives {scores[0]}: first tokens do not tell the behaviour; leave it out")
        if not behaviour.paired:
            return "closed-form"
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
    judge: Judge,
    settings: RunSettings,
    method: str,
    journal: Journal | None = None,
) -> Search:
    """Search from `start`; every trial of a black box is on disk at once where there is a `journal`.

    Raises `UsageError` for settings that do not go together, `GateNotMet` when no point keeps the constraints.
    """
    began, monitor, searching = time.perf_counter(), session.monitor, settings.searching
    constraints = with_keep(searching.constraints, session.prompts.keep is not None)
    named, limited = objectives_named(searching.objectives), constrained(constraints)
    wanted = tuple(dict.fromkeys((*named, *limited, OBJECTIVES["kl"])))
    with monitor.phase("measure the unedited model"):
        behaviour = session.prompts.behaviour
        longest = searching.search_tokens if findings.ids else max(searching.search_tokens, behaviour.shows.tokens)
        short = settings.evaluating.model_copy(update={"max_new_tokens": longest})
        probe = Probe(session, findings.ids, "plain val" if behaviour.paired else "val", judge, short)
        base = values(probe.measure(None, Level.REPLIES), wanted)
        monitor.note(f"unedited: {_worded(base)}")
    attempt = _Attempt(probe, start, settings, within(session.anatomy, settings.editing), journal)
    points = _measured(probe, attempt.propose(method), wanted)
    names = tuple(objective.name for objective in named)
    result = Search(
        method,
        names,
        constraints,
        limits_of(constraints, base) | {"kl": settings.finding.max_kl},
        tuple(sorted(points, key=lambda point: _values(point.scores, names))),
        0,
        "",
        base,
        None,
        {level.name.lower(): count for level, count in probe.counts.items()},
        time.perf_counter() - began,
        len(probe.harmful),
    )
    return _chosen(result, settings, monitor)


def _measured(probe: Probe, proposals: Sequence[tuple[Direction, str]], wanted: Sequence[Objective]) -> list[Point]:
    """Proposals as points, with what they score by replies on validation prompts."""
    session, points = probe.session, []
    level = max(Level.REPLIES, *(objective.level for objective in wanted))
    with session.monitor.phase("measure points by replies", len(proposals)) as advance:
        for direction, origin in proposals:
            found = probe.measure(session.plan(direction), level, harmful=any(o.scores for o in wanted))
            points.append(Point(direction, origin, values(found, wanted), level))
            session.monitor.note(f"{origin}: {_worded(points[-1].scores)}")
            advance(1)
    return points


def _chosen(result: Search, settings: RunSettings, monitor: Monitor) -> Search:
    """The same with a point chosen; where none keeps the constraints and it is forced, without them."""
    try:
        result = choose_point(result, settings.searching)
    except GateNotMet as gate:
        if settings.output is None or not settings.output.force:
            raise
        monitor.warn(f"{gate} (forced)")
        free = settings.searching.model_copy(update={"max_refusals": None})
        result = choose_point(replace(result, limits={}), free)
    monitor.note(f"chosen: point {result.chosen + 1} ({result.why}), {_worded(result.point.scores)}")
    return result


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the methods work with; `editing` names the writers that are searched."""

    probe: Probe
    start: Direction
    settings: RunSettings
    editing: EditSettings
    journal: Journal | None

    @property
    def session(self) -> Session:
        """The session that edits are measured in."""
        return self.probe.session

    def propose(self, method: str) -> list[tuple[Direction, str]]:
        """Directions that may lie on the front, with where each comes from; at most as many as there are points."""
        searching = self.settings.searching
        if method == "closed-form":
            return [(by_recipe(self.session.anatomy, self.start, self.editing), "closed form")]
        refined = self._descend() if method in ("gradient", "both") else []
        if method == "gradient":
            return refined
        trials = self._trials([direction for direction, _ in refined])
        tried = [trial for trial in trials if trial.level == Level.ALL]
        scores = [_values(trial.scores, first_token_objectives(searching.objectives)) for trial in tried]
        best = pareto.nondominated(scores)
        kept = [best[i] for i in pareto.thin([scores[i] for i in best], searching.points)]
        return refined + [(tried[i].direction, tried[i].origin) for i in kept]

    def _descend(self) -> list[tuple[Direction, str]]:
        searching = self.settings.searching
        refine = not searching.keep_direction
        weights = gradient.weights_for(self.session, self.editing, refine=refine)
        way = gradient.legs(searching.points, searching.steps, weights=weights)
        with self.session.monitor.phase("descend the gradient", sum(leg.steps for leg in way)) as advance:
            directions = gradient.descend(
                self.session,
                self.probe.tokens,
                self.start,
                self.editing,
                way,
                refine=refine,
                progress=advance,
            )
        pairs = zip(directions, way, strict=True)
        return [(direction, f"gradient, weight of KL {leg.weight:.3g}") for direction, leg in pairs]

    def _trials(self, refined: Sequence[Direction]) -> list[Point]:
        if self.start.candidates is None:
            raise UsageError("search: expected a direction with candidates at every site, found none; see `find`")
        session, searching, output = self.session, self.settings.searching, self.settings.output
        norms = output is None or output.of_model
        space = Space(
            session.anatomy,
            self.start.candidates,
            self.settings.finding,
            self.editing,
            extra=refined,
            variants=norms,
        )
        names = dict.fromkeys([*first_token_objectives(searching.objectives), "kl"])
        known = tuple(OBJECTIVES[name] for name in names)

        def measure(direction: Direction, level: Level) -> dict[str, float]:
            return values(self.probe.measure(session.plan(direction), level), known)

        with session.monitor.phase("trials of the black box", searching.trials) as advance:
            return optimise(
                measure,
                space,
                searching,
                constraints={"kl": self.settings.finding.max_kl},
                seed=session.seed,
                journal=None if self.journal is None else replace(self.journal, facts=self._facts()),
                seeds=[encoded for direction in refined if (encoded := space.encode(direction)) is not None],
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
            "tokens": self.probe.tokens,
        }


def within(anatomy: Anatomy, editing: EditSettings) -> EditSettings:
    """The writers that are searched: those asked for, else all of blocks from a quarter of the depth on.

    Edits of the first quarter and of the embedding gain nothing that was measurable, and they cost.
    """
    if editing.layers is not None or editing.components is not None or editing.untie:
        return editing
    return editing.model_copy(update={"layers": f"{anatomy.layers // 4}-"})


def choose_point(result: Search, settings: SearchSettings) -> Search:
    """The same points with one chosen.

    Of those that keep the limits: the one picked by number; else the least damage among points that refuse little
    enough, which is at most `--max-refusals`, or `ENOUGH`; where none does, at most the least that was reached and one
    standard error of it. The knee where it is picked, and where refusals are no objective.

    Raises `UsageError` when there is no point of that number, `GateNotMet` when none keeps what is asked for.
    """
    chosen, why = _choice(result, settings)
    return replace(result, chosen=ranks.agreed(chosen), why=ranks.agreed(why))


def _choice(result: Search, settings: SearchSettings) -> tuple[int, str]:
    """The index of the point that is chosen, and why."""
    if settings.pick is not None and settings.pick != "knee":
        number = int(settings.pick)
        if number > len(result.points):
            raise UsageError(f"--pick {number}: expected a point from 1 to {len(result.points)}")
        return number - 1, "picked"
    feasible = [point for point in result.points if result.feasible(point)]
    wanted = {} if settings.max_refusals is None else {"refusals": settings.max_refusals}
    if not feasible:  # for the sake of its message
        names = tuple(dict.fromkeys((*result.objectives, *wanted, *result.limits)))
        scores = [_values(point.scores, names) for point in result.points]
        pareto.choose_index(scores, names, {**result.limits, **wanted})
    wanted, why = _wanted(result, settings, feasible)
    names = tuple(dict.fromkeys((*result.objectives, *wanted)))
    scores = [
        _values(point.scores, names) if point in feasible else (math.nan,) * len(names) for point in result.points
    ]
    return pareto.choose_index(scores, names, wanted), why


def _wanted(result: Search, settings: SearchSettings, feasible: Sequence[Point]) -> tuple[dict[str, float], str]:
    """The most that objectives of the chosen point may be, and why it is chosen, in words."""
    if settings.max_refusals is not None:
        return {"refusals": settings.max_refusals}, f"--max-refusals {settings.max_refusals:g}"
    rates = [rate for point in feasible if math.isfinite(rate := point.scores.get("refusals", math.nan))]
    if settings.pick == "knee" or "refusals" not in result.objectives or not rates:
        return {}, "knee"
    damage = next(name for name in result.objectives if name != "refusals")
    least = min(rates)
    if least <= ENOUGH:
        return {"refusals": ENOUGH}, f"the least {damage} of those with at most {100 * ENOUGH:.0f} % refusals"
    most = least + math.sqrt(least * (1 - least) / max(1, result.prompts))
    return {"refusals": most}, (
        f"the least {damage} of those with at most {100 * most:.1f} % refusals: the fewest, {100 * least:.1f} %, and "
        "its standard error"
    )


def held_out(result: Search, probe: Probe, numbers: Collection[int]) -> Search:
    """The same with the points at some indices measured on the probe's held-out prompts, as hooks."""
    names, level = _measured_by(result)
    points = list(result.points)
    with probe.session.monitor.phase("measure points on held-out prompts", len(numbers) + 1) as advance:
        base = values(probe.measure(None, Level.REPLIES), names)
        advance(1)
        for number in numbers:
            plan = probe.session.plan(points[number].direction)
            found = probe.measure(plan, level, harmful=any(objective.scores for objective in names))
            points[number] = _with_held_out(points[number], found, names)
            advance(1)
    return replace(result, points=tuple(points), base_held_out=base)


def evaluated(result: Search, probe: Probe, states: tuple[ModelState, ModelState], found: Evaluation) -> Search:
    """The same with the held-out values of the chosen point, which was evaluated: its replies are asked for only once.

    `states` are those whose replies are the evaluation's before and after.
    """
    if found.after is None:
        return result
    names, level = _measured_by(result)
    with probe.session.monitor.phase("measure the chosen point on held-out prompts"):
        reads = any(objective.scores for objective in names)
        replies = _with_keep(probe, found.before), _with_keep(probe, found.after)
        base, after = probe.measure_replies(states, replies, level, harmful=reads)
    points = list(result.points)
    points[result.chosen] = _with_held_out(result.point, after, names)
    return replace(result, points=tuple(points), base_held_out=values(base, names))


def _with_keep(probe: Probe, replies: Sets) -> Sets:
    """Replies of an evaluation as a probe calls them: the third set, where the behaviour is to stay, is `keep`."""
    return replies if probe.session.prompts.keep is None else {**replies, "keep": replies["borderline"]}


def _measured_by(result: Search) -> tuple[list[Objective], Level]:
    """The objectives that points have, and the level at which all of them are known."""
    names = [OBJECTIVES[name] for name in result.point.scores]
    return names, max(Level.REPLIES, *(objective.level for objective in names))


def _with_held_out(point: Point, found: Measured, names: Sequence[Objective]) -> Point:
    return replace(point, held_out=values(found, names), intervals=intervals(found, names))


def _values(scores: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    return tuple(scores[name] for name in names)


def _worded(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
