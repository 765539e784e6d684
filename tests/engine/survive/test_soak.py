"""A minute of the soak (`scripts/soak.py` runs longer ones): load, faults and operators at random."""

from __future__ import annotations

from pathlib import Path

import pytest
from on_gpus import RESTARTED, of_cpus_alone
from seeds import asked_seed
from soaking import soak

MINUTES = 1


@pytest.mark.drawn
@pytest.mark.long
@of_cpus_alone(RESTARTED)
async def test_whatever_happens_every_answer_is_right(six_layers: Path) -> None:
    found = await soak(six_layers, MINUTES * 60, seed=asked_seed() or 1)
    assert found.counts["rounds"] and found.counts["requests"] and found.counts["add"]
