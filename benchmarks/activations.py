"""How fast activations are collected: this package, the usual way, and the bare forward pass as the limit.

Run ``python benchmarks/activations.py [MODEL] [--prompts N]``. MODEL is a folder of safetensors or a .gguf file;
without it the demo model in the cache is used. Four ways take turns in one process, on the same prompts (builtin,
train split), in the same dtype, on the same device:

ours   `activations.stream_sites` into moments: the shared prefix once, what differs padded on the right in batches of
       similar length, only the wanted positions kept.
naive  whole prompts padded on the left, in the order given, 32 at once, `output_hidden_states=True`, of which the
       last positions are kept. The model runs without its head, which nobody looks at.
usual  the same, with the call that most tools make: `model(...)`, which also computes logits at every token.
bare   the body of the model on the token ids that ours puts in, in the same batches, and nothing else: no prefix, no
       cache, no hooks, nothing kept. Who computes these tokens in these batches cannot be faster.

Each round runs all four, in a different order each time; what is reported are medians over rounds of the ratios
within a round. The means that ours and naive end with are compared, so that the same thing is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.config import PromptSettings, cache_folder
from abliterate.model.activations import MomentsFitter, stream_sites
from abliterate.model.anatomy import find_blocks
from abliterate.model.batches import (
    Encoded,
    auto_batch_size,
    body,
    in_batches,
    input_device,
    right_padded,
    share_prefix,
)
from abliterate.model.loading import load, locate
from abliterate.monitor import peak_memory
from abliterate.prompts import ChatRenderer, build_contrastive_set
from abliterate.prompts.rendering import common_suffix

DEMO = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
NAIVE_BATCH = 32
TARGETS = {"naive / ours": (">=", 2.0), "ours / bare": ("<=", 1.25)}


@dataclass(frozen=True, slots=True)
class Subject:
    """The model and the two classes of prompts, as `pipeline.find` would collect them."""

    model: Any
    blocks: list[nn.Module]
    sequences: list[list[list[int]]]
    encoded: list[Encoded]
    positions: int
    rows: int | None

    @property
    def sites(self) -> int:
        return len(self.blocks) + 1


@dataclass(slots=True)
class Runs:
    """What one way cost in each round; `means` [class, k, site, d] come from the last one."""

    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    rise: list[int] = field(default_factory=list)
    means: Tensor | None = None


def ours(subject: Subject) -> Tensor:
    """Both classes through `stream_sites`, as in a real run."""
    means = []
    for encoded in subject.encoded:
        fitter = MomentsFitter(subject.positions, subject.sites, subject.model.config.get_text_config().hidden_size)
        size = auto_batch_size(subject.model, subject.rows)
        stream_sites(subject.model, subject.blocks, encoded, subject.positions, fitter.update, size)
        means.append(fitter.result().mean)
    return torch.stack(means)


def naive(subject: Subject, *, head: bool = False) -> Tensor:
    """Both classes, padded on the left, all hidden states asked for."""
    device, k = input_device(subject.model), subject.positions
    run = subject.model if head else body(subject.model)
    means = []
    for sequences in subject.sequences:
        total: Tensor | None = None
        for start in range(0, len(sequences), NAIVE_BATCH):
            batch = sequences[start : start + NAIVE_BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[s[0]] * (width - len(s)) + s for s in batch], device=device)
            mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in batch], device=device)
            with torch.inference_mode():
                out = run(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            last = torch.stack([h[:, -k:].flip(1) for h in out.hidden_states], 2)  # [b, k, site, d], -1 first
            part = last.double().sum(0).cpu()
            total = part if total is None else total + part
            del out
        assert total is not None
        means.append(total / len(sequences))
    return torch.stack(means)


def bare(subject: Subject) -> None:
    """The same token ids in the same batches as ours, with nothing around the forward pass."""
    for encoded in subject.encoded:
        suffixes = encoded.suffixes

        def work(rows: list[int], suffixes: tuple[tuple[int, ...], ...] = suffixes) -> None:
            ids, _ = right_padded([suffixes[row] for row in rows], input_device(subject.model))
            with torch.inference_mode():
                body(subject.model)(input_ids=ids, use_cache=False)

        in_batches([len(s) for s in suffixes], auto_batch_size(subject.model, subject.rows), work)


WAYS: dict[str, Callable[[Subject], Tensor | None]] = {
    "ours": ours,
    "naive": naive,
    "usual": lambda subject: naive(subject, head=True),
    "bare": bare,
}


def measure(subject: Subject, way: str, runs: Runs) -> None:
    """One timed run, counting the tokens that go through the first block (padding too: it costs the same)."""
    runs.tokens = 0

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        runs.tokens += hidden.shape[0] * hidden.shape[1]

    handle = subject.blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    before = _settle(input_device(subject.model))
    wall, cpu = time.perf_counter(), time.process_time()
    runs.means = WAYS[way](subject)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    runs.seconds.append(time.perf_counter() - wall)
    runs.cpu.append(time.process_time() - cpu)
    handle.remove()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    runs.peak.append(peak)
    runs.rise.append(peak - before)


def _settle(device: torch.device) -> int:
    """Free what the last run left, start the high-water mark anew, and say how much memory is in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def ratios(a: list[float], b: list[float]) -> str:
    each = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}-{max(each):.2f}]"


def report(runs: dict[str, Runs], flops_per_token: float, matmul: float) -> None:
    columns = f"{'tokens/s':>9} {'GFLOP/s':>8} {'peak MB':>8} {'rise MB':>8}"
    print(f"{'':<6} {'tokens':>7} {'seconds, median [min-max]':>26} {columns}")
    for way, run in runs.items():
        median = statistics.median(run.seconds)
        spread = f"{median:.2f} [{min(run.seconds):.2f}-{max(run.seconds):.2f}]"
        rate = run.tokens / median
        memory = f"{max(run.peak) / 1e6:>8.0f} {max(run.rise) / 1e6:>8.0f}"
        print(f"{way:<6} {run.tokens:>7} {spread:>26} {rate:>9.0f} {rate * flops_per_token / 1e9:>8.0f} {memory}")
    print(f"matrix product of the MLP's shape, nothing else: {matmul / 1e9:.0f} GFLOP/s")
    print("GFLOP/s counts 2 x the parameters of the blocks per token: not attention, and not the head in 'usual'.")
    print()
    for name, (a, b) in {
        "naive / ours": ("naive", "ours"),
        "usual / ours": ("usual", "ours"),
        "ours / bare": ("ours", "bare"),
    }.items():
        wall = ratios(runs[a].seconds, runs[b].seconds)
        cpu = ratios(runs[a].cpu, runs[b].cpu)
        tokens = runs[a].tokens / runs[b].tokens
        line = f"{name:<13} wall {wall}, CPU time {cpu}, tokens {tokens:.2f}"
        if name in TARGETS:
            sign, wanted = TARGETS[name]
            median = statistics.median([x / y for x, y in zip(runs[a].seconds, runs[b].seconds, strict=True)])
            met = median >= wanted if sign == ">=" else median <= wanted
            line += f"; target {sign} {wanted}: {'met' if met else 'MISSED'}"
        print(line)


def agreement(first: Tensor, second: Tensor) -> None:
    """How far the means [class, k, site, d] of two ways, and the directions from them, are apart.

    Sites 0..L-1 only: the last of `hidden_states` is after the final norm, which no block wrote.
    """
    a, b = first[:, :, :-1], second[:, :, :-1]
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)
    r_a, r_b = a[0] - a[1], b[0] - b[1]
    differs = r_b.norm(dim=-1) > 1e-3 * b[1].norm(dim=-1)  # not the template's own tokens at site 0
    cosine = torch.nn.functional.cosine_similarity(r_a, r_b, dim=-1).masked_fill(~differs, torch.nan)
    found = cosine[differs]
    position, layer = divmod(int(cosine.nan_to_num(2.0).argmin()), cosine.shape[1])
    size = float(r_b[position, layer].norm() / b[1, position, layer].norm())
    print(f"means: relative error at most {float(error.max()):.1e}, median {float(error.median()):.1e}")
    print(
        f"directions (harmful - harmless): cosine at least {float(found.min()):.6f} (layer {layer}, position "
        f"{-1 - position}, where the difference is {size:.1%} of the mean), median {float(found.median()):.6f}, "
        f"at {len(found)} of {differs.numel()} sites (the rest have none)"
    )


def matmul_rate(model: Any, tokens: int = 1024) -> float:
    """FLOP/s of a product of the MLP's shape: what the machine gives at best."""
    config = model.config.get_text_config()
    weight = next(iter(model.parameters()))
    a = torch.randn(tokens, config.hidden_size).to(weight)
    b = torch.randn(config.intermediate_size, config.hidden_size).to(weight)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * b.numel() / best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collecting activations: ours, the usual way, the limit.")
    parser.add_argument("model", nargs="?", default=str(cache_folder() / "models" / DEMO), help="folder or .gguf")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each class (default 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=None, help="for ours and bare; default: auto")
    parser.add_argument("--threads", type=int, default=None, help="of torch; 1 where other work shares the cores")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    loaded = load(locate(args.model, dtype=args.dtype), dtype=args.dtype, device=args.device)
    prompts = build_contrastive_set(PromptSettings(limit=args.prompts))
    renderer = ChatRenderer(loaded.tokenizer)
    classes = [renderer.encode(texts) for texts in (prompts.harmful.train, prompts.harmless.train)]
    everything = [ids for group in classes for ids in group]
    positions = min(8, max(1, common_suffix(everything)))
    shared = share_prefix(everything, keep=positions)
    count = len(classes[0])
    encoded = [shared.take(range(count)), shared.take(range(count, len(everything)))]
    _, blocks = find_blocks(loaded.model)
    subject = Subject(loaded.model, blocks, classes, encoded, positions, args.batch_size)

    size = auto_batch_size(loaded.model, args.batch_size)
    lengths = sorted(map(len, everything))
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    print(f"{type(loaded.model).__name__}, {len(blocks)} blocks of {parameters / len(blocks) / 1e6:.1f} M parameters")
    print(f"{loaded.dtype}, {loaded.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{len(classes[0])} + {len(classes[1])} prompts of {lengths[0]}-{lengths[-1]} tokens (median "
        f"{statistics.median(lengths):.0f}), {len(shared.prefix)} of them shared; {positions} positions x "
        f"{len(blocks) + 1} sites; ours: at most {size.rows} prompts or {size.tokens} tokens at once"
    )
    runs = {way: Runs() for way in WAYS}
    for way in WAYS:  # a first run pages in weights and sets up kernels
        measure(subject, way, Runs())
    order = list(WAYS)
    for number in range(args.rounds):
        for way in order:
            measure(subject, way, runs[way])
        print(f"round {number + 1}: " + ", ".join(f"{way} {runs[way].seconds[-1]:.2f} s" for way in order), flush=True)
        order = order[1:] + order[:1]
    print()
    report(runs, 2.0 * parameters, matmul_rate(loaded.model))
    first, second = runs["ours"].means, runs["naive"].means
    assert first is not None
    assert second is not None
    agreement(first, second)


if __name__ == "__main__":
    main()
