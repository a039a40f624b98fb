"""Numbers as HTML. Every text is escaped, braces and dollars too: the page's own templates shall find nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from abliterate.edit.direction import Site
from abliterate.lab.bench import FirstToken, Heat

#: Cells of the map, and sites to choose from: a page stays small whatever a plan holds.
_MOST_SITES = 2000

_TEMPLATE = str.maketrans({character: f"&#{ord(character)};" for character in "{}$`\\"})


def escape(text: str) -> str:
    """Text that is only ever text, in elements and in quoted attributes."""
    return html.escape(text, quote=True).translate(_TEMPLATE)


def note(text: str) -> str:
    """A line in place of numbers that there are none of."""
    return f'<p class="lab-note">{escape(text)}</p>'


def first_token(found: FirstToken) -> str:
    """Two bars and a number."""
    bars = "".join(
        f'<div class="lab-bar"><span>{name}</span><div role="img" aria-label="{value:.1%}">'
        f'<i style="width:{value:.2%}"></i></div><b data-value="{value:.9f}" data-of="{name}">{value:.1%}</b></div>'
        for name, value in (("original", found.original), ("plan", found.edited))
    )
    return (
        f'<div class="lab-first"><p class="lab-title">Reply starts with a refusal</p>{bars}'
        f'<p class="lab-kl">KL of the first token against the original '
        f'<b data-value="{found.kl:.9f}" data-of="kl">{found.kl:.4f}</b> nats</p></div>'
    )


def positions_shown(sites: int) -> int:
    """How many positions from the end are shown, where each has so many sites."""
    return max(1, _MOST_SITES // max(1, sites))


def heat_map(heat: Heat | None, sites: Sequence[Site], selected: Site | None) -> str:
    """A table of buttons, layers from left to right, positions downwards; strong colour where numbers are good."""
    if heat is None:
        return note("The direction file holds one direction only: there are no other sites to choose.")
    whole, values = len(heat.values), heat.values[: positions_shown(heat.values.shape[1])]
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    known = set(sites)
    rows = []
    for row, cells_of in enumerate(values.tolist()):
        position = -1 - row
        cells = "".join(
            _cell(
                Site(layer, position), value, _shade(value, low, high, heat.best), (layer, position) in known, selected
            )
            for layer, value in enumerate(cells_of)
        )
        rows.append(f'<tr><th scope="row">{position}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{layer if layer % 4 == 0 else ""}</th>' for layer in range(values.shape[1]))
    left_out = "" if whole == len(values) else f"; positions {-1 - len(values)} to {-whole} are not shown"
    worst, best = (high, low) if heat.best == "low" else (low, high)
    return (
        f'<div class="lab-heat"><p class="lab-title">{escape(heat.what)}</p><div class="lab-scroll"><table>'
        f'<thead><tr><th scope="col" title="position from the end of the prompt">pos.</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="lab-legend"><span>{worst:.2f}</span><i></i><span>{best:.2f} (best)</span>'
        f"<span>columns: layers; a click takes that site{left_out}</span></p></div>"
    )


def _cell(site: Site, value: float, shade: float, known: bool, selected: Site | None) -> str:
    layer, position = site
    said = "not scored" if math.isnan(value) else f"{value:.3f}"
    label = f"layer {layer}, position {position}: {said}"
    chosen = ' aria-pressed="true"' if site == selected else ""
    dead = "" if known else " disabled"
    style = "" if math.isnan(value) else f' style="--shade:{shade:.0%}"'
    return (
        f'<td><button type="button" data-site="{layer}:{position}" title="{label}" aria-label="{label}"'
        f"{chosen}{dead}{style}></button></td>"
    )


def _shade(value: float, low: float, high: float, best: str) -> float:
    """0 for the worst, 1 for the best."""
    if math.isnan(value) or high <= low:
        return 0.0
    share = (value - low) / (high - low)
    return 1 - share if best == "low" else share


def tokens(sides: Sequence[tuple[str, Sequence[str], Sequence[float]]], layer: int) -> str:
    """Replies token by token, coloured on one scale around zero: blue below, orange above."""
    most = max((abs(value) for _, _, values in sides for value in values), default=0.0)
    blocks = "".join(
        f'<div class="lab-reply"><p class="lab-title">{escape(name)}</p><p class="lab-tokens">'
        + "".join(_token(text, value, most) for text, value in zip(texts, values, strict=True))
        + "</p></div>"
        for name, texts, values in sides
    )
    return (
        f'<div class="lab-trace">{blocks}<p class="lab-legend lab-both"><span>−{most:.2f}</span><i></i>'
        f"<span>+{most:.2f}</span><span>projection on the direction at layer {layer}</span></p></div>"
    )


def _token(text: str, value: float, most: float) -> str:
    share = abs(value) / most if most else 0.0
    side = "above" if value > 0 else "below"
    shown = escape(text.replace("\n", "↵")) + ("<br>" if "\n" in text else "")
    return f'<span class="lab-{side}" style="--shade:{share:.0%}" title="{value:+.3f}">{shown}</span>'
