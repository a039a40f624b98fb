"""A reading as one HTML page that needs nothing else: tokens shaded by their projection, with a choice of layers.

The same rules as the report's: texts are escaped, data stand as JSON, the policy allows the page's own style and script
and no request. Never imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from abliterate.errors import UsageError
from abliterate.files.atomic import refuse_other_kinds, write_atomically
from abliterate.record import ReadingPart, ReadTextPart
from abliterate.report.html import hash_of, json_of, template, text_of
from abliterate.report.wording import reading_said, shade, shade_colour, shade_scale, token_shown

#: Numbers that a page holds: what has more is cut.
_MOST_NUMBERS = 300_000

_STEPS = range(-10, 11)


def render_reading(part: ReadingPart) -> str:
    """The page as HTML. Texts that do not fit are left out, which is said."""
    shown: list[ReadTextPart] = []
    numbers = 0
    for text in part.texts:
        numbers += len(text.tokens) * len(part.layers)
        if shown and numbers > _MOST_NUMBERS:
            break
        shown.append(text)
    part = part.model_copy(update={"texts": shown, "left_out": part.left_out + len(part.texts) - len(shown)})
    place = part.layers.index(part.layer)
    scales = [shade_scale(part, number) for number in range(len(part.layers))]
    style, script = text_of("style.css") + text_of("reading.css") + _shades(), text_of("reading.js")
    policy = (
        f"default-src 'none'; script-src {hash_of(script)}; style-src {hash_of(style)}; base-uri 'none'; "
        "form-action 'none'"
    )
    data = {
        "layers": part.layers,
        "shown": place,
        "scales": scales,
        "said": [reading_said(part, number) for number in range(len(part.layers))],
        "texts": [text.projections for text in shown],
    }
    return template("reading.html.j2").render(
        part=part,
        title=_last(part.model),
        along=_last(part.direction),
        said=reading_said(part, place),
        scale=scales[place],
        texts=[_tokens(text, place, scales[place]) for text in shown],
        steps=[_class(step) for step in _STEPS],
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(json_of(data)),
    )


def check_page(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` where a page cannot be written, or stands already."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {out}: expected a file name ending in .html")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; give another -o or --overwrite")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"-o {out}: expected a file in a folder that exists")
    refuse_other_kinds(out)


def write_reading(part: ReadingPart, path: Path) -> Path:
    """Write the page to `path`. Raises `CheckpointError` when it cannot be written."""
    write_atomically(path, render_reading(part).encode(errors="replace"))
    return path


def _last(name: str) -> str:
    """The end of a path: where it lies says nothing to whoever the page is sent to."""
    return name.rstrip("/").rsplit("/", 1)[-1] or name


def _tokens(text: ReadTextPart, place: int, scale: float) -> list[dict[str, Any]]:
    return [
        {
            "text": token_shown(token),
            "value": f"{value:.3f}",
            "shade": _class(shade(value, scale)),
            "reply": number >= text.prompt,
        }
        for number, (token, value) in enumerate(zip(text.tokens, text.projections[place], strict=True))
    ]


def _class(step: int) -> str:
    return f"{'n' if step < 0 else 'p'}{abs(step)}"


def _shades() -> str:
    return "".join(f".{_class(step)}{{background:rgb{shade_colour(step)}}}" for step in _STEPS).replace(" ", "")
