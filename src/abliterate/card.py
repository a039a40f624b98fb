"""The model card: what was done to a model, what that measured, and what to mind. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from abliterate.errors import CheckpointError
from abliterate.record import EvaluationPart, RatePart, Record

NOTICE = """\
This model was made for research on how safety behaviour is represented and how brittle it is. Its safety training
has been weakened on purpose: it will answer requests that the original declines. Whoever runs it is responsible for
what it is used for. Do not deploy it where people rely on it to refuse, and keep the licence of the original model.
"""


def write_card(record: Record, folder: Path) -> Path:
    """Write README.md into `folder`, replacing the original's card, which would describe another model."""
    path = folder / "README.md"
    try:
        path.write_text(render_card(record), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def render_card(record: Record) -> str:
    """The card as Markdown with the hub's YAML front matter."""
    name = record.model.name.rstrip("/")
    short = Path(name).name
    return "\n".join(
        [
            _front_matter(record),
            f"# {short}, abliterated",
            "",
            f"A version of `{short}` from which one direction of the residual stream was taken out of the weights",
            "with [abliterate](https://pypi.org/project/abliterate/), without training.",
            "",
            "## What was done",
            "",
            *_what_was_done(record),
            "",
            *(_measured(record.evaluation) if record.evaluation else []),
            "## Responsible use",
            "",
            NOTICE,
            "## Details",
            "",
            "`abliteration.json` holds every setting, hash, score and count of this run; `direction.safetensors` holds",
            "the direction. The method is that of Arditi et al. 2024, *Refusal in Language Models Is Mediated by a",
            "Single Direction* (arXiv:2406.11717).",
            "",
        ]
    )


def _front_matter(record: Record) -> str:
    from huggingface_hub import ModelCardData

    base = record.model.name if record.model.kind == "hub" else None
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["abliterated", "activation-steering", "interpretability", "uncensored"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _what_was_done(record: Record) -> list[str]:
    lines = []
    if record.plan is not None:
        worst = max((edit.ratio for edit in record.plan.edits), default=0.0)
        lines.append(
            f"- {len(record.plan.edits)} tensors that write to the residual stream were edited with strength "
            f"{record.plan.strength:g}; at most {worst:.2%} of what each wrote along the direction is left (rounding)."
        )
        lines += [f"- `{name}` was left alone: {why}." for name, why in record.plan.left_alone.items()]
    if (selection := record.selection) is not None and (site := selection.chosen) is not None:
        lines.append(
            f"- The direction is the difference of means at layer {site.layer} of {record.model.layers}, position "
            f"{site.position}: bypass {site.bypass:.2f} (before: {selection.harmful:.2f}), induce {site.induce:.2f} "
            f"(before: {selection.harmless:.2f}), KL {site.kl:.3f}. A random direction of the same norm: bypass "
            f"{selection.control.bypass:.2f}, induce {selection.control.induce:.2f}."
        )
    return [*lines, *(f"- Warning: {warning}" for warning in record.warnings)]


def _measured(evaluation: EvaluationPart) -> list[str]:
    shift = evaluation.shift
    return [
        "## Measured on held-out prompts",
        "",
        "| refused | before | after |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {rate(getattr(evaluation.before, name))} | {rate(getattr(evaluation.after, name))} |"
            for name in ("harmful", "harmless", "borderline")
        ),
        "",
        f"Answers to {shift.prompts} harmless prompts: KL of the first token {shift.kl_first_token:.3f}, over the "
        f"reply {shift.kl_reply:.3f} nats per token; the original's own replies cost {shift.nll_before:.3f} nats per "
        f"token before and {shift.nll_after:.3f} after. Refusals are counted by phrases in greedy replies of at most "
        f"{evaluation.max_new_tokens} tokens; brackets are 95 % Wilson intervals.",
        "",
    ]


def rate(part: RatePart) -> str:
    """'41/100 = 41 % [32, 51]', with the number of degenerate replies when there are any."""
    if not part.n:
        return "no prompts"
    low, high = part.ci95
    text = f"{part.refusals}/{part.n} = {100 * part.refusals / part.n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return text + (f" +{part.degenerate} degenerate" if part.degenerate else "")
