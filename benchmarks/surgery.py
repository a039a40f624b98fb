"""How fast a checkpoint is edited, and with how much memory: streaming surgery against copying the folder.

Run ``python benchmarks/surgery.py [--gb 1 4] [--rounds N] [--dir FOLDER]``. For each size a sharded bfloat16 checkpoint
of a Llama is made up in FOLDER (untied, so that its embedding is edited too), and these take turns on it (`--ways`):

copy     `cp -r`, then fsync of every file and folder of the copy. Whoever writes the model anew cannot do less.
bytes    `checkpoint.write_edited` with the same tensors handed on as they are, in the same blocks: surgery without
         its arithmetic. Source and copy are hashed, as in surgery.
surgery  `surgery.edit_checkpoint` in a fresh process that imports no more than it needs, from reading the headers to
         the last fsync, with what undo needs. The time of the whole process, with its start and imports, is given
         beside it. `bare` is the same without undo.
apply    the whole command `abliterate apply`: start, imports, proof of the anatomy, surgery, record, rename.

The time of each is divided by the copy's in the same round. Peak memory is the kernel's high-water mark of resident
pages of the process. After the last round every byte outside the planned tensors is compared with the source, in what
both ways wrote, and what is left of the direction is computed anew from the files. Everything made is removed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# No torch here: the peak of a child process is counted from its parent's at the time of the fork.
from abliterate.files.checkpoint import open_checkpoint

D_MODEL, D_MLP, D_KV, HEADS, VOCABULARY = 2048, 8192, 512, 32, 32000
SHARD_BYTES = 10**9
POOL_BYTES = 64 << 20
TARGET_RATIO, TARGET_PEAK = 1.5, 700e6

BLOCK = {
    "input_layernorm.weight": (D_MODEL,),
    "self_attn.q_proj.weight": (D_MODEL, D_MODEL),
    "self_attn.k_proj.weight": (D_KV, D_MODEL),
    "self_attn.v_proj.weight": (D_KV, D_MODEL),
    "self_attn.o_proj.weight": (D_MODEL, D_MODEL),
    "post_attention_layernorm.weight": (D_MODEL,),
    "mlp.gate_proj.weight": (D_MLP, D_MODEL),
    "mlp.up_proj.weight": (D_MLP, D_MODEL),
    "mlp.down_proj.weight": (D_MODEL, D_MLP),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
BLOCK_BYTES = 512 << 10
WAYS = ("copy", "bytes", "surgery", "bare", "apply")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """All tensors of the model, in order."""
    outside = {"model.embed_tokens.weight": (VOCABULARY, D_MODEL), "lm_head.weight": (VOCABULARY, D_MODEL)}
    blocks = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in BLOCK.items()}
    return outside | blocks | {"model.norm.weight": (D_MODEL,)}


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def layers_for(total: float) -> int:
    """How many blocks make a checkpoint of about `total` bytes."""
    block = sum(map(nbytes, BLOCK.values()))
    rest = sum(map(nbytes, shapes(0).values()))
    return max(1, round((total - rest) / block))


# ------------------------------------------------------------------------------------------- in a child process


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint and a random direction. Tensors are stretches of one pool of normal numbers."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(POOL_BYTES // 2, generator=generator)).bfloat16().view(torch.uint8).numpy().data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes(layers).items():
        if filled + nbytes(shape) > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes(shape)
    weight_map: dict[str, str] = {}
    start = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes(shape)]}
            end += nbytes(shape)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            left = end
            while left:
                count = out.write(pool[start : start + min(left, 8 << 20)])
                left -= count
                start = (start + count + 2 * 4099) % (POOL_BYTES - (8 << 20))  # no two tensors alike
    index = {"metadata": {"total_size": sum(map(nbytes, shapes(layers).values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": D_KV * HEADS // D_MODEL,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({"basis": torch.randn(1, D_MODEL, generator=generator)}, folder.parent / "direction.safetensors")


def edit(source: Path, target: Path, direction: Path, *, keep_undo: bool) -> dict[str, float]:
    """Streaming surgery alone, with the anatomy of a Llama written down."""
    from abliterate.edit.direction import load_direction
    from abliterate.edit.plan import make_plan
    from abliterate.edit.weights import edit_checkpoint, planned_parameters
    from abliterate.model.anatomy import Anatomy, Kind, Stored, Writer
    from abliterate.monitor import peak_memory

    layers = sum(name.endswith("o_proj.weight") for name in open_checkpoint(source).tensors)
    blocks = tuple(f"model.layers.{i}" for i in range(layers))
    kinds = dict(zip(WRITERS, (Kind.ATTENTION, Kind.MLP), strict=True))
    writers = [Writer("model.embed_tokens", Kind.EMBEDDING, None, "model.embed_tokens.weight", 1, None)]
    writers += [
        Writer(f"{block}.{name}", kind, i, f"{block}.{name}.weight", 0, None)
        for i, block in enumerate(blocks)
        for name, kind in kinds.items()
    ]
    plan = make_plan(Anatomy(D_MODEL, blocks, tuple(writers), (0.0,)), load_direction(direction).basis)
    names = {name: (Stored(name, name, axis),) for name, axis in planned_parameters(plan).items()}
    target.mkdir()
    imported = peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    surgery = edit_checkpoint(open_checkpoint(source), target, plan, names, keep_undo=keep_undo)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    ratio = max(residual.ratio for residual in surgery.residuals)
    return {"seconds": seconds, "cpu": cpu, "imported": imported, "peak": peak_memory(), "ratio": ratio}


def hand_on(source: Path, target: Path) -> dict[str, float]:
    """What surgery does, without the arithmetic: planned tensors are read in blocks and written as they are."""
    from abliterate.files.checkpoint import TensorReader, write_edited
    from abliterate.monitor import peak_memory

    def rewrite(reader: TensorReader) -> Iterator[bytearray]:
        size = reader.info.nbytes
        for start in range(0, size, BLOCK_BYTES):
            yield reader.read(start, min(BLOCK_BYTES, size - start))

    target.mkdir()
    imported = peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    checkpoint = open_checkpoint(source)
    write_edited(checkpoint, target, {name: rewrite for name in checkpoint.tensors if is_planned(name)})
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "imported": imported, "peak": peak_memory()}


def is_planned(name: str) -> bool:
    return name == "model.embed_tokens.weight" or name.removesuffix(".weight").endswith(WRITERS)


def verify(source: Path, target: Path, direction: Path) -> dict[str, float]:
    """Compare all bytes outside the planned tensors, and measure anew what is left in the planned ones."""
    import torch

    from abliterate.edit.direction import load_direction

    basis = load_direction(direction).basis
    before, after = open_checkpoint(source), open_checkpoint(target)
    same = worst = edited = 0.0
    for shard in before.shards:
        other = target / shard.path.name
        with shard.path.open("rb") as a, other.open("rb") as b:
            if a.read(shard.header_bytes) != b.read(shard.header_bytes):
                sys.exit(f"{other}: header differs")
            for name, info in shard.tensors.items():
                left, right = bytearray(a.read(info.nbytes)), bytearray(b.read(info.nbytes))
                if not is_planned(name):
                    if left != right:
                        sys.exit(f"{other}: {name} is not in the plan and differs")
                    same += info.nbytes
                    continue
                old, new = (
                    torch.frombuffer(x, dtype=torch.bfloat16).reshape(info.shape).float() for x in (left, right)
                )
                if name.startswith("model.embed"):
                    old, new = old.T, new.T
                worst = max(worst, float((basis @ new).norm() / (basis @ old).norm()))
                edited += info.nbytes
    missing = {p.name for p in source.iterdir()} - {p.name for p in target.iterdir()}
    if missing or before.tensors.keys() != after.tensors.keys():
        sys.exit(f"{target}: missing {sorted(missing)}")
    return {"same": same, "edited": edited, "worst": worst}


# --------------------------------------------------------------------------------------------- in this process


@dataclass(slots=True)
class Runs:
    """One way: wall seconds of what is compared, of the whole process, its CPU seconds and peak memory, by round."""

    seconds: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    imported: float = 0.0
    phases: dict[str, Any] = field(default_factory=dict)


def child(arguments: list[str], log: Path) -> tuple[float, float]:
    """Run a process to its end; its wall seconds and its peak of resident bytes."""
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own(work: Path, *arguments: str | Path) -> tuple[dict[str, float], float, float]:
    """One of this file's steps in a fresh process: what it says, its wall seconds, its peak."""
    log = work / "log"
    seconds, peak = child([sys.executable, __file__, "--step", *map(str, arguments)], log)
    said: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return said, seconds, peak


def flush(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in (*names, "."):
            fd = os.open(os.path.join(place, name), os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def clear(target: Path) -> Path:
    """Remove what the last round left, and let the disk come to rest: freeing blocks costs time at the next flush."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    return target


def copy_run(work: Path, runs: Runs) -> None:
    target = work / "copy"
    started = time.perf_counter()
    subprocess.run(["cp", "-r", work / "model", target], check=True)
    flush(target)
    runs.seconds.append(time.perf_counter() - started)
    runs.process.append(runs.seconds[-1])
    runs.peak.append(0.0)


def own_run(work: Path, runs: Runs, way: str) -> None:
    said, seconds, peak = own(work, way, work / "model", work / way, work / "direction.safetensors")
    runs.seconds.append(said["seconds"])
    runs.process.append(seconds)
    runs.cpu.append(said["cpu"])
    runs.peak.append(max(peak, said["peak"]))
    runs.imported = said["imported"]


def apply_run(work: Path, runs: Runs) -> None:
    target = work / "apply"
    command = [sys.executable, "-m", "abliterate", "apply", str(work / "model"), "-o", str(target), "--quiet"]
    seconds, peak = child([*command, "--direction", str(work / "direction.safetensors")], work / "log")
    runs.seconds.append(seconds)
    runs.process.append(seconds)
    runs.peak.append(peak)
    record: dict[str, Any] = json.loads((target / "abliteration.json").read_text())
    runs.phases = record["timings_s"]


def run(work: Path, way: str, runs: Runs) -> None:
    """One run, after what the runs before left is removed."""
    for other in WAYS:
        clear(work / other)
    if way == "copy":
        copy_run(work, runs)
    elif way == "apply":
        apply_run(work, runs)
    else:
        own_run(work, runs, way)


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def benchmark(work: Path, gigabytes: float, rounds: int, ways: list[str]) -> None:
    layers = layers_for(gigabytes * 1e9)
    (work / "model").mkdir()
    own(work, "make", work / "model", str(layers))
    flush(work / "model")
    size = sum(path.stat().st_size for path in (work / "model").iterdir())
    shards = len(open_checkpoint(work / "model").shards)
    print(f"{size / 1e9:.2f} GB in {shards} shards, {layers} blocks", flush=True)
    runs = {way: Runs() for way in ways}
    checks: dict[str, dict[str, float]] = {}
    for way in ways:  # a first run fills the page cache
        run(work, way, Runs())
    for number in range(rounds):
        first = number % len(ways)
        order = [*ways[first:], *ways[:first]]
        for way in order:
            run(work, way, runs[way])
            if number == rounds - 1 and way in ("surgery", "bare", "apply"):
                checks[way] = own(work, "verify", work / "model", work / way, work / "direction.safetensors")[0]
        times = ", ".join(f"{way} {runs[way].seconds[-1]:.2f} s" for way in order)
        print(f"  round {number + 1}: {times}", flush=True)
    report(runs, work, size, checks)


def planned_bytes(work: Path) -> tuple[int, int]:
    """Bytes of the tensors that are edited, and of those among them that are read twice: R W needs all rows."""
    tensors = [info for info in open_checkpoint(work / "model").tensors.values() if is_planned(info.name)]
    edited = sum(info.nbytes for info in tensors)
    return edited, edited - nbytes((VOCABULARY, D_MODEL))


def report(runs: dict[str, Runs], work: Path, size: int, checks: dict[str, dict[str, float]]) -> None:
    edited, again = planned_bytes(work)
    part = f"{edited / 1e9:.2f} GB of it edited, {again / 1e9:.2f} GB read twice"
    print(f"  bytes: {size / 1e9:.2f} GB to read and to write, {part}")
    for way, found in runs.items():
        median = statistics.median(found.seconds)
        moved = 2.0 * size + (again if way not in ("copy", "bytes") else 0)
        line = f"  {way:<8} {spread(found.seconds)} s, {moved / 1e9:.2f} GB moved, {moved / median / 1e9:.2f} GB/s"
        if way != "copy" and "copy" in runs:
            ratio = [a / b for a, b in zip(found.seconds, runs["copy"].seconds, strict=True)]
            line += f", {spread(ratio)} x copy"
            if way == "surgery":
                met = statistics.median(ratio) <= TARGET_RATIO
                line += f" (target: at most {TARGET_RATIO:g}, {'met' if met else 'MISSED'})"
        if way != "copy":
            line += f", peak {max(found.peak) / 1e6:.0f} MB"
            if found.imported:
                line += f" ({found.imported / 1e6:.0f} MB after imports), {spread(found.cpu)} s of CPU"
                line += f", whole process {spread(found.process)} s"
            if max(found.peak) >= TARGET_PEAK:
                line += f"; target below {TARGET_PEAK / 1e6:.0f} MB MISSED"
        print(line)
        if found.phases:
            print(f"           phases {found.phases}")
    for way, check in checks.items():
        print(
            f"  {way}: {check['same'] / 1e9:.2f} GB outside the plan byte-identical, headers too; at most "
            f"{check['worst']:.1e} of the direction left in an edited tensor"
        )
    print(flush=True)


STEPS: dict[str, Callable[..., dict[str, float] | None]] = {
    "make": lambda folder, layers: make(Path(folder), int(layers)),
    "bytes": lambda source, target, _: hand_on(Path(source), Path(target)),
    "surgery": lambda *paths: edit(*map(Path, paths), keep_undo=True),
    "bare": lambda *paths: edit(*map(Path, paths), keep_undo=False),
    "verify": lambda *paths: verify(*map(Path, paths)),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Streaming surgery against copying the folder.")
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0, 4.0], help="sizes of checkpoints (default 1 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to work; default: the system's folder for temporary files"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(STEPS[args.step[0]](*args.step[1:]) or {}))
        return
    for gigabytes in args.gb:
        place = args.dir or Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        needed, free = 2.2 * gigabytes * 1e9 + 1e9, shutil.disk_usage(place).free
        if free < needed:
            sys.exit(f"{place}: {needed / 1e9:.0f} GB needed for --gb {gigabytes:g}, {free / 1e9:.0f} GB free")
        with tempfile.TemporaryDirectory(prefix="abliterate-surgery-", dir=place) as work:
            benchmark(Path(work), gigabytes, args.rounds, args.ways)


if __name__ == "__main__":
    main()
