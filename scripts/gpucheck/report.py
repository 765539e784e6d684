"""GPU check: figures against targets, as JSON and as a page to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpucheck.packed import worst_error

Parts = dict[str, Any]

TARGETS: tuple[tuple[str, str, Callable[[Parts], Any], Callable[[Any], bool]], ...] = (
    ("device contract", "passes", lambda p: p["contract"]["ok"], bool),
    ("logits against float32, relative error", "< 2e-2", lambda p: _worst_error(p["logits"]), lambda v: v < 2e-2),
    ("packed products, relative error", "< 1e-2", lambda p: worst_error(p["packed"], is_fp8=False), lambda v: v < 1e-2),
    ("FP8 products, relative error", "< 5e-2", lambda p: worst_error(p["packed"], is_fp8=True), lambda v: v < 5e-2),
    ("same tokens through drop, exchange, restore", "yes", lambda p: p["regroup"]["same_tokens"], bool),
    ("same tokens, weights back from a mate", "yes", lambda p: p["regroup_from_mates"]["same_tokens"], bool),
    ("likelihood of tokens, off by (nats)", "< 0.1", lambda p: _likelihood(p, "mean"), lambda v: v < 0.1),
    ("likelihood of 99 in 100 tokens, off by (nats)", "< 0.5", lambda p: _likelihood(p, "p99"), lambda v: v < 0.5),
    ("graphs captured by drop and restore", "0", lambda p: _new_captures(p["graphs"]), lambda v: v == 0),
    ("tokens chosen in a graph are the most likely", "yes", lambda p: p["graphs"]["same_tokens"], bool),
    ("same bits in the chain and after the restore", "yes", lambda p: _same_bits(p["graphs"]), bool),
    ("remap of half of the layers, ms", "<= 20", lambda p: p["remap"]["drop_ms"], lambda v: v <= 20),
    ("decode step over its floor, batch 64", "<= 1.35", lambda p: p["decode"]["64"]["over_floor"], lambda v: v <= 1.35),
    ("host time not hidden, share of a step", "< 5 %", lambda p: p["host"]["exposed_share"], lambda v: v < 0.05),
    ("throughput dropped over undropped", ">= 0.9", lambda p: p["steady"]["share"], lambda v: v >= 0.9),
    ("TTFT p99 of recompute over drop", ">= 10", lambda p: _ttft_gain(p), lambda v: v >= 10),
    ("compute-sanitizer", "clean", lambda p: p["sanitizer"]["clean"], bool),
)


def _worst_error(part: Parts) -> float:
    return max(float(part["relative_error_eager"]), float(part["relative_error_graphs"]))


def _new_captures(part: Parts) -> int:
    return sum(part["captures_after_drop_and_restore"]) - sum(part["captures"])


def _same_bits(part: Parts) -> bool:
    return bool(part["same_in_chain"] and part["same_after_restore"])


def _likelihood(parts: Parts, which: str) -> float:
    """Return how far likelihoods are off at most, from each other or the reference's; bf16 alone takes half of it."""
    states = [state for state in parts["likelihood"].values() if isinstance(state, dict)]  # one names the reference
    return max(float(state[name][which]) for state in states for name in ("change", "error"))


def _ttft_gain(parts: Parts) -> float:
    return float(parts["burst_recompute"]["ttft_p99_s"] / parts["burst_drop"]["ttft_p99_s"])


def targets(parts: Parts) -> list[dict[str, Any]]:
    """Return each target with its figure; `met` is None where there is no figure."""
    rows: list[dict[str, Any]] = []
    for name, target, figure, is_met in TARGETS:
        try:
            value = figure(parts)
        except (KeyError, ZeroDivisionError):
            rows.append({"name": name, "target": target, "value": None, "met": None})
        else:
            rows.append({"name": name, "target": target, "value": value, "met": bool(is_met(value))})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Write a short page: what ran on what, targets, and every part's figures."""
    where = result["environment"]
    lines = [
        f"# {where['device']}, {where['date']}",
        "",
        f"{where['memory_gib']} GiB, compute capability {where['compute_capability']}, torch {where['torch']}, "
        f"CUDA {where['cuda']}{', quick' if result['quick'] else ''}. Printed by scripts/gpu_check.py.",
        "",
        "| target | asked | measured | met |",
        "| --- | --- | --- | --- |",
    ]
    words: dict[bool | None, str] = {None: "not measured", True: "yes", False: "no"}
    for row in result["targets"]:
        lines.append(f"| {row['name']} | {row['target']} | {_figure(row['value'])} | {words[row['met']]} |")
    for name, part in result["parts"].items():
        lines += ["", f"## {name}", "", *_rows(part)]
    return "\n".join(lines) + "\n"


def _rows(part: Parts, prefix: str = "") -> list[str]:
    rows = []
    for key, value in part.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key}, ")
        else:
            rows.append(f"- {prefix}{key}: {_figure(value)}")
    return rows


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
