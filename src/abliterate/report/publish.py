"""An edited model on the hub: private unless asked otherwise, with its card and record, and nothing of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterate.errors import AbliterateError, GateNotMet, UsageError
from abliterate.files.checkpoint import sha256
from abliterate.monitor import Monitor, without_bars
from abliterate.record import FILE_NAME, Record, read_record
from abliterate.report.html import FILE_NAME as REPORT
from abliterate.report.html import render

#: Settings that name places on this machine.
_PLACES = ("model", "direction", "output")


def publish(
    out: Path, repository: str, *, public: bool = False, force: bool = False, monitor: Monitor | None = None
) -> str:
    """Upload what the record in `out` lists to `repository` (OWNER/NAME) on the hub, and say at which address it lies.

    Places on this machine are left out of record and report. Only files that the record knows go along, and each must
    be as it was written.

    Raises `GateNotMet` for a result that was saved past a gate (unless `force`), `UsageError` for files that are
    not as the record says, `AbliterateError` when the hub refuses.
    """
    import huggingface_hub

    monitor, record = monitor or Monitor(), read_record(out)
    if not record.files:
        raise UsageError(f"{out}: expected what `run` or `apply` of this version wrote, found a record without files")
    if (past := [text for text in record.warnings if text.endswith("(forced)")]) and not force:
        raise GateNotMet(f"{out}: it was saved past a gate ({past[0]}); --force uploads it all the same")
    with monitor.phase("check files", len(record.files)) as advance:
        for name, known in record.files.items():
            path = out / name
            if name != REPORT and (path.is_symlink() or not path.is_file() or sha256(path) != known):
                raise UsageError(f"{path}: expected the file that was written, found another or none; not uploaded")
            advance(1)
    api = huggingface_hub.HfApi()
    with monitor.phase("upload"), without_bars(huggingface_hub.utils):
        try:
            url = api.create_repo(repository, private=not public, exist_ok=True)
            api.create_commit(
                repository,
                [huggingface_hub.CommitOperationAdd(name, what) for name, what in _uploaded(out, record)],
                commit_message="An edited model with its record (abliterate)",
            )
        except Exception as error:  # network, authentication and permission errors of several libraries
            raise AbliterateError(
                f"push {repository}: the hub refused ({' '.join(str(error).split())[:200]})"
            ) from error
    return str(url)


def _uploaded(out: Path, record: Record) -> Iterator[tuple[str, Any]]:
    """What goes up under which name: files as they are, record and report without places on this machine."""
    told = without_places(record)
    yield FILE_NAME, told.model_dump_json(indent=1).encode()
    for name in record.files:
        yield name, render(told).encode() if name == REPORT else str(out / name)


def without_places(record: Record) -> Record:
    """The record without folders of the machine that it was made on."""
    kept: dict[str, Any] = {name: value for name, value in record.settings.items() if name not in _PLACES}
    if isinstance(loading := kept.get("loading"), dict):
        kept["loading"] = {**loading, "offload": None}
    model = record.model.model_copy(update={"folder": "", "seal": None, "name": _public(record)})
    files = {name: known for name, known in record.files.items() if name != REPORT}
    steering = record.steering
    if steering is not None:
        named = {"model": model.name, "direction": Path(steering.direction).name}
        steering = steering.model_copy(update=named)
    told = {"command": "", "settings": kept, "output": None, "model": model, "files": files, "steering": steering}
    return record.model_copy(update=told)


def _public(record: Record) -> str:
    """The model's name: of a folder or file its last part."""
    return record.model.name if record.model.kind == "hub" else Path(record.model.name).name
