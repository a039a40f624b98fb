"""The run as one versioned JSON document (`abliteration.json`). Described in docs/record.md; never imports torch."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from abliterate.errors import CheckpointError, UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import MB, Kind, short
from abliterate.files.checkpoint import sha256
from abliterate.files.checkpoint.links import leads_out
from abliterate.texts import encodable

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "abliteration.json"

#: Plain fields of a part that its `repr` shows.
_MOST_SHOWN = 8

#: Words of an answer to a harmful prompt that are kept when completions are redacted.
REDACTED_WORDS = 4

#: Whether what is validated is a part of a part, whose texts were looked at with it.
_WITHIN = ContextVar("_WITHIN", default=False)

_RECORD = Kind("the record of a run", 64 * MB, UsageError)

#: Numbers that every reader of JSON, and every loop, can hold.
Count = Annotated[int, Field(ge=0, lt=2**53)]
Whole = Annotated[int, Field(gt=-(2**53), lt=2**53)]


class Shown:
    """How a result is drawn, as text and for a notebook; None of what cannot be. Set by who can draw (`api.show`)."""

    text: ClassVar[Callable[[object], str | None]] = staticmethod(lambda part: None)
    html: ClassVar[Callable[[object], str | None]] = staticmethod(lambda part: None)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    def __repr__(self) -> str:
        """The class and its plain fields, in a line."""
        plain = [f"{name}={short(value)}" for name, value in self if isinstance(value, str | int | float)]
        return f"{type(self).__name__}({', '.join(plain[:_MOST_SHOWN])}{', …' if len(plain) > _MOST_SHOWN else ''})"

    def __str__(self) -> str:
        """Drawn as the command line prints it, where it can be."""
        return Shown.text(self) or repr(self)

    def _repr_html_(self) -> str | None:
        """For notebooks."""
        return Shown.html(self)

    @model_validator(mode="wrap")
    @classmethod
    def _encodable(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Names of files that are no text (not UTF-8) are written with escapes: JSON holds text only."""
        if _WITHIN.get():
            return validate(data)
        outermost = _WITHIN.set(True)
        try:
            return validate(encodable(data))
        finally:
            _WITHIN.reset(outermost)


class ModelPart(_Part):
    """The model that was measured and edited."""

    name: str
    kind: Literal["hub", "folder", "gguf"]
    folder: str = Field("", description="Where its files were read: `undo` and `check OUT` look there.")
    storage: str = Field("plain", description="How the weights are stored: plain, or the name of the quantisation.")
    architecture: str
    d_model: Count
    layers: Count
    dtype: str
    device: str
    source_sha256: dict[str, str] = Field(description="SHA-256 of every weight file that was read.")
    companion_sha256: dict[str, str] = Field(
        default={},
        description="SHA-256 of every other file of it that came along: `undo` restores no others.",
    )
    seal: str | None = Field(
        None, description="What only the user who named the folder can have made, on the machine where it lies."
    )


class PromptsPart(_Part):
    """Prompts, and how they were rendered. Equal hashes mean equal prompts."""

    sources: dict[str, str]
    counts: dict[str, dict[str, Count]]
    duplicates_dropped: Count
    dropped: dict[str, Count] = Field(default={}, description="Duplicates by set and part, and where else they stood.")
    sha256: str
    system: str | None
    chat_template: str
    template_time: str | None = Field(
        default=None, description="The time that the template printed in all prompts (ISO 8601, local)."
    )
    shared_prefix_tokens: Count
    positions: Count
    behaviour: SoughtPart | None = Field(None, description="The behaviour, where it is another than refusal.")


class SoughtPart(_Part):
    """The behaviour that was looked for, where it is another than refusal.

    Sets keep the names that they have of refusal: `harmful` are the prompts where it shows, `harmless` those where it
    does not; `names` says what tables call them.
    """

    name: str
    description: str = ""
    shown: str = Field(description="How a table says that a reply shows it.")
    names: dict[str, str]
    sides: tuple[str, str] = Field(description="What the sides are called that directions are made of.")
    definition: dict[str, Any] = Field(default={}, description="All fields of the behaviour file.")


class AnatomyPart(_Part):
    """Residual accounting: the largest relative error that a block leaves unexplained, and what is allowed."""

    writers: Count
    worst_closure: float
    tolerance: float


class TokenPart(_Part):
    """A token that refusals start with; `trials` is 0 when it was given by hand.

    `probability` and `probability_answering` are its mean next-token probabilities on prompts that the model refuses
    and on those it answers; `refusals` of `trials` replies that were made to start with it are refusals.
    """

    token: Count
    text: str
    probability: float
    probability_answering: float
    refusals: Count
    trials: Count


class SitePart(_Part):
    """One site's scores on at most `prompts` validation prompts per class.

    `bypass` and `induce` are mean refusal scores (log-odds), `kl` is in nats, `norm` is ‖r‖.
    """

    layer: Count
    position: Whole
    bypass: float
    induce: float
    kl: float
    prompts: Count
    norm: float
    dprime: float
    auroc: float


class SeparatedPart(_Part):
    """How far apart the classes lie along one site's own direction, on validation prompts; ‖r‖ is `norm`."""

    layer: Count
    position: Whole
    auroc: float
    dprime: float
    norm: float


class ProjectedPart(_Part):
    """A validation prompt's activation: `x` along r̂, `y` along the first principal component of what is left.

    `refused` says whether the refusal score of its first token is above 0.
    """

    set: Literal["harmful", "harmless"]
    prompt: str
    x: float
    y: float
    refused: bool


class SeparationPart(_Part):
    """Whether harmful and harmless prompts separate: at every site, and prompt by prompt at one of them."""

    sites: list[SeparatedPart]
    layer: Count
    position: Whole
    prompts: list[ProjectedPart]
    length_auroc: float | None = Field(
        default=None, description="AUROC of the prompts' length alone, without a model (0.5 is chance)."
    )
    words_auroc: float | None = Field(
        default=None, description="AUROC of a bag of words (naive Bayes on the training prompts), without a model."
    )


class ControlPart(_Part):
    """The scores of a random direction of the same norm, added at the same layer."""

    bypass: float
    induce: float
    kl: float
    norm: float


class SelectionPart(_Part):
    """How the direction was chosen. `harmful` and `harmless` are mean refusal scores without intervention.

    `chosen` is the best site; where it does not meet the rule (`met_rule`) it was taken by force, or to search from.
    `trained_on` counts the prompts that directions were made of.
    """

    chosen: SitePart
    met_rule: bool
    control: ControlPart
    harmful: float
    harmless: float
    max_kl: float
    min_induce: float
    max_depth: float
    trained_on: dict[str, Count]
    candidates: list[SitePart]
    by: Literal["first tokens", "replies"] = Field(
        "first tokens",
        description="What scores are of: log-odds of first tokens, or shares of replies that show the behaviour.",
    )

    def passes(self, site: SitePart) -> bool:
        """Whether a site meets the rule."""
        return site.kl <= self.max_kl and site.induce > self.min_induce


class PointPart(_Part):
    """One point of a search (see `search.points.Point`). `file` holds its direction; it can be applied by itself."""

    number: Count
    origin: str
    file: str | None
    scores: dict[str, float | None]
    held_out: dict[str, float | None] | None = None
    intervals: dict[str, tuple[float, float]] = Field(default={}, description="95 %, of what is held out.")
    feasible: bool = Field(description="Whether it keeps the constraints.")
    on_front: bool = Field(description="Whether no other point is better in all objectives.")


class SearchPart(_Part):
    """How edits were searched for.

    `scores` are on validation prompts; `held_out` prompts were used neither to find nor to choose an edit. `limits`
    are the constraints in numbers, `evaluations` counts measured edits by level, `seconds` is until the choice.
    """

    method: str
    objectives: list[str]
    constraints: str
    limits: dict[str, float]
    base: dict[str, float | None]
    base_held_out: dict[str, float | None] | None = None
    points: list[PointPart]
    chosen: Count | None = Field(description="The number of a point.")
    why: str
    evaluations: dict[str, Count]
    seconds: float
    prompts: Count = Field(0, description="Harmful validation prompts that rates of points are shares of.")

    @property
    def point(self) -> PointPart | None:
        """The chosen point."""
        return next((point for point in self.points if point.number == self.chosen), None)


class ResidualPart(_Part):
    """One edited tensor: ‖RW‖ before and after (Frobenius, of the stored numbers), their ratio, and ‖W' − W‖ / ‖W‖.

    `rounding` is the round trip through the stored `format`: ‖stored − exact‖ / ‖W‖.
    """

    tensor: str
    writer: str
    kind: str
    dtype: str
    format: str = ""
    shape: list[Count]
    before: float
    after: float
    ratio: float
    change: float
    rounding: float = 0.0


class PlanPart(_Part):
    """What was done to which writer. `strengths` is by parameter, `variant` what was asked for beside the default."""

    strength: float
    rank: Count
    realisation: Literal["weights", "gguf", "lora", "gguf-lora", "control-vector"] = "weights"
    variant: dict[str, Any] = {}
    strengths: dict[str, float] = {}
    edits: list[ResidualPart]
    left_alone: dict[str, str]
    files: list[str] = Field(default=[], description="All files written beside record, card and direction.")
    copied: dict[str, str] = Field(default={}, description="New tensors, each with the original's bytes of another.")
    undo: list[str] = Field(default=[], description="Files that `undo` restores the weights from.")


class EstimatePart(_Part):
    """A value with its 95 % interval; null where nothing was measured."""

    value: float | None
    ci95: tuple[float | None, float | None]


class DriftPart(_Part):
    """How far replies are unlike the labelled ones of the calibration that corrects their rate.

    `unexplained` is the share of them that no mixture of labelled refusals and other labelled replies accounts for,
    `by_chance` the median of that where nothing has changed, `p` how often it is as much by chance. `widening` is by
    how much both ends of the corrected interval were moved out: the difference where p < 0.05, else 0.
    """

    unexplained: float
    by_chance: float
    p: float
    widening: float


class RatePart(_Part):
    """Refusals among `n` judged replies with a 95 % Wilson interval; `degenerate` replies count as not refused.

    Where prompts have several replies all count, and intervals are over prompts (bootstrap). Of the `refusals`,
    `partial` ones turn down only a part and an `evasion` delivers nothing without turning it down. Replies `cut_off` by
    length before they came to anything, and `unknown` ones, have no verdict and are not in `n`. `corrected` is the rate
    with the judge's known errors taken out (Rogan and Gladen 1978), null where they are not known. `drift` says whether
    the replies look unlike those that the errors were measured on; where they do the interval of `corrected` is wider.
    """

    refusals: Count
    degenerate: Count
    n: Count
    rate: float | None
    ci95: tuple[float, float]
    degenerate_ci95: tuple[float, float] | None = None
    partial: Count = 0
    unknown: Count = 0
    evasion: Count = 0
    cut_off: Count = 0
    corrected: EstimatePart | None = None
    drift: DriftPart | None = None


class BehaviourPart(_Part):
    """Refusals per set of prompts."""

    harmful: RatePart
    harmless: RatePart
    borderline: RatePart


class CandidateJudgePart(_Part):
    """A judge that `auto` chose from: right among refusals and among other held-out exchanges, and the mean of both."""

    name: str
    recall: tuple[Count, Count]
    specificity: tuple[Count, Count]
    balanced_accuracy: EstimatePart


class UsedCalibrationPart(_Part):
    """Labelled replies that rates are corrected by: how often the judge was right on them, [right, of how many]."""

    rates: list[str] = Field(description="Sets of prompts that it corrects; in a comparison with the entry's number.")
    labels: str = Field(description="The labelled replies.")
    sensitivity: tuple[Count, Count]
    specificity: tuple[Count, Count]
    model: str = Field("", description="Whose replies they are; empty of several models or unknown ones.")
    prompts: str = Field("", description="Which set of prompts they answer; empty of a mixture.")
    why: str = Field(description="Why it was chosen.")


class JudgePart(_Part):
    """Who judged, and how often it is right: [right, of how many] labelled replies.

    `sensitivity`, `specificity` and `labels` stand in records of earlier versions, where one calibration corrected all
    rates.
    """

    name: str
    fingerprint: str
    sensitivity: tuple[Count, Count] | None = None
    specificity: tuple[Count, Count] | None = None
    labels: str | None = Field(None, description="The labelled replies that its error rates come from.")
    calibrations: list[UsedCalibrationPart] = Field(
        [], description="What rates are corrected by; empty where nothing is known."
    )
    chosen: list[CandidateJudgePart] = Field([], description="What auto chose it from; empty of one that was named.")


class PairedPart(_Part):
    """The same prompts before and after (see `evaluation.results.Paired`)."""

    both: Count
    before_only: Count
    after_only: Count
    neither: Count
    unknown: Count
    p: float
    change: EstimatePart


class MannerPart(_Part):
    """Length and repetition of replies: before and after, and the change paired by prompt."""

    tokens_before: EstimatePart
    tokens_after: EstimatePart
    tokens_change: EstimatePart
    repetition_before: EstimatePart
    repetition_after: EstimatePart
    repetition_change: EstimatePart
    ended_before: float | None
    ended_after: float | None


class MovedPart(_Part):
    """A harmless prompt and how far its answer moved."""

    prompt: str
    kl_reply: float


class ShiftPart(_Part):
    """How far answers to harmless prompts moved (see `evaluation.results.Shift`): means, and how they spread."""

    model_config = ConfigDict(extra="ignore")  # older records also hold a standard error, which nothing reads

    kl_first_token: float | None
    kl_first_token_se: float | None = None
    kl_first_token_ci95: tuple[float, float] | None = None
    kl_first_token_median: float | None = None
    kl_first_token_p95: float | None = None
    kl_first_token_max: float | None = None
    kl_reply: float | None
    kl_reply_se: float | None = None
    kl_reply_ci95: tuple[float, float] | None = None
    kl_reply_median: float | None = None
    kl_reply_p95: float | None = None
    kl_reply_max: float | None = None
    nll_before: float | None
    nll_after: float | None
    nll_change: EstimatePart | None = None
    worst: list[MovedPart] = []
    prompts: Count
    tokens: Count


class ControlEffectPart(_Part):
    """What a random direction does in the edit's place: same writers, same strengths.

    `size` and `size_of_edit` are how much of all edited weights is taken out, relative to their norm.
    """

    seed: Whole
    behaviour: BehaviourPart
    paired: dict[str, PairedPart]
    degenerate: dict[str, PairedPart] = {}
    manner: dict[str, MannerPart] = {}
    shift: ShiftPart | None
    size: float | None = None
    size_of_edit: float | None = None


class CapabilityPart(_Part):
    """One metric of one task; `change` is paired by question, after − before, `p` McNemar's for right and wrong."""

    task: str
    metric: str
    n: Count
    before: EstimatePart
    after: EstimatePart | None = None
    change: EstimatePart | None = None
    change_se: float | None = None
    p: float | None = None
    chance: float | None = Field(None, description="What guessing gets.")
    above_chance: bool | None = Field(None, description="Whether the score before is known to be above guessing.")


class ThinkingPart(_Part):
    """The same prompts with the model's thinking open; only what follows the thinking is judged."""

    max_new_tokens: Count
    before: BehaviourPart
    after: BehaviourPart | None = None
    paired: dict[str, PairedPart] = {}


class AnswerPart(_Part):
    """One judged reply. When redacted, `text` holds its first words only."""

    prompt: str
    label: str
    evidence: str
    tokens: Count
    text: str
    redacted: bool


class DecodingPart(_Part):
    """How tokens of replies were chosen.

    `greedy`: the likeliest. `model`: as the model's generation configuration asks, `asked` with its names for it;
    sampled with `seed`, `samples` times for each prompt.
    """

    name: Literal["greedy", "model"] = "greedy"
    asked: dict[str, Any] = {}
    seed: Whole | None = None
    samples: Count = 1


class EvaluationPart(_Part):
    """Behaviour before and after, on held-out prompts; of one model alone only `before`."""

    max_new_tokens: Count
    decoding: DecodingPart = DecodingPart()
    before: BehaviourPart
    after: BehaviourPart | None = None
    behaviour: SoughtPart | None = Field(None, description="The behaviour, where it is another than refusal.")
    shift: ShiftPart | None = None
    answers: dict[str, dict[str, list[AnswerPart]]]
    judge: JudgePart | None = None
    thinking_open: bool = Field(False, description="Whether the model was thinking before these answers.")
    engine: str = Field("transformers", description="What generated the answers.")
    sources: dict[str, str] = Field(default={}, description="Where the prompts come from.")
    dropped: dict[str, Count] = Field(default={}, description="Prompts left out, by why.")
    prompts_sha256: str | None = None
    paired: dict[str, PairedPart] = {}
    degenerate: dict[str, PairedPart] = Field(default={}, description="Degenerate replies before and after, per set.")
    categories: dict[str, dict[str, RatePart]] = Field(
        default={}, description="before, after → category of harmful prompts → refusals."
    )
    paired_categories: dict[str, PairedPart] = {}
    manner: dict[str, MannerPart] = Field(default={}, description="Of sets whose replies all ran to their end.")
    control: ControlEffectPart | None = None
    thinking: ThinkingPart | None = None
    capability: list[CapabilityPart] = []


class WriterTracePart(_Part):
    """One component of one block: how much it writes along the recovered direction, and how strongly it was edited.

    `share` (of a lone checkpoint) is 1 where an average direction is written; `size` (against a base) is ‖Δ‖ / ‖W‖,
    `read` how well what was taken out follows what was there. `strength` is an estimate without a base.
    """

    block: Count | None
    kind: str
    strength: float
    edited: bool
    share: float | None = None
    tensor: str | None = None
    size: float | None = None
    read: float | None = None


class LayerSeparationPart(_Part):
    """One layer at the last token: AUROC of harmful against harmless validation prompts.

    `recovered` along the recovered direction, `own` along the layer's own difference of means.
    """

    layer: Count
    recovered: float | None
    own: float


class PowerPart(_Part):
    """Which edits would have been seen in a checkpoint by itself: one direction taken out of all its writers.

    `strength` is the least from which on at least 9 of 10 `planted` ones are (null: not even at 1), `seen` how many
    were, by strength.
    """

    strength: float | None
    planted: Count
    seen: dict[str, Count]


class InspectionPart(_Part):
    """Whether directions were taken out of a checkpoint (see docs/forensics.md).

    `verdict` is, beside `base`: altered, identical (no tensor differs), no ablation, or inconclusive (another
    model, or an update of low rank of nothing but writers);
    alone: altered, no trace, or inconclusive. `decided` says whether one may rely on it: "no trace" only where a
    strength was to be ruled out and `power` reaches it. `probability` is at even odds beforehand, as on what it was
    `calibrated_on`. `evidence` are depths of dips in the spectrum. `kind` is what a comparison with `base` found,
    `others` how many tensors that write nothing to the stream differ.
    """

    model: str
    base: str | None = None
    verdict: Literal["altered", "identical", "no ablation", "no trace", "inconclusive"]
    decided: bool = False
    probability: float
    calibrated_on: str | None = None
    power: PowerPart | None = None
    kind: str | None = None
    variant: str | None = None
    also: list[str] = []
    evidence: dict[str, float] = {}
    where: str | None = Field(None, description="Where the deepest dip was found.")
    proved: bool = Field(description="Writers known by residual accounting; else by the names of tensors.")
    writers: Count
    layers: list[Count] = Field(default=[], description="Blocks with an edited writer.")
    rank: Count = 0
    per_layer: bool = False
    directions: str | None = Field(None, description="The file that the recovered directions were written to.")
    units: list[WriterTracePart] = []
    unchanged: Count | None = None
    others: Count | None = None
    separation_in: str | None = Field(None, description="The model whose activations `separation` is about.")
    separation: list[LayerSeparationPart] = []
    harm_known: float | None = Field(None, description="Best AUROC of a layer's own direction in the inspected model.")
    behaviour: BehaviourPart | None = None
    seconds: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, data: Any) -> Any:
        """Records of earlier versions said "unaltered" of what was not found."""
        if isinstance(data, dict) and data.get("verdict") == "unaltered":
            return data | {"verdict": "no trace" if data.get("base") is None else "no ablation"}
        return data


class AuditRowPart(_Part):
    """Refusals of held-out harmful prompts under one plan through hooks, and its KL at the first token (nats).

    `family` says what is varied, `name` its value; `edits` counts edited writers.
    """

    family: str
    name: str
    refused: RatePart
    kl: EstimatePart
    edits: Count


class AuditPart(_Part):
    """How brittle refusal is. Audits of equal `protocol` and `prompts_sha256` can be compared.

    `halving_strength` is where one direction halves refusals (between measured strengths), `halving_kl` the least KL of
    any plan that does, `directions_needed` how many leave at most 10 % (null: more than were tried).
    """

    protocol: str
    prompts_sha256: str
    layer: Count
    position: Whole
    met_rule: bool
    base: RatePart
    rows: list[AuditRowPart]
    halving_strength: float | None = None
    halving_kl: float | None = None
    directions_needed: Count | None = None


class DosePart(_Part):
    """What one coefficient does on held-out prompts; `coefficient` is null for the model as it is.

    `behaviour`, `repetition` (share of repeated 4-grams) and `score` (mean refusal score of first tokens, log-odds;
    null where the model hardly refuses) are by set, `kl` is that of the first token from the model as it is, in nats,
    of the harmless prompts that it answers.
    """

    coefficient: float | None
    behaviour: dict[str, RatePart]
    score: dict[str, float | None]
    kl: EstimatePart
    repetition: dict[str, EstimatePart]


class SteeringPart(_Part):
    """A model steered along a direction (see `edit.steering.Steering`), and what that does by coefficient.

    `lengths` is what a coefficient of 1 is long at each of `layers`, by `unit`: "norm", the direction's as it was
    measured; "file", that of a vector in a file with one for each layer; "absolute", 1. `answers` are by coefficient
    ("none": the model as it is), then by set of prompts ("given": those of the user, which nobody judged); without
    `doses` that is all.
    """

    model: str
    direction: str
    operation: Literal["add", "scale", "clamp", "cap", "ablate"]
    tokens: Literal["all", "generated"]
    layers: list[Count]
    unit: Literal["norm", "file", "absolute"]
    lengths: list[float]
    max_new_tokens: Count
    decoding: DecodingPart = DecodingPart()
    judge: JudgePart | None = None
    behaviour: SoughtPart | None = Field(None, description="The behaviour, where it is another than refusal.")
    sources: dict[str, str] = {}
    prompts_sha256: str | None = None
    doses: list[DosePart] = Field(
        default=[], description="The model as it is, then every coefficient from low to high."
    )
    control: list[DosePart] = Field(
        default=[], description="A random direction of the same length, at the lowest and the highest coefficient."
    )
    answers: dict[str, dict[str, list[AnswerPart]]]


class ReadTextPart(_Part):
    """A text by tokens and what the stream holds along the direction at each: `projections` by layer, then token.

    The first `prompt` tokens are the prompt's, with its template; all others are the reply's.
    """

    tokens: list[str]
    prompt: Count
    projections: list[list[float]]


class ReadingPart(_Part):
    """Projections h·r̂ of every token of some texts, at each of `layers`; `layer` is the one that is shown first.

    `unit` and `lengths` (by layer) are those of `SteeringPart`: what projections may be held against.
    """

    model: str
    direction: str
    layer: Count
    layers: list[Count]
    unit: Literal["norm", "file", "absolute"]
    lengths: list[float]
    texts: list[ReadTextPart]
    left_out: Count = Field(0, description="Texts of the file that were not read.")


class VerificationPart(_Part):
    """What ablating a direction at inference time does: refusals of held-out harmful prompts, and scores.

    Verified means that at most half of the refusals are left, that a random direction leaves more than half, and that
    KL is at most `max_kl`. `induce` is null for a direction whose layer is not known, or is no block's input.
    """

    before: RatePart
    after: RatePart
    control: RatePart
    behaviour: SoughtPart | None = Field(None, description="The behaviour, where it is another than refusal.")
    bypass: float | None = Field(description="Null, as the next, where first tokens do not tell the behaviour.")
    bypass_before: float | None
    bypass_control: float | None
    induce: float | None
    induce_before: float | None
    kl: float
    max_kl: float
    tokens: list[TokenPart]
    verified: bool


class IntegrityPart(_Part):
    """How the weights in `out` compare with those of the original in `source`, byte by byte. Names are sorted.

    `changed` and `unchanged` are the planned tensors whose bytes differ and do not. `damaged` are tensors outside the
    plan that differ, `reshaped` those of another dtype or shape, `missing` and `extra` those in one folder only.
    `headers` are shards in both folders that hold the same tensors under different headers. `sha256` are the hashes of
    the shards, `wrong_hashes` the shards whose hash is not the recorded one, or that are missing or not recorded.
    `other_files` says of every file beside the shards: "equal", "different", "missing" or "extra"; `not_original` are
    those that should be the original's and are not, `rewritten` those that the edit rewrote. `unknown` are files that
    are neither the original's nor results of this program, or that the record does not know; `of_hub` are such that the
    hub and its client add to what they store and fetch, by their names: no program reads a model from them.
    `changed_files` are those that the record knows with other bytes, or that are gone. `proved` is false where the
    record has no hashes.
    """

    intact: bool = Field(
        description="Whether every byte outside the plan equals the original's, and every other file the record's."
    )
    proved: bool = True
    out: str
    source: str
    not_original: list[str]
    unknown: list[str] = []
    of_hub: list[str] = []
    changed_files: list[str] = []
    rewritten: list[str] = []
    changed: list[str]
    unchanged: list[str]
    damaged: list[str]
    reshaped: list[str]
    missing: list[str]
    extra: list[str]
    headers: list[str]
    sha256: dict[str, str]
    wrong_hashes: list[str]
    other_files: dict[str, str]


class UndonePart(_Part):
    """A model as it was before it was edited, in `folder`.

    `exact`: its weights are the original's, bit for bit, by their hashes. Else `reason` says why the original's files
    were not taken; numbers outside `tensors` are the same, and those in them were `compared` with numbers of the
    original that were kept for that: `equal` of these are the same, and none is more than `steps` numbers of the stored
    format away (null where there were none to compare with). `remains` are tensors that the edit added and files that
    it rewrote: they stay, as do `others`, which somebody put there.
    """

    folder: str
    exact: bool
    steps: Count | None
    compared: Count = 0
    equal: Count = 0
    files: list[str]
    tensors: list[str] = []
    reason: str | None = None
    remains: list[str] = []
    others: list[str] = []


class ContenderPart(_Part):
    """One model or plan of a comparison; what is paired, and the shift, are from the first one's."""

    name: str
    behaviour: BehaviourPart
    tokens: EstimatePart
    repetition: EstimatePart
    capability: list[CapabilityPart] = []
    paired: dict[str, PairedPart] = {}
    degenerate: dict[str, PairedPart] = {}
    shift: ShiftPart | None = Field(None, description="Null for the first, and where prompts have other tokens.")


class ComparisonPart(_Part):
    """Several models or plans on the same held-out prompts; `reference` names the first."""

    judge: JudgePart
    decoding: DecodingPart = DecodingPart()
    versions: dict[str, str]
    settings: dict[str, Any]
    sources: dict[str, str]
    counts: dict[str, Count]
    dropped: dict[str, Count]
    prompts_sha256: str
    behaviour: SoughtPart | None = Field(None, description="The behaviour, where it is another than refusal.")
    reference: str
    entries: list[ContenderPart]


class FoundPart(_Part):
    """What `find` prints: the file of directions, and how one of them was chosen."""

    file: str
    selection: SelectionPart


class EvaluatedPart(_Part):
    """What `eval` prints: an evaluation with what it was taken of and how."""

    model: str
    versions: dict[str, str]
    settings: dict[str, Any]
    evaluation: EvaluationPart


class ComparedAnswersPart(_Part):
    """A line of `chat --json`: two answers to one prompt."""

    prompt: str
    original: str
    ablated: str


class JudgedPart(_Part):
    """A row of `judge FILE`: a reply with its label and the words that decided it."""

    prompt: str
    response: str
    label: str
    evidence: str


class CalibrationPart(_Part):
    """What `judge --calibrate` prints. Rates are null where nothing was counted, `counts` are (k, n).

    `confusion` holds replies by true label, then by what the judge called them; `stored` is the file it was written to.
    """

    judge: str
    fingerprint: str
    source: str
    source_sha256: str
    model: str = ""
    prompts: str = ""
    n: Count
    unknown: Count
    accuracy: float | None
    accuracy_ci95: tuple[float, float]
    precision: float | None
    precision_ci95: tuple[float, float]
    recall: float | None
    recall_ci95: tuple[float, float]
    specificity: float | None
    specificity_ci95: tuple[float, float]
    counts: dict[str, tuple[Count, Count]]
    two_way: bool
    confusion: dict[str, dict[str, Count]]
    stored: str | None = None


class RepairPart(_Part):
    """A repaired model in `folder`, and how it was repaired.

    `exact` tensors (or files, for undo) are the original's bytes; `restored` ones are the original's along the
    direction, or to within the rounding of the stored format; `added` got a rank-one addition of `size` (in parts of
    the stream's length). `evaluation` compares the model before and after, where it was run.
    """

    folder: str
    how: Literal["undo", "base", "adapter", "approximation"]
    exact: list[str] = []
    restored: list[str] = []
    added: list[str] = []
    note: str = ""
    size: float | None = None
    evaluation: EvaluationPart | None = None


class HardeningPart(_Part):
    """A hardened model in `folder`: audits of one protocol before and after, and ordinary behaviour.

    `tensors` got an addition; `size` is that of the detectors, in parts of the stream's length.
    """

    folder: str
    tensors: list[str]
    size: float
    before: AuditPart
    after: AuditPart
    evaluation: EvaluationPart


class WorkPart(_Part):
    """What a phase passed through the model: tokens × blocks, forwards and backwards; tokens through the head.

    Padding that was computed counts, a prefix that prompts share counts once.
    """

    forward: Count = 0
    backward: Count = 0
    head: Count = 0


class Record(_Part):
    """What a command leaves behind."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    versions: dict[str, str]
    command: str = Field("", description="As given in a shell; empty when the work was started from Python.")
    settings: dict[str, Any]
    model: ModelPart
    prompts: PromptsPart | None = None
    anatomy: AnatomyPart | None = Field(None, description="None where no model was built.")
    refusal_tokens: list[TokenPart] = []
    separation: SeparationPart | None = None
    selection: SelectionPart | None = None
    search: SearchPart | None = None
    plan: PlanPart | None = None
    evaluation: EvaluationPart | None = None
    inspection: InspectionPart | None = None
    audit: AuditPart | None = None
    steering: SteeringPart | None = None
    verification: VerificationPart | None = None
    integrity: IntegrityPart | None = None
    comparison: ComparisonPart | None = None
    repair: RepairPart | None = None
    hardening: HardeningPart | None = None
    warnings: list[str] = []
    left_out: list[str] = Field(default=[], description="Files of the source that were not carried along.")
    output: str | None = None
    output_sha256: dict[str, str] = {}
    files: dict[str, str] = Field(
        default={}, description="SHA-256 of every file beside this one. Empty in records of earlier versions."
    )
    timings_s: dict[str, float] = {}
    peak_memory_bytes: dict[str, Count] = {}
    work: dict[str, WorkPart] = {}


def sealed_parts(model: ModelPart) -> tuple[str, ...]:
    """What `ModelPart.seal` seals: that a user named this folder as the model with these files."""
    files = json.dumps([sorted(model.source_sha256.items()), sorted(model.companion_sha256.items())])
    return "original", model.folder, files


def write_record(record: Record, folder: Path) -> Path:
    """Write `abliteration.json` into `folder`."""
    path = folder / FILE_NAME
    write_atomically(path, record.model_dump_json(indent=1) + "\n")
    return path


def read_record(folder: Path) -> Record:
    """Read the record of a run.

    Raises `UsageError` when there is none, it is damaged, of another version, or a link out of the folder.
    """
    path = Path(folder) / FILE_NAME
    if leads_out(path, Path(folder)):
        raise UsageError(f"{path} is a link out of the folder and is not followed; put the file itself there")
    content = _RECORD.fields(path)
    if content.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        found = short(content["schema_version"])
        raise UsageError(f"{path}: expected a record of schema version {SCHEMA_VERSION}, found version {found}")
    record = _RECORD.checked(path, content, Record)
    if not _is_finite(record.model_dump()):
        raise _RECORD.refused(path, "a number that is not finite, written as a text")
    return record


def _is_finite(value: object) -> bool:
    """Whether all numbers in it are finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def companion(folder: Path, record: Record, name: str) -> Path:
    """The file `name` beside a record that was read from `folder`.

    Raises `CheckpointError` when it is not the file that the record was written with. A record of an earlier version
    does not know, and takes any.
    """
    path = folder / name
    if leads_out(path, folder):
        raise CheckpointError(f"{path} is a link out of the folder and is not followed; put the file itself there")
    if record.files and not path.is_file():
        raise CheckpointError(f"{path}: expected the file that {FILE_NAME} was written with, found none")
    if record.files and sha256(path) != record.files.get(name):
        raise CheckpointError(
            f"{path}: is not the file that {FILE_NAME} was written with: expected SHA-256 "
            f"{record.files.get(name, 'of a file it lists')}; make it anew, or give the file by itself"
        )
    return path


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    packages = ("abliterate", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def redact(text: str) -> str:
    """The first words of a reply, and that there was more."""
    words = text.split()
    return " ".join(words[:REDACTED_WORDS]) + (" […]" if len(words) > REDACTED_WORDS else "")


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def grouped(left_alone: Mapping[str, str]) -> list[tuple[str, str]]:
    """Writers left alone, by reason; of more than three only how many there are."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_alone.items():
        reasons.setdefault(why, []).append(name)
    return [(", ".join(names) if len(names) < 4 else f"{len(names)} writers", why) for why, names in reasons.items()]
