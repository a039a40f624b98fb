"""What was found as it stands in the record, and the files of a search's points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.edit.direction import Direction, Site, save_direction
from abliterate.files.atomic import real_folder
from abliterate.files.checkpoint import FRONT
from abliterate.finding.find import Findings, shown_by_side
from abliterate.finding.search import Search
from abliterate.prompts.baselines import text_baselines
from abliterate.session import Session


def separation_part(
    session: Session, findings: Findings, site: Site, points: Mapping[str, Float[Tensor, "n 2"]]
) -> rec.SeparationPart:
    """How the classes separate at every site, and what `finding.projections` says of the prompts at one."""
    found, norms = findings.separation, findings.candidates.norms
    texts = {"harmful": session.prompts.harmful.val, "harmless": session.prompts.harmless.val}
    refuses = shown_by_side(session, findings)
    length, words = text_baselines(session.prompts)
    return rec.SeparationPart(
        sites=[
            rec.SeparatedPart(
                layer=layer,
                position=position,
                auroc=round(float(found.auroc[row, layer]), 5),
                dprime=round(float(found.dprime[row, layer]), 4),
                norm=round(float(norms[row, layer]), 5),
            )
            for row, position in enumerate(findings.candidates.positions)
            for layer in range(norms.shape[1])
        ],
        layer=site.layer,
        position=site.position,
        prompts=[
            rec.ProjectedPart(set=name, prompt=text, x=round(x, 4), y=round(y, 4), refused=refused)
            for name in ("harmful", "harmless")
            for text, (x, y), refused in zip(texts[name], points[name].tolist(), refuses[name], strict=True)
        ],
        length_auroc=round(length, 4),
        words_auroc=round(words, 4),
    )


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
