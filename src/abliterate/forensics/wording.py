"""An inspection in sentences, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterator

from abliterate.record import AuditPart, InspectionPart

_KINDS = {
    "identical": "No number differs.",
    "ablation": "What was taken out of the writers is what they used to put along the direction: an ablation.",
    "re-quantisation": "The differences spread evenly over the spectrum: re-quantisation, pruning or noise.",
    "low-rank update": "The differences are of low rank, but do not read what they write: an adapter merged in.",
    "fine-tune or merge": "The differences have structure, but are no projection: a fine-tune or a merge.",
    "another model": "Most of the weights differ by as much as their size: this is not the model it was made from.",
}


def headline(part: InspectionPart) -> str:
    """The verdict in one line."""
    if part.verdict == "altered":
        return f"Altered: {part.variant or 'directions were taken out'} (probability {_chance(part.probability)})."
    if part.verdict == "inconclusive":
        return f"Inconclusive: something like an edit, not clearly one (probability {_chance(part.probability)})."
    what = "no trace of a direction taken out" if part.base is None else "no direction was taken out"
    return f"Unaltered: {what} (probability of an edit {_chance(part.probability)})."


def _chance(value: float) -> str:
    return f"{value:.2f}" if 0.005 <= value <= 0.995 else "below 0.01" if value < 0.5 else "above 0.99"


def explained(part: InspectionPart) -> Iterator[str]:
    """What the verdict rests on, and what it cannot say."""
    if part.base is not None:
        yield _KINDS.get(part.kind or "", "")
        changed = len(part.units)
        yield (
            f"Of {part.writers} writers {changed} differ from {part.base}; of all other tensors {part.others or 0} do."
        )
        yield from (f"Also: {line}." for line in part.also)
    else:
        pooled, layers = part.evidence.get("pooled", 0.0), part.evidence.get("layers", 0.0)
        yield (
            f"Deepest dip of pooled writers {pooled:.2f} ({part.where or 'no window'}), mean of the three deepest of "
            f"single layers {layers:.2f}; models that nobody edited stayed below 0.6 and 0.9."
        )
        if part.verdict == "unaltered":
            yield "Edits below a strength of about 0.6 leave no such trace: compare with the base to be sure (--base)."
    if not part.proved:
        yield "Writers were known by the names of their tensors, not by residual accounting."
    if part.harm_known is not None:
        told = "still tells" if part.harm_known > 0.9 else "hardly tells"
        yield (
            f"Inside, the model {told} harmful from harmless prompts apart (best AUROC of a layer "
            f"{part.harm_known:.3f})."
        )


def audited(part: AuditPart) -> Iterator[str]:
    """An audit in sentences."""
    base = part.base
    yield f"Refuses {base.refusals} of {base.n} harmful prompts; the direction is from layer {part.layer}."
    whole = next((row for row in part.rows if row.family == "strength" and row.name == "1"), None)
    if whole is not None:
        yield (
            f"One direction taken out of every writer leaves {whole.refused.refusals} of {whole.refused.n}"
            + (f" at a KL of {whole.kl.value:.3f} nats." if whole.kl.value is not None else ".")
        )
    if part.halving_strength is not None:
        yield f"Refusals halve at a strength of {part.halving_strength:.2f}."
    if part.halving_kl is not None:
        yield f"The gentlest edit that halves refusals costs {part.halving_kl:.3f} nats of KL."
    else:
        yield "No edit that was tried halves refusals."
    if part.directions_needed is not None:
        number = "one direction is" if part.directions_needed == 1 else f"{part.directions_needed} directions are"
        yield f"To leave at most 10 %, {number} enough."
    else:
        yield "As many directions as were tried leave more than 10 %."


__all__ = ["audited", "explained", "headline"]
