"""The wheel and the source distribution: what they hold and weigh, and that the wheel works where it is alone."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from planted import plant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "abliterate"

#: Bytes: half of it is source, a fifth the charts of the report.
LARGEST = 1_250_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def of_package() -> set[str]:
    """The package's files in the source."""
    inside = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(PACKAGE.parent)) for path in inside}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == of_package()
    assert wheel.stat().st_size < LARGEST


def test_the_source_distribution_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {f"src/{name}" for name in of_package()} <= names
    others = {name for name in names if not name.startswith(("src/", "docs/"))}
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert others == texts | {"pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {Path(name).suffix for name in names if name.startswith("docs/")} == {".md"}
    assert archive.stat().st_size < LARGEST


def test_what_is_said_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        said = Parser().parsestr(archive.read(name).decode())
    assert (said["Name"], said["License-Expression"]) == ("abliterate", "Apache-2.0")
    assert said["Author"] == "The abliterate authors"
    assert len(said.get_all("Classifier", [])) > 5
    assert not any("License ::" in classifier for classifier in said.get_all("Classifier", []))
    assert "arxiv.org" in said["Project-URL"]


def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """What it asks for is lent by this environment, so that nothing is fetched; the package itself is not."""
    home = tmp_path / "fresh"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    where = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*where, str(wheel)], check=True, timeout=300)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    planted = plant(tmp_path / "planted")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def runs(*command: str) -> str:
        return subprocess.run(
            [str(home / "bin" / command[0]), *command[1:]], cwd=tmp_path, env=alone, check=True, text=True, timeout=300,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    place = runs("python", "-c", "import abliterate; print(abliterate.__file__)").strip()
    assert Path(place).is_relative_to(packages)
    assert runs("abliterate", "--version").startswith("abliterate ")
    chosen = ["--harmful", str(planted.harmful), "--harmless", str(planted.harmless), "--search", "closed-form"]
    said = runs("abliterate", "run", str(planted.folder), *chosen, "-o", "out", "--judge", "auto", "--quiet")
    assert "Report: out/report.html" in said
    assert "echarts" in (tmp_path / "out" / "report.html").read_text()
