"""Side-by-side chat: the same prompt to the original and to the ablated model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

from abliterate.cli.arguments import (
    Json,
    OptionalDirection,
    Quiet,
    SiteOption,
    monitor_for,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.config import EditSettings, ModelSettings
from abliterate.texts.terminal import nobody_reads, plain, terminal, write, write_json

if TYPE_CHECKING:
    from abliterate.edit.plan import Plan
    from abliterate.model.loading import LoadedModel
    from abliterate.prompts import ChatRenderer


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is answered, at what length at most. Without prompts, lines are read from the terminal or from stdin."""

    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Longest answer, in tokens.")] = 200
    prompt: Annotated[
        list[str] | None, typer.Option(help="Answer this and end; may be given several times.", show_default=False)
    ] = None


def converse(loaded: LoadedModel, renderer: ChatRenderer, plan: Plan, talk: Conversation, *, as_json: bool) -> None:
    """Answer each prompt twice."""
    from abliterate.edit.hooks import ablation
    from abliterate.model.batches import auto_batch_size, share_prefix
    from abliterate.model.generation import complete
    from abliterate.record import ComparedAnswersPart

    console = terminal()
    for prompt in talk.prompt or _lines(console):
        if nobody_reads():
            return
        encoded = share_prefix(renderer.encode([prompt]), share=False)
        size = auto_batch_size(loaded.model)
        (original,) = complete(loaded.model, loaded.tokenizer, encoded, talk.max_new_tokens, size)
        with ablation(loaded.model, plan):
            (ablated,) = complete(loaded.model, loaded.tokenizer, encoded, talk.max_new_tokens, size)
        if as_json:
            line = ComparedAnswersPart(prompt=prompt, original=original.text, ablated=ablated.text)
            write_json(line.model_dump_json())
            continue
        width = max(30, console.width // 2 - 1)
        panels = [
            Panel(plain(original.text, lines=True), title="original", width=width),
            Panel(plain(ablated.text, lines=True), title="ablated", width=width),
        ]
        write(console, Columns(panels))


def _lines(console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    write(console, "One prompt a line; an empty line or Ctrl-D ends.", style="dim")
    while True:
        try:
            prompt = console.input(plain("> ", "bold")).strip()
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
    model: Annotated[
        str, typer.Argument(metavar="OUT|MODEL", help="What `run` or `apply` wrote, or a model.", show_default=False)
    ],
    direction: OptionalDirection = None,
    site: SiteOption = None,
    talk: Conversation,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The original's and the ablated model's answer to the same prompt, side by side; OUT's record knows both."""
    from abliterate.edit.options import plan_for
    from abliterate.lab.opening import with_direction
    from abliterate.session import open_model

    monitor, chosen = monitor_for(quiet), site_of(site)
    with monitor.phase("find model"):
        known = with_direction(model, direction, given.loading)
    opened = open_model(known.files, known.loading, monitor)
    plan = plan_for(opened.anatomy, known.direction.at(chosen, opened.anatomy.d_model), given.editing)
    converse(opened.loaded, opened.renderer, plan, talk, as_json=as_json)
