"""Settings, one frozen object per concern. The fields' descriptions are the command line's help."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from abliterate.errors import UsageError

DEFAULT_STRENGTH = 1.0


def cache_folder() -> Path:
    """Where what can be made again is kept: $ABLITERATE_CACHE (empty is as good as none) or ~/.cache/abliterate."""
    return Path(os.path.expanduser(os.environ.get("ABLITERATE_CACHE") or "~/.cache/abliterate"))


#: A seed that every generator takes: numpy's has 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
#: How many of anything that one by one takes time: nobody waits for more.
Number = Annotated[int, Field(ge=1, le=10**6)]


#: A coefficient that anything is steered by, and how many are tried.
LARGEST_DOSE, MOST_DOSES = 1e4, 50
Dose = Annotated[float, Field(gt=-LARGEST_DOSE, lt=LARGEST_DOSE)]


def as_natural(text: str) -> int | None:
    """The whole number that a text writes in at most nine digits, from 0; else None."""
    return int(text) if text.isdecimal() and len(text) < 10 else None


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}iB".upper(): 1024 ** (index + 1) for index, unit in enumerate(("KB", "MB", "GB", "TB"))}
_LIMIT = re.compile(r"(?:cuda:)?(\d{1,3}|mps|cpu)=(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]i?B)?", re.IGNORECASE)


def as_limits(text: str) -> dict[int | str, int]:
    """Bytes by device of a text like '0=20GiB,cpu=48GB'; raises ValueError for another."""
    found: dict[int | str, int] = {}
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"expected DEVICE=SIZE like 0=20GiB,cpu=48GiB, found '{part[:40]}'")
        name = match[1].lower()
        found[int(name) if name.isdecimal() else name] = int(float(match[2]) * _UNITS[(match[3] or "").upper()])
    return found


def _as_text(value: Any) -> Any:
    """A path, a number, or a type or device of torch, as it is written in a shell."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    """Several texts or numbers, or strengths by what they are of, as they are written in a shell."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={strength}" for name, strength in value.items())
    if isinstance(value, list | tuple | set | frozenset | range):
        return ",".join(str(_as_text(item)) for item in value)
    return _as_text(value)


#: Prompts that were given as lists, by the name that settings have for them: only this process knows them.
_GIVEN: dict[str, tuple[Any, ...]] = {}


def given_prompts(name: str) -> tuple[Any, ...] | None:
    """The rows of prompts given in Python under a name that `PromptSettings` made; None of other names."""
    return _GIVEN.get(name)


def _as_source(value: Any) -> Any:
    """Where prompts come from: a SPEC, or a name for the rows of a list (texts, conversations, mappings)."""
    if isinstance(value, str | bytes | Mapping | os.PathLike) or not isinstance(value, Iterable):
        return _as_text(value)
    return name_prompts(value, "given in Python")


def name_prompts(values: Iterable[Any], where: str) -> str:
    """A name under which settings hold a list of prompts, which says `where` they stand; `given_prompts` knows it."""
    rows = tuple(values)
    if not rows:
        raise ValueError("expected prompts, found an empty list")
    digest = hashlib.sha256(repr(rows).encode("utf-8", "replace")).hexdigest()
    name = f"{len(rows)} prompts {where} ({digest[:12]})"
    _GIVEN[name] = rows
    return name


#: Behaviours that were given as objects or mappings, by the name that settings have for them.
_BEHAVIOURS: dict[str, Any] = {}


def given_behaviour(name: str) -> Any:
    """The behaviour given in Python under a name that `PromptSettings` made; None of other names."""
    return _BEHAVIOURS.get(name)


def _as_behaviour(value: Any) -> Any:
    """A builtin name or a file; or a name for a behaviour that is given as it is."""
    if isinstance(value, str | bytes | os.PathLike):
        return _as_text(value)
    fields = value.model_dump() if isinstance(value, BaseModel) else value
    if not isinstance(fields, Mapping):
        return value
    digest = hashlib.sha256(repr(fields).encode("utf-8", "replace")).hexdigest()
    name = f"{fields.get('name', 'behaviour')} given in Python ({digest[:12]})"
    _BEHAVIOURS[name] = value
    return name


Text = Annotated[str, BeforeValidator(_as_text)]
List = Annotated[str, BeforeValidator(_as_list)]
#: A prompt source: a SPEC (see `prompts.sources`), or a list.
Source = Annotated[str, BeforeValidator(_as_source)]


class _Settings(BaseModel):
    # Validators are made when they are first needed: most settings are described by a command and not used by it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="wrap")
    @classmethod
    def _said(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What does not fit is an error of this package, which names the field."""
        try:
            return handler(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = first["msg"].removeprefix("Value error, ")
            found = f", found {str(first['input'])[:60]}" if "found" not in reason else ""
            where = ".".join(map(str, (cls.__name__, *first["loc"])))
            raise UsageError(f"{where}: {reason[:1].lower()}{reason[1:]}{found}") from error

    @classmethod
    def natural(cls, value: Any) -> Self:
        """Settings as they are, or made of a mapping."""
        if not isinstance(value, Mapping):
            raise UsageError(f"expected {cls.__name__} or a mapping, found {type(value).__name__}")
        return cls.model_validate(dict(value))

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A path that begins with ~ is in a user's home, wherever it comes from; shells see to that only at times.

        A name that is not UTF-8 can be written into no record.
        """
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError("expected a text or name that is UTF-8, found another; rename the file") from error
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class FileSettings(_Settings):
    """How a model's files are read."""

    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_as_text)] = Field(
        "auto", description="What to measure in; auto is the stored one (bfloat16 for float16 on a CPU)."
    )
    max_leak: Annotated[float, Field(ge=1e-3, le=1)] = Field(
        1e-3, description="Edit a model of which some block writes this share along a direction past all its writers."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a model on the hub; default: its main.")


class ModelSettings(FileSettings):
    """How a model is loaded and run."""

    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps, or balanced: spread evenly over all GPUs.")
    max_memory: List | None = Field(
        None, description="Most that weights may take on each device, e.g. '0=20GiB,1=20GiB,cpu=48GiB'."
    )
    offload: Path | None = Field(
        None, description="Folder for weights that fit nowhere else: they stay on disk and are read for every pass."
    )
    parallel: Literal["data", "tensor"] = Field(
        "data",
        description="What several processes (torchrun) divide: data, the prompts, each process having the model; or "
        "tensor, a model that one device cannot hold.",
    )
    batch_size: Text = Field("auto", description="Prompts at once; auto finds it and halves it when memory runs out.")
    chat_template: Text | None = Field(
        None, description="A Jinja file instead of the tokenizer's template, or 'none' for bare prompts."
    )
    system: str | None = Field(None, description="System prompt.")

    @field_validator("batch_size")
    @classmethod
    def _auto_or_positive(cls, value: str) -> str:
        if value != "auto" and not 0 < (as_natural(value) or 0) <= 10**6:
            raise ValueError(f"expected auto or a positive whole number, found '{value[:40]}'")
        return value

    quantization: Literal["bnb-4bit", "bnb-8bit"] | None = Field(
        None, description="Measure on the model quantised like this; the files that are edited stay full."
    )

    @field_validator("max_memory")
    @classmethod
    def _sizes_by_device(cls, value: str | None) -> str | None:
        if value is not None:
            as_limits(value)
        return value

    @property
    def limits(self) -> dict[int | str, int] | None:
        """Bytes of weights by device (the number of a GPU, mps, cpu)."""
        return None if self.max_memory is None else as_limits(self.max_memory)

    @property
    def judge_device(self) -> str:
        """Where models that judge are run: they are small and not spread."""
        return "auto" if self.device == "balanced" else self.device

    @property
    def rows(self) -> int | None:
        """Prompts at once, or None to find out."""
        return None if self.batch_size == "auto" else int(self.batch_size)


class PromptSettings(_Settings):
    """Which prompts are used, and which behaviour is looked for in the replies."""

    behaviour: Annotated[str, BeforeValidator(_as_behaviour)] = Field(
        "refusal",
        description="What is found, measured and edited: refusal, over-refusal, hedging, sycophancy, stock-phrases, "
        "verbosity, language, or a file (.toml, see docs/behaviours.md).",
    )
    harmful: Source = Field(
        "builtin",
        description="Harmful prompts (those where the behaviour shows): builtin, FILE[:column] or "
        "id[:config]:split:column.",
    )
    harmless: Source = Field("builtin", description="Harmless prompts, named the same way.")
    eval_harmful: Source | None = Field(None, description="Harmful prompts to evaluate on, instead of a held-out part.")
    eval_harmless: Source | None = Field(
        None, description="Harmless prompts to evaluate on, instead of a held-out part."
    )
    borderline: Source = Field("builtin", description="Safe prompts that sound dangerous, to evaluate on.")
    limit: Number | None = Field(None, description="Use at most this many prompts per split.")
    seed: Seed = Field(0, description="Seed of everything random (shuffling prompts, the control direction).")


class RefusalSettings(_Settings):
    """How refusals of this model are recognised by their first token."""

    refusal_tokens: List | None = Field(
        None, description="First tokens of a refusal, comma-separated (e.g. 'I,As'), instead of finding them."
    )
    min_refusal_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="A model that refuses fewer harmful prompts than this has nothing to find."
    )


class VerifySettings(RefusalSettings):
    """When a direction counts as verified."""

    all_prompts: bool = Field(
        False, description="Use all prompts, not only harmful ones that are refused and harmless ones that are not."
    )
    max_kl: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.1, description="Most KL a chosen direction may cost (nats)."
    )


class SelectSettings(VerifySettings):
    """How a site is selected."""

    positions: Annotated[int, Field(gt=0, le=32)] | None = Field(
        None, description="Positions from the end to look at; default: the template's tokens after the instruction."
    )
    projected: bool = Field(False, description="Take each direction's component along the harmless mean out.")
    min_induce: Annotated[float, Field(ge=-1e6, le=1e6)] = Field(
        0.0, description="A chosen direction's induce score must be above this."
    )
    max_depth: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="Sites are below this share of the depth.")


class FindSettings(SelectSettings):
    """How directions are made and chosen."""

    subspace: Literal["mean", "svd", "clusters", "leace"] = Field(
        "mean",
        description="The chosen site's mean difference; or --rank directions: SVD of all candidates, means of clusters "
        "of harmful prompts; or LEACE (needs concept-erasure).",
    )
    rank: Annotated[int, Field(gt=0, le=64)] = Field(1, description="Directions of an SVD or of clusters.")


class SearchSettings(_Settings):
    """How edits are searched for between the unedited model and the closed form."""

    method: Literal["auto", "gradient", "black-box", "both", "random", "closed-form"] = Field(
        "auto",
        description="gradient (through hooks), black-box (Optuna), both, random (a control); closed-form takes the "
        "chosen direction out of every writer. auto: gradient unless the edit is fixed.",
    )
    points: Annotated[int, Field(ge=1, le=50)] = Field(
        4, description="Edits of the front (from light to strong) that are measured by replies."
    )
    steps: Number = Field(25, description="Steps of the gradient, all points together.")
    trials: Number = Field(60, description="Trials of the black box.")
    sampler: Literal["tpe", "nsga2"] = Field("tpe", description="Sampler of the black box.")
    keep_direction: bool = Field(False, description="Search strengths only; the direction stays the mean difference.")
    objectives: List = Field("refusals,kl", description="What is minimised, two or more.")
    constraints: List = Field(
        "over-refusals<=+0.02", description="NAME<=VALUE, or NAME<=+VALUE above the unedited model; comma-separated."
    )
    max_refusals: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Choose the point with least damage among those that refuse at most this share; default: at most "
        "5 %, or the least that was reached.",
    )
    pick: Text | None = Field(
        None,
        description="Choose a point by its number, or 'knee' (farthest below the line between the ends of the front).",
    )
    search_tokens: Number = Field(
        16, description="Longest answer while searching; held-out answers have --max-new-tokens."
    )
    held_out: Literal["chosen", "all", "none"] = Field(
        "chosen", description="Which points are measured again on held-out prompts."
    )

    @field_validator("pick")
    @classmethod
    def _knee_or_number(cls, value: str | None) -> str | None:
        if value is not None and value != "knee" and not as_natural(value):
            raise ValueError("expected knee or the number of a point")
        return value


class WriterSettings(_Settings):
    """Which writers are edited."""

    layers: List | None = Field(
        None, description="Edit only these blocks, counted from 0, e.g. 8-20,22 (no embedding)."
    )
    components: List | None = Field(
        None, description="Edit only these: embedding, attention, state_space, mlp, experts; comma-separated."
    )
    strengths: List | None = Field(
        None,
        description="Strengths of single writers, e.g. 'attention=0.8,mlp@10-20=1.2,*.o_proj=0'; the last that fits.",
    )
    untie: bool = Field(False, description="Give the head its own copy of a tied embedding, and edit the embedding.")


class EditSettings(WriterSettings):
    """What the edit does to which writer."""

    strength: Annotated[float, Field(gt=-1000, lt=1000)] = Field(
        DEFAULT_STRENGTH, description="1 removes, 0 changes nothing, below 0 strengthens."
    )
    norm_preserving: bool = Field(
        False, description="Give what every input feature writes (columns of weights) its old length back."
    )
    biprojected: bool = Field(
        False, description="For each target layer, take the direction's component along its harmless mean out."
    )
    affine: bool = Field(
        False,
        description="Put the direction back as strong as it is in harmless prompts at the chosen site, at every layer.",
    )


class ReplySettings(_Settings):
    """How replies are made and judged."""

    max_new_tokens: Number = Field(128, description="Longest answer, in tokens.")
    decoding: Literal["greedy", "model"] = Field(
        "greedy",
        description="How answers are made: the likeliest token each time, or as the model's generation_config asks "
        "(penalties, suppressed tokens, sampling by --seed).",
    )
    samples: Number = Field(1, description="Answers to each prompt, where --decoding model samples.")
    judge: str | None = Field(
        None,
        description="Who reads the answers; default: as the behaviour says (refusal: rules). rules, learnt (rules and "
        "a small linear model), self (the unedited model), auto (the best of these), minos, protectai or classifier:ID "
        "(a model for sequence classification), or llm:MODEL@URL or strongreject:MODEL@URL (an OpenAI-compatible "
        "server).",
    )
    early_stop: bool = Field(
        False, description="End an answer once it is certain that it refuses (not those to harmless prompts)."
    )
    no_cache: bool = Field(False, description="Do not keep, or take from the cache, answers of unedited models.")

    @field_validator("samples")
    @classmethod
    def _of_what_is_drawn(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("decoding") == "greedy":
            raise ValueError("greedy answers to a prompt are all alike; expected --decoding model with it")
        return value


class ThinkingSettings(_Settings):
    """Whether models think before they answer."""

    thinking: Literal["closed", "open", "both"] = Field(
        "closed", description="Whether a model that thinks does so before it answers; only the answer is judged."
    )
    thinking_tokens: Number = Field(512, description="Tokens that open thinking may take beside the answer.")


class CapabilitySettings(_Settings):
    """What else a model is asked, to see what it still can do."""

    capability: List | None = Field(
        None, description="Local questions to ask before and after: .jsonl or .csv files, comma-separated."
    )
    tasks: List | None = Field(
        None, description="lm-eval tasks, comma-separated: names, or .yaml files (needs the extra eval)."
    )
    trust_task_code: bool = Field(
        False, description="Run Python code that files given as --tasks name (!function), and metrics from the hub."
    )
    multiple_choice: Literal["letter", "text"] = Field(
        "letter", description="How --capability reads multiple choice: the likeliest letter, or the likeliest option."
    )
    task_limit: Number | None = Field(None, description="Use at most this many questions a task.")


class EvidenceSettings(_Settings):
    """What is set beside the edit, and what is kept of the answers."""

    no_control: bool = Field(False, description="Do not evaluate a random direction of the same strength beside.")
    control_prompts: Number = Field(24, description="Prompts of each set that the random direction is evaluated on.")
    keep_completions: bool = Field(False, description="Keep full answers to harmful prompts in the record.")


class EvalSettings(EvidenceSettings, CapabilitySettings, ThinkingSettings, ReplySettings):
    """How behaviour is measured: replies, thinking, capability, and the evidence beside them."""

    @property
    def longest_reply(self) -> int:
        """Most tokens that a reply has, its thinking included."""
        return self.max_new_tokens + (0 if self.thinking == "closed" else self.thinking_tokens)


class SteerSettings(_Settings):
    """What is done to the residual stream along a direction, where, and to which tokens."""

    operation: Literal["add", "scale", "clamp", "cap", "ablate"] = Field(
        "add",
        description="add COEFFICIENT units of the direction; scale what the stream holds along it by COEFFICIENT; "
        "clamp that to COEFFICIENT units, or cap it at so many; or ablate that share of it.",
    )
    coefficient: Dose = Field(
        1.0,
        description="How much. A unit is the direction's measured norm where its file knows it, a vector as a file "
        "with one for each layer holds it, else 1.",
    )
    coefficients: List | None = Field(
        None, description="Several, e.g. -2,-1,0,1,2: behaviour and damage against the coefficient."
    )
    layers: List | None = Field(
        None,
        description="Layers of the stream, e.g. 12-16 (l enters block l); default: the direction's own, all to ablate.",
    )
    tokens: Literal["all", "generated"] = Field(
        "all",
        description="Every token, or only those that the reply is predicted from (the prompt's last, the reply's).",
    )
    no_control: bool = Field(
        False, description="Do not measure a random direction at the lowest and the highest coefficient beside."
    )
    keep_completions: bool = Field(False, description="Show and keep full answers to harmful prompts.")

    @field_validator("coefficients")
    @classmethod
    def _numbers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            doses_of(value)
            if info.data.get("coefficient", 1.0) != 1.0:
                raise ValueError("expected no --coefficient beside it; give that as one of them")
        return value

    @property
    def doses(self) -> tuple[float, ...]:
        """All coefficients, in order."""
        return (self.coefficient,) if self.coefficients is None else doses_of(self.coefficients)


def doses_of(text: str) -> tuple[float, ...]:
    """Coefficients that a text names, from low to high, each once. Raises ValueError for anything else."""
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError as error:
        raise ValueError("expected numbers with commas between them, e.g. -2,-1,0,1,2") from error
    if len(found) > MOST_DOSES or not all(abs(dose) < LARGEST_DOSE for dose in found):
        raise ValueError(f"expected at most {MOST_DOSES} numbers between -{LARGEST_DOSE:g} and {LARGEST_DOSE:g}")
    return tuple(sorted(found))


class InspectSettings(_Settings):
    """What an inspection looks at beside the tensors."""

    base: Text | None = Field(
        None, description="The model that it was made from: compare tensor by tensor. Only this is sure to see an edit."
    )
    rule_out: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Without --base: exit code 0 instead of 4 where no trace was found and one direction taken out of "
        "all writers at this strength would have been seen (9 of 10 planted ones). It rules out no edit of a search.",
    )
    activations: bool = Field(
        False,
        description="Also run models: does the recovered direction separate harmful from harmless prompts (in the "
        "base, --reference, or the model itself), does the inspected model still tell them apart, and, without --base, "
        "does it write too little along its own direction (sees light edits and those of a search).",
    )
    reference: Text | None = Field(
        None, description="A model with the same stream (say, the original) for --activations."
    )
    behavioural: bool = Field(False, description="Also measure how often the model refuses held-out prompts.")
    save: Path | None = Field(None, description="Write the recovered directions to this file (.safetensors).")
    out: Path | None = Field(
        None, description="Folder for record and report; those of a run that are there get the inspection added."
    )


class RepairSettings(_Settings):
    """What is known of the edit that is taken back; one of these, or nothing."""

    base: Text | None = Field(None, description="The original, or another model that it was made from: exact.")
    adapter: Path | None = Field(None, description="The LoRA adapter (PEFT) that was merged: exact to rounding.")
    direction: Path | None = Field(None, description="The direction that was taken out: approximate.")


class HardenSettings(_Settings):
    """How refusal is made harder to take out."""

    detectors: Annotated[int, Field(ge=0, le=32)] = Field(
        4, description="Writers that get a detector of harm, each with a direction of its own."
    )
    strengthen: Annotated[float, Field(ge=0, le=3)] = Field(
        0.0, description="Also write this much more along the model's own direction (helps against light edits only)."
    )


class EngineSettings(_Settings):
    """Who generates, where that is not transformers in this process."""

    engine: str = Field(
        "transformers", description="Who generates: transformers, vllm, or an OpenAI-compatible server (http://…/v1)."
    )
    edited: Path | None = Field(None, description="For vllm: the edited model, or a LoRA adapter for MODEL.")
    served: str | None = Field(None, description="For a server: the name under which it serves MODEL.")
    served_edited: str | None = Field(None, description="For a server: the name of the edited model or adapter.")


#: How llama.cpp stores numbers, where no importance matrix is needed.
GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M"]


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class FolderSettings(_Settings):
    """The folder that results are written to."""

    out: Path = Field(description="Folder to write to.")
    overwrite: bool = Field(False, description="Replace OUT when it holds what this command wrote.")


class OutputSettings(FolderSettings):
    """Where an edited model goes, and in what form."""

    realisation: Literal["weights", "gguf", "lora", "gguf-lora", "control-vector"] = Field(
        "weights",
        description="A model; a model as one GGUF file, by llama.cpp's converter (on the PATH, or in the folder that "
        "ABLITERATE_LLAMA_CPP names); a PEFT adapter; a GGUF adapter for llama.cpp; a GGUF vector to add (steering).",
    )
    gguf_type: Annotated[GgufType, BeforeValidator(_upper)] | None = Field(
        None, description="How --as gguf stores numbers, e.g. Q4_K_M; default: in 16 bits."
    )
    shard_size: Text | None = Field(None, description="Largest file of weights, e.g. 4GB; default: the source's files.")
    force: bool = Field(False, description="Save even when a gate is not met.")

    @field_validator("shard_size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None and _bytes(value) is None:
            raise ValueError(f"expected a size such as 4GB or 500MB, found '{value[:40]}'")
        return value

    @property
    def of_model(self) -> bool:
        """Whether a whole model is written, with edited weights."""
        return self.realisation in ("weights", "gguf")

    @property
    def shard_bytes(self) -> int | None:
        """The largest file of weights in bytes."""
        return None if self.shard_size is None else _bytes(self.shard_size)


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kMGT]?)B", text.strip())
    size = int(float(match[1]) * 1000 ** "kMGT".index(match[2]) * 1000) if match and match[2] else None
    if match and not match[2]:
        size = int(float(match[1]))
    return size or None


class ApplySettings(_Settings):
    """How a direction is taken out of a model's files, and where the result goes."""

    loading: FileSettings = Field(default_factory=FileSettings)
    editing: EditSettings = Field(default_factory=EditSettings)
    output: OutputSettings


class MeasureSettings(_Settings):
    """How a model is loaded and measured."""

    loading: ModelSettings = Field(default_factory=ModelSettings)
    prompts: PromptSettings = Field(default_factory=PromptSettings)
    finding: FindSettings = Field(default_factory=FindSettings)
    evaluating: EvalSettings = Field(default_factory=EvalSettings)


class RunSettings(MeasureSettings):
    """Everything one run needs."""

    model: Text = Field(description="Hub id, folder, or .gguf file.")
    editing: EditSettings = Field(default_factory=EditSettings)
    searching: SearchSettings = Field(default_factory=SearchSettings)
    output: OutputSettings | None = None
