"""The lab: the original and the edited model side by side in a browser, from one model that is loaded once."""

from __future__ import annotations

from abliterate.lab.bench import Bench, Controls, FirstToken, Heat, Intervention
from abliterate.lab.keeping import apply_plan, load_plan, save_plan
from abliterate.lab.opening import open_bench
from abliterate.lab.serving import running, serve
from abliterate.lab.ui import build

__all__ = [
    "Bench",
    "Controls",
    "FirstToken",
    "Heat",
    "Intervention",
    "apply_plan",
    "build",
    "load_plan",
    "open_bench",
    "running",
    "save_plan",
    "serve",
]
