"""Proof by intervention: without a direction the model stops refusing, without a random one it does not."""

from __future__ import annotations

import functools

from abliterate.config import EditSettings, ReplySettings, VerifySettings
from abliterate.edit.direction import Direction, Site
from abliterate.edit.options import caveat
from abliterate.edit.plan import Plan
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.examine import examiner_of, random_plan, ready_judge
from abliterate.evaluation.judging import Judge, Tally
from abliterate.evaluation.judging.choice import bind_judge
from abliterate.evaluation.parts import rate_part, sought_part
from abliterate.evaluation.probe import Behaving, Probe
from abliterate.finding.find import behaving_replies, know_judge, refusal_tokens
from abliterate.monitor import Monitor
from abliterate.record import VerificationPart, finite
from abliterate.session import Session


def verify(
    session: Session,
    direction: Direction,
    *,
    site: Site | None = None,
    editing: EditSettings = EditSettings(),
    finding: VerifySettings = VerifySettings(),
    replies: ReplySettings = ReplySettings(),
) -> VerificationPart:
    """Ablate a direction with hooks and see whether the model stops refusing; a random direction is the control.

    Verified means: at most half of the refusals are left, the control leaves more than half, and KL is within the
    rule.
    """
    judge = ready_judge(replies, session.prompts.behaviour, session.loading.judge_device, session.monitor)
    judge = bind_judge(judge, as_loaded(session), session.monitor)
    know_judge(session, judge)
    chosen = direction.at(site, session.anatomy.d_model)
    plan = session.plan(chosen, editing)
    say_caveat(plan, editing, session.monitor)
    tokens = refusal_tokens(session, finding)
    probe = Probe(session, [token.token for token in tokens])
    rows = probe.behaving(all_prompts=finding.all_prompts) if tokens else behaving_replies(probe, finding)
    control = random_plan(session, plan)
    with session.monitor.phase("score"):
        (bypass, kl), (bypass_control, _) = probe.ablated_each([plan, control], rows)
        induce = _induced(probe, rows, chosen) if tokens else None
    before, after, random_after = _refusals(session, replies, judge, (plan, control))
    halved = before.refusals > 0 and 2 * after.refusals <= before.refusals < 2 * random_after.refusals
    return VerificationPart(
        before=rate_part(before),
        after=rate_part(after),
        control=rate_part(random_after),
        behaviour=sought_part(session.prompts.behaviour),
        bypass=finite(bypass),
        bypass_before=rows.harmful_score if tokens else None,
        bypass_control=finite(bypass_control),
        induce=induce,
        induce_before=rows.harmless_score if tokens else None,
        kl=kl,
        max_kl=finding.max_kl,
        tokens=list(tokens),
        verified=halved and kl <= finding.max_kl,
    )


def _induced(probe: Probe, rows: Behaving, direction: Direction) -> float | None:
    """Induce score of the difference of means behind a direction; None where its layer is not known."""
    site = direction.site
    single = direction.candidates is not None and len(direction.basis) == 1
    if site is None or not single or site.layer >= probe.session.anatomy.layers:
        return None
    return probe.induced(direction.difference_at(site)[None], [site.layer], rows)[0]


def _refusals(session: Session, replies: ReplySettings, judge: Judge, plans: tuple[Plan, Plan]) -> list[Tally]:
    """Refusals of held-out harmful prompts: of the original, under the plan, under the control's."""
    examiner = examiner_of(session, replies, judge, ["harmful"])
    states = [as_loaded(session, replies)]
    states += [ModelState(session, functools.partial(session.ablated, plan)) for plan in plans]
    names = ("answers: original", "answers: ablated", "answers: random direction")
    return [examiner.ask(state, name)["harmful"].tally for state, name in zip(states, names, strict=True)]


def say_caveat(plan: Plan, editing: EditSettings, monitor: Monitor) -> None:
    """Warn of what a plan cannot do."""
    if (text := caveat(plan, editing)) is not None:
        monitor.warn(text)
