"""What a GPU makes of a run: tokens per second beside a bare forward pass, and memory, for each part of a run.

Run ``python benchmarks/gpu.py [MODEL] [--prompts 128] [--tokens 64] [--steps 4] [--dtypes bfloat16 bnb-4bit]``. Without
MODEL a Llama with the shapes of Mistral 7B (32 blocks, d = 4096, 32,000 tokens) and random bfloat16 weights is written
into a temporary folder (14.5 GB) and removed at the end. Where there is no CUDA device nothing is measured, and that
is said. ``--device cpu`` tries the program out.

bare       one batch of whole prompts of one length through the body of the model: what all else is beside
collect    activations of the training prompts at every site, as moments
score      refusal score and KL of ablations, four in a pass
search     steps of the search by gradient, forwards and backwards
replies    greedy replies, counted in tokens that were generated
surgery    the edit written from file to file (bytes per second); no model is loaded for it

Tokens are those that passed all blocks (`model.meter`), backward ones too. Memory is the most that torch had allocated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("src", "tests", "benchmarks")]


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a run took: seconds, what passed, and the most memory of the device in bytes."""

    seconds: float
    amount: float
    memory: int


def main() -> int:
    """Measure, and print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "bnb-4bit"])
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device is seen by torch here: nothing was measured")
        return 0
    with made_up(given.model) as model:
        for dtype in given.dtypes:
            show(dtype, measured(model, dtype, given))
    return 0


@contextlib.contextmanager
def made_up(model: str | None) -> Iterator[str]:
    """MODEL, or a folder with a made-up 8B one for as long as it is needed."""
    if model is not None:
        yield model
        return
    make, shape = (getattr(importlib.import_module("offload"), name) for name in ("make", "Shape"))

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make(folder, shape(32))
        yield str(folder)


def measured(model: str, dtype: str, given: argparse.Namespace) -> dict[str, Part]:
    """The parts of a run with a model in one dtype, or quantised by one method."""
    from abliterate import pipeline
    from abliterate.config import (
        ApplySettings,
        EditSettings,
        FindSettings,
        ModelSettings,
        OutputSettings,
        PromptSettings,
    )
    from abliterate.edit.direction import Direction, Site
    from abliterate.evaluation.probe import Behaving, Probe
    from abliterate.finding.estimate import difference_of_means
    from abliterate.finding.find import _moments
    from abliterate.finding.search.gradient import descend, legs
    from abliterate.model.batches import body, input_device
    from abliterate.model.generation import complete

    quantised = {"quantization": dtype} if dtype.startswith("bnb") else {"dtype": dtype}
    loading = ModelSettings(device=given.device, **quantised)
    session = pipeline.open_session(model, loading=loading, prompts=PromptSettings(limit=given.prompts))
    everything, tokens = FindSettings(all_prompts=True), list(range(10, 18))
    moments = _moments(session, [], everything)
    candidates = difference_of_means(moments["harmful"], moments["harmless"])
    site = Site(session.anatomy.layers // 2, -1)
    start = Direction(torch.nn.functional.normalize(candidates.at(*site), dim=0)[None], candidates, site=site)
    probe = Probe(session, tokens)
    rows = Behaving(tuple(range(len(probe.harmful))), tuple(range(len(probe.harmless))), 0.0, 0.0)
    probe.ablated([session.plan(start)], rows)  # the unedited model is measured once
    ids = torch.randint(0, 60, (64, 64), device=input_device(session.model))

    def bare() -> None:
        with torch.inference_mode():
            body(session.model)(input_ids=ids, use_cache=False)

    def replies() -> float:
        found = complete(session.model, session.loaded.tokenizer, probe.harmful, given.tokens, session.size)
        return float(sum(len(reply.tokens) + reply.ended for reply in found))

    work: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "collect": lambda: _moments(session, [], everything),
        "score": lambda: probe.ablated([session.plan(start)] * 4, rows),
        "search": lambda: descend(session, tokens, start, EditSettings(), legs(1, given.steps)),
        "replies": replies,
    }
    found = {name: timed(session, name, do) for name, do in work.items()}
    if "quantization" in quantised or not session.loaded.files.storage.editable:
        return found
    with tempfile.TemporaryDirectory() as place:
        output = OutputSettings(out=Path(place) / "out")
        size = sum(info.nbytes for info in session.loaded.files.checkpoint.tensors.values())
        began = time.perf_counter()
        pipeline.apply(model, start, ApplySettings(output=output))
        found["surgery"] = Part(time.perf_counter() - began, float(size), 0)
    return found


def timed(session: Any, name: str, work: Callable[[], Any]) -> Part:
    """One part, after it has run once. What it gives is its amount; without, that is the tokens that passed."""
    layers, cuda = session.anatomy.layers, session.loaded.device.type == "cuda"
    work()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = passed(session)
    with session.monitor.phase(name):
        began = time.perf_counter()
        given = work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    amount = given if isinstance(given, float) else (passed(session) - before) / layers
    return Part(seconds, amount, torch.cuda.max_memory_allocated() if cuda else 0)


def passed(session: Any) -> int:
    """Tokens × blocks so far, forwards and backwards, in all phases."""
    return sum(work.forward + work.backward for work in session.monitor.work_by_phase.values())


def show(dtype: str, found: dict[str, Part]) -> None:
    """A row for each part, beside the bare forward pass."""
    print(f"\n{dtype} on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}\n")
    print("| part | seconds | a second | of bare | GB |\n| --- | ---: | ---: | ---: | ---: |")
    bare = found["bare"].amount / found["bare"].seconds
    for name, part in found.items():
        speed = part.amount / part.seconds
        unit = f"{speed / 1e9:.2f} GB" if name == "surgery" else f"{speed:,.0f} tokens"
        share = "" if name == "surgery" else f"{speed / bare:.2f}"
        print(f"| {name} | {part.seconds:.2f} | {unit} | {share} | {part.memory / 1e9:.2f} |")
    print(json.dumps({name: [part.seconds, part.amount, part.memory] for name, part in found.items()}))


if __name__ == "__main__":
    sys.exit(main())
