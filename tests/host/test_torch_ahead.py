"""An import of torch that was hastened: the same torch, and what was put off comes when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kunserve.host.torch_ahead import put_off

HASTENED = """
import sys
from kunserve.host.torch_ahead import PUT_OFF, hasten_torch

hasten_torch()
import torch

assert "torch._decomp" not in sys.modules, "it was not put off"
assert float((torch.ones(3, 4) @ torch.ones(4)).sum()) == 12
from torch._meta_registrations import meta_mm

assert meta_mm(torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")).shape == (2, 5)
assert "torch._decomp" in sys.modules
"""


def test_torch_works_and_what_was_put_off_comes_when_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", HASTENED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_put_off_runs_once_and_when_something_of_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slow_one.py"
    path.write_text("import put_off_runs\nput_off_runs.append(1)\nvalue = 7\n")
    runs: list[int] = []
    monkeypatch.setitem(sys.modules, "put_off_runs", runs)
    monkeypatch.delitem(sys.modules, "slow_one", raising=False)
    put_off("slow_one", path)
    import slow_one  # type: ignore[import-not-found]

    assert runs == []
    assert (slow_one.value, slow_one.value, runs) == (7, 7, [1])
    with pytest.raises(AttributeError):
        _ = slow_one.other
    del sys.modules["slow_one"]


def test_a_file_that_is_not_there_puts_nothing_off(tmp_path: Path) -> None:
    put_off("no_such_one", tmp_path / "no_such_one.py")
    assert "no_such_one" not in sys.modules
