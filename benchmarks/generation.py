"""How fast replies are made: this package, and transformers' own `generate` in a padded loop.

Run ``python benchmarks/generation.py [MODEL] [--prompts N] [--tokens T ...]``. MODEL is a folder of safetensors or a
.gguf file; without it the demo model in the cache is used. All ways answer the same prompts (builtin, test split and
borderline, shuffled), greedily, in one process, with the same number of rows at once:

plain      `model.generate` on whole prompts padded on the left, in the order given.
repaired   the same with what the head reads made contiguous. On CPUs `generate` gives the head a slice of all tokens'
           outputs, and the product of a bfloat16 matrix with that is very slow: nothing a method can take credit for.
ours       `generation.complete`.
no prefix  ours, but the tokens that all prompts start with are computed for each.
no leaving ours, but finished rows stay in the batch until all have finished.
early      ours, and replies that the rule judge says are refusals, whatever follows, are left there.
kept       replies read from the cache, key included; files were hashed before.

Each round runs all ways, in a different order each time; ratios are taken within a round. Then the ways' replies are
compared, and the two-way verdicts on whole and on early replies.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from abliterate.config import cache_folder
from abliterate.evaluation.judging import Exchange, RuleJudge
from abliterate.evaluation.reply_cache import keep, kept_replies, key_of
from abliterate.model import generation
from abliterate.model.batches import Encoded, auto_batch_size, hooked, input_device, share_prefix
from abliterate.model.decoding import Decoding, Settled
from abliterate.model.generation import Reply, complete, end_tokens, reply_text
from abliterate.model.loading import LoadedModel, load, locate
from abliterate.prompts import ChatRenderer, build_contrastive_set

DEMO = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
TARGET = 2.0


@dataclass(frozen=True, slots=True)
class Task:
    """A model, prompts as text and tokens, and how many tokens a reply may have."""

    loaded: LoadedModel
    texts: list[str]
    encoded: Encoded
    tokens: int
    rows: int | None

    @property
    def whole(self) -> Encoded:
        """The prompts with nothing shared."""
        return Encoded((), tuple(self.encoded.prefix + suffix for suffix in self.encoded.suffixes))


@dataclass(slots=True)
class Runs:
    """Seconds (wall, CPU) of one way in each round, and the replies of its last."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)


def plain(task: Task) -> list[Reply]:
    """The usual loop: padded on the left, all rows to the end of the longest."""
    model, tokenizer = task.loaded.model, task.loaded.tokenizer
    ends = end_tokens(model, tokenizer)
    rows = auto_batch_size(model, task.rows).rows
    replies = []
    for start in range(0, len(task.texts), rows):
        batch = task.whole.suffixes[start : start + rows]
        width = max(map(len, batch))
        ids = torch.tensor([[s[0]] * (width - len(s)) + list(s) for s in batch], device=input_device(model))
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in batch], device=ids.device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=task.tokens,
                do_sample=False,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends),
            )
        replies += [_reply(tokenizer, tokens, ends) for tokens in out[:, width:].tolist()]
    return replies


def _reply(tokenizer: Any, tokens: list[int], ends: frozenset[int]) -> Reply:
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return Reply(tuple(tokens[:length]), reply_text(tokenizer, tokens[:length]), length < len(tokens))


def repaired(task: Task) -> list[Reply]:
    """`plain` without the slow product at the head."""
    head = task.loaded.model.get_output_embeddings()
    with hooked([head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))]):
        return plain(task)


def ours(task: Task, encoded: Encoded | None = None, settled: Settled | None = None) -> list[Reply]:
    """This package."""
    model, size = task.loaded.model, auto_batch_size(task.loaded.model, task.rows)
    prompts = task.encoded if encoded is None else encoded
    return complete(model, task.loaded.tokenizer, prompts, task.tokens, size, decoding=Decoding(settled=settled))


def no_leaving(task: Task) -> list[Reply]:
    """This package with finished rows kept in the batch."""
    share = generation._COMPACT_SHARE
    generation._COMPACT_SHARE = 2.0
    try:
        return ours(task)
    finally:
        generation._COMPACT_SHARE = share


def early(task: Task) -> list[Reply]:
    """This package, leaving what the rule judge is certain of."""
    judge = RuleJudge()

    def settled(rows: Sequence[int], texts: Sequence[str]) -> list[bool]:
        return judge.settled([Exchange(task.texts[row], text) for row, text in zip(rows, texts, strict=True)])

    return ours(task, settled=settled)


def kept(task: Task) -> list[Reply]:
    """Replies kept from a run before."""
    return kept_replies(key_of(task.loaded, task.encoded, task.tokens), task.loaded.tokenizer) or []


WAYS: dict[str, Callable[[Task], list[Reply]]] = {
    "plain": plain,
    "repaired": repaired,
    "ours": ours,
    "no prefix": lambda task: ours(task, task.whole),
    "no leaving": no_leaving,
    "early": early,
    "kept": kept,
}


def measure(task: Task, way: str, runs: Runs) -> None:
    """One timed run."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    runs.replies = WAYS[way](task)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    runs.seconds.append(time.perf_counter() - wall)
    runs.cpu.append(time.process_time() - cpu)


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def report(task: Task, runs: dict[str, Runs]) -> None:
    count = len(task.texts)
    baselines = [way for way in ("plain", "repaired", "ours") if way in runs]
    columns = "".join(f" {way + ' / it':>20}" for way in baselines)
    print(f"{'':<10} {'seconds':>22} {'replies/s':>22} {'tokens':>7}{columns}")
    for way, run in runs.items():
        rates = [count / seconds for seconds in run.seconds]
        ratios = "".join(f" {spread(_ratios(runs[other].seconds, run.seconds)):>20}" for other in baselines)
        made = sum(len(reply.tokens) + reply.ended for reply in run.replies)
        print(f"{way:<10} {spread(run.seconds):>22} {spread(rates):>22} {made:>7}{ratios}")
    for other in [way for way in baselines if way != "ours"]:
        for way in ("ours", "early"):
            if way in runs:
                wall, cpu = (
                    _ratios(getattr(runs[other], kind), getattr(runs[way], kind)) for kind in ("seconds", "cpu")
                )
                met = "met" if statistics.median(wall) >= TARGET else "MISSED"
                print(f"{other} / {way}: wall {spread(wall)}, CPU time {spread(cpu)}; target >= {TARGET}: {met}")


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How many times as long `a` took as `b`, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def agreement(task: Task, runs: dict[str, Runs]) -> None:
    """How many replies are the same, and whether leaving early changed a verdict."""
    reference = runs["ours"].replies
    for way, run in runs.items():
        pairs = list(zip(run.replies, reference, strict=True))
        same = sum(a.tokens == b.tokens[: len(a.tokens)] if a.stopped else a.tokens == b.tokens for a, b in pairs)
        print(f"{way}: {same} of {len(pairs)} replies are those of ours (as far as they go)")
    if "early" in runs:
        whole, cut = (_refused(task, runs[way].replies) for way in ("ours", "early"))
        stopped = sum(reply.stopped for reply in runs["early"].replies)
        differ = sum(a != b for a, b in zip(whole, cut, strict=True))
        print(f"early: {stopped} replies left, {sum(whole)} refused; {differ} two-way verdicts differ")


def _refused(task: Task, replies: Sequence[Reply]) -> list[bool]:
    exchanges = [Exchange(prompt, reply.text) for prompt, reply in zip(task.texts, replies, strict=True)]
    return [verdict.refused for verdict in RuleJudge().judge(exchanges)]


def prepare(loaded: LoadedModel, count: int, rows: int | None) -> Task:
    """Prompts of all test sets, mixed."""
    sets = build_contrastive_set()
    texts = [*sets.harmful.test, *sets.harmless.test, *sets.borderline]
    random.Random(0).shuffle(texts)
    return Task(loaded, texts[:count], share_prefix(ChatRenderer(loaded.tokenizer).encode(texts[:count])), 0, rows)


def run(task: Task, ways: Sequence[str], rounds: int) -> None:
    """All rounds at one length, and what came of them."""
    print(f"\n{len(task.texts)} replies of at most {task.tokens} tokens")
    started = time.perf_counter()
    key = key_of(task.loaded, task.encoded, task.tokens)
    print(f"key, with every file hashed that was not before: {time.perf_counter() - started:.2f} s")
    keep(key, ours(task))  # also a first run, which pages in weights and sets up kernels
    runs = {way: Runs() for way in ways}
    order = list(ways)
    for number in range(rounds):
        for way in order:
            measure(task, way, runs[way])
        line = ", ".join(f"{way} {runs[way].seconds[-1]:.2f} s" for way in order)
        print(f"round {number + 1}: {line}; load {os.getloadavg()[0]:.1f}", flush=True)
        order = order[1:] + order[:1]
    report(task, runs)
    if "ours" in runs:
        agreement(task, runs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Making replies: ours, and the usual loop.")
    parser.add_argument("model", nargs="?", default=str(cache_folder() / "models" / DEMO), help="folder or .gguf")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 100], help="longest replies, one run for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batch-size", type=int, default=None, help="rows at once, for all ways; default: auto")
    parser.add_argument("--threads", type=int, default=None, help="of torch; 1 where other work shares the cores")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    loaded = load(locate(args.model, dtype=args.dtype), dtype=args.dtype, device=args.device)
    task = prepare(loaded, args.prompts, args.batch_size)
    lengths = sorted(map(len, task.whole.suffixes))
    print(f"{type(loaded.model).__name__}, {loaded.dtype}, {loaded.device}, {torch.get_num_threads()} threads")
    print(
        f"{len(lengths)} prompts of {lengths[0]}-{lengths[-1]} tokens (median {statistics.median(lengths):.0f}), "
        f"{len(task.encoded.prefix)} of them shared; {auto_batch_size(loaded.model, args.batch_size).rows} rows at once"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ABLITERATE_CACHE"] = folder  # replies of a benchmark are not kept
        for tokens in args.tokens:
            run(Task(loaded, task.texts, task.encoded, tokens, args.batch_size), args.ways, args.rounds)


if __name__ == "__main__":
    main()
