"""Models that are described by a card alone are simulated: with experts, with windows, with both."""

from __future__ import annotations

import pytest

from kunserve.sim.options import Options, simulate

CARDS = ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "gemma-3-12b", "phi-4")


@pytest.mark.parametrize("name", CARDS)
def test_a_load_is_served(name: str) -> None:
    report = simulate(Options(cluster="4xA800", model=name, rate=8.0, duration_s=2.0, burst_s=1.0))
    assert report["finished"] == report["requests"] > 4
