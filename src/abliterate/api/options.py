"""Keyword arguments of the public functions, one mapping for each class of settings.

Written by scripts/python_options.py. Defaults and limits are those of the settings in `abliterate.config`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch

    from abliterate.prompts import Behaviour

#: A file or folder.
Place = str | os.PathLike[str]
#: Prompts: a list of texts or conversations, or a SPEC (builtin, FILE[:column], id[:config]:split:column).
Prompts = str | os.PathLike[str] | Sequence[Any]
#: Several texts or numbers, or one text in which commas stand between them.
Several = str | int | Sequence[Any] | Mapping[str, float]


class FileOptions(TypedDict, total=False):
    """How a model's files are read."""

    #: What to measure in; auto is the stored one (bfloat16 for float16 on a CPU).
    dtype: str | torch.dtype

    #: Edit a model of which some block writes this share along a direction past all its writers.
    max_leak: float

    #: Run Python code that comes with the model.
    trust_remote_code: bool

    #: Branch, tag or commit of a model on the hub; default: its main.
    revision: str | int | os.PathLike[str] | None


class ModelOptions(FileOptions, total=False):
    """How a model is loaded and run."""

    #: auto, cpu, cuda, cuda:1, mps, or balanced: spread evenly over all GPUs.
    device: str | torch.device

    #: Most that weights may take on each device, e.g. '0=20GiB,1=20GiB,cpu=48GiB'.
    max_memory: Several | None

    #: Folder for weights that fit nowhere else: they stay on disk and are read for every pass.
    offload: Place | None

    #: What several processes (torchrun) divide: data, the prompts, each process having the model; or tensor, a model
    #: that one device cannot hold.
    parallel: Literal["data", "tensor"]

    #: Prompts at once; auto finds it and halves it when memory runs out.
    batch_size: str | int | os.PathLike[str]

    #: A Jinja file instead of the tokenizer's template, or 'none' for bare prompts.
    chat_template: str | int | os.PathLike[str] | None

    #: System prompt.
    system: str | None

    #: Measure on the model quantised like this; the files that are edited stay full.
    quantization: Literal["bnb-4bit", "bnb-8bit"] | None


class OtherPromptOptions(TypedDict, total=False):
    """Which prompts are used, and which behaviour is looked for in the replies."""

    #: What is found, measured and edited: refusal, over-refusal, hedging, sycophancy, stock-phrases, verbosity,
    #: language, or a file (.toml, see docs/behaviours.md).
    behaviour: str | os.PathLike[str] | Mapping[str, Any] | Behaviour

    #: Harmful prompts to evaluate on, instead of a held-out part.
    eval_harmful: Prompts | None

    #: Harmless prompts to evaluate on, instead of a held-out part.
    eval_harmless: Prompts | None

    #: Safe prompts that sound dangerous, to evaluate on.
    borderline: Prompts

    #: Use at most this many prompts per split.
    limit: int | None

    #: Seed of everything random (shuffling prompts, the control direction).
    seed: int


class PromptOptions(OtherPromptOptions, total=False):
    """Which prompts are used, and which behaviour is looked for in the replies."""

    #: Harmful prompts (those where the behaviour shows): builtin, FILE[:column] or id[:config]:split:column.
    harmful: Prompts

    #: Harmless prompts, named the same way.
    harmless: Prompts


class RefusalOptions(TypedDict, total=False):
    """How refusals of this model are recognised by their first token."""

    #: First tokens of a refusal, comma-separated (e.g. 'I,As'), instead of finding them.
    refusal_tokens: Several | None

    #: A model that refuses fewer harmful prompts than this has nothing to find.
    min_refusal_rate: float


class VerifyOptions(RefusalOptions, total=False):
    """When a direction counts as verified."""

    #: Use all prompts, not only harmful ones that are refused and harmless ones that are not.
    all_prompts: bool

    #: Most KL a chosen direction may cost (nats).
    max_kl: float


class SelectOptions(VerifyOptions, total=False):
    """How a site is selected."""

    #: Positions from the end to look at; default: the template's tokens after the instruction.
    positions: int | None

    #: Take each direction's component along the harmless mean out.
    projected: bool

    #: A chosen direction's induce score must be above this.
    min_induce: float

    #: Sites are below this share of the depth.
    max_depth: float


class FindOptions(SelectOptions, total=False):
    """How directions are made and chosen."""

    #: The chosen site's mean difference; or --rank directions: SVD of all candidates, means of clusters of harmful
    #: prompts; or LEACE (needs concept-erasure).
    subspace: Literal["mean", "svd", "clusters", "leace"]

    #: Directions of an SVD or of clusters.
    rank: int


class SearchOptions(TypedDict, total=False):
    """How edits are searched for between the unedited model and the closed form."""

    #: gradient (through hooks), black-box (Optuna), both, random (a control); closed-form takes the chosen direction
    #: out of every writer. auto: gradient unless the edit is fixed.
    method: Literal["auto", "gradient", "black-box", "both", "random", "closed-form"]

    #: Edits of the front (from light to strong) that are measured by replies.
    points: int

    #: Steps of the gradient, all points together.
    steps: int

    #: Trials of the black box.
    trials: int

    #: Sampler of the black box.
    sampler: Literal["tpe", "nsga2"]

    #: Search strengths only; the direction stays the mean difference.
    keep_direction: bool

    #: What is minimised, two or more.
    objectives: Several

    #: NAME<=VALUE, or NAME<=+VALUE above the unedited model; comma-separated.
    constraints: Several

    #: Choose the point with least damage among those that refuse at most this share; default: at most 5 %, or the
    #: least that was reached.
    max_refusals: float | None

    #: Choose a point by its number, or 'knee' (farthest below the line between the ends of the front).
    pick: str | int | os.PathLike[str] | None

    #: Longest answer while searching; held-out answers have --max-new-tokens.
    search_tokens: int

    #: Which points are measured again on held-out prompts.
    held_out: Literal["chosen", "all", "none"]


class WriterOptions(TypedDict, total=False):
    """Which writers are edited."""

    #: Edit only these blocks, counted from 0, e.g. 8-20,22 (no embedding).
    layers: Several | None

    #: Edit only these: embedding, attention, state_space, mlp, experts; comma-separated.
    components: Several | None

    #: Strengths of single writers, e.g. 'attention=0.8,mlp@10-20=1.2,*.o_proj=0'; the last that fits.
    strengths: Several | None

    #: Give the head its own copy of a tied embedding, and edit the embedding.
    untie: bool


class EditOptions(WriterOptions, total=False):
    """What the edit does to which writer."""

    #: 1 removes, 0 changes nothing, below 0 strengthens.
    strength: float

    #: Give what every input feature writes (columns of weights) its old length back.
    norm_preserving: bool

    #: For each target layer, take the direction's component along its harmless mean out.
    biprojected: bool

    #: Put the direction back as strong as it is in harmless prompts at the chosen site, at every layer.
    affine: bool


class ReplyOptions(TypedDict, total=False):
    """How replies are made and judged."""

    #: Longest answer, in tokens.
    max_new_tokens: int

    #: How answers are made: the likeliest token each time, or as the model's generation_config asks (penalties,
    #: suppressed tokens, sampling by --seed).
    decoding: Literal["greedy", "model"]

    #: Answers to each prompt, where --decoding model samples.
    samples: int

    #: Who reads the answers; default: as the behaviour says (refusal: rules). rules, learnt (rules and a small
    #: linear model), self (the unedited model), auto (the best of these), minos, protectai or classifier:ID (a model
    #: for sequence classification), or llm:MODEL@URL or strongreject:MODEL@URL (an OpenAI-compatible server).
    judge: str | None

    #: End an answer once it is certain that it refuses (not those to harmless prompts).
    early_stop: bool

    #: Do not keep, or take from the cache, answers of unedited models.
    no_cache: bool


class ThinkingOptions(TypedDict, total=False):
    """Whether models think before they answer."""

    #: Whether a model that thinks does so before it answers; only the answer is judged.
    thinking: Literal["closed", "open", "both"]

    #: Tokens that open thinking may take beside the answer.
    thinking_tokens: int


class CapabilityOptions(TypedDict, total=False):
    """What else a model is asked, to see what it still can do."""

    #: Local questions to ask before and after: .jsonl or .csv files, comma-separated.
    capability: Several | None

    #: lm-eval tasks, comma-separated: names, or .yaml files (needs the extra eval).
    tasks: Several | None

    #: Run Python code that files given as --tasks name (!function), and metrics from the hub.
    trust_task_code: bool

    #: How --capability reads multiple choice: the likeliest letter, or the likeliest option.
    multiple_choice: Literal["letter", "text"]

    #: Use at most this many questions a task.
    task_limit: int | None


class EvidenceOptions(TypedDict, total=False):
    """What is set beside the edit, and what is kept of the answers."""

    #: Do not evaluate a random direction of the same strength beside.
    no_control: bool

    #: Prompts of each set that the random direction is evaluated on.
    control_prompts: int

    #: Keep full answers to harmful prompts in the record.
    keep_completions: bool


class EvalOptions(EvidenceOptions, CapabilityOptions, ThinkingOptions, ReplyOptions, total=False):
    """How behaviour is measured: replies, thinking, capability, and the evidence beside them."""


class SteerOptions(TypedDict, total=False):
    """What is done to the residual stream along a direction, where, and to which tokens."""

    #: add COEFFICIENT units of the direction; scale what the stream holds along it by COEFFICIENT; clamp that to
    #: COEFFICIENT units, or cap it at so many; or ablate that share of it.
    operation: Literal["add", "scale", "clamp", "cap", "ablate"]

    #: How much. A unit is the direction's measured norm where its file knows it, a vector as a file with one for
    #: each layer holds it, else 1.
    coefficient: float

    #: Several, e.g. -2,-1,0,1,2: behaviour and damage against the coefficient.
    coefficients: Several | None

    #: Layers of the stream, e.g. 12-16 (l enters block l); default: the direction's own, all to ablate.
    layers: Several | None

    #: Every token, or only those that the reply is predicted from (the prompt's last, the reply's).
    tokens: Literal["all", "generated"]

    #: Do not measure a random direction at the lowest and the highest coefficient beside.
    no_control: bool

    #: Show and keep full answers to harmful prompts.
    keep_completions: bool


class InspectOptions(TypedDict, total=False):
    """What an inspection looks at beside the tensors."""

    #: The model that it was made from: compare tensor by tensor. Only this is sure to see an edit.
    base: str | int | os.PathLike[str] | None

    #: Without --base: exit code 0 instead of 4 where no trace was found and one direction taken out of all writers
    #: at this strength would have been seen (9 of 10 planted ones). It rules out no edit of a search.
    rule_out: float | None

    #: Also run models: does the recovered direction separate harmful from harmless prompts (in the base,
    #: --reference, or the model itself), does the inspected model still tell them apart, and, without --base, does
    #: it write too little along its own direction (sees light edits and those of a search).
    activations: bool

    #: A model with the same stream (say, the original) for --activations.
    reference: str | int | os.PathLike[str] | None

    #: Also measure how often the model refuses held-out prompts.
    behavioural: bool

    #: Write the recovered directions to this file (.safetensors).
    save: Place | None

    #: Folder for record and report; those of a run that are there get the inspection added.
    out: Place | None


class RepairOptions(TypedDict, total=False):
    """What is known of the edit that is taken back; one of these, or nothing."""

    #: The original, or another model that it was made from: exact.
    base: str | int | os.PathLike[str] | None

    #: The LoRA adapter (PEFT) that was merged: exact to rounding.
    adapter: Place | None

    #: The direction that was taken out: approximate.
    direction: Place | None


class HardenOptions(TypedDict, total=False):
    """How refusal is made harder to take out."""

    #: Writers that get a detector of harm, each with a direction of its own.
    detectors: int

    #: Also write this much more along the model's own direction (helps against light edits only).
    strengthen: float


class EngineOptions(TypedDict, total=False):
    """Who generates, where that is not transformers in this process."""

    #: Who generates: transformers, vllm, or an OpenAI-compatible server (http://…/v1).
    engine: str

    #: For vllm: the edited model, or a LoRA adapter for MODEL.
    edited: Place | None

    #: For a server: the name under which it serves MODEL.
    served: str | None

    #: For a server: the name of the edited model or adapter.
    served_edited: str | None


class FolderOptions(TypedDict, total=False):
    """The folder that results are written to."""

    #: Replace OUT when it holds what this command wrote.
    overwrite: bool


class OutputOptions(FolderOptions, total=False):
    """Where an edited model goes, and in what form."""

    #: A model; a model as one GGUF file, by llama.cpp's converter (on the PATH, or in the folder that
    #: ABLITERATE_LLAMA_CPP names); a PEFT adapter; a GGUF adapter for llama.cpp; a GGUF vector to add (steering).
    as_: Literal["weights", "gguf", "lora", "gguf-lora", "control-vector"]

    #: How --as gguf stores numbers, e.g. Q4_K_M; default: in 16 bits.
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M"] | None

    #: Largest file of weights, e.g. 4GB; default: the source's files.
    shard_size: str | int | os.PathLike[str] | None

    #: Save even when a gate is not met.
    force: bool
