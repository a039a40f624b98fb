"""The documentation site: it builds without a warning, asks nothing of others, and says what the program says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What a browser fetches by itself when it shows a page.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=["'](https?:)?//|"""
    r"""<link\b(?=[^>]*\brel=["'](?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["'](https?:)?//|"""
    r"""url\(["']?https?://|@import ["']https?://"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder: Path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_ask_nothing_of_others(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        found = FETCHED.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found}"
    assert FETCHED.search('<script async src="https://example.org/x.js">'), "the control"
    assert FETCHED.search('<link href="//example.org/x.css" rel="stylesheet">'), "the control"
    assert FETCHED.search('<a href="https://example.org">') is None


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in ("Model.find", "Model.ablate", "load", "wrap", "FoundDirection", "run", "inspect", "EditOptions"):
        assert name.rpartition(".")[2] in page, name
    assert "max_new_tokens" in page


@pytest.mark.parametrize("script", ["commands", "python_options"])
def test_generated_pages_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--check"], check=False)
    assert done.returncode == 0, f"run scripts/{script}.py"


def test_every_page_is_in_the_navigation_and_every_picture_is_there() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in nav, page.name
        for target in re.findall(r"!?\[[^\]]*\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
