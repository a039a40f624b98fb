"""What the stream holds along a direction, token by token: of prompts, and of replies to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit.steering import SteeringVectors
from abliterate.errors import PromptError, UsageError
from abliterate.evaluation.judging.labelled import RESPONSE, read_exchanges
from abliterate.finding.steer import IN_PYTHON
from abliterate.model.activations import stream_sites
from abliterate.model.batches import BatchSize, Encoded
from abliterate.monitor import Monitor
from abliterate.prompts.reading import read_file
from abliterate.prompts.sources import load_prompts
from abliterate.record import ReadingPart, ReadTextPart
from abliterate.session import OpenedModel

#: A prompt, and the reply to it; None where there is none.
Asked = tuple[str, str | None]

#: Tokens of one text, whose activations at all layers are in memory at once.
_MOST_TOKENS = 4096


def read_texts(path: Path) -> list[Asked]:
    """What a file holds: prompts, one a line or row, or in rows with `prompt` and `response` replies to them.

    Raises `PromptError` for anything else.
    """
    rows = read_file(path)
    names = {str(name).strip().casefold() for name in rows[0]} if rows and isinstance(rows[0], Mapping) else set()
    if names & set(RESPONSE):
        return [(one.prompt, one.reply) for one in read_exchanges(path)]
    return [(prompt, None) for prompt in load_prompts(str(path))]


def read(
    opened: OpenedModel,
    vectors: SteeringVectors,
    texts: Sequence[Asked],
    *,
    layer: int | None = None,
    left_out: int = 0,
    monitor: Monitor | None = None,
    name: str = IN_PYTHON,
) -> ReadingPart:
    """Projections on the unit direction at every token of `texts`, in the chat template, at every layer.

    `layer` is shown first: by default the direction's own, else the one in the middle. Raises `UsageError` for vectors
    that do not fit the model, a layer that there is not, or a text of too many tokens.
    """
    count = opened.anatomy.layers
    vectors = vectors.fit(count, opened.anatomy.d_model)
    layers = list(range(count + 1)) if len(vectors.vectors) == 1 else list(vectors.layers)
    shown = _shown(layer, vectors, layers)
    rows = [vectors.row(one) for one in layers]
    units = dict(zip(layers, vectors.units[rows], strict=True))
    with (monitor or Monitor()).phase("read", len(texts)) as advance:
        read = []
        for asked in texts:
            read.append(_read_text(opened, units, asked))
            advance(1)
    return ReadingPart(
        model=opened.loaded.files.name,
        direction=name,
        layer=shown,
        layers=layers,
        unit=vectors.unit,
        lengths=[vectors.lengths[row] for row in rows],
        texts=read,
        left_out=left_out,
    )


def _shown(layer: int | None, vectors: SteeringVectors, layers: Sequence[int]) -> int:
    if layer is None:
        own = vectors.layers or layers
        return own[len(own) // 2]
    if layer not in layers:
        raise UsageError(f"--layer {layer}: expected one of {', '.join(map(str, layers))}")
    return layer


def _read_text(opened: OpenedModel, units: Mapping[int, Float[Tensor, " d"]], asked: Asked) -> ReadTextPart:
    tokenizer, (prompt, reply) = opened.loaded.tokenizer, asked
    (ids,) = opened.renderer.encode([prompt])
    start = len(ids)
    if reply:
        ids = [*ids, *tokenizer(reply, add_special_tokens=False)["input_ids"]]
    if len(ids) > _MOST_TOKENS:
        raise UsageError(f"text: expected at most {_MOST_TOKENS} tokens, found {len(ids)}; give it in parts")
    rows = opened.renderer.rows
    if rows is not None and max(ids) >= rows:
        raise PromptError(f"text: expected tokens below {rows}, found {max(ids)}; is the tokenizer another model's?")
    found: dict[int, list[float]] = {}

    def take(layer: int, _: list[int], values: Float[Tensor, "b k d"]) -> None:
        if layer in units:
            along = values[0].double() @ units[layer].double()
            found[layer] = [round(value, 4) for value in along.flip(0).tolist()]  # positions come from the end

    model = opened.loaded.model
    blocks = [model.get_submodule(name) for name in opened.anatomy.blocks]
    with torch.inference_mode():
        stream_sites(model, blocks, Encoded((), (tuple(ids),)), len(ids), take, BatchSize(1, len(ids)))
    texts = [_piece(tokenizer, token) for token in ids]
    return ReadTextPart(tokens=texts, prompt=start, projections=[found[layer] for layer in units])


def _piece(tokenizer: Any, token: int) -> str:
    """The text of one token, with the space before it that some tokenizers leave out."""
    text: str = tokenizer.decode([token])
    written = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if written.startswith("▁") and not text.startswith(" ") else text


__all__ = ["Asked", "read", "read_texts"]
