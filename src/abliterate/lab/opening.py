"""What the bench is opened on: what a run left, a direction file, or a model on which a direction is found first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from abliterate import record as rec
from abliterate.config import MeasureSettings, ModelSettings
from abliterate.edit.direction import Direction, Site, load_direction
from abliterate.errors import UsageError
from abliterate.finding.estimate import Separation
from abliterate.finding.find import best_separated, find, refusal_tokens
from abliterate.lab.bench import Bench, Heat, can_step
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor
from abliterate.prompts import load_behaviour
from abliterate.session import OpenedModel, Session, locate_model, open_model, open_session

FILE = "direction.safetensors"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known before a model is loaded."""

    files: ModelOnDisk
    loading: ModelSettings
    direction: Direction | None = None
    tokens: tuple[int, ...] = ()
    selection: rec.SelectionPart | None = None
    behaviour: str | None = None


def open_bench(
    target: str,
    measuring: MeasureSettings = MeasureSettings(),
    *,
    direction: Path | None = None,
    root: Path | None = None,
    monitor: Monitor | None = None,
) -> Bench:
    """Load the original model of `target`: OUT of a command, a direction file, or MODEL.

    Where refusal tokens or the direction are not known, they are found first, on the prompts that `measuring` names.
    Results may be written into `root` (default: the current folder).

    Raises `UsageError` when a file is none of these or does not fit, and what `find` raises.
    """
    monitor = monitor or Monitor()
    with monitor.phase("find model"):
        known = known_of(target, measuring.loading)
    if direction is not None:
        known = replace(known, direction=load_direction(direction), selection=None)
    if measuring.finding.refusal_tokens is not None:
        known = replace(known, tokens=())
    if known.tokens and known.direction is not None:
        opened = open_model(known.files, known.loading, monitor)
        shown = _Shown(opened, known.direction, known.tokens, heat_of(known.direction, known.selection))
    else:
        shown = _searched(known, measuring, monitor)
    model, found = shown.model, shown.direction
    width = found.basis.shape[1]
    if width != model.anatomy.d_model:
        raise UsageError(f"direction: expected vectors of the model's width {model.anatomy.d_model}, found {width}")
    folder = (root or Path.cwd()).resolve()
    bench = Bench(model.loaded, model.renderer, model.anatomy, found, shown.tokens, known.loading, folder, shown.heat)
    with monitor.phase("try out a reply"):
        return replace(bench, steps=can_step(bench))


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A live model with the direction, refusal tokens and map of sites that the bench shows."""

    model: OpenedModel | Session
    direction: Direction
    tokens: tuple[int, ...]
    heat: Heat | None


def _searched(known: Known, measuring: MeasureSettings, monitor: Monitor) -> _Shown:
    """What is known, and the rest found on the prompts that `measuring` names."""
    finding = measuring.finding
    if known.behaviour is not None and not finding.refusal_tokens:
        raise UsageError(
            f"lab: what lies there is of the behaviour {known.behaviour}, which first tokens do not tell, and the lab "
            "shows their scores; give --refusal-tokens"
        )
    if not (load_behaviour(measuring.prompts.behaviour).shows.first_tokens or finding.refusal_tokens):
        raise UsageError(
            f"--behaviour {measuring.prompts.behaviour}: the lab shows scores of first tokens, which do not tell "
            "it; give --refusal-tokens"
        )
    session = open_session(
        known.files, loading=known.loading, prompts=measuring.prompts, positions=finding.positions, monitor=monitor
    )
    if known.direction is not None:
        tokens = _ids(refusal_tokens(session, finding))
        return _Shown(session, known.direction, tokens, heat_of(known.direction, known.selection))
    findings = find(session, finding)
    direction, tokens = best_separated(session, findings, finding), _ids(findings.tokens)
    return _Shown(session, direction, tokens, _separated(findings.separation))


def heat_of(direction: Direction, selection: rec.SelectionPart | None = None) -> Heat | None:
    """Bypass of every site that a selection scored; without one, how large the difference of means is."""
    candidates = direction.candidates
    if candidates is None:
        return None
    if selection is None:
        share = candidates.norms / candidates.harmless_mean.norm(dim=-1).clamp_min(1e-6)
        return Heat("size of the difference, relative to the harmless mean", share, "high")
    values = torch.full(candidates.raw.shape[:2], torch.nan)
    for site in selection.candidates:
        if candidates.holds(Site(site.layer, site.position)):
            values[-1 - site.position, site.layer] = site.bypass
    return Heat("bypass: refusal score left when this direction is taken out", values, "low")


def _separated(separation: Separation) -> Heat:
    return Heat("d′: how far apart harmful and harmless prompts lie", separation.dprime.float(), "high")


def _ids(tokens: Iterable[rec.TokenPart]) -> tuple[int, ...]:
    return tuple(token.token for token in tokens)


@dataclass(frozen=True, slots=True)
class Edited:
    """A model on disk with the direction that is taken out of it, and how the model is loaded."""

    files: ModelOnDisk
    loading: ModelSettings
    direction: Direction


def with_direction(target: str, direction: Path | None, loading: ModelSettings) -> Edited:
    """A model and a direction file; without one, of what `run`, `search` or `apply` wrote, its original and direction.

    Raises `UsageError` when there is no direction, or a file is none.
    """
    if direction is not None:
        found = load_direction(direction)
        return Edited(locate_model(target, loading), loading, found)
    known = known_of(target, loading)
    if known.direction is None:
        raise UsageError(
            f"{target}: expected what `run`, `search` or `apply` wrote, found a model; give --direction FILE"
        )
    return Edited(known.files, known.loading, known.direction)


def known_of(target: str, loading: ModelSettings) -> Known:
    """The original, direction and scores that a record, a direction file or a model name leads to."""
    path = Path(os.path.expanduser(target))
    if (path / rec.FILE_NAME).is_file():
        return _of_run(path, loading)
    if path.suffix == ".safetensors" and path.is_file():
        direction = load_direction(path)
        if direction.model is None:
            raise UsageError(f"{target}: expected a direction file that names its model; give MODEL and --direction")
        return Known(locate_model(direction.model, loading), loading, direction)
    return Known(locate_model(target, loading), loading)


def _of_run(folder: Path, loading: ModelSettings) -> Known:
    """The original model of a record, loaded as it was then except where `loading` says otherwise."""
    record = rec.read_record(folder)
    if not (folder / FILE).is_file():
        raise UsageError(f"{folder}: expected {FILE} beside the record, found none; give --direction")
    then = record.settings.get("loading")
    if isinstance(then, dict):
        # Whether code that comes with a model may run is for whoever sits here to say, not for a file.
        kept = {key: value for key, value in then.items() if key not in ("trust_remote_code", "device")}
        try:
            loading = ModelSettings.model_validate(kept | loading.model_dump(exclude_defaults=True))
        except ValueError as error:
            raise UsageError(f"{folder}: expected settings of this version in the record, found others") from error
    source = Path(record.model.folder)
    if record.model.folder and (source / "config.json").is_file():
        files = ModelOnDisk(record.model.name, record.model.kind, source)
    else:
        files = locate_model(record.model.name, loading)
    direction = load_direction(rec.companion(folder, record, FILE))
    sought = None if record.prompts is None else record.prompts.behaviour
    name = None if sought is None or record.refusal_tokens else sought.name
    return Known(files, loading, direction, _ids(record.refusal_tokens), record.selection, name)
