"""Side-by-side chat: the same prompt to the original and to the ablated model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from abliterate.generation import complete
from abliterate.inference import auto_batch_size, share_prefix
from abliterate.interventions import ablation
from abliterate.models import LoadedModel
from abliterate.plan import Plan
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
    console = Console()
    for prompt in prompts or _lines(console):
        encoded = share_prefix(renderer.encode([prompt]), share=False)
        size = auto_batch_size(loaded.model)
        (original,) = complete(loaded.model, loaded.tokenizer, encoded, max_new_tokens, size)
        with ablation(loaded.model, plan):
            (ablated,) = complete(loaded.model, loaded.tokenizer, encoded, max_new_tokens, size)
        if as_json:
            line = {"prompt": prompt, "original": original.text, "ablated": ablated.text}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
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
