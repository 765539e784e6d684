"""Schedule as vLLM 0.6.3 was published to: the engine that KunServe's paper compares with, out of our parts.

Each copy of the weights is a server of its own, with its own queue, behind a router that knows how many requests each
has; nothing is moved between them. A step computes whole prompts or next tokens, never both: prompts first, as many as
fit into its tokens, and whoever runs waits for them. Constants are its defaults (vllm/core/scheduler.py,
block_manager.py and engine/arg_utils.py at v0.6.3; chunked prefill is off up to contexts of 32,768 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kunserve.config import EngineConfig
from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.schedule.budget import TokenBudget
from kunserve.engine.schedule.draft import Draft
from kunserve.engine.schedule.ready import ready
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.policies import OverloadPolicy

MAX_NUM_SEQS = 256  # that run on one server
LEAST_BATCHED_TOKENS = 2048  # of a step; more if a prompt may be longer
WATERMARK = 0.01  # share of the blocks that admission leaves free


def as_published(config: EngineConfig, max_model_len: int) -> EngineConfig:
    """Return the configuration of one of its servers, whose requests have so many tokens at most."""
    return replace(
        config,
        overload_policy=OverloadPolicy.RECOMPUTE,
        watermark=WATERMARK,
        windowed_kv_share=1.0,  # whole prompts would need near blocks at once
        max_num_seqs=min(MAX_NUM_SEQS, config.max_num_seqs),
        max_num_batched_tokens=max(LEAST_BATCHED_TOKENS, max_model_len),
        async_scheduling=False,  # a step is planned when the one before has ended
    )


class PrefillFirst(Scheduler):
    """Schedules whole prompts before next tokens, each in steps of their own."""

    def schedule(self, group: Group, groups: Sequence[Group], epoch: int) -> Microbatch | None:
        """See `Scheduler.schedule`."""
        draft = Draft()
        self._prefill(group, groups, draft)
        if not len(draft):
            can_run, _ = ready(group, may_run_ahead=False)
            self._fill(group, can_run, draft, TokenBudget(self.limits.max_num_batched_tokens, group))
        if not len(draft):
            return None
        group.in_flight.append(batch := draft.microbatch(group, epoch))
        return batch

    def _prefill(self, group: Group, groups: Sequence[Group], draft: Draft) -> None:
        """Admit from the head of the queue, as long as the next prompt fits into the step as a whole."""
        num_tokens = self.limits.max_num_batched_tokens
        while (head := self.waiting.head) is not None and len(draft) < self.limits.max_num_seqs:
            if head.num_tokens > num_tokens or not self._may_admit_head(group, groups, draft):
                return
            self.waiting.popleft()
            self.preempted_by.pop(head.request_id, None)
            self.fleet.admit(head, group, finds_prefix=True)
            num_new = head.num_tokens - head.num_scheduled_tokens
            num_tokens -= num_new
            draft.add(head, num_new)
