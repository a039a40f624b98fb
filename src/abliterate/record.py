"""The run as one versioned JSON document (`abliteration.json`). Described in docs/record.md; never imports torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from abliterate.errors import CheckpointError, UsageError

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "abliteration.json"

#: Words of an answer to a harmful prompt that are kept when completions are redacted.
REDACTED_WORDS = 4


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class ModelPart(_Part):
    """The model that was measured and edited."""

    name: str
    kind: Literal["hub", "folder", "gguf"]
    folder: str = Field("", description="Where its files were read: `undo` and `verify OUT` look there.")
    storage: str = Field("plain", description="How the weights are stored: plain, or the name of the quantisation.")
    architecture: str
    d_model: int
    layers: int
    dtype: str
    device: str
    source_sha256: dict[str, str] = Field(description="SHA-256 of every weight file that was read.")


class PromptsPart(_Part):
    """Prompts, and how they were rendered. Equal hashes mean equal prompts."""

    sources: dict[str, str]
    counts: dict[str, dict[str, int]]
    duplicates_dropped: int
    sha256: str
    system: str | None
    chat_template: str
    shared_prefix_tokens: int
    positions: int


class AnatomyPart(_Part):
    """Residual accounting: how well every block's books closed (relative error)."""

    writers: int
    worst_closure: float
    tolerance: float


class TokenPart(_Part):
    """One refusal token (see `refusals.RefusalToken`); `trials` is 0 when it was given by hand."""

    token: int
    text: str
    probability: float
    probability_answering: float
    refusals: int
    trials: int


class SitePart(_Part):
    """Scores of one site (see `selection.SiteScore`)."""

    layer: int
    position: int
    bypass: float
    induce: float
    kl: float
    prompts: int
    norm: float
    dprime: float
    auroc: float


class ControlPart(_Part):
    """Scores of a random direction of the same norm."""

    bypass: float
    induce: float
    kl: float
    norm: float


class SelectionPart(_Part):
    """How the direction was chosen. `harmful` and `harmless` are mean refusal scores without intervention."""

    chosen: SitePart | None
    met_rule: bool
    control: ControlPart
    harmful: float
    harmless: float
    max_kl: float
    min_induce: float
    max_depth: float
    trained_on: dict[str, int]
    candidates: list[SitePart]


class ResidualPart(_Part):
    """One edited tensor: ‖RW‖ before and after (stored numbers), their ratio, and ‖W' − W‖ / ‖W‖.

    `rounding` is the round trip through the stored `format`: ‖stored − exact‖ / ‖W‖.
    """

    tensor: str
    writer: str
    kind: str
    dtype: str
    format: str = ""
    shape: list[int]
    before: float
    after: float
    ratio: float
    change: float
    rounding: float = 0.0


class PlanPart(_Part):
    """What was done to which writer. `strengths` is by parameter, `variant` what was asked for beside the default."""

    strength: float
    rank: int
    realisation: Literal["weights", "lora", "gguf-lora", "control-vector"] = "weights"
    variant: dict[str, Any] = {}
    strengths: dict[str, float] = {}
    edits: list[ResidualPart]
    left_alone: dict[str, str]
    files: list[str] = Field(default=[], description="All files written beside record, card and direction.")
    copied: dict[str, str] = Field(default={}, description="New tensors, each with the original's bytes of another.")
    undo: list[str] = Field(default=[], description="Files that `undo` restores the weights from.")


class RatePart(_Part):
    """Refusals among `n` replies with a 95 % Wilson interval; `degenerate` replies count as not refused."""

    refusals: int
    degenerate: int
    n: int
    rate: float | None
    ci95: tuple[float, float]


class BehaviourPart(_Part):
    """Refusals per set of prompts."""

    harmful: RatePart
    harmless: RatePart
    borderline: RatePart


class ShiftPart(_Part):
    """How far answers to harmless prompts moved (see `evaluation.Shift`)."""

    kl_first_token: float
    kl_first_token_se: float
    kl_reply: float
    kl_reply_se: float
    nll_before: float
    nll_after: float
    nll_change_se: float
    prompts: int
    tokens: int


class AnswerPart(_Part):
    """One judged reply. When redacted, `text` holds its first words only."""

    prompt: str
    label: str
    evidence: str
    tokens: int
    text: str
    redacted: bool


class EvaluationPart(_Part):
    """Behaviour before and after, on held-out prompts."""

    max_new_tokens: int
    before: BehaviourPart
    after: BehaviourPart
    shift: ShiftPart
    answers: dict[Literal["before", "after"], dict[str, list[AnswerPart]]]


class Record(_Part):
    """What a run leaves behind."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    versions: dict[str, str]
    settings: dict[str, Any]
    model: ModelPart
    prompts: PromptsPart | None = None
    anatomy: AnatomyPart
    refusal_tokens: list[TokenPart] = []
    selection: SelectionPart | None = None
    plan: PlanPart | None = None
    evaluation: EvaluationPart | None = None
    warnings: list[str] = []
    left_out: list[str] = Field(default=[], description="Files of the source that were not carried along.")
    output: str | None = None
    output_sha256: dict[str, str] = {}
    timings_s: dict[str, float] = {}
    peak_memory_bytes: dict[str, int] = {}


def write_record(record: Record, folder: Path) -> Path:
    """Write `abliteration.json` into `folder`."""
    path = folder / FILE_NAME
    try:
        path.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def read_record(folder: Path) -> Record:
    """Read the record of a run.

    Raises `UsageError` when there is none or it is of another version.
    """
    path = folder / FILE_NAME
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: expected the record of a run, found none") from error
    except ValueError as error:
        raise UsageError(
            f"{path}: expected a record of schema version {SCHEMA_VERSION}, found another or a damaged one"
        ) from error


def redact(text: str) -> str:
    """The first words of a reply, and that there was more."""
    words = text.split()
    return " ".join(words[:REDACTED_WORDS]) + (" […]" if len(words) > REDACTED_WORDS else "")


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
