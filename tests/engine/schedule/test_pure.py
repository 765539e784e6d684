"""What decides is pure: it can be imported, and so tested and simulated, without torch, asyncio or anything of I/O."""

from __future__ import annotations

import subprocess
import sys

import pytest

DECIDING = """
import pkgutil, sys
import kunserve.planner
for module in pkgutil.iter_modules(kunserve.planner.__path__, "kunserve.planner."):
    __import__(module.name)
import kunserve.engine.schedule.policy, kunserve.engine.schedule.scheduler
assert "kunserve.engine.schedule.budget" in sys.modules and "kunserve.planner.drop" in sys.modules
print(*sorted(sys.modules))
"""


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Modules that planner, scheduler and policies bring along."""
    done = subprocess.run([sys.executable, "-c", DECIDING], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["torch", "asyncio", "socket", "subprocess", "aiohttp", "uvloop", "structlog"])
def test_what_decides_imports_nothing_that_acts(imported: set[str], module: str) -> None:
    assert module not in imported
