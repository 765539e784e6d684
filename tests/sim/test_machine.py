"""The simulated executor: what the host takes, and who runs ahead of whom."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from cost_models import COST

from kunserve.config import EngineConfig
from kunserve.model.card import load_card
from kunserve.planner.snapshot import DeviceView
from kunserve.sim.clock import simulate
from kunserve.sim.links import TimedLinks
from kunserve.sim.machine import HostTime, SimDevice, SimMachine
from kunserve.sim.policies import with_policy
from kunserve.sim.simulation import Simulation
from kunserve.sim.traces import TraceRow

ROWS = [TraceRow(0.0, 40, 11), TraceRow(0.0, 40, 11)]
HOST = HostTime(0.5, 0.25, 2.0)


def report(num_devices: int, host: HostTime, policy: str = "recompute", *, is_ahead: bool = False) -> dict[str, Any]:
    """Both rows on devices whose every stage takes a second, whatever it holds."""
    model = load_card("smollm2-135m").config
    config = with_policy(EngineConfig("smollm2-135m", async_scheduling=is_ahead), policy)
    none = dict.fromkeys(COST.to_dict(), 0.0)
    cost = replace(COST, **none | {"stage_s": 1.0, "token_s": 1e-9, "overlap": 1.0})
    views = [DeviceView(i, 1000) for i in range(num_devices)]
    links = TimedLinks(lambda source, destination: 1e15, 0.0)
    machine = SimMachine(model, cost, links, views, torch.float32, config.chunk_bytes, "cpu", host=host)
    return Simulation(lambda: machine, model, config, ROWS, 512).run()


def test_the_host_takes_its_time_from_the_devices() -> None:
    # Eleven microbatches of two rows each on one device; of one row each, if both requests have their own.
    assert report(1, HostTime())["elapsed_s"] == pytest.approx(11 * 1.0)
    assert report(1, HOST)["elapsed_s"] == pytest.approx(11 * (1.0 + 0.5 + 2 * 0.25) + 2 * 2.0)
    assert report(2, HOST)["elapsed_s"] == pytest.approx(11 * (1.0 + 0.5 + 0.25) + 2.0)


def test_a_host_apart_serves_all_groups_and_works_ahead_of_devices() -> None:
    apart = replace(HOST, is_apart=True)
    one, two = (report(num_devices, apart)["elapsed_s"] for num_devices in (1, 2))
    assert one == pytest.approx(11 * (1.0 + 0.5 + 2 * 0.25) + 2 * 2.0)
    # The second group's first microbatch waits for the first's; later each has the core while the other computes.
    assert two == pytest.approx(2 * (0.5 + 0.25 + 2.0) + 10 * (0.5 + 0.25) + 11 * 1.0)
    short = HostTime(0.1, 0.05, is_apart=True)
    plain, ahead = (report(1, short, is_ahead=is_ahead)["elapsed_s"] for is_ahead in (False, True))
    assert plain == pytest.approx(11 * (1.0 + 0.2))
    assert ahead == pytest.approx(11 * 1.0 + 0.2, abs=0.2)  # all but the first beside the step before


def test_the_stages_of_a_chain_share_what_the_host_takes() -> None:
    plain, slowed = (report(2, host, "pipeline")["elapsed_s"] for host in (HostTime(), HOST))
    # A row each; both are on their way all the time, but for the first stage of the first and the last of the last.
    assert slowed / plain == pytest.approx((11 * (1.0 + (0.5 + 0.25) / 2) + 2.0) / 11, rel=0.1)


@pytest.mark.parametrize("policy", ["recompute", "pipeline"])
def test_a_microbatch_that_runs_ahead_waits_for_the_tokens_it_goes_on_from(policy: str) -> None:
    ahead, plain = (report(2, HostTime(), policy, is_ahead=is_ahead) for is_ahead in (True, False))
    assert ahead["finished"] == plain["finished"] == 2
    assert ahead["output_tokens"] == plain["output_tokens"]
    assert ahead["elapsed_s"] >= plain["elapsed_s"]  # nothing is computed before it is known


def test_queued_work_is_done_in_order() -> None:
    async def main() -> list[float]:
        device = SimDevice(0, 4, 2 << 20)
        first_s, second_s = device.queue(2.0), device.queue(3.0)
        await asyncio.sleep(4.0)
        return [first_s, second_s, device.queue(1.0)]

    assert simulate(main()) == [2.0, 5.0, 2.0]
