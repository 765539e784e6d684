"""What to do when blocks run out: who is admitted, and who makes room. Pure: no clock, no I/O, no torch.

The policies are those of the published engines, so that they can be compared in the same engine
(sources and constants: vLLM 0.32 `v1/core/sched/scheduler.py` for recompute). `drop` acts one level higher, in the
planner; below it, when even the largest merge is not enough, it preempts like recompute.
"""

from __future__ import annotations

import enum
from typing import Protocol

from kunserve.engine.group import Group
from kunserve.engine.request import Request


class OverloadPolicy(enum.StrEnum):
    """Values of `--overload-policy`."""

    DROP = "drop"
    RECOMPUTE = "recompute"
    QUEUE = "queue"


class Policy(Protocol):
    """Decisions at the edge of memory, for one group at a time."""

    def may_admit(self, group: Group, request: Request) -> bool:
        """Whether `request`, now waiting, may join `group`."""

    def victim(self, group: Group, request: Request) -> Request | None:
        """Whom to preempt so that `request` gets a block, perhaps itself; None: wait for what is in flight."""


def is_settled(request: Request) -> bool:
    """Whether its blocks may be taken now: no microbatch carries it, no copy runs on it."""
    return request.num_in_flight == 0 and not request.is_moving


class Recompute:
    """vLLM: the whole input must fit to be admitted; the last admitted makes room and starts over.

    `watermark`: share of the group's blocks that admission leaves free while anything runs (vLLM's `--watermark`).
    """

    def __init__(self, watermark: float = 0.0) -> None:
        self.watermark = watermark

    def may_admit(self, group: Group, request: Request) -> bool:
        """The whole input fits, above the watermark."""
        kept = int(self.watermark * group.num_blocks) if group.running else 0
        return group.blocks_for(request.num_tokens) <= group.num_free - kept

    def victim(self, group: Group, request: Request) -> Request | None:
        """The tail of the running list."""
        tail = group.running[-1]
        return tail if is_settled(tail) else None


class Queue:
    """Admit only what surely fits: input and every token it may still ask for. Never preempts."""

    def may_admit(self, group: Group, request: Request) -> bool:
        """The longest that all of them can get fits in the group."""
        return sum(self._most_blocks(group, r) for r in (*group.running, request)) <= group.num_blocks

    @staticmethod
    def _most_blocks(group: Group, request: Request) -> int:
        return group.blocks_for(request.num_prompt_tokens + request.params.max_tokens)

    def victim(self, group: Group, request: Request) -> Request | None:
        """Nobody: admission saw to it."""
        return None


def make_policy(policy: OverloadPolicy, watermark: float) -> Policy:
    """The policy that a flag names."""
    return Queue() if policy is OverloadPolicy.QUEUE else Recompute(watermark)
