"""What scripts/map.py makes of simulations: medians, ranges, and what is judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import map as policy_map
import pytest

from kunserve.model.costs import OVERLAP

POLICIES = ("plenty", "drop", "recompute", "swap", "vllm-0.6.3")
POINT = policy_map.Point("sharegpt", 40, True, 1.4)


def found(seed: int, p99_s: Mapping[str, float], *, need: float = 1.4, num_drops: int = 1) -> dict[str, Any]:
    runs = {
        name: policy_map.Run(seconds, 100.0 - seconds, 1e5, num_drops if name == "drop" else 0, 1.5)
        for name, seconds in p99_s.items()
    }
    return {"point": POINT, "seed": seed, "need": need, "burst_s": 20.0, "runs": runs}


SEEDS = [
    dict(zip(POLICIES, seconds, strict=True)) for seconds in ((1, 2, 9, 5, 20), (2, 3, 8, 6, 10), (1, 4, 7, 7, 30))
]


def test_points_are_medians_with_their_ranges() -> None:
    [row] = policy_map.rows_of([found(i, p99) for i, p99 in enumerate(SEEDS)], POLICIES, ("recompute", "swap"))
    assert row["p99_s"] == {"plenty": 1, "drop": 3, "recompute": 8, "swap": 6, "vllm-0.6.3": 20}
    assert row["range_s"]["plenty"] == [1, 2] and row["range_s"]["vllm-0.6.3"] == [10, 30]
    assert row["tokens_range"]["drop"] == [96, 98]
    assert (row["gap"], row["ceiling"], row["p99_over_best"]) == (0.4, 6.0, 0.5)  # what is published is not judged
    assert (row["recompute_over_drop"], row["recompute_over_plenty"]) == (2.67, 8.0)
    lines = policy_map.table_of([row], POLICIES)
    assert len(lines) == 2 + len(POLICIES)
    assert "| plenty | 1.00 (1.00 to 2.00) | 99 (98 to 99) |" in lines[2]
    assert "| drop | 3.00 (2.00 to 4.00) | 97 (96 to 98) | 1, 1, 1 | 1.50 |" in lines[3]


def test_a_drop_that_nobody_needed_is_named() -> None:
    rows = list(policy_map.rows_of([found(0, SEEDS[0], need=0.9)], POLICIES, ("recompute",)))
    assert policy_map.judge(rows)["need < 0.95 without a drop"] == [POINT.name]
    rows = list(policy_map.rows_of([found(0, SEEDS[0], need=0.9, num_drops=0)], POLICIES, ("recompute",)))
    assert policy_map.judge(rows)["need < 0.95 without a drop"] == []


def test_overlaps_are_points_of_their_own() -> None:
    plain, swept = policy_map.points(is_quick=False), policy_map.points(is_quick=False, overlaps=(1.0, OVERLAP))
    assert len(swept) == 2 * len(plain) == 48 and set(plain) < set(swept)
    assert len({point.name for point in swept}) == 48
    assert {point.load(20.0, 0).overlap for point in swept} == {1.0, OVERLAP}


def test_a_burst_that_is_known_to_fit_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[float]()

    def need_of(point: policy_map.Point, burst_s: float, seed: int, out: Path) -> float:
        tried.append(burst_s)
        return 0.4 + 0.01 * burst_s

    monkeypatch.setattr(policy_map, "need_of", need_of)
    burst_s = policy_map.burst_for(POINT, 0, Path())
    assert len(tried) > 1 and need_of(POINT, burst_s, 0, Path()) == pytest.approx(POINT.need, rel=0.05)
    tried.clear()
    assert policy_map.burst_for(POINT, 1, Path(), burst_s) == burst_s and tried == [burst_s]
