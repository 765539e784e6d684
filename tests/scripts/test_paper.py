"""The figures of scripts/figures/paper.py, from small reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paper
import paper_figures as figures

SECONDS = range(60)


def report(ttft_s: float, *, transitions: tuple[tuple[str, float], ...] = (), waits_from: int = 60) -> dict[str, Any]:
    """A request per second; memory is full from `waits_from` on."""
    quantiles = dict.fromkeys(("p50", "p90", "p99", "p999"), ttft_s)
    return {
        "ttft_s": quantiles,
        "tpot_s": dict.fromkeys(quantiles, 0.1),
        "longest_gap_s": 1.0,
        "output_tokens_per_s": 10.0,
        "output_tokens_per_s_while_arriving": 10.0,
        "elapsed_s": 60.0,
        "preemptions": 0,
        "num_transitions": len(transitions),
        "transitions": [{"kind": kind, "started_s": at_s, "outcome": "done"} for kind, at_s in transitions],
        "bubble_share": None,
        "memory": {
            "kv_tokens": 100,
            "most_kv_tokens": 150,
            "mean_usage_of_undropped": 0.5,
            "peak_usage_of_undropped": 1.0,
            "over_time": {
                "at_s": list(SECONDS),
                "kv_tokens": [100] * 60,
                "used_tokens": [99 if s >= waits_from else 50 for s in SECONDS],
                "waiting": [int(s >= waits_from) for s in SECONDS],
                "output_tokens": [10 * s for s in SECONDS],
            },
        },
        "answers": {
            "arrival_s": list(SECONDS),
            "ttft_s": [ttft_s] * 59 + [None],
            "tpot_s": [0.1] * 30 + [0.2] * 30,
        },
    }


def test_every_section_says_what_is_published(tmp_path: Path) -> None:
    drop = report(0.5, transitions=(("drop", 20.0), ("restore", 40.0)), waits_from=50)
    baselines = {name: report(5.0 + i, waits_from=45 + i) for i, name in enumerate((*paper.BASELINES, "pipeline"))}
    others = {figures.VLLM: report(20.0), "drop": drop, figures.PLENTY: report(0.25)}
    systems = figures.section("sharegpt", baselines | others, tmp_path)
    assert "Need: 1.00 of the KV that is mapped without a drop." in systems
    assert any("the ceiling: **20.0 times**" in line for line in systems)
    assert any("vLLM 0.6.3 over drop's: **40.0 times**" in line for line in systems)
    assert any("**10.0 times**; published: 12.7 to 72.2 times" in line for line in systems)
    assert any("| recompute | 100.0 |" not in line and line.startswith("| drop | 0.0") for line in systems)
    restore = figures.section("restore", {"restore": drop, "no restore": report(1.0)}, tmp_path)
    assert any("P50 TTFT: **-50.0 %**; published: -28 %" in line for line in restore)
    runs = dict(zip(paper.ABLATION, [baselines["recompute"], *[drop] * 3, report(0.1)], strict=True))
    assert any("p90 10.00" in line for line in figures.section("ablation", runs, tmp_path))
    end = figures.section("endless burst", {"recompute": report(9.0, waits_from=47), "drop": drop}, tmp_path)
    assert any("**2.50 times**" in line for line in end)
    assert {path.name for path in tmp_path.iterdir()} >= {"sharegpt-slo.png", "restore-over-time.png"}


def test_what_is_read_from_a_run() -> None:
    drop = report(0.5, transitions=(("drop", 20.0), ("restore", 40.0)), waits_from=50)
    assert figures.dropped_window(drop) == (20.0, 40.0)
    assert abs(figures.tpot_within(drop, (20.0, 40.0)) - 0.15) < 1e-9
    assert figures.memory_ends_s(drop) == 50 and figures.memory_ends_s(report(1.0)) is None
    assert figures.misses(drop, 0.4) == 1.0 and figures.misses(drop, 0.5) == 0.0


def test_each_run_is_simulated_with_its_own_options() -> None:
    planned = {e.title: e.runs for e in paper.experiments(["sharegpt"], 3)}
    assert list(planned) == ["sharegpt", "ablation", "restore", "endless burst"]
    runs = [options for experiment in planned.values() for options in experiment.values()]
    assert all(options.seed == 3 for options in runs) and len(set(runs)) >= len(runs) - 2
    assert not planned["restore"]["no restore"].is_restoring
    assert all(sum(options.policy == paper.PLENTY for options in runs.values()) == 1 for runs in planned.values())
    quick = {e.title: e.runs for e in paper.experiments(["sharegpt"], 3, is_quick=True)}
    assert 2 * (quick["sharegpt"]["drop"].rate or 0) == planned["sharegpt"]["drop"].rate
    full = {e.title: e.runs for e in paper.experiments(["sharegpt"], 3, is_full=True)}
    assert len(full["sharegpt"]) > len(planned["sharegpt"])
