"""Several simulated servers: who gets a request, when more are started, and what the report says of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kunserve.errors import ConfigError
from kunserve.sim.nodes.router import ROUTERS, Least, Load, Prefix, Random, make_router
from kunserve.sim.nodes.scaler import Scaler
from kunserve.sim.options import Options, scaler_of, simulate

# Two servers of two GPUs with room for some seven requests each, and a burst that lasts longer than a start.
BURST = Options(
    cluster="2xA800",
    memory_gib=39.0,
    workload="longbench",
    rate=1.4,
    duration_s=80.0,
    burst_height=6.0,
    burst_s=30.0,
    nodes=2,
)


def load(num_open: int = 0, *, num_waiting: int = 0, kv_usage: float = 0.0) -> Load:
    return Load(num_open, num_waiting, kv_usage, num_blocks=4)


def test_the_least_loaded_server_is_picked_and_equal_ones_by_turns() -> None:
    router = Least()
    assert router.pick([load(3), load(1), load(2)], []) == 1
    assert [router.pick([load(), load(), load()], []) for _ in range(6)] == [0, 2, 1, 0, 2, 1]


def test_the_random_router_picks_all_and_the_same_for_a_seed() -> None:
    picks = [[router.pick([load()] * 4, []) for _ in range(400)] for router in (Random(5), Random(5), Random(6))]
    assert picks[0] == picks[1] != picks[2]
    assert min(picks[0].count(i) for i in range(4)) > 70


def test_the_prefix_router_follows_a_prompt_until_its_server_is_full() -> None:
    router, keys = Prefix(), [b"a", b"b", b"c"]
    first = router.pick([load(), load(), load()], keys)
    assert router.pick([load(1), load(1), load(1)], [b"a", b"b", b"d"]) == first
    assert router.pick([load(9 * (i == first)) for i in range(3)], [b"x", b"b", b"c"]) != first  # no common beginning
    full = [load(num_waiting=9 * (i == first), kv_usage=0.99 * (i == first)) for i in range(3)]
    assert router.pick(full, keys) != first


def test_the_prefix_router_forgets_what_a_server_has_no_room_for() -> None:
    router, busy = Prefix(), [load(kv_usage=0.3), load()]
    assert router.pick(list(reversed(busy)), [b"a", b"b"]) == 0
    assert router.pick(busy, [b"a", b"b"]) == 0  # two shared blocks outweigh the load
    assert router.pick(list(reversed(busy)), [bytes([i]) for i in range(4)]) == 0  # as many as it has
    assert router.pick(busy, [b"a", b"b"]) == 1


@pytest.mark.parametrize(
    ("demands", "num_started", "wanted"),
    [
        ([0.5, 0.9], 2, 2),  # 1.4 / 0.8 is less than two
        ([0.9, 0.85], 2, 2),  # within the tolerance
        ([0.9, 0.9], 2, 3),
        ([1.6, 0.8], 2, 3),  # exactly three
        ([2.0, 2.0], 2, 5),
        ([9.0, 9.0], 2, 6),  # the most
        ([1.0, 1.0], 4, 4),  # two are on their way
    ],
)
def test_servers_are_wanted_as_the_hpa_counts(demands: list[float], num_started: int, wanted: int) -> None:
    assert Scaler(0.8, 180.0, 6).num_wanted(demands, num_started) == wanted


@pytest.fixture(scope="module")
def dropped() -> dict[str, Any]:
    """The burst with drops and an autoscaler."""
    return simulate(replace(BURST, pod_start_s=15.0))


def test_a_load_behind_a_router_is_answered_by_all(dropped: dict[str, Any]) -> None:
    for report in (dropped, simulate(replace(BURST, router="random", duration_s=40.0))):
        assert report["finished"] == report["requests"] > 10
        assert report["node_started_s"][:2] == [0.0, 0.0]
    alone = simulate(replace(BURST, nodes=1, duration_s=2.0))
    assert dropped["memory"]["kv_tokens"] == 2 * alone["memory"]["kv_tokens"]
    assert "node_started_s" not in alone
    assert {t["node"] for t in dropped["transitions"] if t["kind"] == "drop"} == {0, 1}


def test_a_drop_bridges_the_start_of_a_server(dropped: dict[str, Any]) -> None:
    neither = simulate(replace(BURST, policy="recompute"))
    scaled = simulate(replace(BURST, policy="recompute", pod_start_s=15.0))
    for report in (scaled, dropped):
        assert report["finished"] == report["requests"]
        late = report["node_started_s"][2:]  # asked for in the burst, from 45 s on; four at most
        assert 1 <= len(late) <= 2 and all(at_s % 15 == 0 and at_s >= 60.0 for at_s in late)
    assert dropped["slo_attainment"] > scaled["slo_attainment"] > neither["slo_attainment"]


def test_the_prefix_router_finds_more_than_any(tmp_path: Path) -> None:
    # Eight conversations of ten turns, each a block of 512 tokens longer than the one before.
    rows = [
        f'{{"timestamp": {1000 * (turn * 8 + chat)}, "input_length": {512 * (turn + 1)}, "output_length": 4, '
        f'"hash_ids": {[100 * chat + i for i in range(turn + 1)]}}}'
        for turn in range(10)
        for chat in range(8)
    ]
    trace = tmp_path / "chats.jsonl"
    trace.write_text("\n".join(rows))
    options = Options(cluster="2xA800", workload=str(trace), nodes=4, has_prefix_cache=True, policy="recompute")
    rates = {router: simulate(replace(options, router=router))["prefix_hit_rate"] for router in ROUTERS}
    assert rates["prefix"] > 0.75 > 1.5 * rates["random"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "prefix"}, "--enable-prefix-caching"),
        ({"most_nodes": 4}, "without --pod-start"),
        ({"pod_start_s": 9.0, "most_nodes": 2}, "there are 2 already"),
    ],
)
def test_options_that_contradict_each_other_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaler_of(replace(BURST, **change))  # type: ignore[arg-type]


def test_the_autoscaler_may_double_the_servers() -> None:
    assert scaler_of(replace(BURST, pod_start_s=9.0)) == Scaler(0.8, 9.0, 4)
    assert type(make_router("least", 0)) is Least
