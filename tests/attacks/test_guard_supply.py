"""What comes from others: where it is from is written down, and what is written down is what is there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HTML = ROOT / "src" / "abliterate" / "report" / "html"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

#: The commits of the releases that are named beside them.
COMMIT = re.compile(r"[\w./-]+@[0-9a-f]{40}")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by name."""
    text = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^([\w.-]+)==([^\s;]+)[^\n]*\n((?:    --hash=[^\n]+\n?)*)", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(blocks) == len(lines), "every requirement is one version"
    return {name: (version, re.findall(r"--hash=(\S+)", hashes)) for name, version, hashes in blocks}


def asked(extra: str | None = None) -> Iterator[Requirement]:
    """What the package or an extra asks for, extras of its own unfolded."""
    listed = project()["dependencies"] if extra is None else project()["optional-dependencies"][extra]
    for requirement in map(Requirement, listed):
        if requirement.name == "abliterate":
            for own in requirement.extras:
                yield from asked(own)
        else:
            yield requirement


def test_the_charts_are_those_that_are_written_down() -> None:
    said = json.loads((HTML / "echarts.json").read_text(encoding="utf-8"))
    for name, digest in said["sha256"].items():
        assert hashlib.sha256((HTML / name).read_bytes()).hexdigest() == digest, name
    assert set(said["sha256"]) == {"echarts.min.js", "echarts.LICENSES.txt"}
    version = re.search(r"Apache ECharts (\S+),", (HTML / "echarts.min.js").read_text(encoding="utf-8")[:200])
    assert version is not None
    packages = {part["package"]: part["integrity"] for part in said["made_of"]}
    assert f"pkg:npm/echarts@{version[1]}" in packages
    script = (ROOT / "scripts" / "vendor_echarts.sh").read_text(encoding="utf-8")
    for name in ("echarts", "esbuild"):
        (pinned,) = re.findall(rf"^{name.upper()}=(\S+)$", script, re.MULTILINE)
        assert f"pkg:npm/{name}@{pinned}" in packages
    for integrity in packages.values():
        algorithm, _, digest = integrity.partition("-")
        assert (algorithm, len(base64.b64decode(digest))) == ("sha512", 64)
    licences = (HTML / "echarts.LICENSES.txt").read_text(encoding="utf-8")
    assert {"echarts/LICENSE", "zrender/LICENSE", "tslib/LICENSE.txt"} <= set(re.findall(r"==== (\S+) ====", licences))


def test_nothing_that_is_downloaded_is_built() -> None:
    # llama_cpp.py is there to build llama.cpp from its source.
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name != "llama_cpp.py"]
    places = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *scripts]
    for path in [*places, *WORKFLOWS]:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"pip['\", ]+download", text):
            assert "--only-binary=:all:" in text[match.start() : match.start() + 400], path


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_commit_and_may_read_only(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [name for name in used if not COMMIT.fullmatch(name)] == []
    for job in workflow["jobs"].values():
        if "permissions" in job:  # whoever may publish runs nothing of ours, and nothing but what was built and tried
            assert job["permissions"] == {"id-token": "write"}
            assert [step["uses"].partition("@")[0] for step in job["steps"]] == [
                "actions/download-artifact",
                "pypa/gh-action-pypi-publish",
            ]
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text(encoding="utf-8")


def commands_of(name: str) -> list[str]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_what_is_checked_on_every_push_and_before_a_release() -> None:
    assert {"bash .ci/run", "make newest", "scripts/wheel.sh"} <= set(commands_of("ci.yml"))
    assert any(command.startswith("pip-audit ") for command in commands_of("ci.yml"))
    assert "scripts/wheel.sh" in commands_of("release.yml")
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert release[True] == {"push": {"tags": ["v*"]}}, "YAML 1.1 reads `on` as true"
    assert release["jobs"]["publish"]["needs"] == "build"


def test_the_lock_holds_what_is_asked_for_in_its_ranges_and_by_hash() -> None:
    lock = locked()
    for name, (_, hashes) in lock.items():
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name
    assert not {name for name in lock if name == "torch" or name.startswith(("nvidia", "triton"))}
    for requirement in [*asked(), *asked("dev")]:
        if requirement.name != "torch":
            version, _ = lock[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version), requirement


def test_users_get_ranges_and_the_checks_one_version() -> None:
    lock = locked()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pinned = Requirement(line)
            (version,) = [part.version for part in pinned.specifier if part.operator == "=="]
            assert pinned.name == "torch" or lock[pinned.name][0] == version
    for requirement in asked():
        assert not any(part.operator == "==" for part in requirement.specifier), requirement
