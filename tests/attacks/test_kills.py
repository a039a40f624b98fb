"""A sample of `benchmarks/kills.py`: commands that are killed or interrupted at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_commands_that_are_stopped_leave_nothing_unfinished() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "5", "--interrupts", "3"]
    only = ["--only", "apply", "inspect", "undo"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *only], env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["kills"] == 5
