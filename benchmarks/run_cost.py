"""What a default run costs: work (exact), seconds and memory per phase.

Run ``python benchmarks/run_cost.py [OUT ...] [--model MODEL]``. Each OUT is a folder that a run left; without any, a
default run of the demo model is made in a temporary folder, with no reply taken from the cache. Of several, a table for
each, and the totals of each relative to the first.

Work is tokens × blocks, forwards and backwards; it is counted at the blocks themselves (`abliterate.model.meter`) and
needs no clock. A token through the head is worth as many blocks as the head's weights are of a block's: for the demo
model 9.1, which the last column adds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import abliterate
from abliterate.config import EvalSettings, OutputSettings, RunSettings, cache_folder
from abliterate.record import Record, WorkPart, read_record

DEMO = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
#: Weights of the demo model's head (151,936 × 896) in those of a block (14.9 million).
HEAD_IN_BLOCKS = 9.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", type=Path, help="folders that runs left")
    parser.add_argument("--model", default=str(cache_folder() / "models" / DEMO))
    options = parser.parse_args()
    if options.out:
        records = {str(out): read_record(out) for out in options.out}
    else:
        with tempfile.TemporaryDirectory() as folder:
            output = OutputSettings(out=Path(folder) / "out")
            asked = RunSettings(model=options.model, output=output, evaluating=EvalSettings(no_cache=True))
            records = {"a default run": abliterate.run(asked)}
    first = None
    for name, record in records.items():
        show(name, record)
        total = together(record)
        first = first or total
        if total is not first:
            print(
                f"relative to the first: {total.forward + total.backward:,} of {first.forward + first.backward:,} "
                f"= {blocks(total) / blocks(first):.3f} with the head, "
                f"{(total.forward + total.backward) / (first.forward + first.backward):.3f} without"
            )


def show(name: str, record: Record) -> None:
    print(f"\n{name}\n{'phase':38} {'seconds':>8} {'forwards':>12} {'backwards':>11} {'head':>8} {'all, blocks':>12}")
    for phase, seconds in record.timings_s.items():
        print(row(phase, seconds, record.work.get(phase, WorkPart())))
    print(row("together", sum(record.timings_s.values()), together(record)))
    print(f"peak memory {max(record.peak_memory_bytes.values(), default=0) / 1e9:.2f} GB")


def row(phase: str, seconds: float, work: WorkPart) -> str:
    counts = f"{work.forward:12,} {work.backward:11,} {work.head:8,} {blocks(work):12,.0f}"
    return f"{phase:38} {seconds:8.1f} {counts}"


def together(record: Record) -> WorkPart:
    names = ("forward", "backward", "head")
    return WorkPart(**{name: sum(getattr(work, name) for work in record.work.values()) for name in names})


def blocks(work: WorkPart) -> float:
    """All work in passes of a token through a block."""
    return work.forward + work.backward + HEAD_IN_BLOCKS * work.head


if __name__ == "__main__":
    main()
