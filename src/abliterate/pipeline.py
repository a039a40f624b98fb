"""The stages in order. The only module that composes the others; the command line and the Python API call it."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate import record as rec
from abliterate.activations import Moments, MomentsFitter, ProjectionFitter, stream_sites
from abliterate.anatomy import TOLERANCE, Anatomy, names_on_disk, study
from abliterate.blueprint import study_files
from abliterate.card import write_card
from abliterate.checkpoint import Checkpoint, bytes_to_write, ensure_space, open_checkpoint, sha256, staged
from abliterate.config import (
    EvalSettings,
    FileSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
)
from abliterate.directions import (
    Candidates,
    Direction,
    Separation,
    difference_of_means,
    load_direction,
    save_direction,
    separation,
)
from abliterate.errors import CheckpointError, GateNotMet, UsageError
from abliterate.evaluation import Answers, Shift, Subject, answer, measure_shift
from abliterate.generation import complete
from abliterate.inference import BatchSize, Encoded, auto_batch_size, share_prefix
from abliterate.interventions import ablation
from abliterate.judging import Tally, judge
from abliterate.models import LoadedModel, ModelFiles, load, locate
from abliterate.monitor import Monitor
from abliterate.plan import Plan, make_plan
from abliterate.prompts import ChatRenderer, ContrastiveSet, build_contrastive_set
from abliterate.prompts.rendering import common_suffix, read_template
from abliterate.refusals import RefusalToken, find_refusals
from abliterate.scoring import refusal_score
from abliterate.selection import Rule, Scorer, Selection, Site, SiteScore, candidate_sites, select, stage_costs
from abliterate.surgery import Surgery, edit_checkpoint, planned_parameters, weights_from

#: Harmless validation prompts that the model replies to before refusal tokens are known.
_HARMLESS_REPLIES = 40
#: More positions than this after the instruction are not looked at unless asked for.
_MOST_POSITIONS = 8
#: The best site must tell the classes apart at least this well on validation prompts.
_MIN_AUROC = 0.7
#: Harmless test prompts whose answers are compared token by token.
_SHIFT_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model whose writers are all known, with the prompts it is measured on.

    `encoded` maps (set, split) to token ids; all share one prefix. `positions` is how many tokens from the end are
    looked at.
    """

    loaded: LoadedModel
    anatomy: Anatomy
    prompts: ContrastiveSet
    encoded: dict[tuple[str, str], Encoded]
    positions: int
    size: BatchSize
    loading: ModelSettings
    monitor: Monitor

    @property
    def model(self) -> Any:
        """The live transformers model."""
        return self.loaded.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's blocks in order."""
        return [self.model.get_submodule(name) for name in self.anatomy.blocks]

    @property
    def test_texts(self) -> dict[str, tuple[str, ...]]:
        """Held-out prompts by set."""
        prompts = self.prompts
        return {"harmful": prompts.harmful.test, "harmless": prompts.harmless.test, "borderline": prompts.borderline}

    def plan(self, direction: Float[Tensor, "k d"], strength: float = 1.0) -> Plan:
        """Take `direction` out of every writer of this model."""
        return make_plan(self.anatomy, direction, strength=strength)

    def ablated(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """The model with `plan` realised as hooks, inside a `with`."""
        return ablation(self.model, plan)

    def answers(self, max_new_tokens: int, name: str) -> dict[str, Answers]:
        """Judged greedy answers to the held-out prompts of all sets."""
        texts = self.test_texts
        encoded = {key: self.encoded[key, "test"] for key in texts}
        with self.monitor.phase(name, sum(map(len, texts.values()))) as advance:
            return answer(self.model, self.loaded.tokenizer, texts, encoded, max_new_tokens, self.size, judge, advance)


@dataclass(frozen=True, slots=True)
class Findings:
    """Candidate directions of a session, and what is needed to choose among them."""

    tokens: tuple[RefusalToken, ...]
    candidates: Candidates
    separation: Separation
    scorer: Scorer
    trained_on: dict[str, int]


@dataclass(frozen=True, slots=True)
class Found:
    """A chosen direction. `basis` [1, d] is its unit vector, `met_rule` says whether it passed the selection rule."""

    findings: Findings
    selection: Selection
    basis: Float[Tensor, "1 d"]
    met_rule: bool


def open_session(
    model: str | ModelFiles,
    *,
    loading: ModelSettings = ModelSettings(),
    prompts: PromptSettings = PromptSettings(),
    positions: int | None = None,
    monitor: Monitor | None = None,
) -> Session:
    """Load a model, prove its anatomy, and render and tokenise the prompts."""
    monitor = monitor or Monitor()
    contrast = _prompts(prompts, monitor)
    loaded, renderer, anatomy = open_model(model, loading, monitor)
    texts = _texts(contrast)
    sequences = {key: renderer.encode(value) for key, value in texts.items()}
    everything = [ids for group in sequences.values() for ids in group]
    wanted = positions or min(_MOST_POSITIONS, max(1, common_suffix(everything)))
    shortest = min(map(len, everything))
    if wanted > shortest:
        raise UsageError(f"--positions {wanted}: expected at most the shortest prompt's {shortest} tokens")
    shared = share_prefix(everything, keep=wanted)
    encoded, start = {}, 0
    for key, group in sequences.items():
        encoded[key] = shared.take(range(start, start + len(group)))
        start += len(group)
    size = auto_batch_size(loaded.model, loading.rows)
    monitor.note(
        f"{anatomy.layers} blocks, {len(anatomy.writers)} writers, books close to {max(anatomy.closure):.0e}; "
        f"{len(shared.prefix)} tokens shared by all prompts; {size.rows} prompts at once on {loaded.device}"
    )
    return Session(loaded, anatomy, contrast, encoded, wanted, size, loading, monitor)


def open_model(
    model: str | ModelFiles, loading: ModelSettings, monitor: Monitor
) -> tuple[LoadedModel, ChatRenderer, Anatomy]:
    """Load a model, check that it can be talked to, and prove its anatomy."""
    with monitor.phase("load model"):
        files = model if isinstance(model, ModelFiles) else _locate(model, loading)
        loaded = load(files, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
        renderer = ChatRenderer(loaded.tokenizer, read_template(loading.chat_template), loading.system)
    with monitor.phase("know every writer"):
        anatomy = study(loaded.model)
    return loaded, renderer, anatomy


def find(session: Session, settings: FindSettings) -> Findings:
    """Refusal tokens, and the difference of means at every site with its separation on validation prompts.

    Raises `GateNotMet` when the model hardly refuses or the prompt sets do not separate.
    """
    monitor = session.monitor
    tokens = _refusal_tokens(session, settings)
    ids = tuple(token.token for token in tokens)
    train = {name: session.encoded[name, "train"] for name in ("harmful", "harmless")}
    with monitor.phase("collect activations", sum(map(len, train.values()))) as advance:
        moments = {}
        for name, encoded in train.items():
            sign = 1.0 if name == "harmful" else -1.0

            def behaves(logits: Tensor, sign: float = sign) -> Tensor:
                return sign * refusal_score(logits, ids) > 0

            fitter = MomentsFitter(session.positions, session.anatomy.layers + 1, session.anatomy.d_model)
            stream_sites(
                session.model,
                session.blocks,
                encoded,
                session.positions,
                fitter.update,
                session.size,
                keep=None if settings.all_prompts else behaves,
                progress=advance,
            )
            moments[name] = _enough(fitter.result(), name, len(encoded))
    candidates = difference_of_means(moments["harmful"], moments["harmless"], projected=settings.projected)
    scorer = Scorer(
        session.model,
        session.anatomy,
        ids,
        session.encoded["harmful", "val"],
        session.encoded["harmless", "val"],
        session.size,
        behaving=not settings.all_prompts,
    )
    separated = _separation(session, candidates, scorer)
    trained_on = {name: moment.count for name, moment in moments.items()}
    monitor.note(
        f"directions from {trained_on['harmful']} harmful and {trained_on['harmless']} harmless prompts; best AUROC "
        f"on validation prompts {float(separated.auroc.max()):.3f}"
    )
    return Findings(tokens, candidates, separated, scorer, trained_on)


def choose(
    session: Session, findings: Findings, settings: FindSettings, *, seed: int = 0, force: bool = False
) -> Found:
    """Select a direction by intervention.

    Raises `GateNotMet` when no site meets the rule, unless `force`: then the best one is taken, with a warning.
    """
    rule = Rule(settings.max_kl, settings.min_induce, settings.max_depth)
    sites = len(candidate_sites(findings.candidates, session.anatomy.layers, rule))
    with session.monitor.phase("select by intervention", stage_costs(sites)) as advance:
        selection = select(findings.scorer, findings.candidates, findings.separation, rule, seed=seed, progress=advance)
    best = selection.best
    found = (
        f"layer {best.layer}, position {best.position}: bypass {best.bypass:.2f} (before {selection.harmful:.2f}), "
        f"induce {best.induce:.2f} (must be above {rule.min_induce:g}), KL {best.kl:.3f} (at most {rule.max_kl:g})"
    )
    if selection.chosen is None:
        _gate(
            session.monitor,
            f"no direction passed verification; the best is {found}; try --projected or other prompts; "
            f"{_admitting(best, rule)} would admit this one, and --force saves it as it is",
            force,
        )
    session.monitor.note(f"chosen: {found}")
    raw = findings.candidates.at(best.layer, best.position)
    return Found(findings, selection, (raw / raw.norm())[None], selection.chosen is not None)


def run(settings: RunSettings, monitor: Monitor | None = None) -> rec.Record:
    """The whole job: find, verify, apply, evaluate. OUT appears only when all of it is done.

    Raises `GateNotMet` when the model hardly refuses or no direction passes (unless forced), `UsageError` for an OUT
    that is in the way, and the errors of every stage.
    """
    monitor = monitor or Monitor()
    output = settings.output
    if output is None:
        raise UsageError("run: expected an output folder, found none; give -o OUT")
    with monitor.phase("find model"):
        files = _locate(settings.model, settings.loading)
    with _output(output, files) as (partial, source):
        session = open_session(
            files,
            loading=settings.loading,
            prompts=settings.prompts,
            positions=settings.finding.positions,
            monitor=monitor,
        )
        findings, finding = _find_or_force(session, settings.finding, output.force)
        settings = settings.model_copy(update={"finding": finding})
        found = choose(session, findings, settings.finding, seed=settings.prompts.seed, force=output.force)
        plan = session.plan(found.basis, settings.strength)
        names = names_on_disk(session.model, planned_parameters(plan), list(source.tensors))
        surgery = _operate(source, partial, plan, names, session.model, monitor)
        evaluation = _evaluate(session, partial, names, settings.evaluating)
        result = _record(session, settings, found, plan, surgery, evaluation, source, partial)
        save_direction(
            partial / "direction.safetensors",
            found.basis,
            candidates=findings.candidates,
            metadata=_direction_metadata(session, found, result),
        )
        _finish(result, partial)
    return result


def apply(
    model: str,
    direction: Path,
    output: OutputSettings,
    *,
    site: Site | None = None,
    strength: float = 1.0,
    loading: FileSettings = FileSettings(),
    monitor: Monitor | None = None,
) -> rec.Record:
    """Write MODEL with a direction taken out of its weights. The model is never loaded.

    Raises `UsageError` when the direction does not fit the model, `AnatomyError` when a writer is not known.
    """
    monitor = monitor or Monitor()
    chosen = load_direction(direction)
    with monitor.phase("find model"):
        files = _locate(model, loading)
    with _output(output, files) as (partial, source):
        with monitor.phase("know every writer"):
            anatomy, skeleton = study_files(files, source, trust_remote_code=loading.trust_remote_code)
        plan = make_plan(anatomy, at_site(chosen, site), strength=strength)
        names = names_on_disk(skeleton, planned_parameters(plan), list(source.tensors))
        surgery = _operate(source, partial, plan, names, skeleton, monitor)
        settings = {"model": model, "direction": str(direction), "site": site, "strength": strength}
        result = rec.Record(
            created=_now(),
            versions=_versions(),
            settings=settings,
            model=_model_part(files, skeleton, anatomy, str(skeleton.config.dtype).removeprefix("torch."), "none", {}),
            anatomy=_anatomy_part(anatomy),
            plan=_plan_part(plan, surgery),
            warnings=monitor.warnings,
            left_out=list(surgery.files.left_out),
            output=str(output.out),
            timings_s=monitor.timings(),
            peak_memory_bytes=monitor.peak_bytes,
        )
        said = {} if site is None else {"chosen": {"layer": site[0], "position": site[1]}}
        save_direction(
            partial / "direction.safetensors",
            plan.direction,
            candidates=chosen.candidates,
            metadata=chosen.metadata | said,
        )
        _finish(result, partial)
    return result


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
    strength: float = 1.0,
    finding: FindSettings = FindSettings(),
    evaluating: EvalSettings = EvalSettings(),
    seed: int = 0,
) -> Verification:
    """Ablate a direction with hooks and see whether the model stops refusing; a random direction is the control.

    Verified means: at most half of the refusals are left, the control leaves more than half, and KL is within the
    rule.
    """
    basis = at_site(direction, site, session.anatomy.d_model)
    tokens = _refusal_tokens(session, finding)
    ids = tuple(token.token for token in tokens)
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    scorer = Scorer(session.model, session.anatomy, ids, *val, session.size, behaving=not finding.all_prompts)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(basis.shape, generator=generator)
    raw, layer = _raw(direction, basis, site)
    with session.monitor.phase("score"):
        bypass, kl = scorer.ablate(session.plan(basis, strength))
        bypass_control, _ = scorer.ablate(session.plan(random, strength))
        induce = None if layer is None or layer >= session.anatomy.layers else scorer.induce(raw, layer)
    tallies = []
    for name, plan in (
        ("answers: original", None),
        ("answers: ablated", session.plan(basis, strength)),
        ("answers: random direction", session.plan(random, strength)),
    ):
        with contextlib.ExitStack() as stack:
            if plan is not None:
                stack.enter_context(session.ablated(plan))
            encoded = session.encoded["harmful", "test"]
            with session.monitor.phase(name, len(encoded)) as advance:
                replies = complete(
                    session.model, session.loaded.tokenizer, encoded, evaluating.max_new_tokens, session.size, advance
                )
            tallies.append(Tally.from_verdicts([judge(reply.text) for reply in replies]))
    before, after, control = tallies
    halved = before.refusals > 0 and 2 * after.refusals <= before.refusals < 2 * control.refusals
    return Verification(
        before=before,
        after=after,
        control=control,
        bypass=bypass,
        bypass_before=scorer.harmful_score,
        bypass_control=bypass_control,
        induce=induce,
        induce_before=scorer.harmless_score,
        kl=kl,
        tokens=tokens,
        verified=halved and kl <= finding.max_kl,
    )


def evaluate(
    session: Session,
    evaluating: EvalSettings,
    *,
    base: Session | None = None,
    plan: Plan | None = None,
) -> tuple[dict[str, Answers], dict[str, Answers] | None, Shift | None]:
    """Answers to held-out prompts of one model; or of two states, before and after, with the shift between them.

    `plan` compares the session's model with itself under hooks; `base` with another model of the same tokenizer.
    """
    if base is None and plan is None:
        return session.answers(evaluating.max_new_tokens, "answers"), None, None
    origin = base or session
    if origin.encoded != session.encoded:
        raise UsageError("--base: expected a model with the same tokenizer and chat template, found another one")
    before = origin.answers(evaluating.max_new_tokens, "answers before")

    def state() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if plan is None else session.ablated(plan)

    with state():
        after = session.answers(evaluating.max_new_tokens, "answers after")
    shift = _shift(session.monitor, session, before, Subject(origin.model), Subject(session.model, state))
    return before, after, shift


def at_site(direction: Direction, site: Site | None, d_model: int | None = None) -> Float[Tensor, "k d"]:
    """The direction to use: the file's basis, or its candidate at `site`.

    Raises `UsageError` when the file has no such candidate, or vectors of another width than `d_model`.
    """
    width = direction.basis.shape[1]
    if d_model is not None and width != d_model:
        raise UsageError(f"direction: expected vectors of the model's width {d_model}, found {width}")
    if site is None:
        return direction.basis
    raw, _ = _raw(direction, direction.basis, site)
    unit: Tensor = raw[None] / raw.norm()
    return unit


def _raw(direction: Direction, basis: Tensor, site: Site | None) -> tuple[Tensor, int | None]:
    """The difference of means r behind a direction and its layer, where the file says them."""
    candidates = direction.candidates
    if site is None and candidates is not None:
        match direction.metadata.get("chosen"):
            case {"layer": int(layer), "position": int(position)}:
                site = (layer, position)
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


def _locate(model: str, loading: FileSettings) -> ModelFiles:
    return locate(model, dtype=loading.dtype, trust_remote_code=loading.trust_remote_code)


def _prompts(settings: PromptSettings, monitor: Monitor) -> ContrastiveSet:
    contrast = build_contrastive_set(
        settings.harmful,
        settings.harmless,
        eval_harmful=settings.eval_harmful,
        eval_harmless=settings.eval_harmless,
        borderline=settings.borderline,
        seed=settings.seed,
        limit=settings.limit,
    )
    counts = "; ".join(
        f"{name} " + " / ".join(str(count) for count in parts.values()) for name, parts in contrast.counts.items()
    )
    monitor.note(f"prompts (train / val / test): {counts}; {contrast.duplicates_dropped} duplicates dropped")
    return contrast


def _texts(contrast: ContrastiveSet) -> dict[tuple[str, str], tuple[str, ...]]:
    texts = {
        (name, split): getattr(getattr(contrast, name), split)
        for name in ("harmful", "harmless")
        for split in ("train", "val", "test")
    }
    return texts | {("borderline", "test"): contrast.borderline}


def _refusal_tokens(session: Session, settings: FindSettings) -> tuple[RefusalToken, ...]:
    tokenizer, monitor = session.loaded.tokenizer, session.monitor
    if settings.refusal_tokens is not None:
        tokens = _given_tokens(tokenizer, settings.refusal_tokens)
    else:
        harmful, harmless = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
        harmless = harmless.take(range(len(harmless))[:_HARMLESS_REPLIES])
        with monitor.phase("find refusal tokens", len(harmful) + len(harmless)) as advance:
            found = find_refusals(session.model, tokenizer, harmful, harmless, session.size, judge, advance)
        if found.refused < max(1, settings.min_refusal_rate * found.prompts):
            raise GateNotMet(
                f"this model hardly refuses: {found.refused} of {found.prompts} harmful validation prompts, expected "
                f"at least {settings.min_refusal_rate:.0%}; there is nothing to find: give prompts that it refuses, or "
                "--refusal-tokens"
            )
        tokens = found.tokens
    monitor.note(
        "refusals start with "
        + ", ".join(f"{t.text!r}" + (f" ({t.probability:.0%})" if t.trials else "") for t in tokens)
    )
    return tokens


def _given_tokens(tokenizer: Any, option: str) -> tuple[RefusalToken, ...]:
    ids: dict[int, str] = {}
    for text in option.split(","):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if not text or not encoded:
            raise UsageError(f"--refusal-tokens '{option}': expected texts separated by commas, found an empty one")
        ids[encoded[0]] = tokenizer.decode([encoded[0]])
    return tuple(RefusalToken(token, text, 0.0, 0.0, 0, 0) for token, text in ids.items())


def _find_or_force(session: Session, settings: FindSettings, force: bool) -> tuple[Findings, FindSettings]:
    """`find`, and when a forced run meets the refusal gate, once more without it; with the settings it took."""
    try:
        return find(session, settings), settings
    except GateNotMet as gate:
        if not force or settings.min_refusal_rate == 0:
            raise
        session.monitor.warn(f"{gate} (forced)")
        relaxed = settings.model_copy(update={"min_refusal_rate": 0.0, "all_prompts": True})
        return find(session, relaxed), relaxed


def _admitting(score: SiteScore, rule: Rule) -> str:
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


def _separation(session: Session, candidates: Candidates, scorer: Scorer) -> Separation:
    values = []
    pairs = (("harmful", scorer.harmful_rows), ("harmless", scorer.harmless_rows))
    with session.monitor.phase("separate validation prompts", sum(len(rows) for _, rows in pairs)) as advance:
        for name, rows in pairs:
            encoded = session.encoded[name, "val"].take(rows)
            fitter = ProjectionFitter(candidates.units, len(encoded))
            stream_sites(
                session.model,
                session.blocks,
                encoded,
                session.positions,
                fitter.update,
                session.size,
                progress=advance,
            )
            values.append(fitter.values)
    result = separation(*values)
    if float(result.auroc.max()) < _MIN_AUROC:
        raise GateNotMet(
            f"the prompt sets do not separate: best AUROC {float(result.auroc.max()):.2f} on validation prompts, "
            f"expected at least {_MIN_AUROC}; check that the sets differ in what is to be found"
        )
    return result


@contextlib.contextmanager
def _output(output: OutputSettings, files: ModelFiles) -> Iterator[tuple[Path, Checkpoint]]:
    """A folder that becomes OUT when all is done, and the checkpoint to be edited into it."""
    source = open_checkpoint(files.folder)
    with staged(output.out, overwrite=output.overwrite, source=files.folder) as partial:
        ensure_space(partial, bytes_to_write(source))
        yield partial, source


def _operate(
    source: Checkpoint, target: Path, plan: Plan, names: dict[str, str], model: Any, monitor: Monitor
) -> Surgery:
    for parameter, tensor in names.items():
        expected, stored = tuple(model.get_parameter(parameter).shape), source.tensors[tensor].shape
        if expected != stored:
            raise CheckpointError(
                f"tensor '{tensor}' in {source.tensors[tensor].file}: expected shape {list(expected)} by the model's "
                f"configuration, found {list(stored)}"
            )
    with monitor.phase("edit weights", bytes_to_write(source)) as advance:
        surgery = edit_checkpoint(source, target, plan, names, progress=advance)
    for name, why in plan.left_alone:
        monitor.note(f"{name} left alone: {why}")
    if surgery.files.left_out:
        monitor.warn(f"not copied, they would still hold the unedited model: {', '.join(surgery.files.left_out)}")
    return surgery


def _evaluate(session: Session, partial: Path, names: dict[str, str], settings: EvalSettings) -> rec.EvaluationPart:
    """Before: the original weights. After: the tensors that were saved, read back from disk."""
    before = session.answers(settings.max_new_tokens, "answers before")
    with contextlib.ExitStack() as stack:
        with session.monitor.phase("read edited weights back"):
            edited = stack.enter_context(weights_from(session.model, partial, names))
        after = session.answers(settings.max_new_tokens, "answers after")
        shift = _shift(
            session.monitor,
            session,
            before,
            Subject(session.model, edited.original),
            Subject(session.model),
        )
    return evaluation_part(before, after, shift, settings)


def _shift(monitor: Monitor, session: Session, before: dict[str, Answers], base: Subject, edited: Subject) -> Shift:
    encoded = session.encoded["harmless", "test"]
    rows = range(min(_SHIFT_PROMPTS, len(encoded)))
    replies = [before["harmless"].replies[row] for row in rows]
    with monitor.phase("shift on harmless prompts", len(rows)) as advance:
        return measure_shift(base, edited, encoded.take(rows), replies, session.size, advance)


def evaluation_part(
    before: dict[str, Answers], after: dict[str, Answers], shift: Shift, settings: EvalSettings
) -> rec.EvaluationPart:
    """The evaluation as it stands in the record, with answers to harmful prompts redacted unless asked for."""
    return rec.EvaluationPart(
        max_new_tokens=settings.max_new_tokens,
        before=behaviour_part(before),
        after=behaviour_part(after),
        shift=rec.ShiftPart(**asdict(shift)),
        answers={
            "before": answer_parts(before, keep=settings.keep_completions),
            "after": answer_parts(after, keep=settings.keep_completions),
        },
    )


def behaviour_part(answers: dict[str, Answers]) -> rec.BehaviourPart:
    """Counts, rates and intervals of every set."""
    return rec.BehaviourPart(**{name: rate_part(group.tally) for name, group in answers.items()})


def rate_part(tally: Tally) -> rec.RatePart:
    """A tally with its rate and interval."""
    return rec.RatePart(
        refusals=tally.refusals,
        degenerate=tally.degenerate,
        n=tally.n,
        rate=rec.finite(tally.rate),
        ci95=tally.ci95,
    )


def answer_parts(answers: dict[str, Answers], *, keep: bool) -> dict[str, list[rec.AnswerPart]]:
    """Every judged reply; those to harmful prompts are redacted unless `keep`."""
    parts: dict[str, list[rec.AnswerPart]] = {}
    for name, group in answers.items():
        redacted = name == "harmful" and not keep
        parts[name] = [
            rec.AnswerPart(
                prompt=prompt,
                label=verdict.label.value,
                evidence="" if redacted else verdict.evidence,
                tokens=len(reply.tokens),
                text=rec.redact(reply.text) if redacted else reply.text,
                redacted=redacted,
            )
            for prompt, reply, verdict in zip(group.prompts, group.replies, group.verdicts, strict=True)
        ]
    return parts


def _record(
    session: Session,
    settings: RunSettings,
    found: Found,
    plan: Plan,
    surgery: Surgery,
    evaluation: rec.EvaluationPart,
    source: Checkpoint,
    partial: Path,
) -> rec.Record:
    monitor, output = session.monitor, settings.output
    with monitor.phase("hash files"):
        before = {shard.path.name: sha256(shard.path) for shard in source.shards}
        after = {shard.path.name: sha256(partial / shard.path.name) for shard in source.shards}
    loaded = session.loaded
    dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    return rec.Record(
        created=_now(),
        versions=_versions(),
        settings=settings.model_dump(mode="json"),
        model=_model_part(loaded.files, session.model, session.anatomy, dtype, device, before),
        prompts=_prompts_part(session),
        anatomy=_anatomy_part(session.anatomy),
        refusal_tokens=[rec.TokenPart(**asdict(token)) for token in found.findings.tokens],
        selection=selection_part(found),
        plan=_plan_part(plan, surgery),
        evaluation=evaluation,
        warnings=monitor.warnings,
        left_out=list(surgery.files.left_out),
        output=None if output is None else str(output.out),
        output_sha256=after,
        timings_s=monitor.timings(),
        peak_memory_bytes=monitor.peak_bytes,
    )


def _model_part(
    files: ModelFiles, model: Any, anatomy: Anatomy, dtype: str, device: str, hashes: dict[str, str]
) -> rec.ModelPart:
    return rec.ModelPart(
        name=files.name,
        kind=files.kind,
        architecture=type(model).__name__,
        d_model=anatomy.d_model,
        layers=anatomy.layers,
        dtype=dtype,
        device=device,
        source_sha256=hashes,
    )


def _prompts_part(session: Session) -> rec.PromptsPart:
    contrast, loading = session.prompts, session.loading
    return rec.PromptsPart(
        sources=contrast.sources,
        counts=contrast.counts,
        duplicates_dropped=contrast.duplicates_dropped,
        sha256=contrast.sha256,
        system=loading.system,
        chat_template=loading.chat_template or "tokenizer",
        shared_prefix_tokens=len(session.encoded["harmful", "test"].prefix),
        positions=session.positions,
    )


def _anatomy_part(anatomy: Anatomy) -> rec.AnatomyPart:
    return rec.AnatomyPart(writers=len(anatomy.writers), worst_closure=max(anatomy.closure), tolerance=TOLERANCE)


def selection_part(found: Found) -> rec.SelectionPart:
    """The selection as it stands in the record. A forced choice is there too, with `met_rule` false."""
    selection = found.selection
    return rec.SelectionPart(
        chosen=rec.SitePart(**asdict(selection.best)),
        met_rule=found.met_rule,
        control=rec.ControlPart(**asdict(selection.control)),
        harmful=selection.harmful,
        harmless=selection.harmless,
        max_kl=selection.rule.max_kl,
        min_induce=selection.rule.min_induce,
        max_depth=selection.rule.max_depth,
        trained_on=found.findings.trained_on,
        candidates=[rec.SitePart(**asdict(score)) for score in selection.candidates],
    )


def _plan_part(plan: Plan, surgery: Surgery) -> rec.PlanPart:
    return rec.PlanPart(
        strength=plan.strength,
        rank=len(plan.direction),
        edits=[rec.ResidualPart(**(asdict(r) | {"ratio": r.ratio})) for r in surgery.residuals],
        left_alone=dict(plan.left_alone),
    )


def direction_metadata(session: Session, found: Found) -> dict[str, Any]:
    """What `direction.safetensors` says of itself."""
    best = found.selection.best
    return {
        "version": 1,
        "model": session.loaded.files.name,
        "d_model": session.anatomy.d_model,
        "layers": session.anatomy.layers,
        "positions": found.findings.candidates.positions,
        "chosen": {"layer": best.layer, "position": best.position, "norm": best.norm, "met_rule": found.met_rule},
        "trained_on": found.findings.trained_on,
        "prompts_sha256": session.prompts.sha256,
    }


def _direction_metadata(session: Session, found: Found, record: rec.Record) -> dict[str, Any]:
    return direction_metadata(session, found) | {"model_sha256": record.model.source_sha256}


def _finish(record: rec.Record, partial: Path) -> None:
    write_card(record, partial)
    rec.write_record(record, partial)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("abliterate", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


__all__ = [
    "Findings",
    "Found",
    "Session",
    "Verification",
    "apply",
    "choose",
    "evaluate",
    "find",
    "open_model",
    "open_session",
    "run",
    "verify",
]
