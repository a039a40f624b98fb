"""A model with verbs: find a direction, hook it, talk to it, measure it, search, write it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import pipeline
from abliterate.api.options import (
    EditOptions,
    EvalOptions,
    FindOptions,
    ModelOptions,
    OtherPromptOptions,
    OutputOptions,
    Prompts,
    RefusalOptions,
    ReplyOptions,
    SearchOptions,
    VerifyOptions,
    WriterOptions,
)
from abliterate.api.progress import progress
from abliterate.api.results import DoseResponse, FoundDirection, Front
from abliterate.api.settings import Options
from abliterate.config import (
    ApplySettings,
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RefusalSettings,
    ReplySettings,
    RunSettings,
    SearchSettings,
    SteerSettings,
    VerifySettings,
    WriterSettings,
)
from abliterate.config.natural import as_type, speaks_python
from abliterate.edit.direction import Direction
from abliterate.edit.hooks import ablation, addition, steered
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.edit.steering import Operation, Steering, SteeringVectors, Tokens, steering_of
from abliterate.edit.weights import edit_live
from abliterate.errors import UsageError
from abliterate.evaluation.answering import as_loaded
from abliterate.evaluation.examine import ready_judge
from abliterate.evaluation.judging.choice import bind_judge
from abliterate.finding.find import Findings, best_separated
from abliterate.finding.parts import search_part, with_origin_of
from abliterate.finding.reading import Asked
from abliterate.finding.reading import read as read_tokens
from abliterate.finding.search import check_search, method_of
from abliterate.finding.search import search as find_front
from abliterate.finding.search.points import Point
from abliterate.finding.steer import sweep as sweep_doses
from abliterate.model.activations import stream_sites
from abliterate.model.anatomy import Anatomy
from abliterate.model.batches import auto_batch_size, share_prefix
from abliterate.model.generation import complete
from abliterate.model.loading import LoadedModel
from abliterate.model.wrapping import on_disk, wrapped
from abliterate.monitor import Monitor
from abliterate.prompts import ContrastiveSet
from abliterate.prompts.contrastive import fingerprint
from abliterate.prompts.prompt import Prompt, read_conversation
from abliterate.record import EvaluationPart, ReadingPart, Record, VerificationPart
from abliterate.session import OpenedModel, Session, load_contrast, open_model, opened_model

#: Whatever can stand for a direction: one, what holds one, a file, one vector [d], or several [k, d].
DirectionLike = Direction | FoundDirection | Front | Point | str | PathLike[str] | Sequence[Any] | Tensor

#: What can be steered along beside: a vector for each layer, as a mapping or a file.
SteeringLike = DirectionLike | SteeringVectors | Mapping[int, Any]

#: One question, or a conversation of {role, content} that ends with the user.
Talk = str | Sequence[Mapping[str, str]]

_HOOKED = ("dtype", "device", "quantization", "revision", "trust_remote_code")


class _FindVerb(OtherPromptOptions, FindOptions, WriterOptions, total=False):
    force: bool


class _EvaluateVerb(OtherPromptOptions, EvalOptions, EditOptions, total=False):
    harmful: Prompts
    harmless: Prompts


class _SearchVerb(OtherPromptOptions, FindOptions, EvalOptions, EditOptions, SearchOptions, total=False):
    harmful: Prompts
    harmless: Prompts
    force: bool


class _SaveVerb(EditOptions, OutputOptions, total=False):
    pass


class _SweepVerb(OtherPromptOptions, RefusalOptions, ReplyOptions, total=False):
    harmful: Prompts
    harmless: Prompts
    no_control: bool
    keep_completions: bool


class _VerifyVerb(OtherPromptOptions, VerifyOptions, ReplyOptions, EditOptions, total=False):
    harmful: Prompts
    harmless: Prompts


def load(model: str | PathLike[str], **options: Unpack[ModelOptions]) -> Model:
    """Load a model, prove that every writer to its residual stream is known, and give it its verbs.

    `model` is a hub id, a folder with safetensors, or a .gguf file. Raises `ModelError` when it cannot be had,
    `AnatomyError` when a writer is not known, `UsageError` for options that are none.
    """
    given = Options("load", options)
    loading = given.take(ModelSettings)
    given.done()
    return Model(open_model(as_type("load: model", model, str), loading, progress()))


def wrap(hf_model: Any, tokenizer: Any = None, **options: Unpack[ModelOptions]) -> Model:
    """The same verbs for a live transformers model (or pipeline, or PEFT model, whose adapter is merged in).

    The model itself is used, not a copy: it is put in evaluation mode and its parameters need no gradients. Hooks are
    seen by its own `generate`. `options` are `system`, `chat_template`, `batch_size` and `max_leak`.

    Raises `UsageError` for what is no such model, `AnatomyError` when a writer is not known.
    """
    given = Options("wrap", options)
    loading = given.take(ModelSettings)
    given.done()
    if idle := [name for name in _HOOKED if name in options]:
        raise UsageError(f"wrap: {idle[0]} does nothing for a model that is loaded; leave it out")
    return Model(opened_model(wrapped(hf_model, tokenizer), loading, progress()))


def as_direction(value: DirectionLike, anatomy: Anatomy | None = None) -> Direction:
    """A direction of whatever can stand for one (see `DirectionLike`), checked against the width of a model.

    Raises `UsageError` for anything else, or another width.
    """
    if isinstance(value, Front):
        value = value.best
    if isinstance(value, FoundDirection | Point):
        value = value.direction
    direction: Direction = as_type("direction", value, Direction)
    return direction if anatomy is None else direction.at(None, anatomy.d_model)


def as_vectors(value: SteeringLike) -> SteeringVectors:
    """What to steer along, of whatever can stand for it (see `SteeringLike`).

    Raises `UsageError` for anything else, or several directions.
    """
    if isinstance(value, Front | FoundDirection | Point):
        return SteeringVectors.of(as_direction(value))
    vectors: SteeringVectors = as_type("direction", value, SteeringVectors)
    return vectors


@dataclass(slots=True)
class _Prepared:
    """A session with prompts, and what was found on it."""

    session: Session
    findings: dict[str, Findings]


@speaks_python
class Model:
    """A live model with verbs. `hf_model` and `tokenizer` are those of transformers.

    Every verb that needs prompts takes `harmful` and `harmless` (lists, or SPECs as on the command line); without them
    it uses those that were last given, else the builtin ones. What is evaluated on is never what a direction has seen.
    """

    def __init__(self, opened: OpenedModel) -> None:
        """Made by `load` and `wrap`."""
        self._opened = opened
        self._prompts = PromptSettings()
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._back: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        """In a line."""
        anatomy, edited = self.anatomy, ", edited in memory" if self._back else ""
        return (
            f"Model({self.name!r}, {anatomy.layers} layers, d_model {anatomy.d_model}, {len(anatomy.writers)} writers, "
            f"{str(self._loaded.dtype).removeprefix('torch.')} on {self._loaded.device}{edited})"
        )

    @property
    def _loaded(self) -> LoadedModel:
        return self._opened.loaded

    @property
    def opened(self) -> OpenedModel:
        """The model with its chat renderer and how it was loaded, for functions below this one."""
        return self._opened

    @property
    def name(self) -> str:
        """As it was given."""
        return self._loaded.files.name

    @property
    def hf_model(self) -> Any:
        """The live model of transformers."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._loaded.tokenizer

    @property
    def anatomy(self) -> Anatomy:
        """Every writer to the residual stream, proved."""
        return self._opened.anatomy

    def find(
        self, harmful: Prompts | None = None, harmless: Prompts | None = None, **options: Unpack[_FindVerb]
    ) -> FoundDirection:
        """The direction that mediates refusal: differences of means at every site, chosen by intervention.

        Raises `GateNotMet` when the model hardly refuses the harmful prompts or no direction passes (with `force` the
        best one is taken), `PromptError` for prompts that cannot be read.
        """
        given = self._options("find", options, harmful, harmless)
        force = bool(given.pop("force", False))
        finding, writers = given.take(FindSettings), given.take(WriterSettings)
        prepared = self._prepare(given, finding)
        given.done()
        findings = self._findings(prepared, finding, writers)
        found = pipeline.choose(prepared.session, findings, finding, force=force)
        return FoundDirection(found.direction, found.selection, findings)

    def plan(self, direction: DirectionLike | Plan, **options: Unpack[EditOptions]) -> Plan:
        """What is done to every writer: the edit as data, the same for hooks, weights, adapters and GGUF.

        Raises `UsageError` when the direction does not fit, or nothing would be edited.
        """
        if isinstance(direction, Plan):
            if options:
                raise UsageError("plan: expected no options beside a plan, which has its own; give a direction")
            return direction
        given = Options("plan", options)
        editing = given.take(EditSettings)
        given.done()
        return plan_for(self.anatomy, as_direction(direction, self.anatomy), editing)

    @contextlib.contextmanager
    def ablate(self, direction: DirectionLike | Plan, **options: Unpack[EditOptions]) -> Iterator[Plan]:
        """Inside a `with`, the model with the direction taken out of what every writer writes, by hooks.

        `strength` 1 takes it out, .8 most of it, negative ones strengthen it. It holds for everything that runs the
        model, also `hf_model.generate`. The hooks are gone at the end, whatever happens.
        """
        plan = self.plan(direction, **options)
        with ablation(self.hf_model, plan):
            yield plan

    @contextlib.contextmanager
    def add(
        self, direction: DirectionLike | Mapping[int, Any], coefficient: float = 1.0, *, layer: int | None = None
    ) -> Iterator[dict[int, Float[Tensor, " d"]]]:
        """Inside a `with`, the model with `coefficient` times a vector added to the stream where it enters a block.

        The vector is the difference of means r where the direction knows its site, else the direction as it was given;
        `layer` is the block, default the direction's own, or L: where the stream leaves the last block. A mapping
        {layer: vector} adds each at its own. A negative coefficient steers away. Yields the vectors by layer.

        Raises `UsageError` without a layer, or for several directions at one.
        """
        if isinstance(direction, Mapping):
            if layer is not None or not direction:
                raise UsageError("add: expected {layer: vector} without layer=, at least one")
            vectors = dict(self._steering(one, as_type("add: layer", at, int)) for at, one in direction.items())
        else:
            vectors = dict([self._steering(direction, layer)])
        with contextlib.ExitStack() as stack:
            for at, vector in vectors.items():
                last = at == self.anatomy.layers
                block = self.hf_model.get_submodule(self.anatomy.blocks[at - last])
                stack.enter_context(addition(block, float(coefficient) * vector[None], leaving=last))
            yield vectors

    def _steering(self, direction: DirectionLike, layer: int | None) -> tuple[int, Float[Tensor, " d"]]:
        """Where a direction is added, and the vector."""
        chosen = as_direction(direction, self.anatomy)
        if len(chosen.basis) != 1:
            raise UsageError(f"add: expected one direction, found {len(chosen.basis)}")
        site = chosen.site
        at = layer if layer is not None else None if site is None else site.layer
        if at is None or not 0 <= at <= self.anatomy.layers:
            raise UsageError(f"add: expected layer=0 to {self.anatomy.layers}, found {at}")
        known = chosen.candidates is not None and site is not None
        return at, chosen.difference_at(site) if known and site is not None else chosen.basis[0].float()

    @contextlib.contextmanager
    def steer(
        self,
        direction: SteeringLike,
        coefficient: float = 1.0,
        *,
        operation: Operation = "add",
        layers: Any = None,
        tokens: Tokens = "all",
    ) -> Iterator[Steering]:
        """Inside a `with`, the model with its residual stream steered along a direction; yields what is done.

        `add` adds `coefficient` units of it; `scale` multiplies what the stream holds along it, the projection h·r̂;
        `clamp` sets that to `coefficient` units, `cap` to at most so many; `ablate` takes that share of it out. A unit
        is the direction's measured norm ‖r‖ where it is known, a vector as a file or {layer: vector} has it, else 1.

        `layers` are those of the stream (l is where it enters block l), default the direction's own, all to ablate.
        `tokens` "generated" are those that the reply is predicted from: the prompt's last, and the reply's own.

        Raises `UsageError` where no layer is known, and for vectors that do not fit the model.
        """
        fields = {"operation": operation, "coefficient": coefficient, "layers": layers, "tokens": tokens}
        settings = SteerSettings.model_validate(fields)
        steering = steering_of(as_vectors(direction), settings, self.anatomy.layers, self.anatomy.d_model)
        with steered([self.hf_model.get_submodule(name) for name in self.anatomy.blocks], steering):
            yield steering

    def sweep(
        self,
        direction: SteeringLike,
        coefficients: Sequence[float] = (-2, -1, 0, 1, 2),
        *,
        operation: Operation = "add",
        layers: Any = None,
        tokens: Tokens = "all",
        **options: Unpack[_SweepVerb],
    ) -> DoseResponse:
        """What `steer` does on held-out prompts, by coefficient: behaviour, KL, broken replies; `plot` draws it.

        A random direction is measured beside, at the lowest and the highest coefficient (unless `no_control`). Prompts
        that the direction was learnt from are left out. Raises what `steer` raises.
        """
        given = self._options("sweep", dict(options))
        fields = {"operation": operation, "coefficients": coefficients, "layers": layers, "tokens": tokens}
        settings = given.take(SteerSettings, **fields)
        finding, replies = given.take(RefusalSettings), given.take(ReplySettings)
        vectors = as_vectors(direction)
        session = self._prepare(given, None, vectors).session
        given.done()
        return DoseResponse(sweep_doses(session, vectors, settings, finding=finding, replies=replies))

    def read(self, text: Any, direction: SteeringLike, *, layer: int | None = None) -> ReadingPart:
        """What the stream holds along a direction at every token of a text; a notebook shades the tokens.

        A text is a question or conversation, in the chat template, or a pair of one and the reply to it; a list holds
        several. `layer` is the one that is shown, default the direction's own; the value has all. Raises `UsageError`
        for vectors that do not fit the model.
        """
        several = isinstance(text, list) and not all(isinstance(one, Mapping) for one in text)
        texts = [_exchange(one) for one in (text if several else [text])]
        return read_tokens(self._opened, as_vectors(direction), texts, layer=layer, monitor=progress())

    def chat(self, prompt: Talk, *, max_new_tokens: int = 200, system: str | None = None) -> str:
        """The greedy reply to a question or conversation, as the model is now (hooked, or not)."""
        return self.answer([prompt], max_new_tokens=max_new_tokens, system=system)[0]

    def answer(self, prompts: Sequence[Talk], *, max_new_tokens: int = 128, system: str | None = None) -> list[str]:
        """Greedy replies to several questions, in batches."""
        renderer = self._opened.renderer if system is None else replace(self._opened.renderer, system=system)
        encoded = share_prefix(renderer.encode(list(map(_asked, prompts))), share=False)
        size = auto_batch_size(self.hf_model, self._opened.loading.rows)
        most = as_type("chat: max_new_tokens", max_new_tokens, int)
        return [reply.text for reply in complete(self.hf_model, self.tokenizer, encoded, most, size)]

    def activations(
        self, prompts: Sequence[Talk] | Sequence[Sequence[int]], *, position: int = -1
    ) -> Float[Tensor, "n sites d"]:
        """The residual stream at every site 0..L at one token of each prompt, in float32 on the CPU.

        Site 0 is the embedding's output, site l what enters block l (TransformerLens: `blocks.l.hook_resid_pre`), site
        L what leaves the last block, before the final norm. Texts are rendered by the chat template; lists of token
        ids are taken as they are. `position` counts from the end.
        """
        if position >= 0:
            raise UsageError(f"activations: expected a position from the end, -1 or less, found {position}")
        raw = all(not isinstance(one, str) and len(one) > 0 and isinstance(one[0], int) for one in prompts)
        ids = prompts if raw else self._opened.renderer.encode([_asked(one) for one in prompts])  # type: ignore[arg-type]
        encoded = share_prefix([list(map(int, one)) for one in ids], keep=-position, share=False)  # type: ignore[arg-type]
        width = (len(encoded), self.anatomy.layers + 1, self.anatomy.d_model)
        found = torch.empty(width)

        def take(layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
            found[rows, layer] = values[:, -1 - position].float().cpu()

        blocks = [self.hf_model.get_submodule(name) for name in self.anatomy.blocks]
        stream_sites(self.hf_model, blocks, encoded, -position, take, auto_batch_size(self.hf_model))
        return found

    def verify(self, direction: DirectionLike, **options: Unpack[_VerifyVerb]) -> VerificationPart:
        """Proof by intervention: without the direction refusals stop, without a random one they do not."""
        given = self._options("verify", options)
        finding, editing, replies = given.take(VerifySettings), given.take(EditSettings), given.take(ReplySettings)
        chosen = as_direction(direction, self.anatomy)
        session = self._prepare(given, None, chosen).session
        given.done()
        return pipeline.verify(session, chosen, editing=editing, finding=finding, replies=replies)

    def evaluate(
        self, direction: DirectionLike | Plan | None = None, **options: Unpack[_EvaluateVerb]
    ) -> EvaluationPart:
        """Replies to held-out prompts before and after, paired, with intervals, shift and a random control.

        Without a direction, of the model as it is. Prompts that the direction was learnt from are left out.
        """
        given = self._options("evaluate", options)
        evaluating, editing = given.take(EvalSettings), given.take(EditSettings)
        chosen = None if direction is None or isinstance(direction, Plan) else as_direction(direction, self.anatomy)
        session = self._prepare(given, None, chosen).session
        given.done()
        plan = direction if isinstance(direction, Plan) else None
        plan = plan if chosen is None else plan_for(self.anatomy, chosen, editing)
        return pipeline.evaluate(session, evaluating, plan=plan)

    def search(self, start: DirectionLike | None = None, **options: Unpack[_SearchVerb]) -> Front:
        """The front of refusals against damage: edits between none and the closed form.

        It begins with `start`, else where the two sets are furthest apart. Raises `GateNotMet` when the model hardly
        refuses, or no point keeps the constraints.
        """
        given = self._options("search", options)
        force = bool(given.pop("force", False))
        finding, evaluating = given.take(FindSettings), given.take(EvalSettings)
        editing, searching = given.take(EditSettings), given.take(SearchSettings)
        output = OutputSettings(out=Path("front"), force=force)
        settings = RunSettings(
            model=self.name,
            finding=finding,
            evaluating=evaluating,
            editing=editing,
            searching=searching,
            output=output,
        )
        monitor = progress()
        prepared = self._prepare(given, finding, monitor=monitor)
        behaviour = prepared.session.prompts.behaviour
        method = method_of(searching, finding, editing, behaviour=behaviour)
        check_search(searching, method, finding, editing)
        judge = ready_judge(evaluating, behaviour, str(self._loaded.device), monitor)
        given.done()
        session = prepared.session
        findings = self._findings(prepared, finding, editing)
        begin = best_separated(session, findings, finding) if start is None else as_direction(start, self.anatomy)
        result = find_front(session, findings, begin, bind_judge(judge, as_loaded(session), monitor), settings, method)
        points = [
            replace(point, direction=replace(with_origin_of(point.direction, begin), candidates=begin.candidates))
            for point in result.points
        ]
        return Front(tuple(points), result.chosen, search_part(result))

    def save(self, direction: DirectionLike, out: str | PathLike[str], **options: Unpack[_SaveVerb]) -> Record:
        """Write the edited model to the folder `out`, with its record, report and model card.

        `as_` is "weights" (default), "gguf" (with `gguf_type`, e.g. "Q4_K_M"; by llama.cpp's converter), "lora",
        "gguf-lora" or "control-vector". Of a model that was wrapped, its weights as they are in memory are the
        original. Raises `UsageError` for an `out` that is in the way (unless
        `overwrite`), or an edit that this form cannot hold.
        """
        if self._back:
            raise UsageError("save: the model is edited in memory; restore() it first, and save the direction")
        given = Options("save", options)
        editing, output = given.take(EditSettings), given.take(OutputSettings, out=as_type("save: out", out, Path))
        given.done()
        chosen = as_direction(direction, self.anatomy)
        settings = ApplySettings(output=output, editing=editing, loading=self._opened.loading)
        return pipeline.apply(on_disk(self._loaded), chosen, settings, monitor=progress())

    def apply_(self, direction: DirectionLike | Plan, **options: Unpack[EditOptions]) -> Model:
        """Take the direction out of the live weights, in place; `restore()` puts the old numbers back.

        The old numbers of what is changed stay in memory. Several calls add up.
        """
        self._back.append(edit_live(self.hf_model, self.plan(direction, **options)))
        self._prepared.clear()
        return self

    def restore(self) -> Model:
        """Undo every `apply_`: the weights are as they were, bit by bit."""
        while self._back:
            self._back.pop()()
        self._prepared.clear()
        return self

    def _options(
        self, verb: str, options: Mapping[str, Any], harmful: Prompts | None = None, harmless: Prompts | None = None
    ) -> Options:
        sides = {"harmful": harmful, "harmless": harmless}
        return Options(verb, {**options, **{name: side for name, side in sides.items() if side is not None}})

    def _prepare(
        self,
        given: Options,
        finding: FindSettings | None,
        direction: Direction | SteeringVectors | None = None,
        monitor: Monitor | None = None,
    ) -> _Prepared:
        """A session with the prompts that were given, else the last ones; none of them seen by the direction."""
        prompts = given.take(PromptSettings)
        if prompts.model_fields_set:
            before = {name: getattr(self._prompts, name) for name in ("behaviour", "harmful", "harmless")}
            if "behaviour" in prompts.model_fields_set:  # another one has other sides
                before = {}
            self._prompts = PromptSettings(**{**before, **prompts.model_dump(exclude_unset=True)})
        seen = frozenset() if direction is None else direction.learnt_from
        positions = None if finding is None else finding.positions
        for name, one in self._prepared.items():
            if name[0] == self._prompts and (finding is None or name[1] == positions) and not _overlap(one, seen):
                one.session.monitor = monitor or progress()
                return one
        shown = monitor or progress()
        contrast: ContrastiveSet = load_contrast(self._prompts, shown, seen)
        session = self._opened.session(contrast, positions=positions, seed=self._prompts.seed, monitor=shown)
        prepared = self._prepared[self._prompts, positions, seen] = _Prepared(session, {})
        return prepared

    def _findings(self, prepared: _Prepared, finding: FindSettings, writers: WriterSettings) -> Findings:
        """Candidates and refusal tokens of a session, made once for the same settings."""
        names = set(WriterSettings.model_fields)
        key = finding.model_dump_json() + writers.model_dump_json(include=names)
        if key not in prepared.findings:
            prepared.findings[key] = pipeline.find(prepared.session, finding, writers)
        return prepared.findings[key]


def _overlap(prepared: _Prepared, seen: frozenset[str]) -> bool:
    """Whether a session would evaluate on prompts that a direction was learnt from."""
    texts = prepared.session.test_texts.values()
    return bool(seen) and any(fingerprint(text) in seen for group in texts for text in group)


def _asked(talk: Talk) -> str:
    """A question or conversation as a prompt."""
    if isinstance(talk, str):
        return talk if isinstance(talk, Prompt) else Prompt(talk)
    return read_conversation(list(talk))


def _exchange(text: Any) -> Asked:
    """A text to read: a question or conversation, or a pair of one and the reply to it."""
    if isinstance(text, tuple) and len(text) == 2 and (text[1] is None or isinstance(text[1], str)):
        return _asked(text[0]), text[1]
    return _asked(text), None


__all__ = ["DirectionLike", "Model", "SteeringLike", "as_direction", "as_vectors", "load", "wrap"]
