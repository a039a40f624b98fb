"""`abliterate inspect`: whether a model was abliterated, and along what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, Quiet, joined, monitor_for, refuse_idle, say
from abliterate.cli.options import with_settings
from abliterate.config import (
    InspectSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.errors import GateNotMet
from abliterate.report.tables.forensics import show_inspection

if TYPE_CHECKING:
    pass

#: Exit code of an inspection that neither found an edit nor could rule one out.
UNDECIDED = 4


@dataclass(frozen=True, slots=True)
class _Groups:
    inspecting: InspectSettings
    loading: ModelSettings
    prompts: PromptSettings
    replies: ReplySettings
    thinking: ThinkingSettings


@with_settings
def inspect(
    given: _Groups,
    /,
    *,
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf, .safetensors file or shard.", show_default=False)
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Was a direction taken out of this checkpoint? Which, where, how strongly? Give the model that it was made from as
    --base: by itself a checkpoint shows strong edits only.

    Exit codes: 0 no direction was taken out (beside --base, or as far as --rule-out asks), 3 one was, 4 not decided:
    no trace was found, which light edits and those of a search do not leave.
    """
    inspecting = given.inspecting
    if not (inspecting.activations or inspecting.behavioural):
        refuse_idle("inspect without --activations or --behavioural", given.prompts)
    if not inspecting.behavioural:
        refuse_idle("inspect without --behavioural", given.replies, given.thinking)
    from abliterate.forensics.inspect import inspect as inspect_model

    evaluating = joined(given.replies, given.thinking)
    measuring = MeasureSettings(loading=given.loading, prompts=given.prompts, evaluating=evaluating)
    part = inspect_model(model, inspecting, measuring, monitor_for(quiet))
    say(part, show_inspection, as_json)
    if part.verdict == "altered":
        raise typer.Exit(GateNotMet.exit_code)
    if not part.decided:
        raise typer.Exit(UNDECIDED)
