"""Uploads: private unless asked otherwise, only what the record knows, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import abliterate as ab
from abliterate.errors import AbliterateError, GateNotMet, UsageError
from abliterate.record import read_record, write_record
from abliterate.report.publish import without_places
from planted import plant
from records import full_record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    planted = plant(tmp_path_factory.mktemp("planted"))
    out: Path = tmp_path_factory.mktemp("made") / "out"
    ab.apply(planted.folder, planted.direction, out=out)
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that remembers what it was given."""
    seen = SimpleNamespace(repo=None, files={}, error=None)

    class Api:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
            if seen.error:
                raise seen.error
            seen.repo = (repository, private, exist_ok)
            return f"https://huggingface.co/{repository}"

        def create_commit(self, repository: str, operations: list[Any], *, commit_message: str) -> None:
            assert repository == seen.repo[0]
            for one in operations:
                what = one.path_or_fileobj
                seen.files[one.path_in_repo] = what if isinstance(what, bytes) else Path(what).read_bytes()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return seen


def test_private_and_without_places(made: Path, hub: SimpleNamespace) -> None:
    (made / "notes.txt").write_text("mine")
    try:
        assert ab.push(made, "me/edited") == "https://huggingface.co/me/edited"
    finally:
        (made / "notes.txt").unlink()
    assert hub.repo == ("me/edited", True, True)
    record = read_record(made)
    assert set(hub.files) == {*record.files, "abliteration.json"}
    told = json.loads(hub.files["abliteration.json"])
    assert told["plan"]
    for name in ("abliteration.json", "report.html", "README.md"):
        assert str(made.parent) not in hub.files[name].decode(), name
        assert record.model.folder not in hub.files[name].decode(), name
    ab.push(made, "me/edited", public=True)
    assert hub.repo == ("me/edited", False, True)


def test_steering_goes_along_without_places(made: Path) -> None:
    steering = full_record().steering
    assert steering is not None
    named = steering.model_copy(update={"model": str(made), "direction": f"{made.parent}/vectors/kind.gguf"})
    told = without_places(read_record(made).model_copy(update={"steering": named})).steering
    assert told is not None
    assert str(made.parent) not in told.model_dump_json()
    assert told.direction == "kind.gguf"
    assert told.doses == steering.doses


def test_what_was_saved_past_a_gate_needs_force(made: Path, hub: SimpleNamespace, tmp_path: Path) -> None:
    record = read_record(made)
    write_record(record.model_copy(update={"warnings": ["no direction passed verification (forced)"]}), made)
    try:
        with pytest.raises(GateNotMet, match="past a gate"):
            ab.push(made, "me/edited")
        assert hub.repo is None
        assert ab.push(made, "me/edited", force=True)
    finally:
        write_record(record, made)


def test_files_that_are_not_as_they_were_written_stay_here(made: Path, hub: SimpleNamespace) -> None:
    card = made / "README.md"
    before = card.read_bytes()
    card.write_text("another")
    try:
        with pytest.raises(UsageError, match=r"README.md: expected the file that was written"):
            ab.push(made, "me/edited")
    finally:
        card.write_bytes(before)
    assert hub.repo is None


def test_what_the_hub_says_is_one_line(made: Path, hub: SimpleNamespace, tmp_path: Path) -> None:
    hub.error = OSError("401 Client Error\n\nInvalid username or password.")
    with pytest.raises(AbliterateError, match="the hub refused") as caught:
        ab.push(made, "me/edited")
    assert "\n" not in str(caught.value)
    with pytest.raises(AbliterateError):
        ab.push(tmp_path, "me/edited")


def test_the_folder_of_offloaded_weights_is_left_out(made: Path) -> None:
    record = read_record(made)
    loading = {"device": "cpu", "offload": "/home/me/weights"}
    told = without_places(record.model_copy(update={"settings": {"loading": loading, "model": "/home/me/model"}}))
    assert told.settings == {"loading": {"device": "cpu", "offload": None}}
