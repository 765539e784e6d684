"""`kunserve loadgen` as users call it."""

from __future__ import annotations

import subprocess
import sys

# Every module of the package is imported: one that is only imported later would not hide what it brings along.
IMPORTS = """
import importlib, pkgutil, sys, kunserve.loadgen
for module in pkgutil.iter_modules(kunserve.loadgen.__path__, "kunserve.loadgen."):
    importlib.import_module(module.name)
assert "kunserve.loadgen.command" in sys.modules
print(*sorted({"torch", "matplotlib"} & sys.modules.keys()))
"""


def test_the_load_generator_starts_without_torch_and_matplotlib() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
