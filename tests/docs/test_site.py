"""The documentation is a site that builds without a warning, and that fetches nothing when it is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'> ]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None and os.environ.get("CI") != "true":
        pytest.skip("needs mkdocs: pip install --constraint constraints.txt '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) > 10
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_reading_it_needs_no_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    assert [url for page in pages for url in FETCHED.findall(page.read_text(encoding="utf-8"))] == []
