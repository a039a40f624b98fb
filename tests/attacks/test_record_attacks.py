"""Files beside a record are those that it was written with; what it says of others excuses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate import record as rec
from abliterate.algebra import orthonormal
from abliterate.edit.direction import Direction, save_direction
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.undo import undo, verify_files
from abliterate.edit.weights import edit_checkpoint
from abliterate.errors import CheckpointError
from abliterate.files.checkpoint import CARD, DIRECTION, Changes, open_checkpoint, sha256
from abliterate.files.local import seal
from abliterate.model.anatomy import Kind, Stored, Writer
from abliterate.monitor import Monitor
from abliterate.report.assemble import check_beside, write_all, write_beside, write_record_and_report
from abliterate.report.card import _licence, render_card

D, NAMES = 16, ("o.0", "o.1", "o.2")


def make_source(folder: Path, seed: int = 0) -> Path:
    """A model in bfloat16, of which three tensors will be edited, with files that come along."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {name: torch.randn(D, 24, generator=generator).bfloat16() for name in (*NAMES, "up")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nthe original\n")
    return folder


def make_out(source: Path, out: Path, seed: int = 0) -> Path:
    """What `apply` leaves: the edited model with its direction, undo file, card, report and record."""
    out.mkdir()
    basis = orthonormal(torch.randn(1, D, generator=torch.Generator().manual_seed(seed)))
    edits = tuple(Edit(Writer(name, Kind.ATTENTION, i, name, 0, None), basis, 1.0) for i, name in enumerate(NAMES))
    plan = Plan(edits, basis, 1.0, (), False)
    names = {name: (Stored(name, name, 0),) for name in NAMES}
    surgery = edit_checkpoint(open_checkpoint(source), out, plan, names, changes=Changes(indexed=True))
    model = rec.ModelPart(
        name="m",
        kind="folder",
        folder=str(source),
        architecture="A",
        d_model=D,
        layers=3,
        dtype="bfloat16",
        device="cpu",
        source_sha256=dict(surgery.files.source_sha256),
        companion_sha256=dict(surgery.files.companion_sha256),
    )
    record = rec.Record(
        created="now",
        versions={},
        settings={},
        model=model.model_copy(update={"seal": seal(*rec.sealed_parts(model))}),
        plan=rec.PlanPart(
            strength=1.0,
            rank=1,
            edits=list(surgery.residuals),
            left_alone={},
            undo=list(surgery.undo),
            files=[*surgery.files.written, *surgery.undo],
        ),
        output_sha256={"model.safetensors": surgery.files.sha256["model.safetensors"]},
    )
    save_direction(out / DIRECTION, Direction(basis))
    write_all(record, out, Monitor())
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and OUTs of two runs with different directions, to be copied."""
    place = tmp_path_factory.mktemp("made")
    make_source(place / "source")
    make_out(place / "source", place / "out")
    make_out(place / "source", place / "other", seed=1)
    return place


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record, as whoever made OUT can."""
    record = json.loads((out / rec.FILE_NAME).read_text())
    change(record)
    (out / rec.FILE_NAME).write_text(json.dumps(record))


def forget(record: dict[str, Any]) -> None:
    """A record as earlier versions wrote it."""
    del record["files"], record["model"]["companion_sha256"], record["model"]["seal"]


# --- verify


def test_what_was_written_is_proved(made: Path, out: Path) -> None:
    found = verify_files(out)
    assert found.intact
    assert found.proved
    record = rec.read_record(out)
    assert record.files.keys() == contents(out).keys() - {rec.FILE_NAME}
    assert not {"README.md", "model.safetensors"} - record.files.keys()
    assert record.model.companion_sha256.keys() == {"README.md", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    "name",
    [
        "evil.py",
        "pytorch_model.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        ".hidden",
        "sub/tokenizer.json",
        "front/x.txt",
        "extra.safetensors",
    ],
)
@pytest.mark.parametrize("excused", [False, True])
def test_a_file_that_was_added_is_named_even_where_the_record_excuses_it(name: str, excused: bool, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("print()")
    if excused:
        digest = sha256(out / name)

        def excuse(record: dict[str, Any]) -> None:
            record["left_out"].append(name)
            record["plan"]["files"].append(name)
            record["files"][name] = digest

        rewrite(out, excuse)
    found = verify_files(out)
    assert found.unknown == [name]
    assert not found.intact


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_changed_file_of_the_original_is_named_even_where_the_record_excuses_it(name: str, out: Path) -> None:
    (out / name).write_text('{"auto_map": {}, "weight_map": {"up": "model.safetensors"}}')

    def excuse(record: dict[str, Any]) -> None:
        record["left_out"].append(name)
        record["plan"]["variant"] = {"untie": True}
        record["plan"]["files"] = []
        record["files"][name] = sha256(out / name)

    rewrite(out, excuse)
    found = verify_files(out)
    assert name in {*found.not_original, *found.unknown}
    assert not found.intact


@pytest.mark.parametrize("name", [DIRECTION, "undo.safetensors", CARD, "report.html"])
@pytest.mark.parametrize("how", ["another run's", "gone", "a link"])
def test_a_result_that_was_replaced_is_named(name: str, how: str, made: Path, out: Path, tmp_path: Path) -> None:
    (out / name).unlink()
    if how == "another run's":
        (out / name).write_bytes((made / "other" / name).read_bytes() + b" " * (name in (CARD, "report.html")))
    elif how == "a link":
        shutil.copy(made / "out" / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    found = verify_files(out)
    assert found.changed_files == [name]
    assert found.unknown == ([name] if how == "a link" else [])
    assert not found.intact


def test_a_record_of_an_earlier_version_is_read_but_proves_nothing(out: Path) -> None:
    rewrite(out, forget)
    found = verify_files(out)
    assert not found.wrong_hashes
    assert (found.proved, found.intact) == (False, False)
    assert (found.unknown, found.changed_files, found.not_original) == ([], [], [])


# --- undo


@pytest.mark.parametrize("in_place", [False, True])
def test_undo_restores_what_the_record_lists_and_nothing_else(
    in_place: bool, made: Path, out: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    (source / "secret.txt").write_text("private")
    (source / "link.txt").symlink_to("/etc/hostname")
    back = None if in_place else tmp_path / "back"
    assert undo(out, target=back, source=source).exact
    assert contents(back or out) == contents(made / "source")


def test_undo_of_a_foreign_record_asks_before_it_reads_the_folder_that_it_names(out: Path, tmp_path: Path) -> None:
    rewrite(out, lambda record: record["model"].update(seal="0" * 64))
    asked: list[Path] = []

    def answer(yes: bool) -> Callable[[Path], bool]:
        def confirm(folder: Path) -> bool:
            asked.append(folder)
            return yes

        return confirm

    source = Path(rec.read_record(out).model.folder)
    unasked = undo(out, target=tmp_path / "1")
    refused = undo(out, target=tmp_path / "2", confirm=answer(False))
    assert asked == [source]
    for undone in (unasked, refused):
        assert (undone.exact, undone.steps) == (False, 1)
        assert "not this user's own" in (undone.reason or "")
    assert undo(out, target=tmp_path / "3", confirm=answer(True)).exact
    assert undo(out, target=tmp_path / "4", source=source).exact


@pytest.mark.parametrize("change", ["folder", "hash", "companion"])
def test_a_seal_is_of_one_folder_with_its_files(change: str, out: Path, tmp_path: Path) -> None:
    def forge(record: dict[str, Any]) -> None:
        if change == "folder":
            record["model"]["folder"] = str(tmp_path)
        elif change == "hash":
            record["model"]["source_sha256"]["x.safetensors"] = "0" * 64
        else:
            record["model"]["companion_sha256"]["secret.txt"] = "0" * 64

    rewrite(out, forge)
    try:
        undone = undo(out, target=tmp_path / "back")
    except CheckpointError:  # a file that OUT has not
        return
    assert "not this user's own" in (undone.reason or "")


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["bound", "earlier version"])
def test_another_runs_undo_file_is_refused(known: bool, needed: bool, made: Path, out: Path, tmp_path: Path) -> None:
    shutil.copy(made / "other" / "undo.safetensors", out / "undo.safetensors")
    if not known:
        rewrite(out, forget)
    if needed:
        rewrite(out, lambda record: record["model"].update(folder=""))
    before = contents(out)
    message = "is not the file that abliteration.json was written with" if known else "steps of the stored format from"
    with pytest.raises(CheckpointError, match=message):
        undo(out, target=tmp_path / "back")
    assert contents(out) == before
    assert not (tmp_path / "back").exists()


def test_how_close_undo_comes_is_measured(made: Path, out: Path, tmp_path: Path) -> None:
    rewrite(out, lambda record: record["model"].update(folder=""))
    undone = undo(out, target=tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (made / "source", tmp_path / "back"))
    equal = sum(int((before[name] == after[name]).sum()) for name in NAMES)
    count = sum(before[name].numel() for name in NAMES)
    assert undone.steps == 1
    assert undone.compared > count / 2  # a thousand places of few numbers
    assert abs(undone.equal / undone.compared - equal / count) < 0.05
    assert contents(tmp_path / "back").keys() == {"config.json", "tokenizer.json", "model.safetensors"}


def test_without_numbers_to_compare_with_nothing_is_claimed(out: Path, tmp_path: Path) -> None:
    kept = out / "undo.safetensors"
    rewrite(out, forget)
    rewrite(out, lambda record: record["model"].update(folder=""))
    kept.write_bytes(kept.read_bytes().replace(b".sample", b".simple"))
    undone = undo(out, target=tmp_path / "back")
    assert (undone.exact, undone.steps, undone.compared) == (False, None, 0)


@pytest.mark.parametrize("exact", [True, False])
def test_undo_in_place_leaves_what_others_put_there_and_follows_no_link(exact: bool, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("precious")
    (out / "thesis.tex").write_text("years of work")
    (out / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    if not exact:
        rewrite(out, lambda record: record["model"].update(folder=""))
    copy = shutil.copytree(out, tmp_path / "copy", symlinks=True)
    undone = undo(out)
    assert (undone.exact, undone.others) == (exact, ["link.txt", "thesis.tex"])
    assert (out / "thesis.tex").read_text() == "years of work"
    assert (out / "link.txt").is_symlink()
    assert undo(copy, target=tmp_path / "back").others == []
    assert not {"thesis.tex", "link.txt"} & contents(tmp_path / "back").keys()


@pytest.mark.parametrize("name", ["../elsewhere.txt", "/etc/hostname", "sub/../../elsewhere.txt"])
def test_names_in_a_record_stay_in_the_folder(name: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("precious")

    def forge(record: dict[str, Any]) -> None:
        record["model"]["companion_sha256"][name] = sha256(tmp_path / "elsewhere.txt")
        record["files"][name] = sha256(tmp_path / "elsewhere.txt")
        record["plan"]["undo"].append(name)

    rewrite(out, forge)
    for source in (None, Path(rec.read_record(out).model.folder)):
        with pytest.raises(CheckpointError, match=r"link out of the folder|is not what it was|found none"):
            undo(out, target=tmp_path / "back", source=source)
    assert (tmp_path / "elsewhere.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.txt", "out"]


# --- optional things


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [mit\n---\n# x",
        b"---\n- a\n- b\n---\n",
        b"---\nlicense: !!python/object:os.system x\n---\n",
        b"---\nlicense: 2024-01-01\nlanguage: {a: b}\n---\n",
        b"---\na: &a [1]\nlicense: [*a, *a]\n---\n",
        b"---\n" + b"[" * 20_000 + b"\n---\n",
        b"---\nlicense: " + b"[" * 20_000 + b"\n---\n",
        b"---\nlicense: " + b"- " * 2_000 + b"x\n---\n",
        b"---\nlicense:\n  ? a\n  : b\n---\n",
        b"\xff\xfe---\n\x00",
        b"---\nlicense: mit\n",
        b"",
    ],
    ids=range(12),
)
def test_no_card_of_the_original_ends_a_job(card: bytes, made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    (source / CARD).write_bytes(card)
    out = make_out(source, tmp_path / "out")
    assert "## Responsible use" in (out / CARD).read_text()
    assert verify_files(out).intact


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("license: mit\ntags: [x, y]", {"license": "mit"}),
        ("tags:\n- {a: b}\nlicense: other\nlicense_name: own\nlicense_link: LICENSE", ...),
        ("language:\n- en\n- de\nlicense:  'apache-2.0'", {"language": ["en", "de"], "license": "apache-2.0"}),
        ("language: [en, de]\nmodel-index:\n- name: x", {"language": ["en", "de"]}),
        ("license_link: https://x.org/y", {"license_link": "https://x.org/y"}),
    ],
)
def test_a_good_card_still_tells_the_licence(said: str, kept: Any, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(f"---\n{said}\n---\n# A model\nlicense: none of it\n")
    if kept is ...:
        kept = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert _licence(tmp_path / CARD) == kept


def test_what_is_optional_and_fails_is_a_warning(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = rec.read_record(out)

    def fail(*_: object) -> None:
        raise TypeError("odd")

    monkeypatch.setattr("abliterate.report.assemble.write_report", fail)
    monkeypatch.setattr("abliterate.report.assemble.write_card", fail)
    monitor = Monitor()
    again = write_all(record, out, monitor)
    assert monitor.warnings == [f"{name} could not be written: TypeError: odd" for name in (CARD, "report.html")]
    assert rec.read_record(out).warnings == again.warnings == monitor.warnings
    assert render_card(again)


def test_adding_to_a_record_blesses_nothing_that_was_changed(out: Path) -> None:
    """`inspect -o` and `audit -o` add a part and write the report anew; other hashes stay what they were."""
    (out / "tokenizer.json").write_text('{"changed": true}')
    check_beside(out)
    write_beside(out, {}, lambda: pytest.fail("there is a record"), Monitor())
    found = verify_files(out)
    assert found.changed_files == ["tokenizer.json"]


def test_a_companion_is_the_one_that_the_record_was_written_with(made: Path, out: Path) -> None:
    record = rec.read_record(out)
    assert rec.companion(out, record, DIRECTION) == out / DIRECTION
    shutil.copy(made / "other" / DIRECTION, out / DIRECTION)
    with pytest.raises(CheckpointError, match=r"direction\.safetensors: is not the file that"):
        rec.companion(out, record, DIRECTION)
    (out / DIRECTION).unlink()
    with pytest.raises(CheckpointError, match="found none"):
        rec.companion(out, record, DIRECTION)
    write_record_and_report(record, out, Monitor())
    assert rec.read_record(out).files[DIRECTION] == record.files[DIRECTION]
