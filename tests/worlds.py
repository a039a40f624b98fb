"""Several processes on this machine, over its loopback: started once, they do one job after the other.

`world` runs `JOBS` in so many processes, and tells what each gave and printed. `measured` is what one finds, too.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate import pipeline
from abliterate.config import EditSettings, FindSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Direction
from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.capability.choosing import by_letter, by_text
from abliterate.evaluation.capability.tasks import Choice
from abliterate.evaluation.probe import Level, Probe
from abliterate.finding.search.gradient import descend, legs
from abliterate.finding.subspaces import Samples
from abliterate.model.batches import BatchSize, in_batches
from abliterate.model.generation import complete
from abliterate.monitor import ranks

#: Models that are measured in several processes, by family.
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_neox", "mixtral")
#: Those of which each process gets a part, by the number of processes.
DIVIDED = {2: ("llama", "qwen3", "gemma2", "mixtral"), 4: ("llama",)}


@dataclass(frozen=True, slots=True)
class Ended:
    """How one process of a world ended: its exit code, what it printed, and the JSON that it left, None without."""

    code: int
    out: str
    err: str
    result: Any


def world(count: int, jobs: str, folder: Path, limit: float = 240) -> dict[str, list[Ended]]:
    """Run jobs, separated by commas, in so many processes each, and how these ended; they have a time limit."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, str(count), jobs, str(folder)], check=True, timeout=limit)
    return {job: [_ended(folder / job, rank) for rank in range(count)] for job in jobs.split(",")}


def _ended(folder: Path, rank: int) -> Ended:
    texts = [(folder / f"{rank}.{kind}").read_text(encoding="utf-8") for kind in ("code", "out", "err")]
    path = folder / f"{rank}.json"
    return Ended(int(texts[0]), texts[1], texts[2], json.loads(path.read_text()) if path.exists() else None)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(count: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes that it starts, beside their rank."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        **({} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}),
    }


def asked(folder: Path) -> PromptSettings:
    files = {name: str(folder / f"{name}.jsonl") for name in ("harmful", "harmless", "borderline")}
    return PromptSettings(limit=10, **files)


def measured(model: Path, prompts: Path, parallel: str = "data") -> dict[str, Any]:
    """Directions, selection, the front of a search by gradient, replies and answers to questions of one model."""
    loading = ModelSettings(device="cpu", dtype="float32", batch_size="8", parallel=parallel)
    session = pipeline.open_session(str(model), loading=loading, prompts=asked(prompts), positions=1)
    settings = FindSettings(all_prompts=True, refusal_tokens="a,I", min_refusal_rate=0)
    findings = pipeline.find(session, settings)
    found = pipeline.choose(session, findings, settings, force=True)
    front = descend(session, findings.ids, found.direction, EditSettings(), legs(2, 3, weights=(0.5, 8.0)))
    test = session.encoded["harmful", "test"]
    kept = Samples(2, -1)
    session.stream(test, kept.update, lambda _: None, into=[kept])
    plan = session.plan(front[-1])
    with session.ablated(plan):
        replies = complete(session.model, session.loaded.tokenizer, test, 6, session.size)
    items = [Choice(f"Which is it, {word}?", ("one thing", "another"), 0) for word in ("red", "green", "a long blue")]
    ways = (by_letter, by_text)
    score = found.selection.candidates
    return {
        "raw": findings.candidates.raw.tolist(),
        "auroc": findings.separation.auroc.tolist(),
        "trained on": dict(findings.trained_on),
        "selection": [[one.layer, one.position, one.bypass, one.induce, one.kl, one.prompts] for one in score],
        "front": [_told(one) for one in front],
        "samples": kept.result().tolist(),
        "replies": [[list(reply.tokens), reply.ended] for reply in replies],
        "edited": Probe(session, findings.ids).measure(plan, Level.ALL).kl.tolist(),
        "questions": [way(session.model, session.renderer, items, session.size, None) for way in ways],
    }


def _told(direction: Direction) -> list[Any]:
    """Strengths by writer, and the directions of every site or writer."""
    assert direction.recipe is not None
    own, vectors = direction.per_writer, direction.per_site
    if own is not None:
        vectors = torch.stack([own.basis, own.reader])
    assert vectors is not None
    return [dict(direction.recipe.strengths), vectors.tolist()]


def _families(folder: Path) -> dict[str, Any]:
    """What several processes measure that divide prompts, and then those that divide models."""
    found = {name: measured(folder.parent.parent / name, folder.parent.parent) for name in FAMILIES}
    divided = {
        name: measured(folder.parent.parent / name, folder.parent.parent, "tensor") for name in DIVIDED[ranks.count()]
    }
    return {"data": found, "tensor": divided}


def _exchanges(_: Path) -> dict[str, Any]:
    """What goes from one process to another, and what becomes of errors in passes."""
    mine, rank = torch.distributed.get_rank() if ranks.count() > 1 else 0, int(os.environ["RANK"])
    assert mine == rank
    led = torch.full((2,), float(rank), dtype=torch.bfloat16)
    ranks.led(led)
    return {
        "summed": [
            ranks.summed(torch.full((2,), rank + 1, dtype=dtype)).tolist()
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64)
        ],
        "joined": ranks.joined(torch.full((rank, 3), float(rank))).tolist(),
        "agreed": ranks.agreed({"rank": rank, "text": "é" * rank}),
        "nothing": ranks.agreed("" if rank == 0 else "x"),
        "limits": [ranks.largest(rank), ranks.least(rank)],
        "led": led.tolist(),
        "errors": [_error(error) for error in (UsageError("no: do so"), ValueError("odd"), None)],
        "memory": _out_of_memory(rank),
        "nested": _nested(),
    }


def _error(error: Exception | None) -> str:
    """What is raised in this process of a pass that fails in the second one."""

    def work(rows: list[int]) -> None:
        if error is not None and 1 in rows:
            raise error

    try:
        in_batches([1] * 6, BatchSize(8), work, into=[])
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def _out_of_memory(rank: int) -> list[Any]:
    """What a pass finds, and the batch size after it, where memory runs out in the second process alone."""
    found, size = torch.zeros(12), BatchSize(6, 60)

    def work(rows: list[int]) -> None:
        if rank == 1 and len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        found[rows] = torch.tensor(rows, dtype=torch.float32)

    steps: list[int] = []
    in_batches([3] * 12, size, work, into=[found], done=steps.append)
    return [found.tolist(), size.rows, sum(steps)]


def _nested() -> list[float]:
    """A pass within a pass is each process's own."""
    outer = torch.zeros(4)

    def work(rows: list[int]) -> None:
        inner = torch.zeros(3)

        def fill(some: list[int]) -> None:
            inner[some] = 1.0

        in_batches([1] * 3, BatchSize(8), fill, into=[inner])
        outer[rows] = inner.sum()

    in_batches([1] * 4, BatchSize(8), work, into=[outer])
    return outer.tolist()


def _fails(number: int, how: Callable[[], object]) -> Callable[[Path], Any]:
    """A command that ends in the process of a number, while the others wait for it."""

    def job(_: Path) -> Any:
        from abliterate.cli import app

        def command(**_: Any) -> int:
            if int(os.environ["RANK"]) == number:
                how()
            ranks.summed(torch.ones(1))
            return 0

        app.app = command  # type: ignore[assignment]
        sys.argv = ["abliterate", "find", "MODEL"]
        app.main()

    return job


def _raise(error: Exception) -> None:
    raise error


JOBS: dict[str, Callable[[Path], Any]] = {
    "families": _families,
    "exchanges": _exchanges,
    "follower": _fails(1, lambda: _raise(UsageError("--device moon: not usable; give --device auto"))),
    "leader": _fails(0, lambda: _raise(AbliterateError("disk full"))),
    "fault": _fails(1, lambda: _raise(ZeroDivisionError("a fault of ours"))),
    "killed": _fails(1, lambda: os.kill(os.getpid(), 9)),
}
#: Jobs that are whole programs, which join by themselves.
PROGRAMS = ("follower", "leader", "fault", "killed")


def _start(rank: int, count: int, port: int, job: str, folder: Path) -> None:
    os.environ |= environment(count, port) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job in PROGRAMS:
        JOBS[job](folder)
        return
    with ranks.joined_processes():
        result = JOBS[job](folder)
    (folder / f"{rank}.json").write_text(json.dumps(result))


def _imported() -> None:
    """What processes that are forked from this one would import, each for itself."""
    for name in ("torch.distributed.tensor", "transformers.distributed.tensor_parallel", "transformers.generation"):
        importlib.import_module(name)
    for name in FAMILIES:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _world(count: int, job: str, folder: Path, limit: float) -> None:
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    port = free_port()
    started = [context.Process(target=_start, args=(rank, count, port, job, folder)) for rank in range(count)]
    for process in started:
        process.start()
    until = time.monotonic() + limit
    for rank, process in enumerate(started):
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        (folder / f"{rank}.code").write_text(str(process.exitcode))


def main(arguments: Sequence[str]) -> None:
    count, jobs, folder = int(arguments[0]), arguments[1].split(","), Path(arguments[2])
    if "families" in jobs:
        _imported()
    for job in jobs:
        own = folder / job
        own.mkdir(parents=True, exist_ok=True)
        _world(count, job, own, 30 if job in PROGRAMS else 200)


if __name__ == "__main__":
    main(sys.argv[1:])
