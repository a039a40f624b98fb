"""A loaded model whose writers are all known, the prompts it is measured on, and what is found on it."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from abliterate.config import EditSettings, FileSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Direction
from abliterate.edit.hooks import ablation
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.model.activations import Consumer, Keep, Progress, stream_sites
from abliterate.model.anatomy import TOLERANCE, Anatomy, study
from abliterate.model.batches import BatchSize, Encoded, auto_batch_size, can_share, share_prefixes
from abliterate.model.context import beyond, check_fits, context_of
from abliterate.model.loading import LoadedModel, load, locate
from abliterate.model.meter import count_passes
from abliterate.model.offloaded import is_offloaded
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor, ranks
from abliterate.prompts import ChatRenderer, ContrastiveSet, build_contrastive_set, describe
from abliterate.prompts.rendering import common_suffix, read_template

#: More positions than this after the instruction are not looked at unless asked for.
_MOST_POSITIONS = 8


@dataclass(slots=True, eq=False)
class Session:
    """A loaded model whose writers are all known, with the prompts it is measured on.

    `encoded` maps (set, split) to token ids; all share one prefix. `positions` is how many tokens from the end are
    looked at, `seed` that of everything random, `size` how many prompts fit at once: it is halved for good when memory
    runs out, `kept` what was measured of the unedited model. A session is live: it holds the model, is not copied, and
    equals only itself.
    """

    loaded: LoadedModel
    renderer: ChatRenderer
    anatomy: Anatomy
    prompts: ContrastiveSet
    encoded: dict[tuple[str, str], Encoded]
    positions: int
    size: BatchSize
    loading: ModelSettings
    seed: int
    monitor: Monitor
    kept: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """In a line: the model, and how many prompts."""
        count = sum(map(len, self.encoded.values()))
        return f"Session({self.loaded.files.name!r}, {self.anatomy.layers} blocks, {count} prompts)"

    @property
    def model(self) -> Any:
        """The live transformers model."""
        return self.loaded.model

    @property
    def named_model(self) -> Any:
        """The model that says where parameters lie on disk: of one of codes or in parts, its skeleton."""
        elsewhere = self.loaded.quantised or self.loaded.partial
        return self.loaded.files.skeleton(self.loading.max_leak) if elsewhere else self.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's blocks in order."""
        return [self.model.get_submodule(name) for name in self.anatomy.blocks]

    @property
    def test_texts(self) -> dict[str, tuple[str, ...]]:
        """Held-out prompts by set."""
        return self.prompts.test_texts

    def plan(self, direction: Direction | Float[Tensor, "k d"], editing: EditSettings | float = EditSettings()) -> Plan:
        """The plan that `editing` (settings, or just a strength) makes of `direction` for this model."""
        if isinstance(direction, Tensor):
            direction = Direction(direction)
        if not isinstance(editing, EditSettings):
            editing = EditSettings(strength=editing)
        return plan_for(self.anatomy, direction, editing)

    def ablated(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """The model with `plan` realised as hooks, inside a `with`."""
        return ablation(self.model, plan)

    @contextlib.contextmanager
    def changed(self, state: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """The model in another state, inside a `with`: there, that is the unedited one, and measured anew."""
        kept, self.kept = self.kept, {}
        try:
            with state:
                yield
        finally:
            self.kept = kept

    def stream(
        self,
        prompts: Encoded,
        consume: Consumer,
        progress: Progress,
        *,
        into: Sequence[Tensor | ranks.Merged] | None = None,
        keep: Keep | None = None,
    ) -> int:
        """Feed `consume` the activations at this session's sites (see `activations.stream_sites`)."""
        model, blocks, positions, size = self.model, self.blocks, self.positions, self.size
        return stream_sites(model, blocks, prompts, positions, consume, size, into=into, keep=keep, progress=progress)

    def stream_classes(
        self,
        split: str,
        consumers: Mapping[str, Consumer],
        keeps: Mapping[str, Keep] | None,
        progress: Progress,
        *,
        into: Sequence[Tensor | ranks.Merged] | None = None,
    ) -> None:
        """Feed each class's consumer the activations of its prompts, both classes in the same batches.

        Weights that are fetched for a pass are fetched once for both.
        """
        starts, together = {}, Encoded((), ())
        for name in consumers:
            starts[name], encoded = len(together), self.encoded[name, split]
            together = together + encoded if len(together) else encoded

        def of_class(rows: list[int]) -> Iterator[tuple[str, list[int], list[int]]]:
            for name, start in starts.items():
                inside = [i for i, row in enumerate(rows) if 0 <= row - start < len(self.encoded[name, split])]
                if inside:
                    yield name, inside, [rows[i] - start for i in inside]

        def consume(layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
            for name, inside, own in of_class(rows):
                consumers[name](layer, own, values[inside])

        def keep(rows: list[int], logits: Float[Tensor, "b vocab"]) -> Bool[Tensor, " b"]:
            wanted = torch.ones(len(rows), dtype=torch.bool)
            for name, inside, own in of_class(rows):
                wanted[inside] = asked[name](own, logits[inside]).cpu()
            return wanted

        asked = keeps or {}
        self.stream(together, consume, progress, into=into, keep=keep if asked else None)


def open_session(
    model: str | ModelOnDisk,
    *,
    loading: ModelSettings = ModelSettings(),
    prompts: PromptSettings = PromptSettings(),
    positions: int | None = None,
    learnt_from: Container[str] = (),
    reply_tokens: int = 0,
    monitor: Monitor | None = None,
) -> Session:
    """Load a model, prove its anatomy, and render and tokenise the prompts.

    `learnt_from` are fingerprints of prompts that are not evaluated on (`Direction.learnt_from`), `reply_tokens` is how
    long replies will be at most.

    Raises `UsageError` for prompts and replies that have not enough positions in the model (`model.context`).
    """
    monitor = monitor or Monitor()
    contrast = load_contrast(prompts, monitor, learnt_from)
    return open_model(model, loading, monitor).session(
        contrast, positions=positions, seed=prompts.seed, reply_tokens=reply_tokens, monitor=monitor
    )


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A live model that can be talked to, with every writer known; `loading` says how it was loaded."""

    loaded: LoadedModel
    renderer: ChatRenderer
    anatomy: Anatomy
    loading: ModelSettings

    def session(
        self,
        contrast: ContrastiveSet,
        *,
        positions: int | None = None,
        seed: int = 0,
        reply_tokens: int = 0,
        monitor: Monitor | None = None,
    ) -> Session:
        """A session of this model with the prompts of `contrast`, rendered and tokenised (see `open_session`)."""
        return _session(self, contrast, positions, seed, reply_tokens, monitor or Monitor())


def _session(
    opened: OpenedModel,
    contrast: ContrastiveSet,
    positions: int | None,
    seed: int,
    reply_tokens: int,
    monitor: Monitor,
) -> Session:
    loaded, renderer, anatomy, loading = opened.loaded, opened.renderer, opened.anatomy, opened.loading
    texts = _texts(contrast)
    sequences = {key: renderer.encode(value) for key, value in texts.items()}
    everything = [ids for group in sequences.values() for ids in group]
    _check_context(loaded.model, list(map(len, everything)), reply_tokens, monitor)
    at_reply = contrast.behaviour.read.at == "reply"
    if at_reply and positions not in (None, 1):
        raise UsageError(f"--positions {positions}: the behaviour {contrast.behaviour.name} is read at replies, at one")
    wanted = 1 if at_reply else positions or min(_MOST_POSITIONS, max(1, common_suffix(everything)))
    shortest = min(map(len, everything))
    if wanted > shortest:
        raise UsageError(f"--positions {wanted}: expected at most the shortest prompt's {shortest} tokens")
    with monitor.phase("check that prompts may share work"):
        share = ranks.agreed(can_share(loaded.model, everything, wanted))
    encoded = share_prefixes(sequences, keep=wanted, share=share)
    prefix = encoded["harmful", "test"].prefix
    size = auto_batch_size(loaded.model, loading.rows)
    size.agree()
    monitor.note(
        f"{anatomy.layers} blocks, {len(anatomy.writers)} writers, residual accounting leaves at most "
        f"{max(anatomy.closure):.0e}; "
        f"{len(prefix)} tokens shared by all prompts; {size.rows} prompts at once on {loaded.device}"
    )
    return Session(loaded, renderer, anatomy, contrast, encoded, wanted, size, loading, seed, monitor)


def _check_context(model: Any, lengths: list[int], reply: int, monitor: Monitor) -> None:
    """Refuse what has no positions; say what goes beyond those that were trained, or may do so with a long reply."""
    check_fits(model, max(lengths), reply)
    if said := beyond(model, lengths):
        monitor.warn(said)
    elif beyond(model, [length + reply for length in lengths]):
        monitor.note(
            f"replies may go beyond the {context_of(model).positions} positions that this model was trained on: the "
            f"longest prompt has {max(lengths)} tokens, a reply up to {reply}"
        )


def open_model(model: str | ModelOnDisk, loading: ModelSettings, monitor: Monitor) -> OpenedModel:
    """Load a model, check that it can be talked to, and prove its anatomy.

    Raises `UsageError` where several processes are to have a part of it each and there is one.
    """
    if loading.parallel == "tensor":
        ranks.divide_model()
    with monitor.phase("load model"):
        files = model if isinstance(model, ModelOnDisk) else locate_model(model, loading)
        loaded = load(
            files,
            dtype=loading.dtype,
            device=loading.device,
            quantization=loading.quantization,
            limits=loading.limits,
            offload=loading.offload,
            say=monitor.note,
        )
    warn_of_files(files, monitor)
    if ranks.count() > 1:
        what = "a part of the model" if loaded.partial else "the model, and runs a part of the prompts"
        monitor.note(f"{ranks.count()} processes: each has {what}")
    return opened_model(loaded, loading, monitor)


def opened_model(loaded: LoadedModel, loading: ModelSettings, monitor: Monitor) -> OpenedModel:
    """Check that a live model can be talked to, and prove its anatomy."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    renderer = replace(renderer_of(loaded.tokenizer, loading, monitor), rows=rows)
    count_passes(loaded.model, monitor)
    with monitor.phase("prove that every writer is known"):
        anatomy = _anatomy(loaded, loading)
    warn_of_leaks(anatomy, monitor)
    return OpenedModel(loaded, renderer, anatomy, loading)


def renderer_of(tokenizer: Any, loading: ModelSettings, monitor: Monitor) -> ChatRenderer:
    """How prompts become chat prompts of a model; it is noted when they hold the time.

    Raises `ChatTemplateError` for a template that is missing, cannot render a prompt, or never renders it twice alike.
    """
    renderer = ChatRenderer(tokenizer, read_template(loading.chat_template), loading.system)
    renderer.check_repeatable()
    if (time := renderer.printed_time) is not None:
        monitor.note(f"the chat template prints the time: in all prompts of this run it is {time}")
    return renderer


def _anatomy(loaded: LoadedModel, loading: ModelSettings) -> Anatomy:
    """Of a live model; from its configuration and files where it computes with codes, where other processes have parts
    of it, or where its weights stay elsewhere and would be read twice for it.
    """
    if loaded.quantised or loaded.partial or (is_offloaded(loaded.model) and not loaded.in_memory):
        return loaded.files.anatomy(loading.max_leak)
    return study(loaded.model, max_leak=loading.max_leak)


def warn_of_files(files: ModelOnDisk, monitor: Monitor) -> None:
    """Say what is odd about a model's files; raises what `ModelOnDisk.description` raises."""
    for text in files.description.warnings:
        monitor.warn(text)


def warn_of_leaks(anatomy: Anatomy, monitor: Monitor) -> None:
    """Say what a larger `max_leak` has let pass."""
    leaks = [error for error in anatomy.closure[1:] if error > TOLERANCE]
    if leaks:
        monitor.warn(
            f"{len(leaks)} of {anatomy.layers} blocks write up to {max(leaks):.0%} along a direction past all their "
            "writers: the edit is incomplete there"
        )


def locate_model(model: str, loading: FileSettings) -> ModelOnDisk:
    """Find MODEL on disk under the settings for reading files."""
    trust = loading.trust_remote_code
    return locate(model, dtype=loading.dtype, trust_remote_code=trust, revision=loading.revision)


def load_contrast(settings: PromptSettings, monitor: Monitor, learnt_from: Container[str] = ()) -> ContrastiveSet:
    """The prompts that settings name; how many there are, and what was dropped, is noted."""
    contrast = build_contrastive_set(settings, learnt_from)
    for spec in dict.fromkeys(contrast.sources.values()):
        if (known := describe(spec)) is not None:
            monitor.note(known)
    behaviour = contrast.behaviour
    names = behaviour.names | dict(zip(("harmful", "harmless"), behaviour.side_names, strict=True))
    counts = "; ".join(
        f"{names[name]} " + " / ".join(str(count) for count in parts.values())
        for name, parts in contrast.counts.items()
        if any(parts.values())
    )
    dropped = ", ".join(f"{count} {where}" for where, count in contrast.dropped.items())
    monitor.note(
        f"prompts (train / val / test): {counts}; {contrast.duplicates_dropped} duplicates dropped"
        + (f" ({dropped})" if dropped else "")
    )
    if contrast.answered:
        monitor.note(f"replies at the end of {contrast.answered} conversations were left out: the model is to answer")
    return contrast


def _texts(contrast: ContrastiveSet) -> dict[tuple[str, str], tuple[str, ...]]:
    texts = {
        (name, split): getattr(getattr(contrast, name), split)
        for name in ("harmful", "harmless")
        for split in ("train", "val", "test")
    }
    texts |= {(name, f"plain {split}"): prompts for (name, split), prompts in contrast.plain.items()}
    if contrast.keep is not None:
        texts |= {("keep", split): getattr(contrast.keep, split) for split in ("train", "val", "test")}
    if "borderline" in contrast.test_texts:
        texts["borderline", "test"] = contrast.borderline
    return texts
