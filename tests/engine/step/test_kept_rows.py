"""Arrays that are kept from step to step are those that would be made anew, whoever joins, leaves or makes way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from groups import commit, make_group, make_request, make_scheduler
from seeds import seeds

from kunserve.compute.sampler import SamplingRow
from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.step.kept_rows import KeptRows
from kunserve.engine.step.microbatch import StepInputs, step_inputs
from kunserve.sampling import FinishReason, SamplingParams

BLOCK = 4
EOS = (2,)


def draw_request(number: int, rng: random.Random) -> Request:
    request = make_request(f"r{number}", rng.randrange(1, 14), rng.randrange(1, 24))
    request.params = SamplingParams(
        request.params.max_tokens,
        min_tokens=rng.choice([0, 0, 5]),
        temperature=rng.choice([0.0, 0.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
    )
    request.seed = number
    return request


def steps(scheduler: Scheduler, group: Group, seed: int, num_ahead: int) -> Iterator[Microbatch]:
    """Microbatches of a group in which requests come and end all the time, each before it is committed."""
    rng, in_flight, number = random.Random(seed), list[Microbatch](), 0
    for _ in range(300):
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            scheduler.waiting.append(draw_request(number, rng))
            number += 1
        if len(in_flight) <= num_ahead and (batch := scheduler.schedule(group, [group], 0)) is not None:
            in_flight.append(batch)
            yield batch
        if in_flight and (len(in_flight) > num_ahead or rng.random() < 0.4):
            commit(scheduler, group, in_flight.pop(0), stops=0.05)
            scheduler.fleet.check(8)


def said_by(row: SamplingRow) -> tuple[object, ...]:
    """All of a row that a token may depend on: for a greedy one not how many there are, once there are enough."""
    is_free = row.params.temperature == 0 and row.params.repetition_penalty == 1.0
    is_early = len(row.output_token_ids) < row.params.min_tokens
    output = None if is_free and not is_early else list(row.output_token_ids)
    return (row.params, row.seed, row.prompt_token_ids, output, row.eos_token_ids, row.mask, row.given)


def assert_same(kept: StepInputs, fresh: StepInputs) -> None:
    for name in ("token_ids", "positions", "cu_seqlens_q", "context_lens", "sampled_rows"):
        mine, its = getattr(kept, name), getattr(fresh, name)
        assert mine.dtype == its.dtype and torch.equal(mine, its), name
    assert list(map(said_by, kept.sampling)) == list(map(said_by, fresh.sampling))
    assert kept.depends_on is fresh.depends_on and len(kept.block_tables) == len(fresh.block_tables)
    for mine, its in zip(kept.block_tables, fresh.block_tables, strict=True):
        assert mine.shape == its.shape and mine.is_contiguous()
        for row, context_len in enumerate(kept.context_lens.tolist()):
            num_ids = -(-context_len // BLOCK)
            assert torch.equal(mine[row, :num_ids], its[row, :num_ids])


@pytest.mark.parametrize("num_blocks", [24, 400])
@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("seed", seeds(3))
def test_arrays_that_are_kept_are_those_made_anew(seed: int, num_ahead: int, num_blocks: int) -> None:
    group, kept, num_decoding, num_both = make_group(num_blocks=num_blocks, block_size=BLOCK), KeptRows(), 0, 0
    scheduler = make_scheduler(group, budget=24, num_ahead=num_ahead)
    for batch in steps(scheduler, group, seed, num_ahead):
        oldest = group.in_flight[0]
        all_anew = Microbatch(batch.group_id, batch.epoch, batch.spans)
        assert_same(step_inputs(batch, BLOCK, EOS, oldest, kept), step_inputs(all_anew, BLOCK, EOS, oldest))
        num_decoding += len(batch.decoding.requests)
        num_both += bool(batch.decoding.requests and batch.others)
    assert num_decoding > 300 and num_both > 20


def test_a_row_follows_blocks_that_are_elsewhere() -> None:
    group, kept = make_group(num_blocks=40, block_size=BLOCK), KeptRows()
    scheduler = make_scheduler(group, budget=64)
    fleet = scheduler.fleet
    fleet.admit(before := make_request("before", 40, 30), group)
    scheduler.waiting.append(request := make_request("a", 6, 30))
    seen = set[int]()  # where its first tokens were
    for number in range(12):
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        inputs = step_inputs(batch, BLOCK, EOS, batch, kept)
        [ids] = request.block_tables
        row = batch.requests.index(request)
        assert inputs.block_tables[0][row, : len(ids)].tolist() == list(ids)
        seen.add(ids[0])
        commit(scheduler, group, batch)
        if number == 1:
            before.finish_reason = FinishReason.ABORT
            fleet.release(before)
        if number == 6:
            fleet.limit(0, 8)
            with fleet.pause([group]), fleet.emptying(group, group.stages[0], 8) as tail:
                assert tail.moved and tail.is_whole
            fleet.shrink(0, 8)
            fleet.grow(0, 40)
    assert len(seen) == 2


@pytest.mark.parametrize("num_blocks", [24, 400])
@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("seed", seeds(3))
def test_those_who_are_alike_go_as_they_would_one_by_one(
    seed: int, num_ahead: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*, is_one_by_one: bool) -> list[list[tuple[object, ...]]]:
        group = make_group(num_blocks=num_blocks, block_size=BLOCK)
        scheduler = make_scheduler(group, budget=24, num_ahead=num_ahead)
        if is_one_by_one:
            monkeypatch.setattr("kunserve.engine.schedule.scheduler.alike", lambda *_, **__: None)
        return [
            [(s.request.request_id, *s[1:], list(s.request.block_tables[0])) for s in batch.spans]
            for batch in steps(scheduler, group, seed, num_ahead)
        ]

    together, one_by_one = run(is_one_by_one=False), run(is_one_by_one=True)
    assert together == one_by_one and len(together) > 100
