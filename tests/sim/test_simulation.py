"""Whole simulations of a small burst: every policy answers everybody, always in the same way."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from kunserve.errors import ConfigError
from kunserve.gpu.links import HOST, Priority
from kunserve.model.card import load_card
from kunserve.model.costs import derive, device_rates
from kunserve.planner.cost import Work
from kunserve.sim.__main__ import parse_arguments
from kunserve.sim.clock import simulate as on_virtual_clock
from kunserve.sim.cluster import Instances, parse_cluster
from kunserve.sim.links import TimedLinks
from kunserve.sim.machine import SimDevice, SimMachine
from kunserve.sim.options import Options, simulate
from kunserve.sim.policies import POLICIES

# Two GPUs with room for some 40 requests each, and ten times as many arrivals from second 45 on.
BURST = Options(cluster="2xA800", memory_gib=39.0, rate=6.0, duration_s=64.0, burst_height=10.0, burst_s=17.0)


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """The burst under each policy."""
    return {policy: simulate(replace(BURST, policy=policy)) for policy in POLICIES}


@pytest.mark.long
@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_is_answered(policy: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[policy]  # the invariants were asserted at its end
    assert report["finished"] == report["requests"] > 150
    assert report["failures"] == []
    assert report["output_tokens"] == reports["queue"]["output_tokens"]
    assert 0 < report["ttft_s"]["p50"] <= report["ttft_s"]["p99"] <= report["ttft_s"]["max"]


def test_a_drop_happens_is_undone_and_beats_recompute(reports: dict[str, dict[str, Any]]) -> None:
    drop, recompute = reports["drop"], reports["recompute"]
    assert [t["kind"] for t in drop["transitions"]] == ["drop", "restore"]
    assert all(t["outcome"] == "done" for t in drop["transitions"])
    assert drop["memory"]["most_kv_tokens"] > 1.5 * drop["memory"]["kv_tokens"]
    assert drop["memory"]["over_time"]["groups"][-1] == 2
    assert drop["ttft_s"]["p99"] < recompute["ttft_s"]["p99"] / 2
    assert reports["swap"]["swaps"] > 0 and recompute["preemptions"] > 0
    assert reports["pipeline"]["memory"]["over_time"]["groups"][0] == 1


def test_weights_return_while_requests_keep_coming() -> None:
    report = simulate(replace(BURST, rate=4.5, duration_s=140.0))
    assert [t["kind"] for t in report["transitions"]] == ["drop", "restore"]
    drop, restore = report["transitions"]
    ended_s = 62.0  # the burst
    num_since = sum(ended_s < at_s < restore["started_s"] for at_s in report["answers"]["arrival_s"])
    assert drop["started_s"] < ended_s < restore["started_s"] < 130.0 and num_since > 30


def test_without_restore_the_chain_stays(reports: dict[str, dict[str, Any]]) -> None:
    report = simulate(replace(BURST, is_restoring=False))
    assert [t["kind"] for t in report["transitions"]] == ["drop"]
    assert report["memory"]["over_time"]["groups"][-1] == 1


def test_the_same_seed_gives_the_same_report_to_the_byte(reports: dict[str, dict[str, Any]]) -> None:
    assert json.dumps(simulate(BURST)) == json.dumps(reports["drop"])
    assert simulate(replace(BURST, seed=1, duration_s=20.0))["ttft_s"] != reports["drop"]["ttft_s"]


def test_a_device_computes_one_thing_after_the_other() -> None:
    async def main() -> tuple[float, float]:
        device, loop = SimDevice(0, 4, 2 << 20), asyncio.get_running_loop()
        await asyncio.gather(device.compute(2.0), device.compute(3.0))
        after_both = loop.time()
        await device.run(lambda: device.reserve(2 << 20))
        return after_both, loop.time()

    assert on_virtual_clock(main()) == (5.0, 5.0)


@pytest.mark.parametrize(("is_coordinated", "order"), [(True, ["kv", "x", "kv 2"]), (False, ["kv", "kv 2", "x"])])
def test_activations_overtake_kv_on_a_port(is_coordinated: bool, order: list[str]) -> None:
    done = []

    async def send(links: TimedLinks, name: str, destination: int, priority: Priority) -> None:
        async with links.turn(0, destination, priority, 100):
            done.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        links = TimedLinks(lambda source, destination: 100.0, 0.0, is_coordinated=is_coordinated)
        await asyncio.gather(
            send(links, "kv", 1, Priority.KV),
            send(links, "kv 2", 2, Priority.KV),
            send(links, "x", 1, Priority.ACTIVATION),
            send(links, "to host", HOST, Priority.WEIGHTS),
        )

    on_virtual_clock(main())
    assert [name for name, _ in done if name != "to host"] == order
    assert dict(done)["to host"] == 1.0  # beside the network
    assert max(at_s for _, at_s in done) == 3.0


def test_only_coordinated_links_cut_kv_into_slices() -> None:
    links, other = (TimedLinks(lambda *_: 1.0, is_coordinated=is_coordinated) for is_coordinated in (True, False))
    assert links.slice_bytes == TimedLinks.slice_bytes < 1 << 30 < other.slice_bytes


def test_a_device_is_as_many_gpus_as_the_model_needs() -> None:
    small, large = load_card("qwen2.5-14b").config, load_card("qwen2.5-72b").config
    assert Instances.of(small, parse_cluster("8xA800")).num_devices == 8
    instances = Instances.of(large, parse_cluster("16xH800"))
    assert (instances.gpus, instances.num_devices, instances.server(1), instances.server(2)) == (4, 4, 0, 1)
    assert instances.bandwidth(0, 1) > instances.bandwidth(1, 2) > 0
    one, four = derive(large, device_rates()["h800"]), instances.cost(large)
    assert four.load_s == pytest.approx(one.load_s / 4) and four.token_s == pytest.approx(one.token_s / 4)
    with pytest.raises(ConfigError, match="one instance of the model needs 4 GPUs"):
        Instances.of(large, parse_cluster("2xH800"))


@pytest.mark.parametrize("kind", ["A100-40", "A100-80", "A800", "L40S", "4090", "H100", "H800", "H200", "B200"])
def test_gpus_that_are_known(kind: str) -> None:
    model, cluster = load_card("qwen3-8b").config, parse_cluster(f"8x{kind}")
    instances = Instances.of(model, cluster)
    cost = instances.cost(model)
    weights_s = cost.load_s * model.num_layers + cost.head_load_s
    assert 1e-3 < weights_s < 30e-3  # 16 GB, read at 0.6 to 6 TB/s
    assert instances.bandwidth(0, 1) > 0 and instances.memory_bytes > 16e9


def test_small_batches_use_less_of_a_gpu() -> None:
    model, cluster = load_card("qwen2.5-14b").config, parse_cluster("4xA800")

    def reached(overlap: float, num_tokens: int) -> float:
        """Share of the time in which a layer's matrices of a microbatch would be multiplied if nothing were read."""
        cost = SimMachine.of_gpus(model, cluster, 64, overlap=overlap).cost
        return cost.token_s * num_tokens / cost.layer_time(Work(num_tokens=num_tokens))

    for overlap in (1.0, 2.0, 4.0):
        shares = [reached(overlap, num_tokens) for num_tokens in (16, 64, 128, 512, 2048)]
        assert shares == sorted(shares) and shares[0] < 0.13 and shares[1] < 0.5 and 0.9 < shares[-1] <= 1.0
    assert reached(1.0, 256) < reached(2.0, 256) < reached(4.0, 256)


def test_nothing_is_faster_than_plenty(reports: dict[str, dict[str, Any]]) -> None:
    plenty = reports["plenty"]
    assert plenty["preemptions"] == 0 and plenty["transitions"] == []
    assert all(plenty["ttft_s"]["p99"] <= report["ttft_s"]["p99"] for report in reports.values())


def test_what_overlaps_less_takes_longer(reports: dict[str, dict[str, Any]]) -> None:
    report = simulate(replace(BURST, policy="recompute", overlap=1.0))
    assert report["tpot_s"]["p50"] > 1.05 * reports["recompute"]["tpot_s"]["p50"]
    options, _ = parse_arguments(["--overlap", "2"])
    assert options.overlap == 2.0


@pytest.mark.parametrize("text", ["A800", "8xZ9", "0xA800", "-1xA800"])
def test_a_cluster_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write for instance 8xA800"):
        parse_cluster(text)


def test_options_come_from_the_command_line() -> None:
    options, is_brief = parse_arguments(["--policy", "pipeline", "--duration", "9", "--no-restore", "--brief"])
    assert options == Options(policy="pipeline", duration_s=9.0, is_restoring=False) and is_brief
