"""How much faster several processes are than one: the phases of a run whose prompts are divided among them.

Run ``python benchmarks/processes.py MODEL [--processes 1 2] [--rounds 3] [--prompts 64] [--tokens 32] [--steps 4]``.
Every round starts each number of processes once, the order turned each time, with one thread a process, over the
loopback. What is measured is what stands between barriers, in the slowest process: seconds by the clock, and seconds of
the processor, which other work on the machine moves less. Loading is not counted. Phases:

collect    activations of the training prompts of both classes, as moments
score      refusal score and KL of sixteen ablations in one pass, on validation prompts
replies    greedy replies to held-out prompts, of up to so many tokens
search     steps of the search by gradient (12 + 12 prompts each, forwards and backwards)

Efficiency is (time of one) / (n × time of n). Bytes are those that each process puts into sums over all.

``python benchmarks/processes.py --modelled`` measures nothing: it prints what a run on an 8B model would send, and what
that would take on 1, 8 and 64 GPUs under the assumptions of `Machine`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PHASES = ("collect", "score", "replies", "search")


@dataclass(frozen=True, slots=True)
class Machine:
    """What is assumed: tokens/s forwards of a GPU with an 8B model, seconds of a decoding step at any batch, rows of a
    batch; bytes/s and seconds a message between processes, within a machine of eight and beyond.
    """

    tokens: float = 20_000
    step: float = 0.025
    rows: int = 256
    near: tuple[float, float] = (2e9, 1e-4)
    far: tuple[float, float] = (1e9, 2e-4)

    def exchange(self, processes: int, size: float, times: int) -> float:
        """Seconds of `times` sums over all processes of `size` bytes together, round a ring."""
        speed, latency = self.near if processes <= 8 else self.far
        return 2 * (processes - 1) * (size / processes / speed + times * latency) if processes > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Of a run with the builtin prompts: prompts that are divided at a time, how often, tokens of each (backwards ones
    count twice more), decoding steps of a reply; bytes that a process puts into sums over all, and how many sums.
    """

    name: str
    prompts: int
    times: int
    tokens: float
    steps: int
    bytes: float
    sums: int

    def seconds(self, machine: Machine, processes: int) -> tuple[float, float]:
        """What is computed and what is exchanged, in the process that has most to do."""
        most = -(-self.prompts // processes)
        batches = -(-most // machine.rows)
        computed = self.times * (most * self.tokens / machine.tokens + batches * self.steps * machine.step)
        return computed, machine.exchange(processes, self.bytes, self.sums)


def phases(layers: int = 32, width: int = 4096, vocabulary: int = 128_256, positions: int = 5) -> list[Phase]:
    """The phases of a run on a model of these shapes; prompts have 40 tokens of their own."""
    sites = (layers + 1) * width
    moments, separation = 2 * 2 * positions * sites * 8, 80 * vocabulary * 4 + 160 * positions * (layers + 1) * 8
    return [
        Phase("collect activations", 640, 1, 40, 0, moments, 6),
        Phase("separate", 160, 1, 40, 0, separation, 8),
        Phase("select the start, 6 sites", 96, 4, 40, 0, 4 * 96 * 16, 12),
        Phase("search, 25 steps", 24, 25, 3 * 40, 0, 25 * 2 * sites * 4, 75),
        Phase("replies of 5 points, 32 tokens", 160, 5, 72, 32, 5 * 160 * 36 * 8, 20),
        Phase("replies before and after, 128 tokens", 300, 2, 168, 128, 2 * 300 * 132 * 8, 8),
    ]


def show_model(counts: Sequence[int]) -> None:
    """Bytes of every phase, and seconds computed + exchanged by number of processes."""
    machine = Machine()
    print(f"| phase | MB | {' | '.join(f'{count} GPUs, s' for count in counts)} |")
    print(f"| --- | ---: |{' ---: |' * len(counts)}")
    totals = dict.fromkeys(counts, 0.0)
    for phase in phases():
        cells = []
        for count in counts:
            computed, exchanged = phase.seconds(machine, count)
            totals[count] += computed + exchanged
            cells.append(f"{computed:.2f} + {exchanged:.3f}")
        print(f"| {phase.name} | {phase.bytes / 1e6:.2f} | {' | '.join(cells)} |")
    print(f"| together | | {' | '.join(f'{totals[count]:.1f}' for count in counts)} |")


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--modelled", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--phase-of", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase_of is not None:
        print(json.dumps(measured(given)), flush=True)
        return 0
    if given.modelled or given.model is None:
        show_model((1, 8, 64))
        return 0
    counts: list[int] = given.processes
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for turn in range(given.rounds):
        for count in counts[turn % len(counts) :] + counts[: turn % len(counts)]:
            found[count].append(world(count))
            print(f"round {turn + 1}, {count} processes: {found[count][-1]}", file=sys.stderr, flush=True)
    show(found)
    return 0


def world(count: int) -> dict[str, Any]:
    """The phases in so many processes: of each the slowest one's times, and the bytes that it puts in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        own = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        env = os.environ | {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": "1"} | loopback
        asked = [sys.executable, __file__, *sys.argv[1:], "--phase-of", str(count)]
        started.append(subprocess.Popen(asked, env=env, stdout=subprocess.PIPE, text=True))
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {
        phase: {name: max(result[phase][name] for result in results) for name in results[0][phase]} for phase in PHASES
    }


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """What this process measures of every phase."""
    import torch
    import torch.distributed as dist

    from abliterate import pipeline
    from abliterate.config import EditSettings, FindSettings, ModelSettings, PromptSettings
    from abliterate.edit.direction import Direction, Site
    from abliterate.evaluation.probe import Behaving, Probe
    from abliterate.finding.estimate import difference_of_means
    from abliterate.finding.find import _moments
    from abliterate.finding.search.gradient import descend, legs
    from abliterate.model.generation import complete
    from abliterate.monitor import ranks

    torch.set_num_threads(1)
    sent = [0]
    all_reduce = dist.all_reduce

    def counted(tensor: Any, *rest: Any, **named: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *rest, **named)

    with ranks.joined_processes():
        dist.all_reduce = counted
        asked = PromptSettings(limit=given.prompts)
        session = pipeline.open_session(given.model, loading=ModelSettings(device="cpu"), prompts=asked)
        tokens = list(range(100, 108))
        everything = FindSettings(all_prompts=True)
        moments = _moments(session, [], everything)
        candidates = difference_of_means(moments["harmful"], moments["harmless"])
        site = Site(session.anatomy.layers // 2, -1)
        start = Direction(torch.nn.functional.normalize(candidates.at(*site), dim=0)[None], candidates, site=site)
        plans = [session.plan(start)] * 16
        probe = Probe(session, tokens)
        probe.base  # noqa: B018 - the unedited model is measured once
        rows = Behaving(tuple(range(len(probe.harmful))), tuple(range(len(probe.harmless))), 0.0, 0.0)
        replying = session.encoded["harmful", "test"]
        work: dict[str, Callable[[], object]] = {
            "collect": lambda: _moments(session, [], everything),
            "score": lambda: probe.ablated(plans, rows),
            "replies": lambda: complete(session.model, session.loaded.tokenizer, replying, given.tokens, session.size),
            "search": lambda: descend(session, tokens, start, EditSettings(), legs(1, given.steps)),
        }
        return {phase: timed(work[phase], ranks.largest, sent) for phase in PHASES}


def timed(work: Callable[[], object], barrier: Callable[[int], int], sent: list[int]) -> dict[str, float]:
    """Seconds by the clock and of the processor, and bytes that were added up."""
    barrier(0)
    began, used, before = time.perf_counter(), time.process_time(), sent[0]
    work()
    found = {"bytes": sent[0] - before, "processor": time.process_time() - used}
    barrier(0)
    return {"seconds": time.perf_counter() - began, **found}


def show(found: dict[int, list[dict[str, Any]]]) -> None:
    """A row for each phase and number of processes: medians [least-most] over the rounds."""
    print("| phase | processes | seconds | efficiency | processor seconds of the slowest | efficiency | bytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    counts = sorted(found)
    for phase in PHASES:
        for count in counts:
            rounds = [one[phase] for one in found[count]]
            first = [one[phase] for one in found[counts[0]]]
            cells = []
            for name in ("seconds", "processor"):
                shares = [a[name] / (count * b[name]) for a, b in zip(first, rounds, strict=True)]
                cells += [spread([one[name] for one in rounds]), spread(shares) if count > 1 else ""]
            print(f"| {phase} | {count} | {' | '.join(cells)} | {rounds[0]['bytes']:,.0f} |")


def spread(values: list[float]) -> str:
    """Median [least-most]."""
    return f"{median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    sys.exit(main())
