"""Models that come from the hub: their bytes are shown in the phase that fetches them, and by nothing else."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from abliterate.monitor import Monitor, under_way, without_bars
from hub_stand_in import hub
from planted import Planted, plant

NAME = "somebody/planted"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), shards=2)


@pytest.fixture
def served(planted: Planted) -> Iterator[str]:
    (planted.folder / "unwanted.bin").write_bytes(b"0" * 100_000)
    with hub(NAME, planted.folder) as address:
        yield address
    (planted.folder / "unwanted.bin").unlink()


@pytest.fixture
def large(planted: Planted) -> Iterator[str]:
    """One with a file of several pieces, as the hub's library counts them (10 MB each)."""
    (planted.folder / "large.txt").write_bytes(b"0" * 45_000_000)
    with hub(NAME, planted.folder, pause=0.004) as address:
        yield address
    (planted.folder / "large.txt").unlink()


def command(direction: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "abliterate", "apply", NAME, "--direction", str(direction)),
        *("-o", str(out), "--as", "lora", *more),
    ]


def environment(address: str, home: Path, **more: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "NO_COLOR"))},
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }


@pytest.fixture
def direction(planted: Planted, tmp_path: Path) -> Path:
    save_file({"direction": planted.direction}, tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def wanted_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "unwanted.bin")


#: Each of its arguments is the rest of a command line. Before the last, all that was fetched is gone.
_ONE_AFTER_THE_OTHER = """
import json, os, shutil, sys
from abliterate.cli import main
for arguments in map(json.loads, sys.argv[1:]):
    if "--quiet" in arguments:
        shutil.rmtree(os.environ["HF_HOME"])
    sys.argv = ["abliterate", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    sys.stdout.flush()
    print("-- end", file=sys.stderr, flush=True)
"""


def test_a_line_says_what_was_fetched_and_quiet_says_nothing(
    planted: Planted, served: str, direction: Path, tmp_path: Path
) -> None:
    given = [command(direction, tmp_path / f"out-{i}", *more)[3:] for i, more in enumerate([(), (), ("--quiet",)])]
    done = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_THE_OTHER, *map(json.dumps, given)],
        env=environment(served, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    first, again, quiet, rest = done.stderr.split("-- end\n")
    size = wanted_bytes(planted.folder)
    assert f"fetched {size / 1e6:,.1f} MB from the hub" in first
    assert "%|" not in first
    assert "Fetching" not in first
    assert "fetched" not in again, "the cache has it"
    assert (quiet, rest) == ("", "")
    assert list((tmp_path / "home").rglob("model*.safetensors")), "it was fetched once more"
    assert not list((tmp_path / "home").rglob("unwanted.bin"))


def test_a_terminal_shows_how_much_has_come(large: str, direction: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen(
        command(direction, tmp_path / "out"),
        env=environment(large, tmp_path / "home", TERM="xterm", COLUMNS="100", LINES="30"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 1 << 16):
            shown += piece
    except OSError:  # the other end is closed
        pass
    assert child.wait(timeout=60) == 0
    os.close(master)
    text = shown.decode(errors="replace")
    shares = {
        int(share) for share in re.findall(r"find model[^\n\r]*?(\d+) %", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))
    }
    assert len([share for share in shares if 0 < share < 100]) >= 2, text
    assert "Fetching" not in text
    assert "%|" not in text


def test_the_monitor_of_the_innermost_phase_is_known_inside_it() -> None:
    outer, inner = Monitor(), Monitor()
    with outer.phase("one"):
        assert under_way() is outer
        with inner.phase("two"):
            assert under_way() is inner
        assert under_way() is outer
    assert under_way() not in (outer, inner)
    with pytest.raises(KeyError), outer.phase("three"):
        raise KeyError
    assert under_way() is not outer


def test_bars_of_libraries_are_back_afterwards() -> None:
    class Library:
        def __init__(self, off: bool) -> None:
            self.off, self.switched = off, 0

        def are_progress_bars_disabled(self) -> bool:
            return self.off

        def disable_progress_bars(self) -> None:
            self.off, self.switched = True, self.switched + 1

        def enable_progress_bars(self) -> None:
            self.off, self.switched = False, self.switched + 1

    on, off = Library(False), Library(True)
    libraries: list[Any] = [on, off]
    with without_bars(*libraries):
        assert on.off
    with pytest.raises(KeyError), without_bars(*libraries):
        raise KeyError
    assert (on.off, on.switched, off.off, off.switched) == (False, 4, True, 0)
