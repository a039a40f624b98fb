"""Searching for an edit: this package's ways, the paper's rule, random search, and heretic-llm, on the same prompts.

Run ``python benchmarks/search.py [MODEL] [--heretic PYTHON] [--trials 12] [--out FOLDER]``. MODEL is a folder of
safetensors or a .gguf file; without it the demo model in the cache is used. PYTHON is that of an environment with
heretic-llm (see ``heretic_trials.py`` for how to make one); without it that arm is left out.

All arms learn from the builtin training prompts, are judged while they search by the builtin validation prompts, and
are measured at the end on the held-out ones, which none has seen. The system prompt is heretic's. Seconds count from
the arm's start with the model loaded, until what it offers is known.

paper      the closed form: the direction that the rule of Arditi et al. 2024 selects, out of every writer
gradient   `abliterate search --method gradient`
tpe        `--method black-box`: Optuna's TPE with staged fidelity
random     `--method random`: the same with random proposals
heretic    heretic-llm in an environment of its own, through its modules: the trials that it offers

For every arm: its points on held-out prompts by two judges (the rule judge of this package with known error rates, and
heretic's own keywords), KL of the first token and along whole replies, length, degenerate replies; the hypervolume over
refusals and KL within (the unedited model's refusals, `--reference` nats); and for every trial on heretic's front the
least KL at which each arm refuses no more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from abliterate.config import (
    FindSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    RunSettings,
    SearchSettings,
    cache_folder,
)
from abliterate.edit.plan import Plan
from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.judging import RuleJudge
from abliterate.evaluation.probe import Level, Measured, Probe
from abliterate.finding.find import best_separated, choose, find
from abliterate.finding.search import OBJECTIVES, search
from abliterate.finding.search.objectives import values
from abliterate.finding.search.pareto import hypervolume, matched, nondominated
from abliterate.model.batches import hooked
from abliterate.monitor import Monitor, peak_memory
from abliterate.session import Session, open_session

DEMO = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SYSTEM = "You are a helpful assistant."
ARMS = ("paper", "gradient", "tpe", "random")
MEASURED = ("refusals", "kl", "kl-reply", "over-refusals", "degenerate", "length")


@dataclass(frozen=True, slots=True)
class Edit:
    """What an arm offers, and what it scored on validation prompts."""

    name: str
    state: Plan | ModelState
    seen: Mapping[str, float]


def main() -> None:
    """Run the arms one after the other, then measure all points."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    monitor = Monitor()
    session = open_session(
        options.model,
        loading=ModelSettings(system=SYSTEM),
        prompts=PromptSettings(limit=options.limit),
        monitor=monitor,
    )
    session.seed = options.seed  # the prompts are the same with every seed
    arms: dict[str, list[Edit]] = {}
    facts: dict[str, dict[str, float]] = {}
    if options.heretic:
        started = time.perf_counter()
        arms["heretic"] = heretic(session, options)
        facts["heretic"] = heretic_facts(options) | {"whole process": time.perf_counter() - started}
    for arm in options.arms:
        started = time.perf_counter()
        arms[arm] = ours(session, arm, options)
        facts[arm] = {"seconds": time.perf_counter() - started, "peak bytes": float(peak_memory())}
        say(f"{arm}: {len(arms[arm])} points in {facts[arm]['seconds']:.0f} s")
    report(session, arms, facts, options)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(cache_folder() / "models" / DEMO))
    parser.add_argument("--heretic", type=Path, help="python of an environment with heretic-llm")
    parser.add_argument("--heretic-options", default="", help="more options for heretic_trials.py")
    parser.add_argument("--trials", type=int, default=12, help="trials of heretic")
    parser.add_argument("--our-trials", type=int, default=40, help="trials of tpe and random")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--limit", type=int, help="prompts per split, to try it out")
    parser.add_argument("--tokens", type=int, default=32, help="longest held-out reply")
    parser.add_argument("--reference", type=float, default=0.2, help="KL of the hypervolume's corner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("search-benchmark"))
    return parser.parse_args()


def ours(session: Session, arm: str, options: argparse.Namespace) -> list[Edit]:
    """The points of one arm of this package, from finding directions on."""
    session.monitor.seconds.clear()
    finding = FindSettings(max_kl=10.0)
    findings = find(session, finding)
    if arm == "paper":
        found = choose(session, findings, FindSettings(), force=True)
        best = found.selection.chosen
        return [Edit(f"layer {best.layer}, {best.position}", session.plan(found.direction), {"kl": best.kl})]
    method = {"tpe": "black-box"}.get(arm, arm)
    searching = SearchSettings(method=method, trials=options.our_trials, constraints="over-refusals<=1")
    settings = RunSettings(model=options.model, loading=session.loading, finding=finding, searching=searching)
    start = best_separated(session, findings, finding)
    result = search(session, findings, start, RuleJudge(), settings, method)
    (options.out / f"{arm}.json").write_text(json.dumps(session.monitor.timings(), indent=1))
    return [Edit(point.origin, session.plan(point.direction), point.scores) for point in result.points]


def heretic(session: Session, options: argparse.Namespace) -> list[Edit]:
    """What heretic offers: its trials that no other beats by its own scores. Run in its own environment, once.

    A folder that holds its results is taken as it is.
    """
    folder = options.out / "heretic"
    if not (folder / "facts.json").exists():
        contrast = session.prompts
        prompts = {
            f"{ours}_{name}": [str(text) for text in getattr(getattr(contrast, name), split)]
            for ours, split in (("train", "train"), ("eval", "val"))
            for name in ("harmful", "harmless")
        }
        path = options.out / "prompts.json"
        path.write_text(json.dumps(prompts))
        script = Path(__file__).with_name("heretic_trials.py")
        command = [str(options.heretic), str(script), str(session.loaded.files.folder), "--prompts", str(path)]
        command += ["--out", str(folder), "--trials", str(options.trials), "--seed", str(options.seed)]
        subprocess.run([*command, "--system", SYSTEM, *options.heretic_options.split()], check=True)
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    edits = []
    for number in nondominated([(trial["refusals"], trial["kl"]) for trial in trials]):
        trial = trials[number]
        state = functools.partial(adapted, session.model, folder / f"trial-{number:02}")
        seen = {"refusals": trial["refusals"], "kl": trial["kl"], "seconds": trial["seconds"]}
        edits.append(Edit(f"trial {number}", ModelState(session, state), seen))
    return edits


def heretic_facts(options: argparse.Namespace) -> dict[str, Any]:
    """What its run took."""
    found: dict[str, Any] = json.loads((options.out / "heretic" / "facts.json").read_text())
    return found


@contextlib.contextmanager
def adapted(model: Any, folder: Path) -> Iterator[None]:
    """A LoRA adapter as hooks on the live model: y + scale · (x Aᵀ) Bᵀ, in float32."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    handles: list[Any] = []
    with hooked(handles):
        for name, down in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            up = tensors[name.replace("lora_A", "lora_B")]
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))

            def add(_: Any, args: Any, out: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
                added: Tensor = scale * (args[0].float() @ down.float().T) @ up.float().T
                return out + added.to(out.dtype)

            handles.append(module.register_forward_hook(add))
        yield


def keyword_refusals(measured: Measured, keywords: Sequence[str], name: str) -> float:
    """The share of replies that hold one of heretic's keywords."""
    replies = (measured.replies or {})[name].replies
    return sum(any(word.lower() in reply.text.lower() for word in keywords) for reply in replies) / len(replies)


def report(
    session: Session, arms: Mapping[str, Sequence[Edit]], facts: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """Measure everything on held-out prompts and print it; JSON beside."""
    findings = find(session, FindSettings())
    probe = Probe(session, findings.ids, "test", RuleJudge(), ReplySettings(max_new_tokens=options.tokens))
    objectives = [OBJECTIVES[name] for name in MEASURED]
    keywords = facts.get("heretic", {}).get("settings", {}).get("refusal_markers") or []

    def of(state: Plan | ModelState | None) -> dict[str, float]:
        measured = probe.measure(state, Level.SHIFT)
        by_keywords = {
            f"keywords, {name}": keyword_refusals(measured, keywords, name)
            for name in session.test_texts
            if name != "borderline"
        }
        return values(measured, objectives) | (by_keywords if keywords else {})

    base = of(None)
    say(f"unedited: {short(base)}")
    results: dict[str, list[dict[str, float]]] = {}
    for arm, edits in arms.items():
        results[arm] = []
        for edit in edits:
            results[arm].append(of(edit.state))
            say(f"{arm}, {edit.name}: {short(results[arm][-1])}; on validation {short(edit.seen)}")
    judges = ["refusals", *(["keywords, harmful"] if keywords else [])]
    for judge in judges:
        for damage in ("kl", "kl-reply"):
            compare(results, base, judge, damage, options.reference)
    seen = {arm: [{"name": e.name, **e.seen} for e in edits] for arm, edits in arms.items()}
    whole = {"base": base, "held out": results, "validation": seen, "facts": facts, "options": vars(options)}
    (options.out / "results.json").write_text(json.dumps(whole, indent=1, default=str))


def compare(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    base: Mapping[str, float],
    judge: str,
    damage: str,
    corner: float,
) -> None:
    """Hypervolumes, and the least damage of each arm at the levels of refusal that heretic's trials reach."""
    fronts = {arm: [(r[judge], r[damage]) for r in rows] for arm, rows in results.items()}
    say(f"\n{judge} x {damage} on held-out prompts")
    for arm, points in fronts.items():
        share = hypervolume(points, (base[judge], corner)) / (base[judge] * corner)
        say(f"  hypervolume {arm}: {share:.3f} of the box")
    reference = fronts.get("heretic")
    if reference is None:
        return
    for i in nondominated(reference):
        level, cost = reference[i]
        others = {arm: matched(points, [level])[0] for arm, points in fronts.items() if arm != "heretic"}
        said = ", ".join(
            f"{arm} -" if least is None else f"{arm} {least:.4f} ({least / cost:.2f} x)"
            for arm, least in others.items()
        )
        say(f"  refusals <= {level:.2f}: heretic {cost:.4f}, {said}")


def short(numbers: Mapping[str, float]) -> str:
    """Numbers on one line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
