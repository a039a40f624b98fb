"""What a repair did, in words and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from abliterate.cli.evaluating import show_evaluation
from abliterate.parts import evaluation_part
from abliterate.repairing import Repaired

_HOW = {
    "undo": "Restored with what the edit kept for undo",
    "base": "Restored from the base",
    "adapter": "Restored by taking the merged adapter out",
    "approximation": "Repaired approximately, by a rank-one addition fitted on prompts",
}


def show_repaired(done: Repaired, console: Console) -> None:
    """How exact it is comes first."""
    console.print(f"[bold]{_HOW[done.how]}.[/]", highlight=False)
    for count, what in (
        (len(done.exact), "the original's bytes"),
        (len(done.restored), "restored, not byte for byte"),
        (len(done.added), "with an addition"),
    ):
        if count:
            console.print(f"{count} {'files' if done.how == 'undo' and what.startswith('the') else 'tensors'}: {what}.")
    if done.note:
        console.print(escape(done.note[0].upper() + done.note[1:] + "."), highlight=False)
    if done.evaluation is not None:
        show_evaluation(evaluation_part(done.evaluation), console)
    console.print(f"Model: [bold]{escape(str(done.folder))}[/]", soft_wrap=True)


def repaired_as_dict(done: Repaired) -> dict[str, Any]:
    """The same for machines."""
    return {
        "folder": str(done.folder),
        "how": done.how,
        "exact": list(done.exact),
        "restored": list(done.restored),
        "added": list(done.added),
        "note": done.note,
        "size": done.size,
        "evaluation": None if done.evaluation is None else evaluation_part(done.evaluation).model_dump(mode="json"),
    }
