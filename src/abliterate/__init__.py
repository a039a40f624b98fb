"""Find, prove and edit behavioural directions in open-weight language models.

Names are loaded when first used: importing this package does not import torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from abliterate._version import __version__ as __version__

if TYPE_CHECKING:
    from abliterate.api.calls import apply as apply
    from abliterate.api.calls import audit as audit
    from abliterate.api.calls import chat as chat
    from abliterate.api.calls import compare as compare
    from abliterate.api.calls import evaluate as evaluate
    from abliterate.api.calls import find as find
    from abliterate.api.calls import harden as harden
    from abliterate.api.calls import inspect as inspect
    from abliterate.api.calls import judge as judge
    from abliterate.api.calls import load_prompts as load_prompts
    from abliterate.api.calls import open_lab as open_lab
    from abliterate.api.calls import push as push
    from abliterate.api.calls import read as read
    from abliterate.api.calls import repair as repair
    from abliterate.api.calls import run as run
    from abliterate.api.calls import search as search
    from abliterate.api.calls import show as show
    from abliterate.api.calls import steer as steer
    from abliterate.api.calls import undo as undo
    from abliterate.api.calls import verify as verify
    from abliterate.api.calls import verify_files as verify_files
    from abliterate.api.calls import write_report as write_report
    from abliterate.api.model import Model as Model
    from abliterate.api.model import load as load
    from abliterate.api.model import wrap as wrap
    from abliterate.api.progress import quiet as quiet
    from abliterate.api.results import DoseResponse as DoseResponse
    from abliterate.api.results import FoundDirection as FoundDirection
    from abliterate.api.results import Front as Front
    from abliterate.config import EditSettings as EditSettings
    from abliterate.config import EvalSettings as EvalSettings
    from abliterate.config import FindSettings as FindSettings
    from abliterate.config import HardenSettings as HardenSettings
    from abliterate.config import InspectSettings as InspectSettings
    from abliterate.config import MeasureSettings as MeasureSettings
    from abliterate.config import ModelSettings as ModelSettings
    from abliterate.config import OutputSettings as OutputSettings
    from abliterate.config import PromptSettings as PromptSettings
    from abliterate.config import RepairSettings as RepairSettings
    from abliterate.config import ReplySettings as ReplySettings
    from abliterate.config import RunSettings as RunSettings
    from abliterate.config import SearchSettings as SearchSettings
    from abliterate.config import SteerSettings as SteerSettings
    from abliterate.edit.direction import Direction as Direction
    from abliterate.edit.direction import Site as Site
    from abliterate.edit.direction import load_direction as load_direction
    from abliterate.edit.direction import save_direction as save_direction
    from abliterate.edit.gguf import read_control_vector as read_control_vector
    from abliterate.edit.hooks import ablation as ablation
    from abliterate.edit.hooks import addition as addition
    from abliterate.edit.options import plan_for as plan_for
    from abliterate.edit.plan import Plan as Plan
    from abliterate.edit.plan import compose as compose
    from abliterate.edit.plan import make_plan as make_plan
    from abliterate.edit.steering import SteeringVectors as SteeringVectors
    from abliterate.errors import AbliterateError as AbliterateError
    from abliterate.errors import GateNotMet as GateNotMet
    from abliterate.finding.find import choose as choose
    from abliterate.model.anatomy import Anatomy as Anatomy
    from abliterate.model.anatomy import study as study
    from abliterate.prompts import Behaviour as Behaviour
    from abliterate.prompts import load_behaviour as load_behaviour
    from abliterate.record import Record as Record
    from abliterate.record import read_record as read_record
    from abliterate.session import Session as Session
    from abliterate.session import open_session as open_session

#: How often a thread of torch (GNU OpenMP) that waits looks for work before it sleeps. By default 300,000 times, which
#: takes cores from whoever has work; so many are as fast alone (benchmarks/contention.py).
_LOOKS = "3000"


def _sleep_soon() -> None:
    """Let threads that wait sleep soon, unless the user says how they wait. It is read when torch is imported."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _LOOKS)


_sleep_soon()

_HOMES = {
    "api.calls": (
        *("apply", "audit", "chat", "compare", "evaluate", "find", "harden", "inspect", "judge", "load_prompts"),
        *(
            "open_lab",
            "push",
            "read",
            "repair",
            "write_report",
            "run",
            "search",
            "show",
            "steer",
            "undo",
            "verify",
            "verify_files",
        ),
    ),
    "api.model": ("Model", "load", "wrap"),
    "api.progress": ("quiet",),
    "api.results": ("DoseResponse", "FoundDirection", "Front"),
    "config": (
        *("EditSettings", "EvalSettings", "FindSettings", "HardenSettings", "InspectSettings"),
        *("MeasureSettings", "ModelSettings", "OutputSettings", "PromptSettings", "RepairSettings"),
        *(
            "ReplySettings",
            "RunSettings",
            "SearchSettings",
            "SteerSettings",
        ),
    ),
    "edit.direction": ("Direction", "Site", "load_direction", "save_direction"),
    "edit.gguf": ("read_control_vector",),
    "edit.hooks": ("ablation", "addition"),
    "edit.options": ("plan_for",),
    "edit.plan": ("Plan", "compose", "make_plan"),
    "edit.steering": ("SteeringVectors",),
    "errors": ("AbliterateError", "GateNotMet"),
    "finding.find": ("choose",),
    "model.anatomy": ("Anatomy", "study"),
    "prompts": ("Behaviour", "load_behaviour"),
    "record": ("Record", "read_record"),
    "session": ("Session", "open_session"),
}

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use; functions take natural types."""
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(f"abliterate.{module}"), name)
            return import_module("abliterate.config.natural").natural(found) if isfunction(found) else found
    raise AttributeError(f"module 'abliterate' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
