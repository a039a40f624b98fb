"""The model card: what was done to a model, what that measured, and what to mind. Never imports torch.

Names, warnings and all else that comes from models, files and judges stand in it as text, never as Markdown or HTML.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from abliterate.errors import AbliterateError
from abliterate.files.atomic import write_atomically
from abliterate.files.checkpoint import CARD
from abliterate.files.checkpoint.reading import open_source
from abliterate.record import (
    EvaluationPart,
    PlanPart,
    RatePart,
    Record,
    grouped,
)
from abliterate.report.wording import (
    SETS,
    _between,
    drifted,
    edited,
    estimate,
    intervals_of,
    judged_by,
    rate,
    replies_of,
    states_of,
    words_of,
)
from abliterate.texts import markdown, markdown_code, printable

NOTICE = """\
This model was made for research on how safety behaviour is represented and how brittle it is. Its safety training
has been weakened on purpose: it will answer requests that the original declines. Whoever runs it is responsible for
what it is used for. Do not deploy it where people rely on it to refuse, and keep the licence of the original model.
"""


NEUTRAL_NOTICE = """\
This model was made for research on how safety behaviour is represented. Its behaviour differs from the original's in
ways that were measured only as far as this card says. Keep the licence of the original model.
"""


#: Of a card, in bytes and characters: what is longer tells no licence.
_LONGEST_CARD, _LONGEST_ENTRY, _LONGEST_VALUE, _MOST_VALUES = 1 << 18, 1 << 12, 300, 200

_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)

#: An entry that is wanted, with the lines that belong to it. All others are left unread: YAML can take for ever.
_ENTRY = re.compile(r"^(?:license|license_name|license_link|language):(?=\s).*(?:\n(?:[ \t]+\S|- ).*)*", re.MULTILINE)

_LIBRARIES = {
    "weights": "transformers",
    "gguf": "gguf",
    "lora": "peft",
    "gguf-lora": "gguf",
    "control-vector": "gguf",
}

#: Title and first sentence, by what was written.
_WHAT = {
    "weights": (
        "abliterated",
        "A version of {name} whose weights were edited along {what} of the residual stream with abliterate,\n"
        "without training.",
    ),
    "gguf": (
        "abliterated, as GGUF",
        "A version of {name} whose weights were edited along {what} of the residual stream with abliterate,\n"
        "without training, and then converted with llama.cpp. What was measured was measured before the conversion.",
    ),
    "lora": (
        "abliteration adapter",
        "A LoRA adapter that edits what {name} writes to the residual stream along {what}. Made with\n"
        "abliterate, without training; the model itself is not changed.",
    ),
    "gguf-lora": (
        "abliteration adapter for llama.cpp",
        "A GGUF LoRA that edits what {name} writes to the residual stream along {what}. Made with\n"
        "abliterate, without training; the model itself is not changed.",
    ),
    "control-vector": (
        "control vector for llama.cpp",
        "A vector to add to the residual stream of {name} at every token, made with abliterate. It steers; that\n"
        "is not the same as taking the direction out.",
    ),
}


def _how_to_use(plan: PlanPart) -> list[str]:
    """How a file for llama.cpp, an adapter or a vector is loaded; a model is loaded like any other."""
    if plan.realisation == "weights":
        return []
    if plan.realisation == "gguf":
        how = [f"    llama-cli -m {shlex.quote(printable(plan.files[0]))}", "    ollama create NAME -f Modelfile"]
    elif plan.realisation == "lora" and any(
        "/" in name for name in plan.files
    ):  # PEFT allows biases only in an adapter of their own
        how = [
            "Two adapters that belong together (`m` is the loaded model, `here` this folder):",
            "",
            "    m.load_adapter(f'{here}/plain', adapter_name='plain')",
            "    m.load_adapter(f'{here}/biased', adapter_name='biased')",
            "    m.set_adapter(['plain', 'biased'])",
            "",
            "or, with peft,",
            "",
            "    m = peft.PeftModel.from_pretrained(m, f'{here}/plain', adapter_name='plain')",
            "    m.load_adapter(f'{here}/biased', adapter_name='biased')",
            "    m.base_model.set_adapter(['plain', 'biased'], inference_mode=True)",
        ]
    elif plan.realisation == "lora":
        how = ["    peft.PeftModel.from_pretrained(model, here)    # or model.load_adapter(here)"]
    else:
        flag = "--lora" if plan.realisation == "gguf-lora" else "--control-vector"
        how = [f"    llama-cli -m model.gguf {flag} {shlex.quote(printable(plan.files[0]))}"]
    return ["## How to use it", "", *how, ""]


def _weakened(record: Record) -> bool:
    other = record.prompts is not None and record.prompts.behaviour is not None
    return not other and (record.plan is None or record.plan.strength > 0)


def write_card(record: Record, folder: Path) -> Path:
    """Write README.md into `folder`, replacing the original's card, which would describe another model."""
    path = folder / CARD
    write_atomically(path, render_card(record, _licence(path)))
    return path


def render_card(record: Record, licence: dict[str, Any] | None = None) -> str:
    """The card as Markdown with the hub's YAML front matter."""
    name = record.model.name.rstrip("/")
    short = Path(name).name
    realisation = "weights" if record.plan is None else record.plan.realisation
    return "\n".join(
        [
            _front_matter(record, licence or {}),
            f"# {markdown(short)}, {_WHAT[realisation][0]}",
            "",
            _WHAT[realisation][1].format(
                name=markdown_code(short), what=_directions(1 if record.plan is None else record.plan.rank)
            ),
            "",
            *(_how_to_use(record.plan) if record.plan else []),
            "## What was done",
            "",
            *_what_was_done(record),
            "",
            *(_measured(record.evaluation) if record.evaluation else []),
            "## Responsible use",
            "",
            NOTICE if _weakened(record) else NEUTRAL_NOTICE,
            "## Details",
            "",
            "`abliteration.json` holds every setting, hash, score and count of this run; `direction.safetensors` holds",
            "the direction. The method is that of Arditi et al. 2024, *Refusal in Language Models Is Mediated by a",
            "Single Direction* (arXiv:2406.11717).",
            "",
        ]
    )


def _licence(readme: Path) -> dict[str, Any]:
    """Licence and languages from the original's card, which stay true; nothing of a card that cannot be read."""
    import yaml

    found: dict[str, Any] = {}
    try:
        with open(open_source(readme), "rb") as file:
            text = file.read(_LONGEST_CARD).decode(errors="replace")
        match = _FRONT_MATTER.match(text)
        for entry in _ENTRY.finditer(match[1]) if match else ():
            if len(entry[0]) <= _LONGEST_ENTRY and entry[0].count("[") < 2 and not re.search("[{&*!]", entry[0]):
                found |= yaml.safe_load(entry[0])
    except (AbliterateError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: value for key, value in found.items() if value and _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether a value of a card is a short text, or a few of them."""
    if isinstance(value, list):
        return len(value) <= _MOST_VALUES and all(isinstance(one, str) and _is_plain(one) for one in value)
    return isinstance(value, str) and len(value) <= _LONGEST_VALUE and value.isprintable()


def _front_matter(record: Record, licence: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = printable(record.model.name) if record.model.kind == "hub" else None
    data = ModelCardData(
        base_model=base,
        library_name=_LIBRARIES["weights" if record.plan is None else record.plan.realisation],
        pipeline_tag="text-generation",
        tags=["activation-steering", "interpretability", *(["abliterated", "uncensored"] if _weakened(record) else [])],
        **{name: _printable(value) for name, value in licence.items()},
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _printable(value: Any) -> Any:
    """A value of front matter, a text or a list of such, as texts that can be seen."""
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def _what_was_done(record: Record) -> list[str]:
    lines = []
    if record.plan is not None:
        if record.plan.edits:
            lines.append(f"- Of the tensors that write to the residual stream, {edited(record.plan)}.")
        elif record.plan.realisation != "control-vector":
            lines.append(f"- {len(record.plan.strengths)} writers are changed, with strength {_between(record.plan)}.")
        if record.plan.variant:
            asked = ", ".join(f"{name} {value}" for name, value in record.plan.variant.items())
            lines.append(f"- The edit: {markdown(asked.replace('_', '-'))}.")
        lines += [f"- {markdown(what)}: left alone, {markdown(why)}." for what, why in grouped(record.plan.left_alone)]
    if (selection := record.selection) is not None and (site := selection.chosen) is not None:
        subspace = record.settings.get("finding", {}).get("subspace", "mean")
        what = "The direction is" if subspace == "mean" else f"The edit ({markdown(str(subspace))}) was made around"
        if record.search is not None:
            what = "The search began at"
        lines.append(
            f"- {what} the difference of means at layer {site.layer} of {record.model.layers}, position "
            f"{site.position}: bypass {site.bypass:.2f} (before: {selection.harmful:.2f}), induce {site.induce:.2f} "
            f"(before: {selection.harmless:.2f}), KL {site.kl:.3f}. A random direction of the same norm: bypass "
            f"{selection.control.bypass:.2f}, induce {selection.control.induce:.2f}."
        )
    if (search := record.search) is not None:
        lines.append(
            f"- Strengths and directions were searched ({markdown(search.method)}); of {len(search.points)} points "
            f"between less {_less_of(record)} and less damage, number {search.chosen} was taken "
            f"({markdown(search.why)})."
        )
    return [*lines, *(f"- Warning: {markdown(warning)}" for warning in record.warnings)]


def _less_of(record: Record) -> str:
    sought = None if record.prompts is None else record.prompts.behaviour
    return "refusal" if sought is None else f"of what was looked for ({markdown(sought.name)})"


def _measured(evaluation: EvaluationPart) -> list[str]:
    measured, words = states_of(evaluation), words_of(evaluation.behaviour)
    names = [name.replace("random", "random direction") for name, _, _ in measured]
    rows = {name: [getattr(behaviour, name) for _, behaviour, _ in measured] for name in SETS}
    lines = [
        "## Measured on held-out prompts",
        "",
        f"| {markdown(words.shown)} | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(measured)}",
        *(
            f"| {markdown(words(name))} | {' | '.join(map(_with_correction, rates))} |"
            for name, rates in rows.items()
            if not words.sets or any(part.n for part in rates)
        ),
        "",
        markdown(replies_of(evaluation.max_new_tokens, evaluation.decoding))
        + f"; brackets are {intervals_of(evaluation.decoding)}. "
        + ("" if evaluation.judge is None else markdown(judged_by(evaluation.judge)))
        + markdown(f" {drifted(measured)}".rstrip()),
        "",
    ]
    return [*lines, *_shifted(evaluation), *_capable(evaluation)]


def _with_correction(part: RatePart) -> str:
    return rate(part) + ("" if part.corrected is None else f"; corrected {estimate(part.corrected, 100, '.0f')}")


def _shifted(evaluation: EvaluationPart) -> list[str]:
    shift = evaluation.shift
    if shift is None or shift.kl_first_token is None or shift.kl_reply is None:
        return []
    less = markdown(words_of(evaluation.behaviour)("harmless"))
    text = (
        f"Answers to {shift.prompts} {less} prompts: KL of the first token {shift.kl_first_token:.3f}, over the "
        f"reply {shift.kl_reply:.3f} nats per token; the original's own replies have an NLL of "
        f"{shift.nll_before:.3f} nats per token before and {shift.nll_after:.3f} after."
    )
    control = None if evaluation.control is None else evaluation.control.shift
    if control is not None and control.kl_first_token is not None and control.kl_reply is not None:
        text += (
            f" A random direction of the same strength, on {control.prompts} prompts: KL of the first token "
            f"{control.kl_first_token:.3f}, over the reply {control.kl_reply:.3f}."
        )
    return [text, ""]


def _capable(evaluation: EvaluationPart) -> list[str]:
    if not evaluation.capability:
        return []
    rows = [
        f"| {markdown(part.task)} | {markdown(part.metric)} | {part.n} | {estimate(part.before, 1, '.3f')} | "
        f"{'' if part.after is None else estimate(part.after, 1, '.3f')} |"
        for part in evaluation.capability
    ]
    return ["| capability | metric | questions | before | after |", "| --- | --- | --- | --- | --- |", *rows, ""]


def _directions(rank: int) -> str:
    return "one direction" if rank == 1 else f"{rank} directions"
