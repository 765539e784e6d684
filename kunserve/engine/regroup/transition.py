"""Transitions: what is known of one drop or restore, while it runs and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

HISTORY = 1000  # transitions that are remembered


@dataclass(slots=True)
class Transition:
    """What happened, step by step. Times in seconds; `started_s` on the engine's clock."""

    kind: str  # "drop", "restore"
    started_s: float
    old_groups: tuple[int, ...]
    new_groups: tuple[int, ...] = ()
    epoch: int | None = None  # the one it made, once committed
    outcome: str = "running"  # then "done", "cancelled", "rolled back", "failed after its commit", "lost"
    exchange_mode: str | None = None
    exchange_bytes: int = 0
    num_lost: int = 0  # requests whose KV should have followed its layers but did not arrive: they are recomputed
    num_cached_blocks: int = 0  # that no request used, and that followed
    weight_bytes: int = 0  # dropped, or loaded
    weight_sources: dict[str, int] = field(default_factory=dict)  # bytes of tensors loaded, by where they came from
    seconds: dict[str, float] = field(default_factory=dict)  # by step
    step: str | None = None  # the one it is at
    planned_bytes: int = 0  # of weights that it is to drop, or to load

    def state(self) -> dict[str, Any]:
        """As `/kunserve/state` and the log show it: `step` and `planned_bytes` only while it runs."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.outcome != "running":
            del shown["step"], shown["planned_bytes"]
        return shown
