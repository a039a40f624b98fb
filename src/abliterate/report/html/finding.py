"""Do the classes separate, and where is the direction?"""

from __future__ import annotations

from typing import Any

from abliterate.record import Record, SelectionPart, SeparationPart
from abliterate.report.html.parts import Figure, Section, Table, number, short
from abliterate.report.wording import Words, words_of_record


def separated(record: Record) -> Section | None:
    """AUROC and norm by layer, and every prompt at the chosen site."""
    part = record.separation
    if part is None or not part.sites:
        return None
    best = max(part.sites, key=lambda site: site.auroc)
    here = next((s for s in part.sites if (s.layer, s.position) == (part.layer, part.position)), best)
    words = words_of_record(record)
    more, less = words.sides
    text = (
        f"Along its own difference of means, layer {here.layer} at position {here.position} tells {more} from "
        f"{less} validation prompts with an AUROC of {here.auroc:.3f} and d′ {here.dprime:.2f} (0.5 and 0 are "
        f"chance); the best site is layer {best.layer} at position {best.position} with {best.auroc:.3f}. Position "
        "-1 is the last token before the reply."
    )
    texts = (
        [text] if part.words_auroc is None or part.length_auroc is None else [text, _without_model(part, best.auroc)]
    )
    return Section("separation", f"Do {more} and {less} separate?", texts, [*_by_layer(part), _scatter(part, words)])


def _without_model(part: SeparationPart, best: float) -> str:
    """How far the texts alone tell the sets apart."""
    length, words = part.length_auroc or 0.5, part.words_auroc or 0.5
    as_well = " Words alone do about as well as the best site: separation by itself proves little here." * (
        words > best - 0.01
    )
    return (
        f"Without the model, the prompts' length alone has an AUROC of {length:.3f} and a bag of their words "
        f"{words:.3f}.{as_well} That the behaviour hangs on the direction is shown by intervention, below."
    )


def _by_layer(part: SeparationPart) -> list[Figure]:
    positions = sorted({site.position for site in part.sites}, reverse=True)
    layers = sorted({site.layer for site in part.sites})
    figures = []
    for name, label, form in (("auroc", "AUROC", ".3f"), ("norm", "Norm of the difference of means", ".2f")):
        found = {(site.layer, site.position): getattr(site, name) for site in part.sites}
        chart: dict[str, Any] = {
            "kind": "lines",
            "half": True,
            "least": 0.5 if name == "auroc" else None,
            "log": name == "norm",
            "mark": [part.layer, found.get((part.layer, part.position))],
            "series": [
                {"name": f"position {position}", "points": [[x, found.get((x, position))] for x in layers]}
                for position in positions
            ],
        }
        rows = [[str(x), *(number(found.get((x, position)), form) for position in positions)] for x in layers]
        table = Table(["layer", *(f"position {p}" for p in positions)], rows, _at(layers, part.layer), frozenset())
        figures.append(Figure(f"{name}-by-layer", f"{label} by layer", table, chart))
    return figures


def _scatter(part: SeparationPart, words: Words) -> Figure:
    sides = dict(zip(("harmful", "harmless"), words.sides, strict=True))
    said = {True: words.shown, False: f"not {words.shown}" if words.sets else "answered"}
    series = [
        {
            "name": f"{sides[kind]}, {said[refused]}",
            "role": kind,
            "hollow": (kind == "harmful") != refused,
            "points": [[p.x, p.y, short(p.prompt, 80)] for p in part.prompts if (p.set, p.refused) == (kind, refused)],
        }
        for kind, refused in (("harmful", True), ("harmful", False), ("harmless", False), ("harmless", True))
    ]
    chart = {
        "kind": "scatter",
        "x": "projection on the direction",
        "y": "first principal component of the rest",
        "series": [one for one in series if one["points"]],
    }
    rows = [
        [short(p.prompt, 120), sides[p.set], said[p.refused], f"{p.x:.2f}", f"{p.y:.2f}"] for p in part.prompts[:400]
    ]
    table = Table(
        ["prompt", "set", "by the model", "on the direction", "first component"], rows, words=frozenset({0, 1, 2})
    )
    note = (
        "Validation prompts, which the direction was not made from. Filled: those on which the model does as their "
        "side says, by the sign of the score of the first token, or by what short replies show."
    )
    return Figure("scatter", f"Prompts at layer {part.layer}, position {part.position}", table, chart, note)


_SCORE = "mean refusal score (log-odds that a reply starts as a refusal, or as the behaviour does)"


def direction_found(record: Record) -> Section | None:
    """Bypass, induce and KL of every site that was scored; the chosen one, the rule, a random direction."""
    part = record.selection
    if part is None or not part.candidates:
        return None
    control = part.control
    (more, less), by_replies = words_of_record(record).sides, part.by == "replies"
    score = "share of short replies that show the behaviour" if by_replies else _SCORE
    rule = f"KL at most {part.max_kl:g}, induce above {part.min_induce:g}, layer below {part.max_depth:g} of the depth"
    text = [
        f"Bypass is the {score} of {more} prompts with the direction taken out; induce is "
        f"{'how much that of' if by_replies else 'that of'} {less} prompts {'rises ' if by_replies else ''}with it "
        f"added; KL is what taking it out does to the first token of answers to {less} prompts. The rule is the least "
        f"bypass with {rule}. Without intervention the scores are {part.harmful:.2f} and {part.harmless:.2f}. Random "
        f"control, a direction of the same norm: bypass {control.bypass:.2f}, induce {control.induce:.2f}, KL "
        f"{control.kl:.3f}."
    ]
    if (site := part.chosen) is not None:
        met = "" if part.met_rule else " It does not meet the rule."
        role = "A search started from" if record.search is not None else "Chosen was"
        text.append(
            f"{role} layer {site.layer}, position {site.position}: bypass {site.bypass:.2f}, induce {site.induce:.2f}, "
            f"KL {site.kl:.3f}.{met}"
        )
    return Section("direction", "Where is the direction?", text, [*_heat_maps(part), _sites(part)])


def _heat_maps(part: SelectionPart) -> list[Figure]:
    figures = []
    sites = part.candidates if part.chosen is None else [*part.candidates, part.chosen]
    layers = sorted({site.layer for site in sites})
    positions = sorted({site.position for site in sites})
    for name, title in (
        ("bypass", "Bypass (less is better)"),
        ("induce", "Induce (more is better)"),
        ("kl", "KL in nats (less is better)"),
    ):
        values = {(site.layer, site.position): getattr(site, name) for site in part.candidates}
        chart: dict[str, Any] = {
            "kind": "heat",
            "layers": layers,
            "positions": positions,
            "cells": [[layers.index(x), positions.index(y), round(v, 4)] for (x, y), v in values.items()],
            "failing": [
                [layers.index(s.layer), positions.index(s.position)] for s in part.candidates if not part.passes(s)
            ],
            "chosen": None
            if part.chosen is None
            else [layers.index(part.chosen.layer), positions.index(part.chosen.position)],
            "cap": 4 * part.max_kl if name == "kl" else None,
            "name": name,
        }
        rows = [[str(y), *(number(values.get((x, y)), ".2f") for x in layers)] for y in reversed(positions)]
        note = "Ring: the chosen site. Small crosses: sites that fail the rule."
        if name == "kl":
            note += f" Colours end at {4 * part.max_kl:g} nats."
        table = Table(["position", *map(str, layers)], rows, words=frozenset())
        figures.append(Figure(f"map-{name}", title, table, chart, note))
    return figures


def _sites(part: SelectionPart) -> Figure:
    best = sorted(part.candidates, key=lambda site: site.bypass)[:10]
    chosen = None if part.chosen is None else (part.chosen.layer, part.chosen.position)
    rows = [
        [
            str(s.layer),
            str(s.position),
            f"{s.bypass:.2f}",
            f"{s.induce:.2f}",
            f"{s.kl:.3f}",
            f"{s.auroc:.3f}",
            str(s.prompts),
            "yes" if part.passes(s) else "no",
        ]
        for s in best
    ]
    control = part.control
    rows.append(
        ["random control", "", f"{control.bypass:.2f}", f"{control.induce:.2f}", f"{control.kl:.3f}", "", "", ""]
    )
    marked = frozenset(i for i, s in enumerate(best) if (s.layer, s.position) == chosen)
    head = ["layer", "position", "bypass", "induce", "KL", "AUROC", "prompts a class", "meets the rule"]
    title = f"The {len(best)} sites with the least bypass, of {len(part.candidates)}"
    return Figure("sites", title, Table(head, rows, marked), folded=False)


def _at(rows: list[int], layer: int) -> frozenset[int]:
    return frozenset({rows.index(layer)}) if layer in rows else frozenset()
