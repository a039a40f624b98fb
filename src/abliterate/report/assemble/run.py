"""A run as it stands in the record: model, prompts, selection, plan."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from abliterate import record as rec
from abliterate.config import EditSettings, OutputSettings, RunSettings
from abliterate.edit.direction import Direction
from abliterate.edit.plan import Plan
from abliterate.edit.weights import Residual
from abliterate.edit.write import Realised
from abliterate.errors import UsageError
from abliterate.files.checkpoint import sha256
from abliterate.finding.find import Findings, Found
from abliterate.finding.search import Search
from abliterate.finding.selection import Site
from abliterate.model.anatomy import TOLERANCE, Anatomy
from abliterate.model.on_disk import ModelOnDisk
from abliterate.report.assemble.search import search_part
from abliterate.report.card import write_card
from abliterate.report.html import write_report
from abliterate.session import Session


def run_record(
    session: Session,
    settings: RunSettings,
    output: OutputSettings,
    found: Found,
    plan: Plan,
    done: Realised,
    folder: Path,
    evaluation: rec.EvaluationPart,
    separation: rec.SeparationPart | None,
    search: Search | None = None,
) -> rec.Record:
    """The record of a whole run whose results lie in `folder`."""
    monitor, loaded = session.monitor, session.loaded
    before = source_hashes(done, loaded.files)
    after = written_hashes(done, folder)
    dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    return rec.Record(
        created=now(),
        versions=versions(),
        command=command(),
        settings=settings.model_dump(mode="json"),
        model=model_part(loaded.files, session.model, session.anatomy, dtype, device, before),
        prompts=prompts_part(session),
        anatomy=anatomy_part(session.anatomy),
        refusal_tokens=[rec.TokenPart(**asdict(token)) for token in found.findings.tokens],
        separation=separation,
        selection=selection_part(found),
        search=None if search is None else search_part(search),
        plan=plan_part(plan, done, output, settings.editing, folder),
        evaluation=evaluation,
        warnings=monitor.warnings,
        left_out=[] if done.surgery is None else list(done.surgery.files.left_out),
        output=str(output.out),
        output_sha256=after,
        timings_s=monitor.timings(),
        peak_memory_bytes=monitor.peak_bytes,
    )


def search_record(
    session: Session, settings: RunSettings, findings: Findings, separation: rec.SeparationPart | None, search: Search
) -> rec.Record:
    """The record of a search that edited nothing."""
    monitor, loaded = session.monitor, session.loaded
    hashes = dict(loaded.files.sha256)
    dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    return rec.Record(
        created=now(),
        versions=versions(),
        command=command(),
        settings=settings.model_dump(mode="json"),
        model=model_part(loaded.files, session.model, session.anatomy, dtype, device, hashes),
        prompts=prompts_part(session),
        anatomy=anatomy_part(session.anatomy),
        refusal_tokens=[rec.TokenPart(**asdict(token)) for token in findings.tokens],
        separation=separation,
        search=search_part(search),
        warnings=monitor.warnings,
        output=None if settings.output is None else str(settings.output.out),
        timings_s=monitor.timings(),
        peak_memory_bytes=monitor.peak_bytes,
    )


def model_part(
    files: ModelOnDisk, model: Any, anatomy: Anatomy, dtype: str, device: str, hashes: dict[str, str]
) -> rec.ModelPart:
    """The model that was measured or edited."""
    return rec.ModelPart(
        name=files.name,
        kind=files.kind,
        folder=str(files.folder.resolve()),
        storage=files.storage.method,
        architecture=type(model).__name__,
        d_model=anatomy.d_model,
        layers=anatomy.layers,
        dtype=dtype,
        device=device,
        source_sha256=hashes,
    )


def prompts_part(session: Session) -> rec.PromptsPart:
    """Prompts, and how they were rendered."""
    contrast, loading = session.prompts, session.loading
    return rec.PromptsPart(
        sources=contrast.sources,
        counts=contrast.counts,
        duplicates_dropped=contrast.duplicates_dropped,
        dropped=dict(contrast.dropped),
        sha256=contrast.sha256,
        system=loading.system,
        chat_template=loading.chat_template or "tokenizer",
        shared_prefix_tokens=len(session.encoded["harmful", "test"].prefix),
        positions=session.positions,
    )


def anatomy_part(anatomy: Anatomy) -> rec.AnatomyPart:
    """How well the books closed."""
    return rec.AnatomyPart(writers=len(anatomy.writers), worst_closure=max(anatomy.closure), tolerance=TOLERANCE)


def separation_part(
    session: Session, findings: Findings, site: Site, points: Mapping[str, Float[Tensor, "n 2"]]
) -> rec.SeparationPart:
    """How the classes separate at every site, and what `finding.projections` says of the prompts at one."""
    found, norms = findings.separation, findings.candidates.norms
    texts = {"harmful": session.prompts.harmful.val, "harmless": session.prompts.harmless.val}
    return rec.SeparationPart(
        sites=[
            rec.SeparatedPart(
                layer=layer,
                position=position,
                auroc=round(float(found.auroc[row, layer]), 5),
                dprime=round(float(found.dprime[row, layer]), 4),
                norm=round(float(norms[row, layer]), 5),
            )
            for row, position in enumerate(findings.candidates.positions)
            for layer in range(norms.shape[1])
        ],
        layer=site[0],
        position=site[1],
        prompts=[
            rec.ProjectedPart(set=name, prompt=text, x=round(x, 4), y=round(y, 4), refused=refused)
            for name in ("harmful", "harmless")
            for text, (x, y), refused in zip(
                texts[name], points[name].tolist(), findings.scorer.refused[name], strict=True
            )
        ],
    )


def selection_part(found: Found) -> rec.SelectionPart:
    """The selection as it stands in the record. A forced choice is there too, with `met_rule` false."""
    selection = found.selection
    return rec.SelectionPart(
        chosen=rec.SitePart(**asdict(selection.best)),
        met_rule=found.met_rule,
        control=rec.ControlPart(**asdict(selection.control)),
        harmful=selection.harmful,
        harmless=selection.harmless,
        max_kl=selection.rule.max_kl,
        min_induce=selection.rule.min_induce,
        max_depth=selection.rule.max_depth,
        trained_on=found.findings.trained_on,
        candidates=[rec.SitePart(**asdict(score)) for score in selection.candidates],
    )


def plan_part(plan: Plan, done: Realised, output: OutputSettings, editing: EditSettings, folder: Path) -> rec.PlanPart:
    """What was done to which writer and tensor, and what is left."""
    surgery = done.surgery
    return rec.PlanPart(
        strength=plan.strength,
        rank=len(plan.direction),
        realisation=output.realisation,
        variant=editing.model_dump(mode="json", exclude_defaults=True),
        strengths={edit.writer.name: edit.strength for edit in plan.edits},
        edits=[] if surgery is None else [_residual_part(residual) for residual in surgery.residuals],
        left_alone=dict(plan.left_alone),
        files=_file_names(done, folder),
        copied=dict(done.copied),
        undo=[] if surgery is None else list(surgery.undo),
    )


def _residual_part(residual: Residual) -> rec.ResidualPart:
    return rec.ResidualPart(**(asdict(residual) | {"ratio": residual.ratio, "shape": list(residual.shape)}))


def source_hashes(done: Realised, files: ModelOnDisk) -> dict[str, str]:
    """SHA-256 of each weight file of the source, by name: from the surgery, or read anew."""
    if done.surgery is not None:
        return dict(done.surgery.files.source_sha256)
    return dict(files.sha256)


def written_hashes(done: Realised, folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file that was written, by name."""
    if done.surgery is None:
        return {name: sha256(folder / name) for name in _file_names(done, folder)}
    return {name: found for name, found in done.surgery.files.sha256.items() if name.endswith(".safetensors")}


def _file_names(done: Realised, folder: Path) -> list[str]:
    """The files that were written, those of adapters in their folders."""
    paths = [folder / name for name in done.written]
    inside = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [str(path.relative_to(folder)) for path in inside]


def direction_metadata(session: Session, found: Found) -> dict[str, Any]:
    """What `direction.safetensors` says of itself."""
    best = found.selection.best
    chosen = {"layer": best.layer, "position": best.position, "norm": best.norm, "met_rule": found.met_rule}
    return _metadata(session, found.findings, chosen)


def search_metadata(session: Session, findings: Findings, start: Direction, record: rec.Record) -> dict[str, Any]:
    """The same of a direction that was searched for from `start`."""
    return _metadata(session, findings, start.metadata["chosen"]) | {"model_sha256": record.model.source_sha256}


def _metadata(session: Session, findings: Findings, chosen: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": 1,
        "model": session.loaded.files.name,
        "d_model": session.anatomy.d_model,
        "layers": session.anatomy.layers,
        "positions": findings.candidates.positions,
        "chosen": chosen,
        "trained_on": findings.trained_on,
        "prompts_sha256": session.prompts.sha256,
        "learnt_from": session.prompts.learnt_from,
    }


def saved_metadata(session: Session, found: Found, record: rec.Record) -> dict[str, Any]:
    """The same with the hashes of the files it was measured on."""
    return direction_metadata(session, found) | {"model_sha256": record.model.source_sha256}


def write_all(record: rec.Record, partial: Path) -> None:
    """Put the model card, the report and the record beside the model."""
    write_card(record, partial)
    write_told(record, partial)


def write_told(record: rec.Record, folder: Path) -> None:
    """Write the record and the report; what only measures leaves no more."""
    write_report(record, folder)
    rec.write_record(record, folder)


def write_beside(folder: Path, parts: Mapping[str, BaseModel], fresh: Callable[[], rec.Record]) -> None:
    """Write record and report into `folder`: those of a run that are there with `parts` added, else a fresh record's.

    Raises `UsageError` when the folder cannot be made or holds a record of another version.
    """
    if (folder / rec.FILE_NAME).is_file():
        record = rec.read_record(folder).model_copy(update=dict(parts))
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder}: expected a folder, found {error.strerror}") from error
        record = fresh()
    write_told(record, folder)


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line of this process, as it would be given in a shell; "" when it is not abliterate's."""
    program = Path(sys.argv[0])
    ours = program.name == "abliterate" or program.parts[-2:] == ("abliterate", "__main__.py")
    return shlex.join(["abliterate", *sys.argv[1:]]) if ours else ""


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    packages = ("abliterate", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
