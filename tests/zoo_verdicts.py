"""What holds for a model of the zoo: is every writer known, do hooks and weights agree, is an ablation complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abliterate.algebra import orthonormal
from abliterate.edit.hooks import ablation
from abliterate.edit.plan import Plan, Variant, make_plan
from abliterate.edit.weights import edit_checkpoint, planned_parameters
from abliterate.errors import AnatomyError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.model.anatomy import Anatomy, Kind, names_on_disk, stream_out, study
from zoo import UNBUILT, Entry

_POST_LN = "norms stand on the residual stream itself (post-LN), so no edit of writers can keep a direction out of it"
_SCALED = "the residual stream itself is multiplied by learned vectors, which turn every direction in it"
_NO_IMAGE = "its cross-attention blocks do not run without an image"
CANNOT_RUN = "transformers 5.24 cannot run it: its forward pass asks the text half for images"
_CONVOLVED = "a depthwise convolution stands between the last maps and the stream"

_WHY: Mapping[str, str] = {
    """bart bert bert-generation big_bird blenderbot-small camembert data2vec-text electra ernie git marian minimax mvp
    openai-gpt opt-post-norm plbart prophetnet rembert roberta roc_bert roformer trocr xlm xlm-roberta xlnet xmod""": (
        _POST_LN
    ),
    "doge doge-moe zaya": _SCALED,
    "inkling2_text inkling_text": _CONVOLVED,
    "mllama": _NO_IMAGE,
    "blt": "three stacks of blocks of different widths, joined by cross-attention",
    "ctrl": "fixed positions are added outside any module, where no hook reaches them",
    "dory": "its middle blocks run several times, and the stream is interpolated at a learned rate per channel",
    "gemma3n_text": "its low-rank side path (LAuReL) adds the normed stream itself, through a gain",
    "hrm_text": "two stacks of blocks that take turns, each run several times",
    "llama4-images": CANNOT_RUN,
    "inkling2_loop_text": "its middle blocks run several times, each pass takes gated messages from the one before",
    "longcat_flash": "identity experts add the normed stream itself, through a gain",
    "qwen4_exp_text-ple": "per-layer embeddings pass a convolution and a non-linearity after their last map",
    "reformer": "reversible blocks: two streams that are added to in turns",
    "rwkv": "the feed-forward output is gated elementwise after its last map",
}

#: Why the writers of a model of the zoo cannot be proved, by `str(entry)`.
WHY: Mapping[str, str] = {name: reason for names, reason in _WHY.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` says why not every writer is known, None if every one is; the rest then says how well.

    `difference` is between the logits under hooks and those of the edited checkpoint, relative to their size; `moved`
    how far both are from the model's. `left` is the largest share of the direction that is left anywhere in the
    stream, embeddings untied; `fixed` whether vectors without weights (positions) are added to it.
    """

    reason: str | None
    kinds: Mapping[str, int]
    difference: float = 0.0
    moved: float = 0.0
    left: float = 0.0
    fixed: bool = False

    @property
    def agrees(self) -> bool:
        """Hooks and weights are the same function."""
        return self.difference < 1e-4

    @property
    def complete(self) -> bool:
        """The direction is gone from the stream."""
        return self.left < 1e-3


def examine(entry: Entry, folder: Path) -> Verdict:
    """Build a model, study it, and compare hooks with weights stored in the empty `folder`."""
    model = entry.model()
    try:
        anatomy = study(model)
    except AnatomyError as error:
        return Verdict(str(error), {})
    generator = torch.Generator().manual_seed(1000)
    direction = orthonormal(torch.randn(2, anatomy.d_model, generator=generator))
    ids = torch.randint(4, 250, (2, 12), generator=generator)
    plan, untied = (make_plan(anatomy, direction, variant=Variant(untie=untie)) for untie in (False, True))
    before, held = run(model, anatomy, ids, direction)
    with ablation(model, untied):
        _, left = run(model, anatomy, ids, direction)
    with ablation(model, plan):
        hooked, _ = run(model, anatomy, ids, direction)
    stored, _ = run(_edited(entry, model, plan, folder), anatomy, ids, direction)
    return Verdict(
        reason=None,
        kinds=Counter(str(writer.kind) for writer in anatomy.writers),
        difference=_difference(stored, hooked),
        moved=_difference(hooked, before),
        left=max(after / max(site, 1e-30) for after, site in zip(left, held, strict=True)),
        fixed=any(not writer.parameters for writer in anatomy.writers),
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _edited(entry: Entry, model: Any, plan: Plan, folder: Path) -> Any:
    source, target = folder / "source", folder / "edited"
    target.mkdir()
    model.save_pretrained(source)
    checkpoint = open_checkpoint(source)
    names = names_on_disk(model, planned_parameters(plan), checkpoint.tensors)
    edit_checkpoint(checkpoint, target, plan, names)
    return entry.load(target)


def run(model: Any, anatomy: Anatomy, ids: Tensor, direction: Tensor) -> tuple[Tensor, list[float]]:
    """Logits, and how much of the direction the stream holds where it enters each block and leaves the last."""
    with _along(model, anatomy, direction) as held, torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits, held


@contextmanager
def _along(model: Any, anatomy: Anatomy, direction: Tensor) -> Iterator[list[float]]:
    held: list[float] = []
    blocks = [model.get_submodule(name) for name in anatomy.blocks]

    def measure(stream: Tensor) -> None:
        held.append(float((stream.reshape(-1, anatomy.d_model) @ direction.T).norm()))

    def entering(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        measure(args[0] if args else kwargs["hidden_states"])

    def leaving(_: Any, __: Any, output: Any) -> None:
        measure(stream_out(output))

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


#: One row of the table in docs/supported-models.md: closes, hooks = weights, writers, remarks.
Cells = tuple[str, str, str, str]


def cells(entry: Entry, verdict: Verdict) -> Cells:
    """What the table says of one model."""
    if verdict.reason is not None:
        return "no", "", "", WHY.get(str(entry), verdict.reason)
    writers = ", ".join(f"{kind.replace('_', ' ')} {verdict.kinds[kind]}" for kind in Kind if kind in verdict.kinds)
    remark = "fixed positions have no weights and stay" if verdict.fixed and not verdict.complete else ""
    return "yes", "yes" if verdict.agrees else "no", writers, remark


def table(examined: Sequence[tuple[Entry, Verdict]]) -> list[str]:
    """Rows of Markdown, one for each class and verdict, model types side by side."""
    rows: dict[tuple[str, Cells], list[str]] = {}
    for entry, verdict in sorted(examined, key=lambda pair: (pair[0].cls, str(pair[0]))):
        rows.setdefault((entry.cls, cells(entry, verdict)), []).append(str(entry))
    return [f"| {' | '.join((cls, ', '.join(types), *row))} |" for (cls, row), types in rows.items()]


def read_table(lines: Sequence[str]) -> dict[tuple[str, str], Cells]:
    """What rows among the lines say, by class and model type."""
    found: dict[tuple[str, str], Cells] = {}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    for cls, types, closes, agrees, writers, remarks in rows:
        if closes not in ("yes", "no"):
            continue  # the head of the table
        found |= {(cls, name): (closes, agrees, writers, remarks) for name in types.split(", ")}
    return found


def figures(rows: Mapping[tuple[str, str], Cells]) -> list[str]:
    """What a table says of all classes together, as items of Markdown; a class counts by the worst of its types."""
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = set(mapping.values())
    wrong = {pair: _shortcoming(row) for pair, row in rows.items()}
    built = {cls for model_type, cls in mapping.items() if model_type not in UNBUILT}
    failed = {cls: wrong[cls, name] for name, cls in mapping.items() if wrong.get((cls, name))}
    others = [shortcoming for (cls, name), shortcoming in wrong.items() if mapping.get(name) != cls]
    return [
        f"- {len(classes)} classes for {len(mapping)} model types are in the mapping.",
        f"- {_share(built, classes)} of them could be built as a tiny model.",
        f"- {_share(built - failed.keys(), built)} of those close, and hooks and weights agree.",
        f"- {_share(failed, built)} do not:",
        *(f"  - {count}: {reason}" for reason, count in Counter(sorted(failed.values())).most_common()),
        f"- {_share(classes - built, classes)} could not be built:",
        *(f"  - {mapping[name]} (`{name}`): {reason}" for name, reason in UNBUILT.items()),
        f"- Of {len(others)} more (second configurations of a class, models of text and images) "
        f"{others.count('')} close and agree.",
    ]


def _shortcoming(row: Cells) -> str:
    closes, agrees, _, remarks = row
    return remarks if closes == "no" else "" if agrees == "yes" else "hooks and weights differ"


def _share(some: Collection[str], of: Collection[str]) -> str:
    return f"{len(some)} ({100 * len(some) / len(of):.1f} %)"
