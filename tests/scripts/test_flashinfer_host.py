"""FlashInfer's own wrappers take what is planned, where their files are installed; no GPU is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check" / "flashinfer_host.py"


@pytest.mark.long
def test_every_kind_of_step_is_planned_and_run() -> None:
    """Or a line says what to install."""
    done = subprocess.run([sys.executable, SCRIPT], check=False, capture_output=True, text=True)
    if find_spec("flashinfer") is None:
        assert done.returncode == 2 and "FlashInfer is not installed" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows if "case" in row} == {"plain", "windows", "more KV heads", "soft caps"}
    assert all(row["us"]["module"] > 0 for row in rows if "plan" in row)
