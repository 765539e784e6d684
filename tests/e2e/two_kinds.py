"""Models whose KV is of two kinds, and what holds of an engine that serves one."""

from __future__ import annotations

from typing import Any

from kunserve.engine.engine import Engine
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.engine.launch.launch import Served

FAMILIES = ("gemma2", "gemma3", "gpt-oss", "qwen2-window")
# So many layers that half of a chain has a half of either kind.
SHAPE: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
SHAPES = {family: SHAPE | ({"num_hidden_layers": 6} if family == "gemma3" else {}) for family in FAMILIES}


def is_bounded(engine: Engine) -> bool:
    """Whether no request that decodes holds more near blocks than its window needs; all layers keep what they need."""
    for group in engine.groups:
        assert isinstance(group, MixedGroup)
        for request in group.running:
            near = request.table.near
            if not request.is_moving and near is not None and request.num_tokens - request.num_computed_tokens <= 1:
                assert len(near.blocks) <= group.near_blocks_for(max(request.num_tokens, request.num_scheduled_tokens))
                assert request.table.num_behind == 0
    return True


async def watch(engine: Engine) -> None:
    while True:
        await engine.signals.next_commit()
        engine.check()
        assert is_bounded(engine)


def share_of(engine: Engine) -> tuple[float, ...]:
    """Near blocks over full ones, of each group."""
    groups = [group for group in engine.groups if isinstance(group, MixedGroup)]
    return tuple(group.num_near_blocks / group.num_blocks for group in groups)


async def rebalance(served: Served, share: int) -> str:
    """Give near layers another share, in thousandths; returns what came of it."""
    transition = await served.control.reconfigure.rebalance(share)
    served.engine.check()
    return transition.outcome
