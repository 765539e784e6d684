"""How long requests stand still for a merge, on the virtual clock: until its boundary, and while their KV moves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.signals import loop_time
from kunserve.model.card import load_card
from kunserve.sampling import SamplingParams
from kunserve.sim.clock import simulate
from kunserve.sim.machine import SimMachine
from kunserve.sim.nodes.node import Node
from kunserve.sim.options import Options, cluster_of, config_of
from kunserve.sim.policies import with_policy
from kunserve.sim.report import Answer

MODEL = "qwen2.5-14b"
RDMA = 25e9  # bytes a second between two of these GPUs, one way


@dataclass(slots=True)
class Steps:
    """All microbatches that came back, as (group id, begun, ended)."""

    seen: list[tuple[int, float, float]] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note them while the block runs."""
        returned = Group.returned

        def note(group: Group, launched_s: float, now_s: float) -> float:
            step_s = returned(group, launched_s, now_s)
            self.seen.append((group.group_id, now_s - step_s, now_s))
            return step_s

        with patch.object(Group, "returned", note):
            yield

    def longest(self, group_ids: set[int], start_s: float, end_s: float) -> float:
        """Return the longest step of these groups that ran at any time between; 0 if none did."""
        return max(
            (end - begun for i, begun, end in self.seen if i in group_ids and begun < end_s and end > start_s),
            default=0.0,
        )


async def started(gpus: str, policy: str, memory_gib: float = 80.0) -> Node:
    """A server that plans its steps ahead, and restores soon."""
    options = Options(gpus, MODEL, policy=policy, memory_gib=memory_gib, is_running_ahead=True, restore_hold_s=0.2)
    options = replace(options, max_num_batched_tokens=2048)
    model = load_card(MODEL).config
    machine = SimMachine.of_gpus(model, cluster_of(options), options.block_size)
    return await Node.start(machine, model, with_policy(config_of(options), policy), 32768)


def submitted(node: Node, number: int, num_prompt: int, num_output: int) -> list[Answer]:
    """Send so many equal requests at once."""
    answers = []
    for i in range(number):
        answers.append(Answer(loop_time(), num_prompt))
        params = SamplingParams(num_output, ignore_eos=True, seed=0)
        node.submit(Request(f"{loop_time()}-{i}", [1] * num_prompt, params), answers[-1], lambda: None)
    return answers


async def settled(node: Node) -> None:
    """Wait until no transition is under way."""
    while node.control.reconfigure.transitions.current is not None:
        await asyncio.sleep(0.05)


def test_a_drop_commits_within_a_step_of_its_own_groups() -> None:
    """Fifty bursts on two GPUs whose steps are planned ahead, each too large for them: the server drops by itself."""

    async def main() -> list[float]:
        node, steps, rng = await started("2xA800", "drop", memory_gib=40.0), Steps(), random.Random(5)
        engine, transitions = node.engine, node.control.reconfigure.transitions
        with steps.noted():
            while sum(t.kind == "drop" for t in transitions.remembered) < 50:
                while len(engine.groups) == 2:
                    submitted(node, 1, rng.randrange(1000, 8000), 400)
                    await asyncio.sleep(rng.expovariate(20.0))
                for request_id in list(engine.live):
                    engine.abort(request_id)
                while len(engine.groups) < 2:
                    await asyncio.sleep(0.05)
        drops = [t for t in transitions.remembered if t.kind == "drop" and t.outcome == "done"]
        await node.stop()
        beyond = []
        for drop in drops:
            committed_s = drop.seconds["committed"]
            longest_s = steps.longest({*drop.old_groups}, drop.started_s, drop.started_s + committed_s)
            beyond.append(committed_s - longest_s)
        return beyond

    beyond = sorted(simulate(main()))
    assert len(beyond) >= 45
    assert beyond[int(0.9 * len(beyond))] <= 0.010


def test_an_exchange_by_layer_takes_hardly_longer_than_its_bytes() -> None:
    """All of two groups' KV, more than the merge frees: everybody stands still for as long as a link needs for it."""

    async def main() -> tuple[dict[str, Any], list[Answer]]:
        node = await started("2xA800", "recompute")
        answers = submitted(node, 76, 6000, 120)
        while any(answer.num_output_tokens < 8 for answer in answers):
            await asyncio.sleep(0.05)
        for answer in answers:
            answer.longest_gap_s = 0.0
        step_s = max(group.step_s or 0.0 for group in node.engine.groups)
        await node.control.drop()
        await settled(node)
        [drop] = [t.state() for t in node.control.reconfigure.transitions.remembered]
        while not all(answer.is_finished for answer in answers):
            await asyncio.sleep(0.05)
        await node.stop()
        return drop | {"step_s": step_s}, answers

    drop, answers = simulate(main())
    assert drop["exchange_mode"] == "by_layer" and drop["num_lost"] == 0
    bytes_s = drop["exchange_bytes"] / 2 / RDMA  # both ways at once
    assert bytes_s > 0.2
    assert (
        max(answer.longest_gap_s for answer in answers) <= 1.5 * bytes_s + drop["step_s"] + drop["seconds"]["committed"]
    )
