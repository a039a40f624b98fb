"""The record of a command, built in one way: what was asked, what was found, what was written."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from abliterate import record as rec
from abliterate.config import EditSettings, OutputSettings
from abliterate.edit.direction import Direction
from abliterate.edit.plan import Plan
from abliterate.edit.write import Realised
from abliterate.errors import UsageError
from abliterate.evaluation.parts import sought_part
from abliterate.files.atomic import real_folder, refuse_other_kinds
from abliterate.files.checkpoint import DIRECTION, FRONT, JOURNAL, sha256
from abliterate.files.local import seal
from abliterate.model.anatomy import TOLERANCE, Anatomy
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor, ranks
from abliterate.report.card import write_card
from abliterate.report.html import FILE_NAME as REPORT
from abliterate.report.html import write_report
from abliterate.session import Session


def build_record(model: rec.ModelPart, monitor: Monitor, settings: Mapping[str, Any], **parts: Any) -> rec.Record:
    """The record of a command: what it was asked, with which versions, what it found (`parts`), and what it took."""
    return rec.Record(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=rec.versions(),
        command=command(),
        settings=dict(settings),
        model=model,
        warnings=monitor.warnings,
        timings_s=monitor.timings(),
        peak_memory_bytes=monitor.peak_bytes,
        work={name: rec.WorkPart(**asdict(work)) for name, work in monitor.work_by_phase.items()},
        **parts,
    )


def session_record(session: Session, settings: Mapping[str, Any], **parts: Any) -> rec.Record:
    """The record of work on a session; a `model` among the parts takes the place of the session's."""
    model = parts.pop("model", None) or session_model(session)
    known = {"prompts": prompts_part(session), "anatomy": anatomy_part(session.anatomy)}
    return build_record(model, session.monitor, settings, **known, **parts)


class SourceHashes(NamedTuple):
    """SHA-256 of the source's files by name: those with weights, and the others that came along."""

    weights: Mapping[str, str]
    companions: Mapping[str, str]


def session_model(session: Session, hashes: SourceHashes | None = None) -> rec.ModelPart:
    """The model of a session, with the hashes of its files (default: read anew)."""
    loaded = session.loaded
    dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    if ranks.count() > 1:
        device = f"{device}, {ranks.count()} processes"
    return model_part(loaded.files, session.model, session.anatomy, dtype=dtype, device=device, hashes=hashes)


def model_part(
    files: ModelOnDisk,
    model: Any,
    anatomy: Anatomy,
    *,
    dtype: str,
    device: str = "none",
    hashes: SourceHashes | None = None,
) -> rec.ModelPart:
    """The model that was measured or edited; `model` is the live one, or a skeleton."""
    weights, companions = hashes or SourceHashes(files.sha256, {})
    part = rec.ModelPart(
        name=files.name,
        kind=files.kind,
        folder=str(files.folder.resolve()),
        storage=files.storage.method,
        architecture=type(model).__name__,
        d_model=anatomy.d_model,
        layers=anatomy.layers,
        dtype=dtype,
        device=device,
        source_sha256=dict(weights),
        companion_sha256=dict(companions),
    )
    return part.model_copy(update={"seal": seal(*rec.sealed_parts(part))}) if companions else part


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
        template_time=session.renderer.printed_time,
        shared_prefix_tokens=len(session.encoded["harmful", "test"].prefix),
        positions=session.positions,
        behaviour=sought_part(contrast.behaviour),
    )


def anatomy_part(anatomy: Anatomy) -> rec.AnatomyPart:
    """What residual accounting leaves unexplained."""
    return rec.AnatomyPart(writers=len(anatomy.writers), worst_closure=max(anatomy.closure), tolerance=TOLERANCE)


def plan_part(plan: Plan, done: Realised, output: OutputSettings, editing: EditSettings, folder: Path) -> rec.PlanPart:
    """What was done to which writer and tensor, and what is left."""
    surgery = done.surgery
    return rec.PlanPart(
        strength=plan.strength,
        rank=len(plan.direction),
        realisation=output.realisation,
        variant=editing.model_dump(mode="json", exclude_defaults=True),
        strengths={edit.writer.name: edit.strength for edit in plan.edits},
        edits=list(done.residuals if surgery is None else surgery.residuals),
        left_alone=dict(plan.left_alone),
        files=_file_names(done, folder),
        copied=dict(done.copied),
        undo=[] if surgery is None else list(surgery.undo),
    )


def source_hashes(done: Realised, files: ModelOnDisk) -> SourceHashes:
    """SHA-256 of the files of the source: from the surgery, or read anew."""
    if done.surgery is not None:
        return SourceHashes(done.surgery.files.source_sha256, done.surgery.files.companion_sha256)
    return SourceHashes(files.sha256, {})


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


def written_parts(
    plan: Plan, done: Realised, output: OutputSettings, editing: EditSettings, folder: Path
) -> dict[str, Any]:
    """What was written into `folder`, as parts of a record."""
    return {
        "plan": plan_part(plan, done, output, editing, folder),
        "left_out": [] if done.surgery is None else list(done.surgery.files.left_out),
        "output": str(output.out),
        "output_sha256": written_hashes(done, folder),
    }


def with_hashes(direction: Direction, record: rec.Record) -> Direction:
    """The direction with the hashes of the files it was measured on."""
    return replace(direction, facts={**direction.facts, "model_sha256": record.model.source_sha256})


def write_all(record: rec.Record, partial: Path, monitor: Monitor) -> rec.Record:
    """Put the model card, the report and the record beside the model; the record as it is then."""
    record = _optional(record, monitor, "README.md", lambda: write_card(record, partial))
    return write_record_and_report(record, partial, monitor, *files_below(partial))


def write_record_and_report(record: rec.Record, folder: Path, monitor: Monitor, *written: str) -> rec.Record:
    """Write the record and the report; what only measures leaves no more. The record as it is then.

    `written` are names of files in `folder` that belong to the record: it gets their hashes.
    """
    record = _optional(record, monitor, REPORT, lambda: write_report(record, folder))
    names = {name for name in (*written, REPORT) if (folder / name).is_file()} - {rec.FILE_NAME}
    known = {name: found for name, found in record.output_sha256.items() if name in written}
    hashes = {name: known[name] if name in known else sha256(folder / name) for name in names}
    record = record.model_copy(update={"files": dict(sorted({**record.files, **hashes}.items()))})
    rec.write_record(record, folder)
    return record


def _optional(record: rec.Record, monitor: Monitor, name: str, write: Callable[[], object]) -> rec.Record:
    """Write what a job is not thrown away for; where that fails it is said, and the record says it too."""
    try:
        write()
    except Exception as error:  # whatever it is: hours of work stand beside it
        text = f"{name} could not be written: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        monitor.warn(text)
        return record.model_copy(update={"warnings": [*record.warnings, text]})
    return record


def files_below(folder: Path) -> list[str]:
    """The names of all files in a folder that was written here."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_results(folder: Path) -> None:
    """Raise, before hours of work, where record, report and files of a search could not be written into `folder`.

    Links are no reason: they are replaced, but for a folder's, through which everything would land elsewhere.
    """
    for name in (rec.FILE_NAME, REPORT, DIRECTION, JOURNAL):
        refuse_other_kinds(folder / name)
    if os.path.lexists(folder / FRONT):
        real_folder(folder / FRONT)


def check_beside(folder: Path | None) -> None:
    """The same for what `write_beside` does; the record that is there can be read."""
    if folder is None:
        return
    check_results(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: expected a folder, found a file; give another")
    if os.path.lexists(folder / rec.FILE_NAME):
        rec.read_record(folder)


def write_beside(
    folder: Path, parts: Mapping[str, BaseModel], fresh: Callable[[], rec.Record], monitor: Monitor
) -> None:
    """Write record and report into `folder`: those of a run that are there with `parts` added, else a fresh record's.

    Raises `UsageError` when the folder cannot be made or holds a record of another version.
    """
    if os.path.lexists(folder / rec.FILE_NAME):
        record = rec.read_record(folder).model_copy(update=dict(parts))
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder}: expected a folder, found {error.strerror}") from error
        record = fresh()
    write_record_and_report(record, folder, monitor)


def command() -> str:
    """The command line of this process, as it would be given in a shell; "" when it is not abliterate's."""
    program = Path(sys.argv[0])
    ours = program.name == "abliterate" or program.parts[-2:] == ("abliterate", "__main__.py")
    return shlex.join(["abliterate", *sys.argv[1:]]) if ours else ""
