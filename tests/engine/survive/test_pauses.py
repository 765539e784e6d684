"""Who waits when a device goes: streams of other groups for one microbatch at most. And who ends with it: nobody."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_models import COST
from transition_harness import Checked, checked_engine

from kunserve.config import EngineConfig
from kunserve.engine.batch import Microbatch
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.errors import DeviceLostError, EngineError
from kunserve.model.card import load_card
from kunserve.planner.snapshot import DeviceView
from kunserve.sampling import SamplingParams
from kunserve.sim.clock import simulate
from kunserve.sim.links import TimedLinks
from kunserve.sim.machine import SimMachine
from kunserve.sim.nodes.node import Node


def ask(number: int, num_prompt_tokens: int, num_tokens: int) -> Request:
    """Return a greedy request that shares no beginning with others."""
    prompt = [3 + number, *range(3, 2 + num_prompt_tokens)]
    return Request(f"r{number}", prompt, SamplingParams(num_tokens, temperature=0.0, ignore_eos=True))


def watch(engine: Engine, seen: Callable[[Group, Microbatch], None]) -> None:
    """Let `seen` see each microbatch as it is launched."""
    inputs = engine.executor.inputs

    def look(group: Group, batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Any:
        seen(group, batch)
        return inputs(group, batch, eos_token_ids)

    engine.executor.inputs = look  # type: ignore[method-assign]


class Missed:
    """Counts how many microbatches of its group, one after the other, a stream that has begun was not in."""

    def __init__(self, engine: Engine) -> None:
        self.most = defaultdict[str, int](int)  # by request id
        self._now = defaultdict[tuple[int, str], int](int)
        watch(engine, self._see)

    def _see(self, group: Group, batch: Microbatch) -> None:
        present = {span.request for span in batch.spans}
        for request in group.running:
            key = group.group_id, request.request_id
            has_begun = request.num_output_tokens > 0 and request.num_computed_tokens >= request.num_tokens - 1
            self._now[key] = self._now[key] + 1 if has_begun and request not in present else 0
            self.most[request.request_id] = max(self.most[request.request_id], self._now[key])


def simulated(num_devices: int) -> tuple[SimMachine, EngineConfig]:
    """Return devices with room for some 4,000 tokens each, and steps of 128 tokens."""
    model = load_card("smollm2-135m").config
    config = EngineConfig("smollm2-135m", max_num_batched_tokens=128)
    views = [DeviceView(i, 480) for i in range(num_devices)]
    links = TimedLinks(lambda source, destination: 1e10, 0.0)
    return SimMachine(model, COST, links, views, torch.float32, config.chunk_bytes, "cpu"), config


@pytest.mark.parametrize("num_prompt_tokens", [64, 400])
def test_streams_of_sound_groups_miss_one_microbatch_at_most(num_prompt_tokens: int) -> None:
    async def main() -> tuple[dict[str, int], set[str]]:
        machine, config = simulated(3)
        node = await Node.start(machine, load_card("smollm2-135m").config, config, 1024)
        engine, number = node.engine, 2048 // num_prompt_tokens
        missed = Missed(engine)

        async def read(request: Request) -> None:
            async for _ in engine.submit(request):
                pass

        answering = [asyncio.create_task(read(ask(i, num_prompt_tokens, 200))) for i in range(number)]
        while sum(live.request.num_output_tokens > 20 for live in engine.live.values()) < number:
            await engine.signals.next_commit()
        group = engine.fleet.group_on(1)
        assert group is not None
        gone = {request.request_id for request in group.running}
        missed.most.clear()
        engine.device_health.lose(1, "the test says so")
        await asyncio.gather(*answering)
        await node.stop()
        return missed.most, gone

    most, gone = simulate(main())
    others = {name: number for name, number in most.items() if name not in gone}
    assert gone and len(others) >= len(gone)
    assert set(others.values()) <= {0, 1} and 1 in others.values()


def kill_with(checked: Checked, poison: str) -> list[int]:
    """Let each device die in the step that has the request `poison`; returns those that did, as they do."""
    killed, execute = list[int](), checked.engine.executor.execute

    async def run(group: Group, batch: Microbatch, *inputs: Any) -> Any:
        if any(span.request.request_id == poison and span.request.num_output_tokens > 3 for span in batch.spans):
            device = group.stages[-1].device

            def die() -> None:
                if device not in killed:  # a microbatch that runs ahead finds it dead already
                    killed.append(device)
                raise DeviceLostError("an illegal address")

            await checked.engine.memories[device].device.run(die)
        return await execute(group, *inputs)

    checked.engine.executor.execute = lambda group, *inputs: run(group, group.in_flight[-1], *inputs)  # type: ignore[method-assign, misc]
    return killed


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("devices", ["cpu:3", "cpu:4"])
async def test_whoever_ends_devices_ends_two_at_most_and_nobody_with_it(
    devices: str, is_ahead: bool, six_layers: Path
) -> None:
    requests: Sequence[Request] = [ask(i, 20 + i, 40) for i in range(9)]
    async with checked_engine(six_layers, devices, 320, async_scheduling=is_ahead) as checked:
        missed, killed = Missed(checked.engine), kill_with(checked, "r4")
        answers = await checked.answer_all(requests)
        await checked.rebuilt()
        assert len(killed) == 2 == len(set(killed))
        assert isinstance(answers[4].error, EngineError) and len(answers[4].token_ids) >= 4
        assert [len(answer.token_ids) for answer in answers if answer is not answers[4]] == [40] * 8
        assert max(missed.most.values()) <= 1
        checked.assert_idle()
