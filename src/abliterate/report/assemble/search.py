"""A search as it stands in the record, and the files of its points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from abliterate import record as rec
from abliterate.edit.direction import Direction, save_direction
from abliterate.files.atomic import real_folder
from abliterate.files.checkpoint import FRONT
from abliterate.finding.search import Search


def search_part(result: Search) -> rec.SearchPart:
    """The search as it stands in the record."""
    on_front = result.on_front()
    return rec.SearchPart(
        method=result.method,
        objectives=list(result.objectives),
        constraints=result.constraints,
        limits=dict(result.limits),
        base=_finite(result.base),
        base_held_out=None if result.base_held_out is None else _finite(result.base_held_out),
        points=[
            rec.PointPart(
                number=number + 1,
                origin=point.origin,
                file=point_file(number + 1),
                scores=_finite(point.scores),
                held_out=None if point.held_out is None else _finite(point.held_out),
                intervals=dict(point.intervals or {}),
                feasible=result.feasible(point),
                on_front=number in on_front,
            )
            for number, point in enumerate(result.points)
        ],
        chosen=result.chosen + 1,
        why=result.why,
        evaluations=dict(result.evaluations),
        seconds=round(result.seconds, 1),
        prompts=result.prompts,
    )


def point_file(number: int) -> str:
    """Where the direction of a point lies in OUT."""
    return f"{FRONT}/{number:02}.safetensors"


def save_points(result: Search, folder: Path, start: Direction) -> None:
    """Write the direction of every point below `folder`; each can be applied by itself.

    Candidates are kept only where the edit needs them. What the file says of model and prompts is what `start` says.
    """
    part = search_part(result)
    kept = {point.file for point in part.points}
    real_folder(folder / FRONT)
    for old in sorted((folder / FRONT).glob("*.safetensors")):  # of a search that was here before
        if f"{FRONT}/{old.name}" not in kept:
            old.unlink()
    for point, said in zip(result.points, part.points, strict=True):
        direction, recipe = point.direction, point.direction.recipe
        if recipe is None or not recipe.biprojected:
            direction = replace(direction, candidates=None)
        own = {"search": said.model_dump(mode="json", exclude={"file", "feasible", "on_front"})}
        direction = with_origin_of(direction, start)
        save_direction(folder / point_file(said.number), replace(direction, facts={**direction.facts, **own}))


def with_origin_of(direction: Direction, start: Direction) -> Direction:
    """A direction that a search made, with what is known of the one that it began with."""
    return replace(
        direction, site=start.site, model=start.model, learnt_from=start.learnt_from, facts=dict(start.facts)
    )


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: rec.finite(value) for name, value in values.items()}
