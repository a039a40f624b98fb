"""What an inspection finds and what it misses, on models of which it is known what was done to them.

    python benchmarks/forensics.py MODEL=DIRECTIONS … --work FOLDER --out LONE.jsonl [--difference]
    python benchmarks/forensics.py --fit LONE.jsonl DIFFERENCES.jsonl

For every MODEL (a folder) with its file of candidate directions (`abliterate find`) it writes null models and edited
ones, rounds them as they would be stored, inspects each as a lone file (or, with `--difference`, compares it with the
base), and adds one line per case to the file. `--fit` reads both files, fits the coefficients of the verdict, judges
each base model with coefficients fitted on the others, prints the tables of docs/forensics.md and writes
`src/abliterate/forensics/calibration.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from abliterate.evaluation.statistics import wilson
from abliterate.forensics import verdict
from abliterate.forensics.difference import compare
from abliterate.forensics.reading import open_inspected
from abliterate.forensics.repair import read_adapter
from abliterate.forensics.single import inspect

CALIBRATION = Path(verdict.__file__).with_name("calibration.json")
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "forensics.svg"
Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def writers(folder: Path) -> Weights:
    """The output maps of a folder, in float32, in order of depth."""
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        names = [name for name in file.keys() if name.endswith(("o_proj.weight", "down_proj.weight"))]  # noqa: SIM118
        return {name: file.get_tensor(name).float() for name in sorted(names, key=layer_of)}


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


# --- rounding ---------------------------------------------------------------------------------------------------------


def bf16(weight: Tensor) -> Tensor:
    return weight.bfloat16()


def fp8(weight: Tensor) -> Tensor:
    """E4M3 with one scale per row, as dynamic FP8 checkpoints have it."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return ((weight / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()


def gguf(kind: str) -> Callable[[Tensor], Tensor]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    form = GGMLQuantizationType[kind]
    return lambda weight: torch.from_numpy(dequantize(quantize(weight.numpy(), form), form)).half()


# --- edits ------------------------------------------------------------------------------------------------------------


def taken_out(weight: Tensor, basis: Tensor, strength: float) -> Tensor:
    return weight - strength * basis.T @ (basis @ weight)


def columns_kept(weight: Tensor, basis: Tensor, strength: float) -> Tensor:
    edited = taken_out(weight, basis, strength)
    kept: Tensor = edited * (weight.norm(dim=0) / edited.norm(dim=0).clamp_min(1e-12))
    return kept


def rows_renormalised(weight: Tensor, basis: Tensor, strength: float) -> Tensor:
    """Rows brought to length 1, edited, brought back to their old length, as some tools do."""
    lengths = weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    edited = taken_out(weight / lengths, basis, strength)
    kept: Tensor = edited / edited.norm(dim=1, keepdim=True).clamp_min(1e-12) * lengths
    return kept


def edits(directions: Tensor, layers: int) -> Iterator[tuple[str, Callable[[float], Change], Tensor]]:
    """Name, the change by strength, and the basis that should be found. `directions` [L+1, d] are unit rows."""
    chosen = round(0.6 * layers)
    one = directions[chosen : chosen + 1]
    several = torch.linalg.qr(directions[[chosen, round(0.3 * layers), round(0.85 * layers)]].T).Q.T
    noise = torch.nn.functional.normalize(
        torch.randn(1, one.shape[1], generator=torch.Generator().manual_seed(5)), dim=1
    )

    def each(how: Callable[..., Tensor], basis: Callable[[int], Tensor], where: Callable[[str], float]) -> Any:
        def by_strength(strength: float) -> Change:
            return lambda weights: {
                name: how(weight, basis(layer_of(name)), strength * where(name)) if where(name) else weight
                for name, weight in weights.items()
            }

        return by_strength

    def everywhere(_: str) -> float:
        return 1.0

    def triangle(name: str) -> float:
        """Full at 60 % of the depth, falling to 0.3 at both ends."""
        return max(0.3, 1 - 1.4 * abs(layer_of(name) / layers - 0.6))

    yield "plain", each(taken_out, lambda _: one, everywhere), one
    yield "plain, random direction", each(taken_out, lambda _: noise, everywhere), noise
    yield "norm-preserving", each(columns_kept, lambda _: one, everywhere), one
    yield "three directions", each(taken_out, lambda _: several, everywhere), several
    yield "attention only", each(taken_out, lambda _: one, lambda name: float("o_proj" in name)), one
    yield (
        "middle half of the layers",
        each(taken_out, lambda _: one, lambda name: float(0.3 <= layer_of(name) / layers < 0.8)),
        one,
    )
    yield "direction per layer", each(taken_out, lambda layer: directions[layer + 1 : layer + 2], everywhere), one
    yield "rows renormalised", each(rows_renormalised, lambda _: one, everywhere), one
    yield (
        "per layer, rows renormalised, strength by depth",
        each(rows_renormalised, lambda layer: directions[layer + 1 : layer + 2], triangle),
        one,
    )


# --- null models ------------------------------------------------------------------------------------------------------


def nulls(folder: Path, base: Weights, work: Path, *, brief: bool) -> Iterator[tuple[str, Weights]]:
    """Models that nobody has taken a direction out of."""
    yield "original", base
    generator = torch.Generator().manual_seed(1)
    yield "random", {n: torch.randn(w.shape, generator=generator) * 0.02 for n, w in base.items()}
    for share in (0.3, 0.5, 0.7):
        yield f"pruned {share:.0%}", {n: pruned(w, share) for n, w in base.items()}
    yield "layers dropped", {n: w for n, w in base.items() if layer_of(n) % 4 != 1}
    yield "noise 5 %", {n: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    yield "random LoRA merged", {n: w + lora(w, generator) for n, w in base.items()}
    trained = [("fine-tuned", 2e-5, 0), ("fine-tuned hard", 2e-4, 0), ("LoRA trained and merged", 5e-4, 16)]
    for name, rate, rank in trained[: 1 if brief else 3]:
        tuned = writers(fine_tuned(folder, work / name.replace(" ", "-"), rate, rank))
        yield name, tuned
        yield f"merge with {name}", {n: (w + tuned[n]) / 2 for n, w in base.items()}


def pruned(weight: Tensor, share: float) -> Tensor:
    """The smallest numbers set to zero."""
    return weight * (weight.abs() > weight.abs().flatten().kthvalue(int(share * weight.numel()))[0])


def lora(weight: Tensor, generator: torch.Generator, rank: int = 16) -> Tensor:
    change = torch.randn(weight.shape[0], rank, generator=generator) @ torch.randn(
        rank, weight.shape[1], generator=generator
    )
    scaled: Tensor = change * (0.05 * weight.norm() / change.norm())
    return scaled


def fine_tuned(folder: Path, target: Path, rate: float, rank: int, steps: int = 40) -> Path:
    """The model after a few steps on harmless prompts; all weights, or a LoRA of `rank` that is merged."""
    target = target.with_name(f"{folder.name}-{target.name}")
    if (target / "model.safetensors").exists():
        return target
    import transformers

    from abliterate.prompts.sources import load_builtin

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained: Any = model
    if rank:
        import peft

        trained = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    texts = load_builtin("harmless")["train"]
    optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        lines = [" ".join(texts[(step * 24 + row * 6 + k) % len(texts)] for k in range(6)) for row in range(4)]
        batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=96)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        trained(**batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    (trained.merge_and_unload() if rank else trained).to(torch.bfloat16).save_pretrained(target)
    return target


# --- cases ------------------------------------------------------------------------------------------------------------


def directions_of(file: Path) -> Tensor:
    """Unit candidates of every layer at the last token, [L+1, d]."""
    with safe_open(str(file), "pt") as content:
        return torch.nn.functional.normalize(content.get_tensor("candidates")[-1].float(), dim=-1)


def alone(path: Path, wanted: Tensor | None) -> dict[str, Any]:
    """What an inspection of a lone file finds."""
    started = time.perf_counter()
    trace = inspect(open_inspected(str(path)))
    cosine = None
    if wanted is not None and len(trace.directions):
        cosine = float((wanted @ trace.directions.T).norm(dim=1).min())
        if trace.per_layer:
            cosine = float((trace.directions @ wanted[0]).abs().mean())
    return {
        "pooled": trace.evidence.pooled,
        "layers": trace.evidence.layers,
        "variant": trace.variant,
        "cosine": cosine,
        "seconds": round(time.perf_counter() - started, 2),
    }


def beside(path: Path, base: Path, wanted: Tensor | None) -> dict[str, Any]:
    """What a comparison with the base finds."""
    started = time.perf_counter()
    found = compare(open_inspected(str(path)), open_inspected(str(base)))
    cosine = None
    if wanted is not None and len(found.directions) and not found.per_layer:
        cosine = float((wanted @ found.directions.T).norm(dim=1).min())
    seconds = round(time.perf_counter() - started, 2)
    return {
        "kind": found.verdict,
        "variant": found.variant,
        "found": found.strength,
        "cosine": cosine,
        "seconds": seconds,
    }


def cases(
    entry: str, work: Path, *, brief: bool, few: bool
) -> Iterator[tuple[str, str, float, str, Callable[[], Weights], Tensor | None]]:
    """Base, name, strength, format, the weights, and the basis to be found; `few` of them for comparisons."""
    path, _, candidates = entry.partition("=")
    folder = Path(path)
    base, label = writers(folder), folder.name
    formats = ("bf16", "q4_0") if brief or few else ("bf16", "fp8", "q8_0", "q4_0")
    for name, weights in nulls(folder, base, work, brief=brief):
        for stored in formats:
            yield label, name, 0.0, stored, lambda weights=weights: weights, None  # type: ignore[misc]
    strengths = (1.0, 0.6, 0.3) if few else (1.0, 0.8, 0.6, 0.5) if brief else STRENGTHS
    directions = directions_of(Path(candidates))
    for name, by_strength, wanted in edits(directions, len(directions) - 1):
        for strength in strengths:
            for stored in formats if few or strength in (1.0, 0.8, 0.6) else ("bf16",):
                change = by_strength(strength)
                yield label, name, strength, stored, lambda change=change: change(base), wanted  # type: ignore[misc]


def run(models: list[str], work: Path, out: Path, *, brief: bool, difference: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    rounding = {"bf16": bf16, "fp8": fp8, "q8_0": gguf("Q8_0"), "q4_0": gguf("Q4_0")}
    done = {(c["base"], c["name"], c["strength"], c["stored"]) for c in read(out)} if out.exists() else set()
    edited, original = work / f"{out.stem}-case.safetensors", work / f"{out.stem}-base.safetensors"
    with out.open("a", encoding="utf-8") as file:
        for entry in models:
            base = writers(Path(entry.partition("=")[0]))
            save_file({name: bf16(weight) for name, weight in base.items()}, original)
            for label, name, strength, stored, make, wanted in cases(entry, work, brief=brief, few=difference):
                if (label, name, strength, stored) in done or (difference and name == "layers dropped"):
                    continue
                save_file({n: rounding[stored](weight).contiguous() for n, weight in make().items()}, edited)
                found = beside(edited, original, wanted) if difference else alone(edited, wanted)
                key = {"base": label, "name": name, "strength": strength, "stored": stored}
                file.write(json.dumps(key | found) + "\n")
                file.flush()


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(width: int, inputs: int, blocks: int, work: Path) -> None:
    """Seconds per block of a lone inspection of that size, beside reading it and beside its matrix products alone."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "speed.safetensors"
    tensors = {}
    for block in range(blocks):
        tensors[f"model.layers.{block}.self_attn.o_proj.weight"] = torch.randn(width, width).bfloat16()
        tensors[f"model.layers.{block}.mlp.down_proj.weight"] = torch.randn(width, inputs).bfloat16()
    save_file(tensors, path)
    del tensors
    started = time.perf_counter()
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    reading = time.perf_counter() - started
    wide = torch.randn(width, inputs)
    started = time.perf_counter()
    torch.matmul(wide, wide.T)
    product = (time.perf_counter() - started) * (1 + width / inputs)
    del wide
    started = time.perf_counter()
    inspect(open_inspected(str(path)))
    seconds = (time.perf_counter() - started) / blocks
    print(f"{path.stat().st_size / blocks / 1e9:.2f} GB a block: {seconds:.1f} s; ", end="")
    print(
        f"reading {reading / blocks:.2f} s, its products alone {product:.1f} s; {torch.get_num_threads()} threads; ",
        end="",
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    path.unlink()


# --- edits of other tools ---------------------------------------------------------------------------------------------


def merged(model: Path, adapters: Path, work: Path) -> None:
    """Every adapter under a folder (as heretic_trials.py leaves them) merged into MODEL and inspected."""
    work.mkdir(parents=True, exist_ok=True)
    base = writers(model)
    original, edited = work / "merged-base.safetensors", work / "merged-case.safetensors"
    save_file({name: bf16(weight) for name, weight in base.items()}, original)
    for file in sorted(adapters.rglob("adapter_model.safetensors")):
        weights = dict(base)
        for module, (down, up) in read_adapter(file.parent).items():
            weights[f"{module}.weight"] = base[f"{module}.weight"] + up @ down
        for stored, how in (("bf16", bf16), ("q4_0", gguf("Q4_0"))):
            save_file({name: how(weight).contiguous() for name, weight in weights.items()}, edited)
            trace, found = (
                inspect(open_inspected(str(edited))),
                compare(open_inspected(str(edited)), open_inspected(str(original))),
            )
            print(f"{file.parent.name} {stored}: {trace.verdict.word} {trace.verdict.probability:.2f}, ", end="")
            print(f"{trace.variant} | {found.verdict}, {found.variant}", flush=True)


# --- the fit ----------------------------------------------------------------------------------------------------------


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def fitted(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Logistic regression, classes of equal weight, a weak ridge, non-negative slopes, by Newton's method."""
    x = np.array([[1.0, min(c["pooled"], 3.0), min(c["layers"], 3.0)] for c in cases])
    y = np.array([float(c["strength"] > 0) for c in cases])
    weight = np.where(y > 0, 0.5 / max(1, y.sum()), 0.5 / max(1, (1 - y).sum())) * len(y)
    ridge = np.diag([0.0, 0.05, 0.05])
    theta = np.zeros(3)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -30, 30)))
        gradient = x.T @ (weight * (p - y)) + ridge @ theta
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + ridge + 1e-6 * np.eye(3)
        theta -= np.linalg.solve(hessian, gradient)
    return {"constant": float(theta[0]), "pooled": float(theta[1]), "layers": float(theta[2])}


def probability(fit: dict[str, float], c: dict[str, Any]) -> float:
    return verdict.judge(verdict.Evidence(min(c["pooled"], 3.0), min(c["layers"], 3.0)), fit).probability


def auc(positive: list[float], negative: list[float]) -> float:
    return float(np.mean([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive]))


def report(lone: Path, differences: Path) -> None:
    """Fit, judge each base with coefficients from the others, print tables, write the calibration."""
    cases, compared = read(lone), read(differences)
    bases = sorted({c["base"] for c in cases})
    chances: dict[int, float] = {}
    for held in bases:
        fit = fitted([c for c in cases if c["base"] != held])
        chances |= {id(c): probability(fit, c) for c in cases if c["base"] == held}
    null = [c for c in cases if c["strength"] == 0]
    mistaken = sum(chances[id(c)] >= verdict.ALTERED for c in null)
    print(f"{len(cases)} lone files of {len(bases)} models; each judged with coefficients from the others.\n")
    print(f"False positives: {mistaken} of {len(null)} {interval(mistaken, len(null))}; ", end="")
    doubtful = sum(verdict.NO_TRACE < chances[id(c)] < verdict.ALTERED for c in null)
    print(f"called inconclusive: {doubtful}.\n")
    strengths = sorted({c["strength"] for c in cases if c["strength"] > 0}, reverse=True)
    print("| edit | " + " | ".join(f"{s:g}" for s in strengths) + " | AUC at 0.6 and above |")
    print("| --- |" + " --- |" * (len(strengths) + 1))
    for name in dict.fromkeys(c["name"] for c in cases if c["strength"] > 0):
        cells = []
        for strength in strengths:
            own = [c for c in cases if c["name"] == name and c["strength"] == strength]
            cells.append(f"{sum(chances[id(c)] >= verdict.ALTERED for c in own)}/{len(own)}")
        strong = [chances[id(c)] for c in cases if c["name"] == name and c["strength"] >= 0.6]
        print(f"| {name} | " + " | ".join(cells) + f" | {auc(strong, [chances[id(c)] for c in null]):.3f} |")
    by_format(cases, chances)
    curve(cases, chances)
    fit = fitted(cases)
    picture(cases, fit, PICTURE)
    edited = [c for c in compared if c["strength"] > 0]
    others = [c for c in compared if c["strength"] == 0]
    counts = {
        "edited": len(edited),
        "found": sum(c["kind"] == "ablation" for c in edited),
        "others": len(others),
        "mistaken": sum(c["kind"] == "ablation" for c in others),
    }
    print(f"\nBeside the base: {counts['found']} of {counts['edited']} edits found; {counts['mistaken']} of ", end="")
    print(f"{counts['others']} other changes taken for one.\n")
    beside_table(compared)
    origin = {"models": bases, "nulls": len(null), "edits": len(cases) - len(null), "strengths": strengths}
    seen = json.loads(CALIBRATION.read_text(encoding="utf-8"))["notches"]  # counted apart, see docs/forensics.md
    content = {"coefficients": fit, "fitted_on": origin, "difference": counts, "notches": seen}
    CALIBRATION.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def interval(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"(95 %: {low:.1%} to {high:.1%})"


def by_format(cases: list[dict[str, Any]], chances: dict[int, float]) -> None:
    """The same by how weights are stored, at the strengths that all formats were tried at."""
    formats = list(dict.fromkeys(c["stored"] for c in cases))
    print("\n| stored as | nulls called altered | edits of 1.0 | of 0.8 | of 0.6 |\n| --- | --- | --- | --- | --- |")
    for stored in formats:
        cells = []
        for strength in (0.0, 1.0, 0.8, 0.6):
            own = [c for c in cases if c["stored"] == stored and c["strength"] == strength]
            cells.append(f"{sum(chances[id(c)] >= verdict.ALTERED for c in own)}/{len(own)}")
        print(f"| {stored} | " + " | ".join(cells) + " |")


def curve(cases: list[dict[str, Any]], chances: dict[int, float]) -> None:
    """Share of edits found when so many null models are called altered, by strength."""
    null = sorted((chances[id(c)] for c in cases if c["strength"] == 0), reverse=True)
    strengths = sorted({c["strength"] for c in cases if c["strength"] > 0}, reverse=True)
    print("\n| false positives at most | " + " | ".join(f"{s:g}" for s in strengths) + " |")
    print("| --- |" + " --- |" * len(strengths))
    for rate in (0.0, 0.05, 0.1, 0.25):
        bar = null[int(rate * len(null))]
        cells = []
        for strength in strengths:
            own = [chances[id(c)] for c in cases if c["strength"] == strength]
            cells.append(f"{sum(chance > bar for chance in own) / len(own):.0%}")
        print(f"| {rate:.0%} | " + " | ".join(cells) + " |")


def picture(cases: list[dict[str, Any]], fit: dict[str, float], path: Path) -> None:
    """Every lone file in the plane of the two depths, as an SVG; the line is the bar of "altered"."""
    side, edge, least, most = 520, 60, 0.02, 13.0

    def place(value: float) -> float:
        return math.log(min(most, max(least, value)) / least) / math.log(most / least) * (side - 2 * edge)

    def at(pooled: float, layers: float) -> tuple[float, float]:
        return edge + place(pooled), side - edge - place(layers)

    groups = (
        ("nobody edited it", "#8a94a6", lambda s: s == 0),
        ("strength 0.3 to 0.5", "#e0a100", lambda s: 0 < s <= 0.5),
        ("0.6 and 0.7", "#d1500a", lambda s: 0.5 < s < 0.8),
        ("0.8 and above", "#8f1d1d", lambda s: s >= 0.8),
    )
    parts = [f'<rect width="{side}" height="{side}" fill="white"/>']
    for value in (0.03, 0.1, 0.3, 1, 3, 10):
        (x, y), low, high = at(value, value), edge, side - edge
        parts.append(f'<path d="M{x:.1f} {low}V{high}M{low} {y:.1f}H{high}" stroke="#e3e6eb"/>')
        parts.append(f'<text x="{x:.1f}" y="{high + 18}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<text x="{low - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    bar = math.log(verdict.ALTERED / (1 - verdict.ALTERED)) - fit["constant"]
    steps = [least * (most / least) ** (step / 200) for step in range(201)]
    line = [at(x, (bar - fit["pooled"] * x) / fit["layers"]) for x in steps if bar - fit["pooled"] * x > 0]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#1f2a37" stroke-dasharray="5 4"/>')
    for row, (name, colour, fits) in enumerate(groups):
        for found in (c for c in cases if fits(c["strength"])):
            x, y = at(found["pooled"], found["layers"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}" fill-opacity=".75"/>')
        parts.append(f'<circle cx="{edge + 14}" cy="{edge + 14 + 20 * row}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{edge + 26}" y="{edge + 18 + 20 * row}">{name}</text>')
    parts.append(f'<text x="{side / 2}" y="{side - 16}" text-anchor="middle">deepest window</text>')
    parts.append(
        f'<text transform="translate(16 {side / 2}) rotate(-90)" text-anchor="middle">mean of three layers</text>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" font-family="sans-serif" font-size="13">'
    )
    path.write_text(head + "\n".join(parts) + "</svg>\n", encoding="utf-8")


def beside_table(compared: list[dict[str, Any]]) -> None:
    """What a comparison called each change."""
    print("| what was done | stored as | called |\n| --- | --- | --- |")
    keys = dict.fromkeys((c["name"], c["stored"]) for c in compared)
    for name, stored in keys:
        called = Counter(c["kind"] for c in compared if (c["name"], c["stored"]) == (name, stored))
        print(f"| {name} | {stored} | " + ", ".join(f"{kind} {count}" for kind, count in called.most_common()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL=DIRECTIONS")
    parser.add_argument("--work", type=Path, default=Path("forensics-work"))
    parser.add_argument("--out", type=Path, default=Path("forensics.jsonl"))
    parser.add_argument("--brief", action="store_true", help="fewer strengths, formats and trainings (large models)")
    parser.add_argument("--difference", action="store_true", help="compare with the base, instead of lone files")
    parser.add_argument("--merged", type=Path, nargs=2, metavar=("MODEL", "ADAPTERS"), help="edits as adapters")
    parser.add_argument("--fit", type=Path, nargs=2, metavar=("LONE", "DIFFERENCES"), help="files of cases")
    parser.add_argument("--speed", type=int, nargs=3, metavar=("WIDTH", "INPUTS", "BLOCKS"), help="time it")
    given = parser.parse_args()
    if given.speed:
        width, inputs, blocks = given.speed
        speed(width, inputs, blocks, given.work)
    if given.merged:
        model, adapters = given.merged
        merged(model, adapters, given.work)
    if given.models:
        run(given.models, given.work, given.out, brief=given.brief, difference=given.difference)
    if given.fit:
        report(*given.fit)


if __name__ == "__main__":
    main()
