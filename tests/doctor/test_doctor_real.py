"""The doctor on the machine that runs the tests: its real packages and metadata, nothing faked but single faults."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_machine import REQUIREMENTS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kunserve.doctor.finding import Status
from kunserve.doctor.probe import Probe
from kunserve.doctor.report import examine

ROOT = Path(__file__).parents[2]
REPORT = "import sys; from kunserve.cli import main; main(['doctor', '--json'])"
LOADED = """
import json, sys
from kunserve.doctor.probe import Probe
from kunserve.doctor.report import examine
examine(Probe())
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own. `path`: a folder that comes before all installed packages."""
    places = [str(place) for place in (path, ROOT) if place]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def checks(done: subprocess.CompletedProcess[str]) -> Mapping[str, Mapping[str, Any]]:
    assert done.stdout, done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_every_check_can_be_made_on_this_machine() -> None:
    findings = examine(Probe())
    assert [one.found for one in findings.values() if "could not be looked at" in one.found] == []


def test_every_check_can_be_made_with_the_requirements_of_this_source() -> None:
    """What is installed may be older than pyproject.toml."""
    findings = examine(Probe(requirements=lambda: REQUIREMENTS))
    assert [one.found for one in findings.values() if "could not be looked at" in one.found] == []
    assert all(findings[name].status is Status.OK for name in ("packages", "structured"))


def test_every_package_that_kunserve_requires_is_imported_by_some_check() -> None:
    done = python(LOADED)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    owners = importlib.metadata.packages_distributions()
    found = {canonicalize_name(owner) for name in loaded for owner in owners.get(name, ())}
    required = {one.name for one in map(Requirement, REQUIREMENTS) if one.marker is None}
    assert required - found == set()


@pytest.mark.parametrize(("package", "error"), [("aiohttp", "ImportError"), ("uvloop", "RuntimeError")])
def test_a_broken_package_that_comes_first_is_named(tmp_path: Path, package: str, error: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}")
    done = python(REPORT, tmp_path)
    finding = checks(done)["packages"]
    assert done.returncode == 1 and finding["prevents"] == ["cpu", "cuda"]
    assert finding["found"] == f"the server cannot be imported: in {package}: {error}"
    assert finding["remedy"].startswith(f"pip install '{package}<") and "--force-reinstall" in finding["remedy"]


def test_a_removed_working_directory_and_a_hub_cache_of_its_own(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    code = f"import os; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); {REPORT}"
    done = python(code, HF_HUB_CACHE=str(tmp_path / "hub"))
    found = checks(done)
    assert done.returncode == 1 and found["KunServe"]["found"].startswith("the working directory was removed")
    assert found["packages"]["status"] == "ok" and found["Hub"]["details"]["folder"] == str(tmp_path / "hub")
