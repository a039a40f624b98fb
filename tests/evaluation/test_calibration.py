"""Labelled files of every shape, what follows from them about a judge, and how that is kept and shown."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from abliterate.cli.judge import as_csv, show_calibration, show_errors
from abliterate.errors import AbliterateError, PromptError
from abliterate.evaluation.judging import Exchange, Judge, Label, RuleJudge, Verdict
from abliterate.evaluation.judging.calibration import (
    Calibration,
    SetName,
    builtin_calibrations,
    calibration_part,
    compare,
    folder_of,
    own_calibrations,
    store,
)
from abliterate.evaluation.judging.labelled import Labelled, label_file, read_exchanges, read_labelled
from abliterate.evaluation.judging.learnt import LearntJudge
from abliterate.evaluation.statistics import rogan_gladen, wilson
from abliterate.record import JudgedPart

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "judge"
HEADER = "prompt,response,label\n"


@dataclass
class Scripted:
    """Says what it was told to say, in order; a reply counts what it was asked."""

    verdicts: Sequence[Label]
    name: str = "scripted"
    fingerprint: str = "scripted-1"
    asked: list[Exchange] = field(default_factory=list)

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.asked += exchanges
        return [Verdict(label, "because") for label in self.verdicts]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ABLITERATE_CACHE", str(folder))
    return folder


def write(tmp_path: Path, text: str | bytes, name: str = "replies.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(labelled: Labelled) -> list[tuple[str, str, str]]:
    pairs = zip(labelled.exchanges, labelled.labels, strict=True)
    return [(given.prompt, given.reply, label.value) for given, label in pairs]


# Reading


def test_reads_names_and_figures_forgivingly(tmp_path: Path) -> None:
    text = "Label , Prompt,RESPONSE,notes\n Refusal ,p,r1,\nPARTIAL,p,r2,x\ncompliance,p,r3,\n degenerate,p,,\n"
    labelled = read_labelled(write(tmp_path, text))
    assert [row[1:] for row in rows(labelled)] == [
        ("r1", "refusal"),
        ("r2", "partial"),
        ("r3", "compliance"),
        ("", "degenerate"),
    ]
    assert not labelled.two_way


@pytest.mark.parametrize(
    ("label", "expected"),
    [("1", "refusal"), (" 0 ", "compliance"), ("1.0", "refusal"), ("0.0", "compliance"), ("TRUE", "refusal")],
)
def test_numbers_are_two_way_labels(tmp_path: Path, label: str, expected: str) -> None:
    labelled = read_labelled(write(tmp_path, f"{HEADER}p,r,{label}\n"))
    assert labelled.labels == (Label(expected),)
    assert labelled.two_way


def test_reads_pyrit_sets_with_comments_before_the_header_only(tmp_path: Path) -> None:
    text = (
        "# dataset_version=1.0\n\n# another line\nobjective,assistant_response,human_score,data_type\n"
        'make it,"# A heading\n# prompt,response,label\nand ""quotes"", commas",0,text\n#hash,no,1,text\n'
    )
    assert rows(read_labelled(write(tmp_path, text))) == [
        ("make it", '# A heading\n# prompt,response,label\nand "quotes", commas', "compliance"),
        ("#hash", "no", "refusal"),
    ]


@pytest.mark.parametrize("name", ["pyrit_refusal.csv", "pyrit_refusal_extra.csv"])
def test_reads_the_sets_as_the_csv_module_does(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the labelled sets are not here")
    text = "".join(line for line in path.read_text("utf-8").splitlines(True) if not line.startswith("# "))
    expected = list(csv.DictReader(io.StringIO(text)))
    labelled = read_labelled(path)
    assert len(labelled.labels) == len(expected) > 50
    assert [label is Label.REFUSAL for label in labelled.labels] == [row["human_score"] == "1" for row in expected]
    assert labelled.two_way


def test_byte_order_mark_crlf_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 100_000
    limit = csv.field_size_limit()
    text = f'# set\r\nprompt,response,label\r\np,"one\r\ntwo",1\r\n\r\np,"{long}",0\r\n'
    labelled = read_labelled(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert [row[1] for row in rows(labelled)] == ["one\r\ntwo", long]
    assert csv.field_size_limit() == limit < len(long)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")], ids=repr)
def test_what_parts_fields_is_found(tmp_path: Path, name: str, mark: str) -> None:
    lines = [("prompt", "response", "label", "note"), ("p", '"one; two, three"', "1", ""), ("q", "r", "0", "x")]
    text = "# made by hand; with a comment\n\n" + "".join(mark.join(line) + "\n" for line in lines)
    path = write(tmp_path, text, name)
    assert rows(read_labelled(path)) == [("p", "one; two, three", "refusal"), ("q", "r", "compliance")]
    assert [exchange.reply for exchange in read_exchanges(path)] == ["one; two, three", "r"]


def test_reads_json_lines(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "response": "a\u2028b\nc", "label": "Partial"},
        {"objective": "p", "assistant_response": "no", "human_score": 1, "data_type": "text"},
        {"label": False, "response": "yes", "prompt": ""},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    labelled = read_labelled(write(tmp_path, text, "set.JSONL"))
    assert rows(labelled) == [("p", "a\u2028b\nc", "partial"), ("p", "no", "refusal"), ("", "yes", "compliance")]


def test_label_column_is_not_needed_to_read_replies(tmp_path: Path) -> None:
    path = write(tmp_path, "response,prompt\nr,p\n")
    assert read_exchanges(path) == [Exchange("p", "r")]
    with pytest.raises(PromptError, match="expected a column label or human_score, found response, prompt"):
        read_labelled(path)
    assert read_exchanges(write(tmp_path, f"{HEADER}p,r,nonsense\n")) == [Exchange("p", "r")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", f"{HEADER}p,r,1\np,r,\n", r"row 2 \(line 3\): expected a label of refusal.* 1 or 0, found ''"),
        ("a.csv", f'# c\n\n{HEADER}p,"a\nb",1\n\np,r,maybe\n', r"row 2 \(line 7\): .*found 'maybe'"),
        ("a.csv", f"{HEADER}p,r,unknown\n", "found 'unknown'"),
        ("a.csv", f"{HEADER}p,r,0.5\n", r"row 1 \(line 2\).*found '0.5'"),
        ("a.csv", f"{HEADER}p,r, with a comma,1\n", r"row 1 \(line 2\): expected 3 fields .* found 4"),
        ("a.csv", f"{HEADER}p,r\n", "expected 3 fields .* found 2"),
        ("a.csv", f'{HEADER}p,"never closed,1\np,r,0\n', r"row 1 \(line 2\): expected a double quote that closes"),
        ("a.csv", "prompt;response;label\np;r;1;2\n", "expected 3 fields .* found 4; put a text with a semicolon"),
        ("a.csv", "prompt,response,label,Label\np,r,1,0\n", "expected one column 'label', found 2"),
        ("a.csv", "prompt,label\np,1\n", "expected a column response or assistant_response"),
        ("a.csv", HEADER, "expected at least one row, found none"),
        ("a.csv", "", "expected a column prompt or objective, found nothing"),
        ("a.csv", "# only a comment\n", "found nothing"),
        ("a.csv", b"\xff\xfep\x00r\x00", "found UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"prompt": "p"\n', r"row 1 \(line 1\): not JSON"),
        ("a.jsonl", '\n[1]\n"x"\n', r"row 1 \(line 2\): expected an object, found a list"),
        ("a.jsonl", '{"prompt": "p", "response": null, "label": 1}', "expected text as response, found null"),
        ("a.jsonl", '{"prompt": "p", "response": "r"}', r"row 1 \(line 1\): expected a column label or human_score"),
        ("a.jsonl", '{"prompt": "p", "response": "r", "label": null}', "found ''"),
        ("a.jsonl", "[" * 100_000, "not JSON"),
        ("a.jsonl", "", "expected at least one row"),
        ("a.txt", "x", "expected .csv, .tsv or .jsonl, found '.txt'"),
        ("a", "x", "found 'no suffix'"),
    ],
)
def test_everything_else_is_one_clear_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(PromptError, match=message) as caught:
        read_labelled(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("missing.csv", "folder.csv"):
        with pytest.raises(PromptError, match=r"expected a file of labelled replies, found (none|a folder)"):
            read_labelled(tmp_path / name)


# Figures

R, P, C, D, U = Label.REFUSAL, Label.PARTIAL, Label.COMPLIANCE, Label.DEGENERATE, Label.UNKNOWN
E, CUT = Label.EVASION, Label.CUT_OFF


def calibrate(judge: Judge, path: Path, model: str = "", prompts: SetName = "") -> Calibration:
    labelled = read_labelled(path)
    return compare(judge, labelled, judge.judge(labelled.exchanges), path, model=model, prompts=prompts)


def calibration(
    tmp_path: Path, pairs: Sequence[tuple[Label, Label]], *, model: str = "", prompts: SetName = ""
) -> Calibration:
    """The calibration of a judge that calls replies (label, verdict)."""
    path = write(tmp_path, HEADER + "".join(f"p,r,{label.value}\n" for label, _ in pairs))
    return calibrate(Scripted([verdict for _, verdict in pairs]), path, model, prompts)


def test_figures_are_two_way_and_unknown_is_neither(tmp_path: Path) -> None:
    pairs = [(R, R)] * 5 + [(R, P), (P, R), (R, C), (P, D), (R, U)] + [(C, C)] * 3 + [(D, C), (C, R), (C, U), (D, U)]
    found = calibration(tmp_path, pairs)
    assert found.n == len(pairs) == 17
    assert found.unknown == 3
    assert found.accuracy == (7 + 4, 17)
    assert found.precision == (7, 8)
    assert found.recall == (7, 9)
    assert found.specificity == (4, 5)
    assert found.recall.ci95 == wilson(7, 9)
    assert found.confusion[R] == {E: 0, R: 5, P: 1, C: 1, D: 0, CUT: 0, U: 1}
    assert found.confusion[D] == {E: 0, R: 0, P: 0, C: 1, D: 0, CUT: 0, U: 1}
    assert not found.two_way
    assert found.corrected(30, 100) == rogan_gladen(30, 100, (7, 9), (4, 5)) is not None


def test_a_judge_that_is_never_wrong_and_one_that_is_silent(tmp_path: Path) -> None:
    good = calibration(tmp_path, [(label, label) for label in (R, P, C, D)])
    assert {good.accuracy.value, good.precision.value, good.recall.value, good.specificity.value} == {1.0}
    silent = calibration(tmp_path, [(label, U) for label in (R, P, C, D)])
    assert silent.accuracy == (0, 4)
    assert silent.recall == silent.specificity == silent.precision == (0, 0)
    assert silent.corrected(1, 2) is None


def test_judge_sees_what_the_file_says_and_the_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER}ask,answer,1\n")
    judge: Judge = Scripted([R])
    found = calibrate(judge, path)
    assert isinstance(judge, Scripted)
    assert judge.asked == [Exchange("ask", "answer")]
    assert (found.judge, found.fingerprint, found.source) == ("scripted", "scripted-1", "replies.csv")
    assert found.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.two_way


def test_a_verdict_too_few_is_an_error_of_the_judge(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER}p,r,1\np,r,0\n")
    with pytest.raises(ValueError, match="shorter"):
        compare(Scripted([]), read_labelled(path), [Verdict(R)], path)


# Keeping


def test_stored_calibrations_come_back_for_the_same_state_only(tmp_path: Path, cache: Path) -> None:
    found = calibration(tmp_path, [(R, R), (C, R), (C, C)])
    assert own_calibrations(Scripted([])) == []
    path = store(found)
    assert path.parent == folder_of("scripted-1") == cache / "judges" / hashlib.sha256(b"scripted-1").hexdigest()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_calibrations(Scripted([])) == [found]
    assert own_calibrations(Scripted([], fingerprint="scripted-2")) == []
    newer = calibration(tmp_path, [(R, C), (C, C)])
    store(newer)
    assert own_calibrations(Scripted([])) == [newer]
    assert os.listdir(path.parent) == [path.name]


def test_each_model_and_set_of_prompts_has_a_calibration_of_its_own(tmp_path: Path) -> None:
    of: list[tuple[str, SetName]] = [("", ""), ("org/one", ""), ("org/one", "harmful"), ("org/two", "harmful")]
    made = [calibration(tmp_path, [(R, R), (C, C)], model=model, prompts=prompts) for model, prompts in of]
    assert len({store(one) for one in made}) == 4
    again = calibration(tmp_path, [(R, C), (C, C)], model="/models/One/", prompts="harmful")
    store(again)
    kept = own_calibrations(Scripted([]))
    assert len(kept) == 4
    assert again in kept
    assert made[2] not in kept, "the same model, named by its folder"


def test_builtin_calibrations_are_of_the_judges_as_they_are() -> None:
    for judge in (RuleJudge(), LearntJudge()):
        found = builtin_calibrations(judge)
        assert len(found) == 3, "run scripts/calibrate_judges.py after a change of the judge"
        assert {one.judge for one in found} == {judge.name}
    assert builtin_calibrations(Scripted([])) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "JSON that cannot be used"),
        (lambda text: b"", "JSON that cannot be used"),
        (lambda text: b"\xff" + text, "not UTF-8 at 0"),
        (lambda text: text.replace(b'"judge"', b'"jury"'), "judge: field required"),
        (lambda text: text.replace(b'"refusal": 1', b'"refusal": -1'), "confusion.refusal.refusal: .*greater"),
        (lambda text: text.replace(b'"confusion": {', b'"confusion": {"unknown": {"refusal": 1},'), "truly unknown"),
        (lambda text: text.replace(b"scripted-1", b"scripted-9"), "expected one of 'scripted-1', found 'scripted-9'"),
    ],
)
def test_damaged_file_is_one_clear_line(tmp_path: Path, change: object, message: str) -> None:
    path = store(calibration(tmp_path, [(R, R), (C, C)]))
    assert own_calibrations(Scripted([]))
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AbliterateError, match=message) as caught:
        own_calibrations(Scripted([]))
    assert "\n" not in str(caught.value)
    assert "delete it and calibrate again" in str(caught.value)


def test_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file stands where the folder should be")
    with pytest.raises(AbliterateError, match=r"cannot be written.*set ABLITERATE_CACHE"):
        store(calibration(tmp_path, [(R, R)]))


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = calibration(tmp_path, [(R, R), (C, C)])
    path = store(earlier)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("abliterate.files.atomic.os.replace", full)
    with pytest.raises(AbliterateError, match="No space left"):
        store(calibration(tmp_path, [(R, C)]))
    assert os.listdir(path.parent) == [path.name]
    assert own_calibrations(Scripted([])) == [earlier]


# Showing


def screen(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), no_color=True, force_terminal=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_calibration_for_machines(tmp_path: Path) -> None:
    found = calibration(tmp_path, [(R, R)] * 3 + [(R, C), (C, C), (C, U)])
    told = json.loads(calibration_part(found, Path("/x/y.json")).model_dump_json())
    assert (told["n"], told["accuracy"], told["precision"], told["recall"]) == (6, 4 / 6, 1.0, 0.75)
    assert told["recall_ci95"] == list(wilson(3, 4))
    assert (told["specificity"], told["unknown"], told["judge"], told["stored"]) == (1.0, 1, "scripted", "/x/y.json")
    expected: dict[str, int] = {**dict.fromkeys((r.value for r in Label), 0), "compliance": 1, "unknown": 1}
    assert told["confusion"]["compliance"] == expected
    assert told["counts"]["accuracy"] == [4, 6]
    nothing = calibration_part(calibration(tmp_path, [(R, U)]))
    assert (nothing.precision, nothing.precision_ci95, nothing.stored) == (None, (0.0, 1.0), None)


@pytest.mark.parametrize("width", [30, 80])
def test_calibration_on_screen(tmp_path: Path, width: int) -> None:
    pairs = [(R, R)] * 8 + [(R, C), (P, R), (C, C), (D, D), (C, U), (C, P)]
    console = screen(width)
    show_calibration(calibration(tmp_path, pairs), console, Path("/a/[b]/c.json"))
    text = shown(console)
    for part in (
        "14 labelled replies of replies.csv",
        "90.0",
        "9/10",
        "66.7",
        "2/3",
        "No verdict on 1",
        "/a/[b]/c.json",
    ):
        assert part in text
    assert ("partial called refusal: 1" in text) == (width == 30)
    assert ("Labelled (rows) and called (columns)" in text) == (width == 80)
    assert "…" not in text
    assert "\x1b" not in text
    assert "Labels of 1 and 0" not in text


def test_two_way_labels_are_said_to_be(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER}p,r,1\np,r,0\n")
    console = screen(80)
    show_calibration(calibrate(Scripted([P, D]), path), console)
    assert "Labels of 1 and 0" in shown(console)
    assert "Stored" not in shown(console)


def test_errors_show_the_start_of_replies_only(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    exchanges = (
        Exchange("right", "fine"),
        Exchange("[b]ask[/b]\x1b[31m\nmore", " ".join(words)),
        Exchange("p", "字" * 500),
        Exchange("", "half\ud83d"),
    )
    labelled = Labelled(exchanges, (C, R, R, C), two_way=False)
    console = screen(80)
    show_errors(labelled, [Verdict(C), Verdict(C), Verdict(P, "but [not] this"), Verdict(U)], console)
    text = shown(console)
    assert "3 of 4 called otherwise than labelled" in text
    assert "row 1:" not in text
    assert "row 2: labelled refusal, called compliance" in text
    assert "word11 …" in text
    assert "word12" not in text
    assert "[b]ask[/b]" in text
    assert "\x1b" not in text
    assert "row 3: labelled refusal, called partial (but [not] this)" in text
    assert 0 < text.count("字") <= 120
    assert "row 4: labelled compliance, called unknown" in text
    text.encode()


def test_two_way_labels_forgive_the_finer_kinds() -> None:
    exchanges = (Exchange("p", "r"),) * 3
    console = screen(80)
    show_errors(Labelled(exchanges, (R, C, C), two_way=True), [Verdict(P), Verdict(D), Verdict(P)], console)
    assert "1 of 3" in shown(console)
    assert "row 3: labelled compliance, called partial" in shown(console)


def test_labelled_rows_can_be_corrected_and_read_again(tmp_path: Path) -> None:
    replies = ["I'm sorry, but I can't help with that.", 'Sure:\n1. "Stir", then\r\n2. bake.', ""]
    source = write(tmp_path, as_csv([JudgedPart(prompt="p", response=r, label="", evidence="") for r in replies]))
    labels = label_file(RuleJudge(), source)
    assert [row.label for row in labels] == ["refusal", "compliance", "degenerate"]
    assert [row.response for row in labels] == replies
    assert labels[0].evidence
    back = read_labelled(write(tmp_path, as_csv(labels), "back.csv"))
    assert rows(back) == [("p", row.response, row.label) for row in labels]
    lines = "\n".join(row.model_dump_json() for row in labels)
    assert rows(read_labelled(write(tmp_path, lines, "back.jsonl"))) == rows(back)


def test_rule_judge_is_right_about_replies_it_knows_and_not_about_others(tmp_path: Path) -> None:
    known = "p,\"I'm sorry, but I can't help with that.\",1\n" * 6 + "p,The capital of France is Paris.,0\n" * 6
    path = write(tmp_path, HEADER + known)
    found = calibrate(RuleJudge(), path)
    assert found.accuracy == (12, 12)
    swapped = known.replace(",1\n", ",x\n").replace(",0\n", ",1\n").replace(",x\n", ",0\n")
    path = write(tmp_path, HEADER + swapped)
    wrong = calibrate(RuleJudge(), path)
    assert wrong.accuracy == (0, 12)
    assert wrong.corrected(3, 10) is None
    assert math.isclose(wrong.precision.value, 0.0)


def test_calibration_does_not_import_torch() -> None:
    code = "import sys, abliterate.evaluation.judging.calibration, abliterate.cli.judge; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
