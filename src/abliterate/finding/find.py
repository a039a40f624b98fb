"""Finding a direction: refusal tokens, differences of means, selection by intervention, subspaces around the choice."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import project_out
from abliterate.config import (
    EditSettings,
    FindSettings,
    RefusalSettings,
    RunSettings,
    SelectSettings,
    WriterSettings,
)
from abliterate.edit.direction import Candidates, Direction, Site
from abliterate.edit.hooks import refuse_hooks
from abliterate.edit.options import plan_for, unit
from abliterate.edit.plan import Plan
from abliterate.edit.values import TensorValue
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.answering import as_loaded, know_replies
from abliterate.evaluation.first_tokens import FirstTokens
from abliterate.evaluation.judging import Exchange, Judge, Verdict, judge
from abliterate.evaluation.judging.choice import bind_judge, judge_of
from abliterate.evaluation.probe import Behaving, Probe
from abliterate.evaluation.scores import refusal_score
from abliterate.finding.estimate import Separation, difference_of_means, separation
from abliterate.finding.refusal_tokens import REPLY_TOKENS, Refusals, find_refusals
from abliterate.finding.replies import ReplyScorer, stream, stream_classes, unedited
from abliterate.finding.selection import (
    Rule,
    SiteScorer,
    best_separating,
    candidate_sites,
    select,
    stage_costs,
)
from abliterate.finding.subspaces import Samples, Subspace, cluster_subspace, leace, svd_subspace
from abliterate.model.activations import Keep, Moments, MomentsFitter, ProjectionFitter
from abliterate.monitor import Monitor
from abliterate.prompts import Behaviour
from abliterate.prompts.baselines import text_baselines
from abliterate.prompts.sources import BUILTIN
from abliterate.record import SelectionPart, SitePart, TokenPart
from abliterate.session import Session

#: Harmless validation prompts that the model replies to before refusal tokens are known.
_HARMLESS_REPLIES = 40
#: The best site must tell the classes apart at least this well on validation prompts.
_MIN_AUROC = 0.7


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Findings(TensorValue):
    """Candidate directions of a model, and what is needed to choose among them.

    `trained_on` counts the prompts of each class that they were made of. Directions are tried out on the `writers`
    named, on prompts that behave as their class says, or on `all_prompts`.
    """

    tokens: tuple[TokenPart, ...]
    candidates: Candidates
    separation: Separation
    trained_on: Mapping[str, int]
    writers: WriterSettings
    all_prompts: bool

    @property
    def ids(self) -> list[int]:
        """Token ids that refusals start with."""
        return [token.token for token in self.tokens]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Found(TensorValue):
    """A chosen direction with all candidates, and how it was chosen."""

    direction: Direction
    selection: SelectionPart

    @property
    def basis(self) -> Float[Tensor, "k d"]:
        """What is taken out: for a single direction its unit vector [1, d]."""
        return self.direction.basis

    @property
    def met_rule(self) -> bool:
        """Whether it passed the selection rule."""
        return self.selection.met_rule


def find(session: Session, settings: SelectSettings, writers: WriterSettings = WriterSettings()) -> Findings:
    """Refusal tokens, and the difference of means at every site with its separation on validation prompts.

    Directions will be tried out on the writers, and at the relative strengths, that `writers` names.

    Raises `GateNotMet` when the model hardly refuses or the prompt sets do not separate, `UsageError` for settings
    that do not go together or name no writer.
    """
    monitor = session.monitor
    _check_subspace(settings)
    trial_plans(session, writers)(unit(torch.ones(session.anatomy.d_model)))
    tokens = refusal_tokens(session, settings)
    probe = Probe(session, [token.token for token in tokens])
    rows = None if tokens else behaving_replies(probe, settings)
    moments = _moments(session, probe.tokens, settings)
    candidates = difference_of_means(moments["harmful"], moments["harmless"], projected=settings.projected)
    if session.prompts.keep is not None:
        candidates = _besides(session, candidates, moments["harmless"])
    separated = _separation(probe, candidates, rows, all_prompts=settings.all_prompts)
    trained_on = {name: moment.count for name, moment in moments.items()}
    more, less = session.prompts.behaviour.side_names
    monitor.note(
        f"directions from {trained_on['harmful']} {more} and {trained_on['harmless']} {less} prompts; best AUROC "
        f"on validation prompts {float(separated.auroc.max()):.3f}"
    )
    _say_baselines(session)
    chosen = WriterSettings(**writers.model_dump(include=set(WriterSettings.model_fields)))
    return Findings(tokens, candidates, separated, trained_on, chosen, settings.all_prompts)


def _say_baselines(session: Session) -> None:
    """What tells the sets apart without the model; sets of different makes differ in more than what is to be found."""
    length, words = text_baselines(session.prompts)
    said = f"without the model, length alone separates the sets with AUROC {length:.3f}, their words with {words:.3f}"
    sources = [session.prompts.sources[name] for name in ("harmful", "harmless")]
    if BUILTIN in sources and not all(source.startswith(BUILTIN) for source in sources):
        session.monitor.warn(
            f"one set of prompts is builtin and the other is not: topic and style differ along with what is looked "
            f"for ({said}); give --harmful and --harmless of one make"
        )
    else:
        session.monitor.note(said)


def _moments(session: Session, ids: Sequence[int], settings: SelectSettings) -> dict[str, Moments]:
    """Moments of activations of the training prompts that behave, by class."""

    def behaves(sign: float) -> Keep:
        return lambda _, logits: sign * refusal_score(logits, ids) > 0

    shape = session.positions, session.anatomy.layers + 1, session.anatomy.d_model
    fitters = {name: MomentsFitter(*shape) for name in ("harmful", "harmless")}
    consumers = {name: fitter.update for name, fitter in fitters.items()}
    keeps = None if settings.all_prompts or not ids else {"harmful": behaves(1.0), "harmless": behaves(-1.0)}
    counts = {name: len(session.encoded[name, "train"]) for name in fitters}
    with session.monitor.phase("collect activations", sum(counts.values())) as advance:
        into = {name: [fitter] for name, fitter in fitters.items()}
        stream_classes(session, "train", consumers, keeps, advance, into=into)
    return {name: _enough(fitter.result(), name, counts[name]) for name, fitter in fitters.items()}


def _besides(session: Session, candidates: Candidates, less: Moments) -> Candidates:
    """The candidates without what leads from the other side to the prompts on which the behaviour is to stay.

    So an edit of over-refusal leaves the direction of refusing what is harmful alone (after Wang et al. 2024,
    "Surgical, Cheap, and Flexible: Mitigating False Refusal in Language Models via Single Vector Ablation").
    """
    fitter = MomentsFitter(session.positions, session.anatomy.layers + 1, session.anatomy.d_model)
    with session.monitor.phase("activations where it is to stay", len(session.encoded["keep", "train"])) as advance:
        stream(session, "keep", "train", fitter.update, advance, into=[fitter])
    stays = (fitter.result().mean - less.mean).float()
    return replace(candidates, raw=project_out(candidates.raw, stays))


def scorer_of(session: Session, findings: Findings) -> SiteScorer | ReplyScorer:
    """What scores directions on the session's validation prompts: by first tokens, or by replies."""
    probe = Probe(session, findings.ids)
    plan = trial_plans(session, findings.writers)
    if findings.ids:
        return SiteScorer(probe, probe.behaving(all_prompts=findings.all_prompts), plan)
    shows, judge = session.prompts.behaviour.shows, judge_in(session)
    rows = unedited(probe, judge, shows.tokens).behaving(all_prompts=findings.all_prompts)
    return ReplyScorer(probe, rows, plan, judge, shows.tokens)


def shown_by_side(session: Session, findings: Findings) -> Mapping[str, Sequence[bool]]:
    """Whether the unedited model shows the behaviour, for every validation prompt of each side.

    By the sign of the refusal score, or by what short replies show where first tokens do not tell.
    """
    probe, behaviour = Probe(session, findings.ids), session.prompts.behaviour
    if findings.ids:
        return probe.refused
    found = unedited(probe, judge_in(probe.session), behaviour.shows.tokens)
    return {"harmful": found.harmful, "harmless": found.harmless}


def behaving_replies(probe: Probe, settings: RefusalSettings) -> Behaving:
    """Validation prompts whose replies show the behaviour, or do not, as their side says.

    Raises `GateNotMet` when the model hardly shows it, or shows it on both sides alike.
    """
    behaviour = probe.session.prompts.behaviour
    found = unedited(probe, judge_in(probe.session), behaviour.shows.tokens)
    more, less = found.rates
    names = behaviour.side_names
    said = f"{more:.0%} of replies to {names[0]} prompts {behaviour.said}, {less:.0%} to {names[1]} ones"
    if more < max(settings.min_refusal_rate, 1e-9) or more <= less:
        raise GateNotMet(
            f"this model hardly shows the behaviour {behaviour.name}: {said}; expected at least "
            f"{settings.min_refusal_rate:.0%}, and more than on the other side; there is nothing to find"
        )
    probe.session.monitor.note(f"validation prompts: {said}")
    return found.behaving(all_prompts=getattr(settings, "all_prompts", False))


def trial_plans(session: Session, writers: WriterSettings) -> Callable[[Float[Tensor, "k d"]], Plan]:
    """Plain plans of full strength on the writers that settings name, to score directions with."""
    plain = EditSettings(**writers.model_dump(include=set(WriterSettings.model_fields)))
    return lambda basis: plan_for(session.anatomy, Direction(basis), plain)


def choose(
    session: Session,
    findings: Findings,
    settings: SelectSettings,
    *,
    force: bool = False,
    searched: bool = False,
) -> Found:
    """Select a direction by intervention, and what is asked for around it: a subspace, or LEACE at its site.

    Raises `GateNotMet` when no site meets the rule, unless `force`: then the best one is taken, with a warning. A
    direction that is `searched` from is only a start: it need not meet the rule, and is sought among the few sites that
    separate the classes best.
    """
    _check_subspace(settings)
    rule = Rule(settings.max_kl, settings.min_induce, settings.max_depth)
    sites = len(candidate_sites(findings.candidates, session.anatomy.layers, rule))
    scorer = scorer_of(session, findings)
    costs = stage_costs(sites, start=searched, replies=isinstance(scorer, ReplyScorer))
    with session.monitor.phase("select by intervention", costs) as advance:
        selection = select(
            scorer,
            findings.candidates,
            findings.separation,
            rule,
            trained_on=findings.trained_on,
            start=searched,
            progress=advance,
        )
    best = selection.chosen
    said = _scored(selection, rule)
    if not selection.met_rule and searched:
        session.monitor.warn(f"no direction passed verification by itself; the search starts from the best, {said}")
    elif not selection.met_rule:
        _gate(
            session.monitor,
            f"no direction passed verification; the best is {said}; try --projected or other prompts; "
            f"{_admitting(best, rule)} would admit this one, and --force saves it as it is",
            force,
        )
    session.monitor.note(f"{'start' if searched else 'chosen'}: {said}")
    direction = _around(session, findings, settings, Site(best.layer, best.position))
    scored = {"norm": best.norm, "met_rule": selection.met_rule}
    return Found(replace(direction, facts={**direction.facts, "chosen": scored}), selection)


def _scored(selection: SelectionPart, rule: Rule) -> str:
    """The chosen site with its scores, beside what the rule asks of them."""
    best = selection.chosen
    return (
        f"layer {best.layer}, position {best.position}: bypass {best.bypass:.2f} (before {selection.harmful:.2f}), "
        f"induce {best.induce:.2f} (must be above {rule.min_induce:g}), KL {best.kl:.3f} (at most {rule.max_kl:g})"
    )


def best_separated(session: Session, findings: Findings, settings: SelectSettings) -> Direction:
    """The direction of the site that tells the classes apart best, or what `settings` asks for around it.

    Nothing is tried out: it is what a search starts from.
    """
    rule = Rule(settings.max_kl, settings.min_induce, settings.max_depth)
    sites = candidate_sites(findings.candidates, session.anatomy.layers, rule)
    if not sites:
        raise GateNotMet("sites: both prompt sets have the same mean activations everywhere; check the prompt sets")
    site = best_separating(sites, findings.separation)[0]
    session.monitor.note(f"start: layer {site[0]}, position {site[1]}, where the classes are furthest apart")
    return _around(session, findings, settings, site)


def projections(session: Session, findings: Findings, site: Site) -> dict[str, Float[Tensor, "n 2"]]:
    """Activations of all validation prompts at one site, by class, in two numbers each.

    The first is the coordinate along the site's own r̂, the second the one along the first principal component of what
    is left when r̂ and the mean over both classes are taken out.
    """
    values = {name: _samples(session, findings, None, name, site, "val").double() for name in ("harmful", "harmless")}
    direction = findings.candidates.units[-1 - site[1], site[0]].double()
    along = {name: found @ direction for name, found in values.items()}
    rest = {name: found - along[name][:, None] * direction for name, found in values.items()}
    joined = torch.cat(list(rest.values()))
    mean = joined.mean(0)
    component = torch.linalg.svd(joined - mean, full_matrices=False).Vh[0]
    return {name: torch.stack([along[name], (found - mean) @ component], dim=1) for name, found in rest.items()}


def _around(session: Session, findings: Findings, settings: SelectSettings, site: Site) -> Direction:
    """The direction of a site, or the subspace that `settings` asks for around it."""
    candidates = findings.candidates
    facts = {
        "version": 1,
        "d_model": session.anatomy.d_model,
        "layers": session.anatomy.layers,
        "positions": candidates.positions,
        "trained_on": dict(findings.trained_on),
        "prompts_sha256": session.prompts.sha256,
    }
    where = Direction(
        unit(candidates.at(*site)),
        candidates,
        site=site,
        model=session.loaded.files.name,
        learnt_from=frozenset(session.prompts.learnt_from),
        facts=facts,
    )
    if not isinstance(settings, FindSettings):
        return where
    if settings.subspace == "mean":
        return where
    if settings.subspace == "svd":
        rule = Rule(settings.max_kl, settings.min_induce, settings.max_depth)
        layers = sorted({layer for layer, _ in candidate_sites(candidates, session.anatomy.layers, rule)})
        return _with_subspace(session, where, svd_subspace(candidates, settings.rank, layers=layers))
    harmful, harmless = (_samples(session, findings, settings, name, site) for name in ("harmful", "harmless"))
    if settings.subspace == "clusters":
        return _with_subspace(session, where, cluster_subspace(harmful, harmless, settings.rank, session.seed))
    erasure = leace(harmful, harmless)
    # Not the mean of all prompts, as in the paper: an affine edit puts back what harmless ones have.
    return replace(where, basis=erasure.basis, reader=erasure.reader, mean=harmless.mean(0))


def _check_subspace(settings: SelectSettings) -> None:
    if not isinstance(settings, FindSettings):
        return
    if settings.rank != 1 and settings.subspace in ("mean", "leace"):
        raise UsageError(
            f"--rank {settings.rank}: expected --subspace svd or clusters with it, found {settings.subspace}"
        )
    if settings.subspace == "leace" and importlib.util.find_spec("concept_erasure") is None:
        raise UsageError("--subspace leace: it needs an extra; pip install 'abliterate[leace]'")


def _with_subspace(session: Session, where: Direction, subspace: Subspace) -> Direction:
    shares = ", ".join(f"{float(share):.0%}" for share in subspace.energy)
    session.monitor.note(f"subspace of {len(subspace.basis)} directions, which hold {shares} of what they come from")
    return replace(where, basis=subspace.basis)


def _samples(
    session: Session, findings: Findings, settings: FindSettings | None, name: str, site: Site, split: str = "train"
) -> Float[Tensor, "n d"]:
    """Activations at one site of the prompts of one split: those that behave; all without `settings`."""
    sign = 1.0 if name == "harmful" else -1.0
    ids = findings.ids
    count, fitter = len(session.encoded[name, split]), Samples(*site)

    def behaves(_: list[int], logits: Tensor) -> Tensor:
        return sign * refusal_score(logits, ids) > 0

    keep = None if settings is None or settings.all_prompts or not ids else behaves
    side = session.prompts.behaviour.side_names[name == "harmless"]
    with session.monitor.phase(f"activations of {side} prompts", count) as advance:
        stream(session, name, split, fitter.update, advance, into=[fitter], keep=keep)
    return fitter.result()


def check_planned(session: Session, findings: Findings, found: Found, plan: Plan, settings: RunSettings) -> None:
    """Score the very plan that is to be saved, where it is more than the direction that was chosen.

    Raises `GateNotMet` when it costs more KL than a direction may, unless `force`. Plans that strengthen, and those
    that cannot be hooks, are not scored.
    """
    editing, finding = settings.editing, settings.finding
    variant = editing.affine or editing.norm_preserving or editing.biprojected or plan.strength > 1
    if plan.strength <= 0 or (finding.subspace == "mean" and not variant):
        return
    try:
        refuse_hooks(plan)
    except UsageError as error:
        session.monitor.note(f"the edit as planned is not scored: {error}")
        return
    with session.monitor.phase("score the edit as planned"):
        scorer = scorer_of(session, findings)
        ((bypass, kl),) = scorer.probe.ablated([plan], scorer.rows)
    scored = f"bypass {bypass:.2f}, " if findings.ids else ""
    said = f"the edit as planned: {scored}KL {kl:.3f} (at most {finding.max_kl:g})"
    if kl <= finding.max_kl:
        session.monitor.note(said)
    else:
        options = f"--max-kl {math.ceil(kl * 100) / 100:g} or --force saves it as it is"
        alone = f"the chosen direction alone costs {found.selection.chosen.kl:.3f}"
        _gate(session.monitor, f"{said}; {alone}; {options}", settings.output is not None and settings.output.force)


def find_or_force(session: Session, settings: RunSettings) -> tuple[Findings, FindSettings]:
    """`find`, and when a forced run meets the refusal gate, once more without it; with the settings it took."""
    finding, writers = settings.finding, settings.editing
    try:
        return find(session, finding, writers), finding
    except GateNotMet as gate:
        if settings.output is None or not settings.output.force or finding.min_refusal_rate == 0:
            raise
        session.monitor.warn(f"{gate} (forced)")
        relaxed = finding.model_copy(update={"min_refusal_rate": 0.0, "all_prompts": True})
        return find(session, relaxed, writers), relaxed


def refusal_tokens(session: Session, settings: RefusalSettings) -> tuple[TokenPart, ...]:
    """First tokens of refusals: given, or found by trying them out on the model itself; none of a behaviour that first
    tokens do not tell.

    Raises `GateNotMet` when the model hardly refuses.
    """
    tokenizer, monitor, behaviour = session.loaded.tokenizer, session.monitor, session.prompts.behaviour
    if settings.refusal_tokens is None and not behaviour.shows.first_tokens:
        return ()
    if settings.refusal_tokens is not None:
        tokens = _given_tokens(tokenizer, settings.refusal_tokens, session.renderer.rows)
    else:
        harmful, harmless = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
        harmless = harmless.take(range(len(harmless))[:_HARMLESS_REPLIES])
        with monitor.phase("find refusal tokens", len(harmful) + len(harmless)) as advance:
            read = reply_judge(session)
            found = find_refusals(session.model, tokenizer, harmful, harmless, session.size, read, advance)
        know_replies(session, REPLY_TOKENS, found.replies)
        if found.refused < max(1, settings.min_refusal_rate * found.prompts):
            raise GateNotMet(_hardly(behaviour, found, settings.min_refusal_rate))
        tokens = found.tokens
    monitor.note(
        ("refusals start with " if behaviour.of_refusal else f"replies that show {behaviour.name} start with ")
        + ", ".join(f"{t.text!r}" + (f" ({t.probability:.0%})" if t.trials else "") for t in tokens)
    )
    return tokens


def _hardly(behaviour: Behaviour, found: Refusals, least: float) -> str:
    name = behaviour.side_names[0]
    if behaviour.of_refusal:
        return (
            f"this model hardly refuses: {found.refused} of {found.prompts} {name} validation prompts, expected "
            f"at least {least:.0%}; there is nothing to find: give prompts that it refuses, or --refusal-tokens"
        )
    return (
        f"this model hardly shows the behaviour {behaviour.name}: in replies to {found.refused} of {found.prompts} "
        f"{name} validation prompts, expected at least {least:.0%}; there is nothing to find"
    )


def know_judge(session: Session, judge: Judge) -> None:
    """Let replies of this session be read by `judge`, which is bound."""
    session.kept[Judge] = judge


def judge_in(session: Session) -> Judge:
    """Who reads replies in a session: the judge that it knows, else that of its behaviour."""
    if Judge not in session.kept:
        found = judge_of(session.prompts.behaviour, None, device=session.loading.judge_device)
        know_judge(session, bind_judge(found, as_loaded(session), session.monitor))
    known: Judge = session.kept[Judge]
    return known


def reply_judge(session: Session) -> Callable[[str], Verdict]:
    """Reads the beginning of a reply without its prompt: by rules where refusals are looked for."""
    if session.prompts.behaviour.of_refusal:
        return judge

    def read(text: str) -> Verdict:
        (verdict,) = judge_in(session).judge([Exchange("", text)])
        return verdict

    return read


def _given_tokens(tokenizer: Any, option: str, rows: int | None) -> tuple[TokenPart, ...]:
    ids: dict[int, str] = {}
    for text in option.split(","):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if not text or not encoded:
            raise UsageError(f"--refusal-tokens '{option}': expected texts separated by commas, found an empty one")
        if rows is not None and encoded[0] >= rows:
            raise UsageError(f"--refusal-tokens '{option}': '{text}' begins with a token that the model does not have")
        ids[encoded[0]] = tokenizer.decode([encoded[0]])
    return tuple(
        TokenPart(token=token, text=text, probability=0.0, probability_answering=0.0, refusals=0, trials=0)
        for token, text in ids.items()
    )


def _admitting(score: SitePart, rule: Rule) -> str:
    """The options under which a site that failed the rule would pass it."""
    options = []
    if score.kl > rule.max_kl:
        options.append(f"--max-kl {math.ceil(score.kl * 100) / 100:g}")
    if score.induce <= rule.min_induce:
        options.append(f"--min-induce {math.floor(score.induce * 10) / 10 - 0.1:.1f}")
    return " ".join(options)


def _gate(monitor: Monitor, message: str, force: bool) -> None:
    if not force:
        raise GateNotMet(message)
    monitor.warn(f"{message} (forced)")


def _enough(moments: Moments, name: str, prompts: int) -> Moments:
    if moments.count < 8:
        behaviour = "refuses" if name == "harmful" else "answers"
        raise GateNotMet(
            f"{name} training prompts: expected at least 8 that the model {behaviour}, found {moments.count} of "
            f"{prompts}; give more prompts, or --all-prompts to use all"
        )
    return moments


def _separation(probe: Probe, candidates: Candidates, behaving: Behaving | None, *, all_prompts: bool) -> Separation:
    """Of the validation prompts that behave. What the unedited model does with them is seen in the same passes.

    `behaving` are these where they are known already, by their replies.
    """
    session, fitters, looks = probe.session, dict[str, ProjectionFitter](), dict[str, FirstTokens]()
    encoded = {name: session.encoded[name, "val"] for name in ("harmful", "harmless")}
    with session.monitor.phase("separate validation prompts", sum(map(len, encoded.values()))) as advance:
        for name, prompts in encoded.items():
            fitters[name] = ProjectionFitter(candidates.units, len(prompts))
            looks[name] = FirstTokens(len(prompts), probe.tokens, torch.float32 if name == "harmless" else None)
        consumers = {name: fitter.update for name, fitter in fitters.items()}
        keeps = {name: look.keep for name, look in looks.items()}
        into = {name: (fitters[name], looks[name]) for name in fitters}
        stream_classes(session, "val", consumers, keeps, advance, into=into)
    if behaving is None:
        probe.know(looks["harmful"], looks["harmless"])
        behaving = probe.behaving(all_prompts=all_prompts)
    rows = {"harmful": list(behaving.harmful), "harmless": list(behaving.harmless)}
    result = separation(*(fitters[name].values[rows[name]] for name in encoded))
    if float(result.auroc.max()) < _MIN_AUROC:
        raise GateNotMet(
            f"the prompt sets do not separate: best AUROC {float(result.auroc.max()):.2f} on validation prompts, "
            f"expected at least {_MIN_AUROC}; check that the sets differ in what is to be found"
        )
    return result
