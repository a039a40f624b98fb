"""What other processes on the same cores cost: torch's threads wait for each other by spinning, or asleep.

Run ``python benchmarks/contention.py [--turns N] [--policy NAME=VALUE,...]``. A chain of the demo model's MLP
products (bfloat16, 64 tokens, 24 blocks) is timed in a process of its own with a thread for each core, in five
situations: alone; beside a busy process; beside another torch process with as many threads, which spins; beside both;
beside that and as many busy ones as make five busy threads. Policies are environments of the measured process,
"default" (nothing set) first; 3000 is what abliterate sets. Situations and policies take turns, so that a ratio
compares what ran in the same minute; shown are the medians over turns, in seconds and in fair shares.

The fair share is what a scheduler that treats threads alike would give: of c cores with k other busy threads, the c
threads of the chain get c / (c + k) of the machine, and need (c + k) / c of the time they need alone. "Alone" is the
least of all times alone. The load of the machine before the first turn is printed: on a machine that others use all
times are theirs, too. Where Linux allows it (root, autogroups), all that is started here is one group of raised
priority: then what runs elsewhere hardly matters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: At most this many times as long alone as without the policy, and this many fair shares beside others.
ALONE, BESIDE = 1.03, 1.25

CHAIN = """
import sys, time, torch
torch.set_num_threads({threads})
torch.set_grad_enabled(False)
up, down = (torch.randn(shape, dtype=torch.bfloat16) / 30 for shape in ((4864, 896), (896, 4864)))
gate, x = torch.randn(4864, 896, dtype=torch.bfloat16) / 30, torch.randn(64, 896, dtype=torch.bfloat16)
def chain(times):
    for _ in range(24 * times):
        y = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T
    return y
chain(2)
while {forever}:
    chain(1)
for line in sys.stdin:
    start = time.perf_counter()
    chain(int(line))
    print(time.perf_counter() - start, flush=True)
"""
BUSY = "while True: pass"


@dataclass(frozen=True, slots=True)
class Situation:
    """What runs beside: busy processes of one thread, and torch processes with a thread for each core."""

    name: str
    busy: int = 0
    torch: int = 0

    @property
    def fair(self) -> float:
        """Times as long as alone."""
        return (CORES + self.busy + CORES * self.torch) / CORES


SITUATIONS = (
    Situation("alone"),
    Situation("beside a busy process", busy=1),
    Situation("beside a torch process", torch=1),
    Situation("beside both", busy=1, torch=1),
    Situation("beside five busy threads", busy=max(0, 5 - CORES), torch=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--times", type=int, default=20, help="passes through the chain that are timed")
    parser.add_argument("--policy", nargs="*", default=["OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=3000"])
    options = parser.parse_args()
    with contextlib.suppress(OSError):  # a scheduling group of its own, where Linux has such, with most of the machine
        os.setsid()
        Path("/proc/self/autogroup").write_text("-19")
    print(f"{CORES} cores, load {os.getloadavg()[0]:.1f} before the first turn")
    policies: dict[str, Mapping[str, str]] = {"default": {}}
    policies |= {text: dict(pair.split("=", 1) for pair in text.split(",")) for text in options.policy}
    took: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        chains = {name: stack.enter_context(started(chain(), policy)) for name, policy in policies.items()}
        for turn in range(options.turns):
            for situation in SITUATIONS:
                with beside(situation):
                    for name in list(chains)[:: 1 if turn % 2 else -1]:
                        took.setdefault((situation.name, name), []).append(timed(chains[name], options.times))
    show(took, list(policies))


def chain(*, forever: bool = False) -> str:
    return CHAIN.format(threads=CORES, forever=forever)


@contextlib.contextmanager
def started(code: str, changes: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process, without what this one's environment says about threads."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**own, **changes}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def beside(situation: Situation) -> Iterator[None]:
    """The other processes of a situation, after they have started."""
    with contextlib.ExitStack() as stack:
        for code in [BUSY] * situation.busy + [chain(forever=True)] * situation.torch:
            stack.enter_context(started(code, {}))
        time.sleep(3 if situation.torch else 0.2)
        yield


def timed(process: subprocess.Popen[str], times: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{times}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def show(took: Mapping[tuple[str, str], Sequence[float]], policies: Sequence[str]) -> None:
    alone = min(min(times) for (situation, _), times in took.items() if situation == "alone")
    print(f"\n{'situation':26} {'fair':>6} " + " ".join(f"{name:>24}" for name in policies))
    for situation in SITUATIONS:
        fair = alone * situation.fair
        cells = []
        for name in policies:
            times = took[situation.name, name]
            middle = statistics.median(times)
            cells.append(f"{middle:6.2f} s = {middle / fair:5.2f} shares")
        print(f"{situation.name:26} {fair:6.2f} " + " ".join(f"{cell:>24}" for cell in cells))
    first = statistics.median(took["alone", policies[0]])
    for name in policies[1:]:
        slower = statistics.median(took["alone", name]) / first
        worst = max(statistics.median(took[s.name, name]) / (alone * s.fair) for s in SITUATIONS[1:])
        print(
            f"{name}: alone {slower:.3f} × the default (target {ALONE}), beside others {worst:.2f} fair shares at "
            f"most (target {BESIDE})"
        )


if __name__ == "__main__":
    main()
