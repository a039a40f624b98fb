"""Progress on a terminal and where there is none: what is drawn again, what stays, and what a narrow one cuts."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from abliterate.monitor.live import Screen

#: A nested phase with notes, a phase in bytes, one whose name and note are long, a warning, and one that fails.
SCRIPT = """
import sys, time
from rich.console import Console
from abliterate.monitor.live import Screen
screen = Screen(Console(stderr=True))
with screen.phase("collect activations", 40) as advance:
    for step in range(4):
        advance(10)
        time.sleep(0.3)
        screen.note(f"step {step} of [bold]four[/bold]: 1234567.890 units")
with screen.phase("edit weights", 1000) as advance:
    advance(120)
    time.sleep(0.3)
with screen.phase("measure points on held-out prompts of every kind", 2) as advance:
    with screen.phase("answers", 3) as inner:
        inner(1)
        time.sleep(0.3)
    advance(1)
    time.sleep(0.3)
screen.warn("KL 0.123456789 is above what was asked for, at most 0.100000000")
if "wait" in sys.argv:
    with screen.phase("wait"):
        print("waiting", flush=True)
        time.sleep(20)
if "fail" in sys.argv:
    with screen.phase("fail"):
        screen.note("the last thing known: 0.987654321")
        raise SystemExit(3)
"""

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def on_terminal(*arguments: str, columns: int = 80, interrupt: bool = False, **environment: str) -> tuple[int, str]:
    """Exit code and everything written, with standard streams on a terminal of 24 lines."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    written = b""
    while part := _read(master):
        written += part
        if interrupt and b"waiting" in written:
            time.sleep(0.5)
            process.send_signal(2)
            interrupt = False
    os.close(master)
    return process.wait(), written.decode()


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the other end is closed
        return b""


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def left(text: str) -> list[str]:
    """The lines that stay: a small terminal of the sequences that a live view uses."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
            row -= int(match[1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line.rstrip() for line in lines if line.strip()]


def test_what_is_going_on_is_drawn_again_and_what_is_over_stays_with_its_notes() -> None:
    code, text = on_terminal()
    assert code == 0
    assert "\x1b[2K" in text, "redrawn"
    shown = plain(text)
    assert re.search(r"collect activations ━+.* 20/40 0:00, about 0:00 left", shown)
    assert re.search(r"20/40 0:00, about 0:00 left\r\n  step 0 of \[bold\]four\[/bold\]", shown), "notes at once"
    assert re.search(r"edit weights ━+.* 12 % 0:00", shown), "bytes are shown in per cent"
    assert re.search(r"every kind .*0/2 0:00\r\n\W*\w* *\W*answers .*1/3", shown), "the inner phase is below"
    lines = left(text)
    stays = [re.sub(r"\d+\.\d s", "T s", line) for line in lines]
    notes = [f"  step {step} of [bold]four[/bold]: 1234567.890 units" for step in range(4)]
    assert stays == [
        *("✓ collect activations T s", *notes, "✓ edit weights T s", "✓ answers T s"),
        "✓ measure points on held-out prompts of every kind T s",
        "  warning: KL 0.123456789 is above what was asked for, at most 0.100000000",
    ]


def test_a_warning_stands_out_and_colours_can_be_turned_off() -> None:
    coloured, without = on_terminal()[1], on_terminal(NO_COLOR="1")[1]
    assert re.search(r"\x1b\[1;33mwarning: KL", coloured)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", without)
    assert left(coloured)[-1] == left(without)[-1]


def test_forty_columns_break_lines_between_words_only() -> None:
    lines = left(on_terminal(columns=40)[1])
    assert max(map(len, lines)) <= 40
    for word in ("1234567.890", "0.123456789", "0.100000000"):
        assert any(word in line.split() for line in lines), (word, lines)
    assert any(re.fullmatch(r"✓ measure points on .* \d\.\d s", line) for line in lines), lines


@pytest.mark.parametrize("columns", [8, 20, 40])
def test_no_frame_is_wider_or_higher_than_the_terminal(columns: int) -> None:
    code, text = on_terminal(columns=columns)
    assert code == 0
    assert re.search(r"\S [^\r\n]*… (0/2 )?0:00", plain(text)), "a name without room is cut, not the time"
    assert max(len(line) for line in re.split(r"[\r\n]", plain(text))) <= columns
    assert max(map(len, re.findall(r"(?:\x1b\[1A\x1b\[2K)+", text)), default=0) / len("\x1b[1A\x1b[2K") < 24


def test_a_dumb_terminal_and_a_pipe_get_lines(tmp_path: Path) -> None:
    def of_a_pipe(**environment: str) -> str:
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.run(
            command, capture_output=True, check=True, text=True, env={**os.environ, **environment}
        ).stderr

    for text in (plain(on_terminal(TERM="dumb", columns=40)[1]), of_a_pipe(), plain(of_a_pipe(FORCE_COLOR="1"))):
        lines = text.splitlines()
        assert lines[0] == "  step 0 of [bold]four[/bold]: 1234567.890 units", "at once"
        assert re.fullmatch(r"✓ collect activations \d\.\d s", lines[4])
        assert len(lines) == 9, "nothing is drawn again, and no note is broken"
    assert "\x1b[2K" not in of_a_pipe(FORCE_COLOR="1")


@pytest.mark.parametrize(("how", "code"), [("wait", -2), ("fail", 3)])
def test_what_is_broken_off_leaves_a_clean_terminal(how: str, code: int) -> None:
    returned, text = on_terminal(how, interrupt=how == "wait")
    assert returned in (code, 130, 1)
    assert text.count(HIDE) == text.count(SHOW) > 0
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert f"✓ {how}" not in plain(text)
    if how == "fail":
        assert "  the last thing known: 0.987654321" in left(text)


def test_a_console_that_is_no_file_is_no_terminal() -> None:
    written = io.StringIO()
    screen = Screen(Console(file=written, force_terminal=True))
    with screen.phase("one", 1) as advance:
        advance(1)
    screen.advance(1)
    assert re.search(r"✓.* one .*s", written.getvalue())
    assert screen.seconds["one"] >= 0
