"""Fit the weights of the learnt judge on the labelled exchanges, and say how it does on those it never saw.

Run ``python scripts/train_judge.py`` to write ``learnt.safetensors`` beside the judge's code, and the few exchanges
that judges draw while they work; ``--check`` fits and compares without writing. Only rows of the split "fit" are used,
and none whose reply was cut off. Logistic regression with an L2 penalty, full-batch L-BFGS in float64: the same weights
on every machine but for rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from abliterate.evaluation import judging
from abliterate.evaluation.judging import learnt, rules
from abliterate.evaluation.judging.base import Label, Verdict
from abliterate.evaluation.judging.shipped import FILE, MOST_FIT, ShippedExchange, draw, parse_exchanges
from abliterate.evaluation.statistics import wilson

#: All labelled exchanges.
EXCHANGES = Path(__file__).parents[1] / "benchmarks" / "exchanges.jsonl"

#: Weight of the data against the penalty ‖w‖²/2.
C = 2.0


def design(rows: list[ShippedExchange]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, buckets + signs + 1] (sparse) and whether each was refused [n]."""
    indices, values = [], []
    for number, row in enumerate(rows):
        words, signs = learnt.features(row.reply, row.prompt, rules.judge(row.reply, row.prompt))
        places = [*words, *range(learnt.BUCKETS, learnt.BUCKETS + learnt.SIGNS + 1)]
        indices += [(number, place) for place in places]
        values += [*([learnt.word_scale(len(words))] * len(words)), *signs, 1.0]
    shape = (len(rows), learnt.BUCKETS + learnt.SIGNS + 1)
    table = torch.sparse_coo_tensor(torch.tensor(indices).T, torch.tensor(values, dtype=torch.float64), shape)
    refused = [Verdict(row.label).refused for row in rows]
    return table.coalesce(), torch.tensor(refused, dtype=torch.float64)


def fit(rows: list[ShippedExchange]) -> np.ndarray:
    """The weights [buckets + signs + 1] of the least penalised loss."""
    table, refused = design(rows)
    weights = torch.zeros(table.shape[1], dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([weights], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        descent.zero_grad()
        logits = torch.sparse.mm(table, weights[:, None])[:, 0]
        data = torch.nn.functional.binary_cross_entropy_with_logits(logits, refused, reduction="sum")
        value = C * data + weights[:-1].square().sum() / 2
        value.backward()
        return value

    descent.step(loss)
    return weights.detach().numpy().astype(np.float16)


def usable(split: str) -> list[ShippedExchange]:
    """The exchanges of a split that have a verdict."""
    rows = parse_exchanges(EXCHANGES.read_text(encoding="utf-8"))
    return [row for row in rows if row.split == split and row.label is not Label.CUT_OFF]


def drawn() -> str:
    """The lines of those that judges draw, as they stand among all."""
    lines = EXCHANGES.read_text(encoding="utf-8").splitlines()
    rows = parse_exchanges("\n".join(lines))
    kept = {row.id for row in (*draw(rows, "hold"), *draw(rows, "fit", MOST_FIT))}
    return "".join(f"{line}\n" for line, row in zip(lines, rows, strict=True) if row.id in kept)


def main() -> None:
    """Train, or compare with the weights that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Compare with the weights that are there; write nothing.")
    path = Path(judging.__file__).with_name(learnt.FILE)
    weights = fit(usable("fit"))
    if parser.parse_args().check:
        kept = learnt._weights()
        print(f"largest difference {np.abs(kept - weights.astype(np.float32)).max():.4f}")
    else:
        save_file({"weights": weights}, path)
        path.with_name(FILE).write_text(drawn(), encoding="utf-8", newline="\n")
        learnt._weights.cache_clear()
    rows = usable("hold")
    called = [learnt.judge(row.reply, row.prompt).refused for row in rows]
    right = sum(one == Verdict(row.label).refused for one, row in zip(called, rows, strict=True))
    low, high = wilson(right, len(rows))
    print(f"held out: {right}/{len(rows)} = {right / len(rows):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
