"""The contracts of imports (pyproject.toml, dev/README.md "Folders") refuse what they are there for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to plant imports in."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kunserve", tmp_path / "kunserve", symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    done = subprocess.run([LINT, "--no-logo", "--no-cache"], cwd=folder, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_what_is_there_keeps_all_contracts(copy: Path) -> None:
    status, text = lint(copy)
    assert status == 0 and " 0 broken" in text, text


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("model/card", "kunserve.gpu.device"),
        ("compute/decoder", "kunserve.engine.group"),
        ("engine/schedule/scheduler", "kunserve.engine.regroup.control"),
        ("api/wire/fields", "kunserve.api.say.answers"),
        ("gpu/chunk_pool", "kunserve.gpu.range"),  # not up, but in a circle
        ("engine/schedule/waiting", "torch"),
        ("planner/plan", "asyncio"),
    ],
)
def test_an_import_that_runs_up_is_refused(copy: Path, module: str, planted: str) -> None:
    with (copy / "kunserve" / f"{module}.py").open("a") as file:
        file.write(f"\nimport {planted}\n")
    status, text = lint(copy)
    assert status == 1 and " 0 broken" not in text
    assert planted.rpartition(".")[2] in text and module.rpartition("/")[2] in text


def test_a_new_folder_has_to_be_given_its_place(copy: Path) -> None:
    (copy / "kunserve" / "engine" / "news").mkdir()
    (copy / "kunserve" / "engine" / "news" / "__init__.py").write_text('"""New."""\n')
    status, text = lint(copy)
    assert status == 1 and "news" in text
