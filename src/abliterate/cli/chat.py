"""Side-by-side chat: the same prompt to the original and to the ablated model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from abliterate.cli.arguments import (
    DirectionFile,
    Json,
    Model,
    Quiet,
    SiteOption,
    monitor_for,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.config import EditSettings, ModelSettings

if TYPE_CHECKING:
    from abliterate.edit.plan import Plan
    from abliterate.model.loading import LoadedModel
    from abliterate.prompts import ChatRenderer


def converse(
    loaded: LoadedModel,
    renderer: ChatRenderer,
    plan: Plan,
    prompts: Iterable[str] | None,
    max_new_tokens: int,
    *,
    as_json: bool,
) -> None:
    """Answer each prompt twice. Without `prompts`, lines are read from the terminal or from stdin."""
    from abliterate.edit.hooks import ablation
    from abliterate.model.batches import auto_batch_size, share_prefix
    from abliterate.model.generation import complete
    from abliterate.record import ComparedAnswersPart

    console = Console()
    for prompt in prompts or _lines(console):
        encoded = share_prefix(renderer.encode([prompt]), share=False)
        size = auto_batch_size(loaded.model)
        (original,) = complete(loaded.model, loaded.tokenizer, encoded, max_new_tokens, size)
        with ablation(loaded.model, plan):
            (ablated,) = complete(loaded.model, loaded.tokenizer, encoded, max_new_tokens, size)
        if as_json:
            line = ComparedAnswersPart(prompt=prompt, original=original.text, ablated=ablated.text)
            sys.stdout.write(line.model_dump_json() + "\n")
            sys.stdout.flush()
            continue
        width = max(30, console.width // 2 - 1)
        panels = [
            Panel(Text(original.text), title="original", width=width),
            Panel(Text(ablated.text), title="ablated", width=width),
        ]
        console.print(Columns(panels))


def _lines(console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    console.print("[dim]One prompt a line; an empty line or Ctrl-D ends.[/]")
    while True:
        try:
            prompt = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    editing: EditSettings


@with_settings
def chat(
    given: _Groups,
    /,
    *,
    model: Model,
    direction: DirectionFile,
    site: SiteOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Answer this and end; may be given several times.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The original's and the ablated model's answer to the same prompt, side by side."""
    from abliterate.edit.direction import load_direction
    from abliterate.edit.options import plan_for
    from abliterate.session import open_model

    loaded = load_direction(direction)
    chosen = site_of(site)
    live, renderer, anatomy = open_model(model, given.loading, monitor_for(quiet))
    plan = plan_for(anatomy, loaded.at(chosen, anatomy.d_model), given.editing)
    converse(live, renderer, plan, prompt, max_new_tokens, as_json=as_json)
