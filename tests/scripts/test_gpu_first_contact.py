"""First contact goes on whatever a step does to its process, and says so in lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_first_contact
import pytest
import torch
from gpu_first_contact import STEPS, follow

RUN = """
import os, sys, time
from gpu_first_contact import serve
def fine(ordinal): return {"ordinal": ordinal, "pid": os.getpid()}
steps = {
    "a": fine, "fails": lambda _: 1 // 0, "b": fine, "dies": lambda _: os.abort(), "hangs": lambda _: time.sleep(600),
    "c": fine,
}
serve(steps, sys.argv[1].split(","), 3)
"""


def test_steps_that_fail_die_or_hang_cost_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_first_contact.__file__).parent))
    names = ["a", "fails", "b", "dies", "hangs", "c"]
    results = {result["step"]: result for result in follow(names, [sys.executable, "-c", RUN], 15.0)}
    assert list(results) == names
    assert [results[name]["ok"] for name in names] == [True, False, True, False, False, True]
    assert results["fails"]["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert results["dies"]["error"].endswith("status -6") and results["hangs"]["error"].endswith("status -9")
    assert results["a"]["ordinal"] == 3 and len({results[name]["pid"] for name in ("a", "b", "c")}) == 3


def test_a_process_that_does_not_begin_ends_too() -> None:
    results = list(follow(["a", "b"], [sys.executable, "-c", "raise SystemExit(5)"], 15.0))
    assert [(r["step"], r["ok"]) for r in results] == [("a", False), ("b", False)]


def test_where_there_is_no_gpu_every_step_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, gpu_first_contact.__file__, "--steps"]
    results = list(follow(list(STEPS)[-2:], command, 60.0))
    assert [result["step"] for result in results] == list(STEPS)[-2:] and not any(result["ok"] for result in results)


def test_the_last_line_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_first_contact, "follow", lambda names, *_: ({"step": n, "ok": n != "pin"} for n in names))
    monkeypatch.setattr("sys.argv", ["gpu_first_contact.py"])
    with pytest.raises(SystemExit) as ended:
        gpu_first_contact.main()
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert ended.value.code == 1 and last == {"ok": len(STEPS) - 1, "of": len(STEPS)} and len(lines) == len(STEPS)
    assert subprocess.run([sys.executable, gpu_first_contact.__file__, "--help"], check=True, capture_output=True)
