"""Proof by intervention: without a direction the model stops refusing, without a random one it does not."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch import Tensor

from abliterate.config import EditSettings, EvalSettings, FindSettings
from abliterate.edit.direction import Direction, chosen_site
from abliterate.edit.options import caveat
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.examine import answers_of, as_loaded, examiner_of, random_plan
from abliterate.evaluation.judging import Tally
from abliterate.evaluation.judging.choice import open_judge
from abliterate.evaluation.results import Subject
from abliterate.finding.find import refusal_tokens
from abliterate.finding.refusal_tokens import RefusalToken
from abliterate.finding.selection import Scorer, Site
from abliterate.monitor import Monitor
from abliterate.session import Session


@dataclass(frozen=True, slots=True)
class Verification:
    """What ablating a direction at inference time does: refusals among held-out harmful prompts, and scores.

    `induce` is None for a direction whose layer is not known, or is no block's input.
    """

    before: Tally
    after: Tally
    control: Tally
    bypass: float
    bypass_before: float
    bypass_control: float
    induce: float | None
    induce_before: float
    kl: float
    tokens: tuple[RefusalToken, ...]
    verified: bool


def verify(
    session: Session,
    direction: Direction,
    *,
    site: Site | None = None,
    editing: EditSettings = EditSettings(),
    finding: FindSettings = FindSettings(),
    evaluating: EvalSettings = EvalSettings(),
    seed: int = 0,
) -> Verification:
    """Ablate a direction with hooks and see whether the model stops refusing; a random direction is the control.

    Verified means: at most half of the refusals are left, the control leaves more than half, and KL is within the
    rule.
    """
    judge = open_judge(evaluating.judge, device=session.loading.device)
    chosen = at_site(direction, site, session.anatomy.d_model)
    plan = session.plan(chosen, editing)
    say_caveat(plan, editing, session.monitor)
    tokens = refusal_tokens(session, finding)
    ids = tuple(token.token for token in tokens)
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    scorer = Scorer(session.model, session.anatomy, ids, *val, session.size, behaving=not finding.all_prompts)
    control = random_plan(session, plan, seed)
    raw, layer = _raw(direction, chosen.basis, site)
    with session.monitor.phase("score"):
        bypass, kl = scorer.ablate(plan)
        bypass_control, _ = scorer.ablate(control)
        induce = None if layer is None or layer >= session.anatomy.layers else scorer.induce(raw, layer)
    examiner = examiner_of(session, evaluating, judge, ["harmful"])
    tallies = []
    for name, trial in (
        ("answers: original", None),
        ("answers: ablated", plan),
        ("answers: random direction", control),
    ):
        with contextlib.nullcontext() if trial is None else session.ablated(trial):
            subject = as_loaded(session) if trial is None else Subject(session.model)
            tallies.append(examiner.ask(answers_of(session, subject, examiner), name)["harmful"].tally)
    before, after, random_after = tallies
    halved = before.refusals > 0 and 2 * after.refusals <= before.refusals < 2 * random_after.refusals
    return Verification(
        before=before,
        after=after,
        control=random_after,
        bypass=bypass,
        bypass_before=scorer.harmful_score,
        bypass_control=bypass_control,
        induce=induce,
        induce_before=scorer.harmless_score,
        kl=kl,
        tokens=tokens,
        verified=halved and kl <= finding.max_kl,
    )


def say_caveat(plan: Plan, editing: EditSettings, monitor: Monitor) -> None:
    """Warn of what a plan cannot do."""
    if (text := caveat(plan, editing)) is not None:
        monitor.warn(text)


def at_site(direction: Direction, site: Site | None, d_model: int | None = None) -> Direction:
    """The direction to use: what the file holds, or its candidate at `site`.

    Raises `UsageError` when the file has no such candidate, or vectors of another width than `d_model`.
    """
    width = direction.basis.shape[1]
    if d_model is not None and width != d_model:
        raise UsageError(f"direction: expected vectors of the model's width {d_model}, found {width}")
    if site is None:
        return direction
    raw, _ = _raw(direction, direction.basis, site)
    said = {"chosen": {"layer": site[0], "position": site[1]}}
    return Direction(raw[None] / raw.norm(), direction.metadata | said, direction.candidates)


def _raw(direction: Direction, basis: Tensor, site: Site | None) -> tuple[Tensor, int | None]:
    """The difference of means r behind a direction and its layer, where the file says them."""
    candidates = direction.candidates
    if site is None and candidates is not None and len(basis) == 1:
        site = chosen_site(direction)
    if site is None:
        return basis[0], None
    layer, position = site
    if candidates is None:
        raise UsageError(f"--site {layer}:{position}: the direction file holds no candidates, only one direction")
    shape = candidates.raw.shape
    if not (0 <= layer < shape[1] and -shape[0] <= position <= -1):
        raise UsageError(
            f"--site {layer}:{position}: expected a layer below {shape[1]} and a position from -{shape[0]} to -1 "
            "among the file's candidates"
        )
    raw = candidates.at(layer, position)
    if float(raw.norm()) == 0:
        raise UsageError(f"--site {layer}:{position}: the classes do not differ there")
    return raw, layer
