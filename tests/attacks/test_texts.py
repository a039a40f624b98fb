"""Texts of models, files and servers reach terminals, cards and pages as text; printing never ends a finished job."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from safetensors.torch import save_file

from abliterate.errors import PromptError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.files.checkpoint.outputs import other_files
from abliterate.monitor.live import Screen
from abliterate.prompts import Prompt
from abliterate.record import FILE_NAME, IntegrityPart, Record, read_record
from abliterate.report.card import render_card
from abliterate.report.html import render
from abliterate.report.tables.files import show_integrity
from abliterate.report.tables.record import show_record
from abliterate.texts import encodable, markdown, markdown_code, printable, printable_lines, shown_json
from abliterate.texts import terminal as terminals
from abliterate.texts.terminal import Steady, plain, terminal, write, write_json, write_lines
from records import full_record

#: What a terminal obeys, what nobody sees, what turns letters around.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")

HOSTILE = (
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m\x90q\x9c",
    "a\rb\x08\x08c\x7f",
    "[/]",
    "[/bold][red]x[/red][link=file:///etc/passwd]y[/link]",
    "\\[/]\\",
    ":smile: [@click=app.bell]z[/]",
    "\u202egnp.exe\u2066\u2069",
    "in\u200bvisible\ufeff\U000e0041",
    "one\nVerified: every byte\u2028equals",
)

WORDS = (
    "# Heading",
    "\n\n# Heading\n",
    "x\n===",
    "[link](http://evil.example)",
    "![image](http://evil.example/x.png)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "<http://evil.example> http://evil.example www.evil.example",
    "`code` ``more`` ```",
    "a | b | c",
    "*bold* _it_ __it__ ~~no~~ $x$ $$y$$",
    "1. one\n- two\n> three",
    "---",
    "&lt;b&gt; &#35;",
    "[^1] [ref]: http://evil.example",
    "\\[x](y) \\",
)


def shown(record: Record, console: Console) -> str:
    show_record(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_show_a_record_of_strangers_as_text(text: str) -> None:
    for console in (Console(file=io.StringIO(), width=100), terminal()):
        console.file = io.StringIO()
        out = shown(full_record(text), console)
        assert not HIDDEN.search(out)
        assert not re.search(r"^Verified", out, re.MULTILINE)
        assert printable(text)[:4] in out.replace("\n", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_progress_warnings_and_lists_show_texts_of_strangers_as_text(text: str) -> None:
    console = Console(file=io.StringIO(), width=100)
    screen = Screen(console)
    with screen.phase(text):
        screen.warn(text)
    write(console, text, plain(text, "bold"), plain(text, lines=True))
    fields: dict[str, Any] = {name: [text] for name in IntegrityPart.model_fields}
    part = IntegrityPart.model_construct(**fields)
    show_integrity(part, console)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert not HIDDEN.search(out)
    assert out.count(printable(text)[:4]) >= 10


@given(st.text(st.characters()))
def test_no_text_has_anything_left_that_is_not_shown(text: str) -> None:
    assert not HIDDEN.search(printable(text))
    assert "\n" not in printable(text)
    assert not HIDDEN.search(printable_lines(text))
    assert printable(printable(text)) == printable(text)


def test_what_needs_no_care_stays_as_it_is() -> None:
    for text in ("Grüße, 你好", "👩\u200d👩\u200d👧 नमस्\u200dते", "a [b] {c} <d> \\ 50 % # *", "שלום"):
        assert printable(text) == text
    assert printable_lines("a\n\tb\r\nc") == "a\n\tb\nc"


@given(st.text(st.characters()), st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252"]))
def test_json_says_the_same_in_any_encoding(text: str, encoding: str) -> None:
    said = shown_json(json.dumps({"a": [text]}, indent=1, ensure_ascii=False), encoding)
    assert json.loads(said.encode(encoding).decode(encoding)) == {"a": [text]}
    assert not HIDDEN.search(said)


@pytest.mark.parametrize("text", HOSTILE)
def test_json_and_csv_on_stdout_obey_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(json.dumps({"a": text}, ensure_ascii=False))
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": text}
    assert not HIDDEN.search(out)
    write_lines(f"a,{text}\n")
    assert not HIDDEN.search(capsys.readouterr().out)


# --- model cards and pages


def tokens_of(card: str) -> list[tuple[str, str]]:
    """What Markdown makes of a card, without its texts."""
    body = card.split("\n---\n", 1)[1]
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(body):
        found += [(token.type, token.tag)] + [(child.type, child.tag) for child in token.children or ()]
    return [one for one in found if one[0] not in ("text", "softbreak", "text_special")]


@pytest.mark.parametrize("text", [*WORDS, *HOSTILE])
def test_card_has_the_same_parts_whatever_a_stranger_calls_things(text: str) -> None:
    expected, found = (tokens_of(render_card(full_record(one))) for one in ("Name a fruit.", text))
    assert found == expected
    assert not HIDDEN.search(render_card(full_record(text)))


@pytest.mark.parametrize("text", [*WORDS, *HOSTILE])
def test_words_and_code_of_markdown_are_read_back_as_they_were(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for written, kind in ((markdown(text), "text"), (markdown_code(text), "code_inline")):
        paragraph, inline, _ = parser.parse(f"{written}\n")
        assert paragraph.type == "paragraph_open"
        assert {child.type for child in inline.children or ()} <= {kind, "text_special"}
        assert "".join(child.content for child in inline.children or ()).strip() == printable(text).strip()


def test_addresses_become_no_links() -> None:
    for text in ("http://evil.example", "HTTPS://evil.example", "www.evil.example", "(ftp://evil.example)"):
        assert not re.search(r"(?i)(https?|ftp)://|www\.", markdown(f"see {text}"))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(" ".join([tag, *sorted(name for name, _ in attrs)]))


@pytest.mark.parametrize("text", [*WORDS, *HOSTILE])
def test_page_has_the_same_elements_and_nothing_hidden(text: str) -> None:
    pages = [render(full_record(one, redacted=False)) for one in ("Name a fruit.", text)]
    found = []
    for page in pages:
        parser = _Tags()
        parser.feed(page)
        found.append(parser.tags)
    assert found[0] == found[1]
    assert not HIDDEN.search(re.sub(r"(?s)<script>.*?</script>", "", pages[1]))


@pytest.mark.parametrize("text", [*WORDS, *HOSTILE, "x\n---\n# y", "--- "])
def test_front_matter_of_a_card_ends_where_it_ends(text: str) -> None:
    licence = {"license": "other", "license_name": text, "license_link": text, "language": [text]}
    record = full_record(text)
    record = record.model_copy(update={"model": record.model.model_copy(update={"kind": "hub"})})
    card = render_card(record, licence)
    head = re.match(r"\A---\n(.*?)\n---\n\n?# ", card, re.DOTALL)
    assert head is not None
    assert yaml.safe_load(head[1])["license_name"] == printable(text)
    assert not HIDDEN.search(card)


# --- consoles and streams


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of a run."""
    folder = tmp_path_factory.mktemp("out")
    record = full_record("Größe → 你好 [/] \x1b[31m")
    (folder / FILE_NAME).write_text(record.model_dump_json(), encoding="utf-8")
    return folder


def run(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command line through a shell, `ab` for the program."""
    written = command.replace("ab ", f"{sys.executable} -m abliterate ", 1)
    return subprocess.run(["bash", "-c", written], capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_consoles_that_are_not_utf_8_get_something_similar(out: Path, environment: dict[str, str]) -> None:
    done = run(f"ab show {out}", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert b"[/]" in done.stdout


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 0, "warning: done, but not all of the result could be printed (No space left on device)\n"),
        (">/dev/full 2>/dev/full", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_a_job_that_is_done_is_done_though_nothing_could_be_printed(
    out: Path, redirection: str, code: int, said: str
) -> None:
    (out / "report.html").unlink(missing_ok=True)
    done = run(f"ab report {out} {redirection}")
    assert (done.returncode, done.stderr.decode()) == (code, said)
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_who_only_prints_fails_on_a_full_disk_and_not_when_the_reader_has_enough(out: Path) -> None:
    full = run(f"ab show {out} >/dev/full")
    assert full.returncode == 1
    assert full.stderr.decode().splitlines() == [
        "error: not all of the result could be printed (No space left on device)"
    ]
    head = run(f"ab show {out} --json | head -c 10; exit ${{PIPESTATUS[0]}}")
    assert (head.returncode, head.stderr, head.stdout) == (0, b"", b'{\n "schema')


def test_errors_are_one_line_whatever_they_quote(tmp_path: Path) -> None:
    done = run("ab show $'no\\x1b[31m\\nsuch\\xff\\u202e[/]'")
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: no\\x1b[31m")
    assert f"such\\udcff\\u202e[/]/{FILE_NAME}: expected the record of a run, found none" in line


class _Broken(io.StringIO):
    """A stream that fails with `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(32, "x"), ValueError("closed")]
)
def test_steady_streams_drop_what_cannot_be_written(error: Exception) -> None:
    stream = Steady(_Broken(error))
    console = Console(file=stream, width=80)  # type: ignore[arg-type]
    write(console, "one")
    print("two", file=stream)
    assert stream.lost is error
    assert stream.why
    assert stream.left_by_reader is isinstance(error, BrokenPipeError)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_can_be_written_in_any_encoding(text: str) -> None:
    for encoding in ("ascii", "latin-1", "cp437"):
        raw = io.BytesIO()
        stream = Steady(io.TextIOWrapper(raw, encoding=encoding, newline=""))
        stream.write(text)
        stream.flush()
        assert stream.lost is None


def test_signs_are_replaced_by_signs_as_wide() -> None:
    assert terminals._in_ascii("é") == "e"
    assert "".join(map(terminals._in_ascii, "│→✓–▃r̂")) == "|>+-3r"
    assert terminals._in_ascii("你") == "\\u4f60"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("as_json", [False, True])
def test_chat_shows_what_models_say_as_text(
    text: str, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from abliterate.cli import chat
    from abliterate.model import batches, generation

    reply = generation.Reply((1,), text, ended=True)
    monkeypatch.setattr(generation, "complete", lambda *_: [reply])
    monkeypatch.setattr(batches, "auto_batch_size", lambda _: None)
    monkeypatch.setattr("abliterate.edit.hooks.ablation", lambda *_: contextlib.nullcontext())
    renderer: Any = SimpleNamespace(encode=lambda prompts: [[1, 2] for _ in prompts])
    loaded: Any = SimpleNamespace(model=None, tokenizer=None)
    plan: Any = None
    chat.converse(loaded, renderer, plan, chat.Conversation(5, [text.replace("\ud800", "")]), as_json=as_json)
    out = capsys.readouterr().out
    assert not HIDDEN.search(out)
    if as_json:
        assert json.loads(out)["original"] == text


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d x", "mod\udcff\x1b[31m"])
def test_names_that_are_no_text_can_be_recorded(text: str, tmp_path: Path) -> None:
    record = full_record(text)
    (tmp_path / FILE_NAME).write_text(record.model_dump_json(), encoding="utf-8")
    again = read_record(tmp_path)
    assert again == record
    assert again.model.name == encodable(text) != text
    assert render_card(record).encode()
    assert render(record).encode()


def test_half_a_character_is_no_prompt() -> None:
    with pytest.raises(PromptError, match="half of a character"):
        Prompt("\ud83d bread")


def test_nothing_is_printed_past_the_terminal() -> None:
    folder = Path(terminals.__file__).parent
    for path in sorted(folder.glob("*.py")):
        if path.name != "terminal.py":
            text = path.read_text(encoding="utf-8")
            found = re.findall(r"console\.print\(|Console\(\)|rich\.(?:table|markup) import|sys\.stdout\.write", text)
            assert found == [], path.name


def test_files_whose_names_are_no_text_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "caf\udce9.txt").write_text("x")
    (tmp_path / "café.txt").write_text("x")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    found = other_files(open_checkpoint(tmp_path))
    assert sorted(path.name for path in found.files) == ["café.txt", "config.json"]
    assert found.left_out == ("caf\udce9.txt",)
