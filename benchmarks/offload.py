"""What a model larger than memory costs: `find`, `verify` and `apply` on a made-up checkpoint that stays on disk.

Run ``python benchmarks/offload.py [--gigabytes 30] [--dir FOLDER]``. A Llama with random bfloat16 weights is written
tensor by tensor into a temporary folder, with the tokenizer of the tests' tiny model, and removed at the end. Each
command runs in a process of its own with ``--max-memory cpu=… --offload FOLDER``; what is measured:

memory     the most that was resident in the process (VmHWM), and the most of it that no file stands behind (RssAnon).
           Pages of weights that are mapped from files count in the first and not in the second: the system takes
           them back when it likes.
fetched    bytes of weights that accelerate reads, counted where it does: passes × size.
reading    what as many bytes take to be read from the same files and nothing else, with nothing of them in memory.
computing  what the same tokens take in one block whose weights are in memory, times blocks and passes.

A narrow twin with four blocks is measured in memory and from disk in float32, and what `find` finds is
compared. A random model does not refuse: refusal tokens are given, and all prompts are used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted

KEYS, HEAD, ROWS = 8, 128, 32000


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama: its blocks, its stream, and what is inside its MLPs."""

    blocks: int
    width: int = 4096
    inner: int = 14336

    @property
    def block(self) -> int:
        """Bytes of one block."""
        return 2 * self.width * (2 * self.width + 2 * KEYS * HEAD + 3 * self.inner + 2)


TWIN = Shape(4, 1024, 3584)
SHARD = 2 * 10**9
TARGETS = {"memory": 6e9, "time": 1.5}


def main() -> None:
    """Make the models, run the commands, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=30)
    parser.add_argument("--prompts", type=int, default=64, help="of each class and split")
    parser.add_argument("--max-depth", type=float, default=0.1, help="sites that are scored, as a share of the depth")
    parser.add_argument("--memory", default="1GiB", help="of weights that stay in memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        _child(args.child)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="abliterate-offload-", dir=args.dir) as place:
        folder = Path(place)
        _twin(folder, args)
        _large(folder, args)


# --- checkpoints


def make(folder: Path, shape: Shape) -> int:
    """Write a Llama with random weights, one tensor in memory at a time; returns its bytes."""
    tokenizer = planted.tokenizer()
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": ROWS,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.width // HEAD,
        "num_key_value_heads": KEYS,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, sizes in _shapes(shape):
        if 2 * sum(_count(other) for _, other in shards[-1]) > SHARD:
            shards.append([])
        shards[-1].append((name, sizes))
    generator, total = torch.Generator().manual_seed(0), 0
    noise = torch.randn(10**7, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write(folder / file, tensors, noise, generator)
        index |= {name: file for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def _shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    kv, width, inner = KEYS * HEAD, shape.width, shape.inner
    yield "model.embed_tokens.weight", (ROWS, width)
    for block in range(shape.blocks):
        at = f"model.layers.{block}."
        yield at + "input_layernorm.weight", (width,)
        yield at + "self_attn.q_proj.weight", (width, width)
        yield at + "self_attn.k_proj.weight", (kv, width)
        yield at + "self_attn.v_proj.weight", (kv, width)
        yield at + "self_attn.o_proj.weight", (width, width)
        yield at + "post_attention_layernorm.weight", (width,)
        yield at + "mlp.gate_proj.weight", (inner, width)
        yield at + "mlp.up_proj.weight", (inner, width)
        yield at + "mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (ROWS, width)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _write(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: torch.Tensor, generator: torch.Generator
) -> int:
    """One shard. Numbers are slices of one list of normal ones from random places, scaled: drawing takes longer."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in tensors:
            if len(shape) == 1:
                numbers = torch.ones(shape, dtype=torch.bfloat16)
            else:
                spread = 1.0 if "embed" in name else 0.6 * shape[1] ** -0.5
                numbers = torch.empty(_count(shape), dtype=torch.bfloat16)
                done = 0
                while done < len(numbers):
                    offset = int(torch.randint(0, len(noise) // 2, (1,), generator=generator))
                    part = noise[offset:][: len(numbers) - done]
                    torch.mul(part, spread, out=numbers[done : done + len(part)])
                    done += len(part)
            file.write(numbers.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return end


def prompts(folder: Path, count: int) -> list[str]:
    """Files of prompts of two words, as many as the three splits need; options that name them."""
    both = []
    for name, words in (("harmful", planted.BAD), ("harmless", planted.GOOD)):
        texts = [f"{first} {word}" for first in (*planted.NEUTRAL, *planted.ANSWER, *words) for word in words]
        planted.write_jsonl(folder / f"{name}.jsonl", texts[: 13 * count // 2])
        both += [f"--{name}", str(folder / f"{name}.jsonl")]
    return [*both, "--limit", str(count), "--chat-template", "none"]


# --- runs


def _twin(folder: Path, args: argparse.Namespace) -> None:
    """Four blocks in memory and from disk: `find` must find the same."""
    from abliterate.edit.direction import load_direction

    make(folder / "twin", TWIN)
    found = {}
    for name, more in (("memory", []), ("disk", _offloading(folder, "100MiB"))):
        out = folder / f"twin-{name}.safetensors"
        run = _run([*_find(folder, "twin", out, args, 1.0), "--dtype", "float32", *more])
        candidates = load_direction(out).candidates
        assert candidates is not None
        found[name] = candidates.raw, run
    ours, theirs = (found[name][0] for name in ("disk", "memory"))
    error = float((ours - theirs).norm() / theirs.norm())
    scores = [json.loads(found[name][1]["stdout"])["selection"]["candidates"] for name in ("disk", "memory")]
    by_site = [{(s["layer"], s["position"]): s for s in some} for some in scores]
    same = by_site[0].keys() & by_site[1].keys()
    worst = {
        key: max(abs(by_site[0][site][key] - by_site[1][site][key]) for site in same)
        for key in ("bypass", "induce", "kl")
    }
    print(f"twin of {TWIN.blocks} blocks, {TWIN.width} wide, in float32, from disk beside in memory:")
    print(f"  directions differ by {error:.1e} (relative),", end="")
    print(f"  scores of {len(same)} sites by at most {worst}", flush=True)


def _large(folder: Path, args: argparse.Namespace) -> None:
    one = Shape(1)
    blocks = max(2, round((args.gigabytes * 1e9 - 4 * ROWS * one.width) / one.block))
    started = time.perf_counter()
    size = make(folder / "model", Shape(blocks))
    print(f"model: {blocks} blocks, {size / 1e9:.1f} GB, written in {time.perf_counter() - started:.0f} s", flush=True)
    speed = _reading(folder / "model")
    print(f"reading all of it: {size / speed:.1f} s, {speed / 1e9:.2f} GB/s", flush=True)
    more = _offloading(folder, args.memory)
    out = folder / "direction.safetensors"
    commands = {
        "find": [*_find(folder, "model", out, args, args.max_depth), *more],
        "verify": ["verify", *_edit(folder, out), *_asking(folder, args), *more, "--max-new-tokens", "1", "--no-cache"],
        "apply": ["apply", *_edit(folder, out), "--out", str(folder / "edited")],
    }
    for name, command in commands.items():
        measured = _run(command)
        _show(name, measured, speed, size, blocks, args.prompts)


def _edit(folder: Path, direction: Path) -> list[str]:
    return [str(folder / "model"), "--direction", str(direction)]


def _offloading(folder: Path, memory: str) -> list[str]:
    return ["--device", "cpu", "--max-memory", f"cpu={memory}", "--offload", str(folder / "offload")]


def _asking(folder: Path, args: argparse.Namespace) -> list[str]:
    return [*prompts(folder, args.prompts), "--refusal-tokens", "I", "--all-prompts"]


def _find(folder: Path, model: str, out: Path, args: argparse.Namespace, depth: float) -> list[str]:
    sites = ["--positions", "1", "--max-depth", str(depth)]
    return ["find", str(folder / model), "-o", str(out), *_asking(folder, args), *sites, "--force", "--json"]


def _run(command: list[str]) -> dict[str, Any]:
    """One command in its own process: seconds, memory, and what it printed and fetched."""
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", told.name, *command], stdout=subprocess.PIPE, text=True
        )
        anonymous = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, anonymous), daemon=True)
        watcher.start()
        stdout, _ = process.communicate()
        seconds = time.perf_counter() - started
        if process.returncode not in (0, 3):  # 3: not verified
            sys.exit(f"{command[0]} ended with {process.returncode}")
        counted: dict[str, Any] = json.load(told)
        return {"seconds": seconds, "anonymous": anonymous[0], "stdout": stdout} | counted


def _watch(pid: int, most: list[int]) -> None:
    with contextlib.suppress(OSError, StopIteration):
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            most[0] = max(most[0], 1024 * int(next(x for x in lines if x.startswith("RssAnon")).split()[1]))
            time.sleep(0.02)


def _child(arguments: list[str]) -> None:
    """Run a command here, counting what is fetched."""
    import accelerate.utils.offload  # type: ignore[import-untyped]

    from abliterate.cli import main as abliterate
    from abliterate.monitor import Monitor

    told, *command = arguments
    counts: dict[str, Any] = {"fetched": 0, "phases": {}}
    loader = accelerate.utils.offload.OffloadedWeightsLoader
    original = loader.__getitem__

    def counted(self: Any, key: str) -> torch.Tensor:
        found: torch.Tensor = original(self, key)
        counts["fetched"] += found.numel() * 2  # as stored
        return found

    loader.__getitem__ = counted
    phase = Monitor.phase

    @contextlib.contextmanager
    def noted(self: Monitor, name: str, total: int | None = None) -> Iterator[Any]:
        before, started = counts["fetched"], time.perf_counter()
        with phase(self, name, total) as advance:
            yield advance
        work = self.work_by_phase.get(name)
        tokens = 0 if work is None else work.forward
        counts["phases"][name] = round(time.perf_counter() - started, 1), counts["fetched"] - before, tokens

    Monitor.phase = noted  # type: ignore[method-assign]
    sys.argv = ["abliterate", *command]
    try:
        abliterate()
    finally:
        lines = Path("/proc/self/status").read_text().splitlines()
        counts["resident"] = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        Path(told).write_text(json.dumps(counts))


def _show(name: str, measured: dict[str, Any], speed: float, size: int, blocks: int, prompts: int) -> None:
    seconds, fetched = measured["seconds"], measured["fetched"]
    memory = max(measured["resident"], measured["anonymous"])
    print(f"{name}: {seconds:.0f} s; memory {measured['anonymous'] / 1e9:.2f} GB anonymous, ", end="")
    print(f"{memory / 1e9:.2f} GB resident (target < {TARGETS['memory'] / 1e9:.0f})", flush=True)
    if fetched:
        reading = fetched / speed
        tokens = sum(work for *_, work in measured["phases"].values()) / blocks
        computing = tokens * _seconds_per_token(4 * prompts) * blocks
        print(
            f"  fetched {fetched / 1e9:.0f} GB ({fetched / size:.1f} passes): reading takes {reading:.0f} s, ", end=""
        )
        print(f"computing {tokens:.0f} tokens {computing:.0f} s; time / reading {seconds / reading:.2f} ", end="")
        print(f"(target <= {TARGETS['time']}), time / both {seconds / (reading + computing):.2f}")
    for phase, (spent, fetched, work) in measured["phases"].items():
        print(f"    {phase}: {spent} s, {fetched / size:.1f} passes, {work / blocks:.0f} tokens", flush=True)


def _seconds_per_token(tokens: int) -> float:
    """Of one block whose weights are in memory, for a batch of so many tokens; the least of five."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = Shape(1)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.width // HEAD,
        num_key_value_heads=KEYS,
    )
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    stream = torch.randn(tokens // 2, 2, shape.width).to(torch.bfloat16)
    positions = LlamaRotaryEmbedding(config)(stream, torch.arange(2)[None])
    spent = []
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            block(stream, position_embeddings=positions)
            spent.append(time.perf_counter() - started)
    return min(spent) / tokens


def _reading(folder: Path) -> float:
    """Bytes a second of reading all files of a folder, none of which is in memory."""
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(16 << 20)
    started, total = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
