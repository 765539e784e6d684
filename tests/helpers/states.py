"""States as `Engine.state()` gives them: two devices before and after a drop, with whatever else a test wants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

State = dict[str, Any]

LAYERS = 4
UNITS = {"embed": 3, **{f"layers.{i}": 2 for i in range(LAYERS)}, "head": 3}
BUDGET = 30


def state(
    now_s: float = 1.0, *, is_dropped: bool = False, used: int = 0, idle: int = 0, waiting: int = 0, **more: Any
) -> State:
    """Two groups of one device, or one chain of two."""
    units = list(UNITS)
    halves = (units[:3], units[3:]) if is_dropped else (units, units)
    stages = [[("cpu:0", [0, 2]), ("cpu:1", [2, 4])]] if is_dropped else [[("cpu:0", [0, 4])], [("cpu:1", [0, 4])]]
    blocks = {"total": 64 if is_dropped else 32, "used": used, "idle": idle}
    first_id = 2 if is_dropped else 0
    return {
        "now_s": now_s,
        "epoch": int(is_dropped),
        "overload_policy": "drop",
        "num_layers": LAYERS,
        "block_size": 16,
        "chunks_of_unit": UNITS,
        "devices": [_device(f"cpu:{i}", half, units, blocks) for i, half in enumerate(halves)],
        "groups": [
            {
                "id": first_id + i,
                "stages": [{"device": device, "layers": layers} for device, layers in chain],
                "blocks": blocks,
                "running": int(used > 0),
                "microbatches_in_flight": int(used > 0),
            }
            for i, chain in enumerate(stages)
        ],
        "requests": {"running": int(used > 0), "waiting": waiting, "preemptions": 0, "swaps": 0, "migrations": 0},
        "copies": {"now": len(stages), "at_launch": 2, "no_drop": None},
        "transitions": [drop_transition()] if is_dropped else [],
        **more,
    }


def gone(shown: State, index: int, why: str = "lost") -> State:
    """Return the state of groups of one device each after a device has gone: it holds nothing and has no group."""
    devices, nothing = list(shown["devices"]), {"total": 0, "used": 0, "idle": 0}
    empty = {"budget": 0, "weights": 0, "kv": 0, "free": 0}
    name = devices[index]["name"]
    devices[index] = {**devices[index], "state": why, "chunks": empty, "weights": [], "home": [], "blocks": nothing}
    groups = [group for group in shown["groups"] if all(stage["device"] != name for stage in group["stages"])]
    return {**shown, "devices": devices, "groups": groups}


def drop_transition(started_s: float = 2.0) -> State:
    """As `Transition.state()` of a drop that is done."""
    return {
        "kind": "drop",
        "started_s": started_s,
        "old_groups": (0, 1),
        "new_groups": (2,),
        "epoch": 1,
        "outcome": "done",
        "exchange_mode": None,
        "exchange_bytes": 1 << 20,
        "num_lost": 0,
        "weight_bytes": 14 << 21,
        "seconds": {"boundary": 0.01234567, "remap": 0.002, "committed": 0.0143, "exchange": 0.1, "total": 0.1143},
    }


def _device(name: str, units: list[str], home: list[str], blocks: dict[str, int]) -> State:
    weights = chunks(units)
    counts = {"budget": BUDGET, "weights": weights, "kv": BUDGET - weights - 2, "free": 2}
    return {
        "name": name,
        "chunk_bytes": 1 << 21,
        "chunks": counts,
        "weights": units,
        "home": home,
        "blocks": blocks,
    }


def chunks(units: Iterable[str]) -> int:
    """Chunks that these units take."""
    return sum(UNITS[unit] for unit in units)
