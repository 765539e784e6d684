"""vLLM 0.6.3 as it was published, and that no policy knows how long an answer gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from groups import commit, make_group, make_request

from kunserve.config import EngineConfig
from kunserve.engine.batch import Microbatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import SchedulerLimits
from kunserve.errors import ConfigError
from kunserve.policies import OverloadPolicy
from kunserve.sim.options import Options, simulate
from kunserve.sim.policies import POLICIES, VLLM
from kunserve.sim.published import PrefillFirst, as_published
from kunserve.sim.traces import TraceRow

GPUS = Options(cluster="2xA800", memory_gib=39.0)


def lengths(batch: Microbatch | None) -> dict[str, int]:
    """Return how many tokens of whom a microbatch has."""
    assert batch is not None
    return {span.request.request_id: span.end - span.start for span in batch.spans}


def test_whole_prompts_go_first_and_by_themselves() -> None:
    group = make_group(num_blocks=32)  # of 4 tokens
    scheduler = PrefillFirst(Fleet([group]), SchedulerLimits(24, 8), make_policy(OverloadPolicy.RECOMPUTE, 0.0))
    for name, num_prompt in (("a", 10), ("b", 12), ("c", 8)):
        scheduler.waiting.append(make_request(name, num_prompt, 5))
    seen = []
    for _ in range(3):
        batch = scheduler.schedule(group, [group], 0)
        seen.append(lengths(batch))
        assert batch is not None
        commit(scheduler, group, batch)
    assert seen == [{"a": 10, "b": 12}, {"c": 8}, {"a": 1, "b": 1, "c": 1}]  # c did not fit into the first as a whole


def test_who_runs_waits_for_a_prompt_and_blocks_are_left_free() -> None:
    group = make_group(num_blocks=100)
    scheduler = PrefillFirst(Fleet([group]), SchedulerLimits(400, 8), make_policy(OverloadPolicy.RECOMPUTE, 0.5))
    scheduler.waiting.append(make_request("a", 40, 5))
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    commit(scheduler, group, batch)
    scheduler.waiting.append(make_request("b", 160, 5))
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and lengths(batch) == {"b": 160}
    commit(scheduler, group, batch)
    scheduler.waiting.append(make_request("c", 4, 5))  # half of the blocks are to stay free
    assert lengths(scheduler.schedule(group, [group], 0)) == {"a": 1, "b": 1}


def test_its_steps_hold_any_prompt() -> None:
    config = as_published(EngineConfig("m", max_num_seqs=1024, max_num_batched_tokens=512), 32768)
    assert (config.max_num_batched_tokens, config.max_num_seqs, config.watermark) == (32768, 256, 0.01)
    assert not config.async_scheduling
    assert as_published(config, 1024).max_num_batched_tokens == 2048


def test_each_copy_has_a_queue_of_its_own() -> None:
    # The third goes to the server with fewer requests, and waits for a long prompt though the other is idle by then.
    rows = [TraceRow(0.0, 20_000, 2), TraceRow(0.0, 100, 2), TraceRow(0.0, 100, 200)]
    alone, shared = (simulate(replace(GPUS, policy=policy), rows) for policy in (VLLM, "recompute"))
    assert len(alone["node_started_s"]) == 2 and alone["finished"] == shared["finished"] == 3
    assert max(alone["answers"]["ttft_s"][1:]) > 2.0 > max(shared["answers"]["ttft_s"][1:])
    with pytest.raises(ConfigError, match="each GPU's copy is a server"):
        simulate(replace(GPUS, policy=VLLM, pod_start_s=10.0), rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_knows_how_long_an_answer_gets(policy: str) -> None:
    """Until the first answer ends, loads that differ in the lengths of answers only cannot be told apart."""
    short, long = 100, 300
    rows = [TraceRow(0.02 * i, 1500, long if i % 3 else short) for i in range(40)]
    other = [replace(row, num_output_tokens=short if i % 3 else long) for i, row in enumerate(rows)]
    first, second = (simulate(replace(GPUS, policy=policy), load) for load in (rows, other))
    ends_s = min(
        arrival_s + ttft_s + (short - 1) * tpot_s
        for report in (first, second)
        for arrival_s, ttft_s, tpot_s in zip(*report["answers"].values(), strict=True)
    )

    def begun(report: dict[str, dict[str, list[float]]]) -> list[float]:
        answers = zip(report["answers"]["arrival_s"], report["answers"]["ttft_s"], strict=True)
        return [arrival_s + ttft_s for arrival_s, ttft_s in answers if arrival_s + ttft_s < ends_s]

    assert first["finished"] == second["finished"] == 40
    assert begun(first) == begun(second) and len(begun(first)) >= 10
