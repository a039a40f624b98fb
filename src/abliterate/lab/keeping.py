"""Plans as files: saved, loaded, applied. A name from a browser is a plain name in the folder the lab works in."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from abliterate import pipeline
from abliterate.config import ApplySettings, FileSettings, OutputSettings
from abliterate.edit.direction import Direction, load_direction, save_direction
from abliterate.edit.options import plan_for
from abliterate.errors import UsageError
from abliterate.lab.bench import Bench, Controls
from abliterate.monitor import Monitor

SUFFIX = ".safetensors"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def place(root: Path, name: str, suffix: str = "") -> Path:
    """Where `name` would lie in `root`; raises `UsageError` for anything but a plain name that is free."""
    if not _NAME.fullmatch(name):
        raise UsageError("name: expected letters, digits, '.', '_' and '-' (a name, no path), found another")
    path = root / (name if name.endswith(suffix) else name + suffix)
    if os.path.lexists(path):
        raise UsageError(f"name: expected one that is free, found {path.name} in {root}; choose another")
    return path


def save_plan(bench: Bench, controls: Controls, name: str) -> Path:
    """Write the plan as a direction file that needs no further settings, and return where it lies."""
    path = place(bench.root, name, SUFFIX)
    save_direction(path, bench.recipe(controls))
    return path


def load_plan(bench: Bench, path: Path) -> Direction:
    """The direction of an uploaded file, once it is known to fit the model.

    Raises `UsageError` for another file, another model's, or one whose plan cannot be made.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"plan: expected a {SUFFIX} file, found another")
    try:
        direction = load_direction(path, bench.anatomy.d_model)
    except UsageError as error:  # the path is a passing one
        raise UsageError(str(error).replace(f"direction file '{path}'", f"plan '{path.name}'")) from error
    candidates = direction.candidates
    if candidates is not None and candidates.raw.shape[1] != bench.anatomy.layers + 1:
        raise UsageError(
            f"plan '{path.name}': expected {bench.anatomy.layers + 1} sites, found {candidates.raw.shape[1]}"
        )
    plan_for(bench.anatomy, direction)
    return direction


def apply_plan(
    bench: Bench, controls: Controls, name: str, realisation: Literal["weights", "lora"], monitor: Monitor
) -> Path:
    """Write the model with the plan in its weights, or a LoRA adapter, into a new folder, and return where it lies."""
    out = place(bench.root, name)
    files = FileSettings.model_validate({key: getattr(bench.loading, key) for key in FileSettings.model_fields})
    with tempfile.TemporaryDirectory() as folder:
        direction = Path(folder) / "direction.safetensors"
        save_direction(direction, bench.recipe(controls))
        settings = ApplySettings(output=OutputSettings(out=out, realisation=realisation), loading=files)
        pipeline.apply(str(bench.loaded.files.folder), direction, settings, monitor=monitor)
    return out
