"""Those who go on as they did are those that would be found ready, whatever comes between two microbatches."""

from __future__ import annotations

import random

import pytest
from groups import commit, make_group, make_request, make_scheduler
from seeds import seeds

from kunserve.engine.batch import Microbatch
from kunserve.engine.schedule.ready import Steady, alike
from kunserve.sampling import FinishReason


@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("seed", seeds(6))
def test_whoever_goes_on_would_be_found_ready(seed: int, num_ahead: int) -> None:
    rng, group = random.Random(seed), make_group(num_blocks=200)
    scheduler = make_scheduler(group, budget=64, num_ahead=num_ahead)
    in_flight, steady, num_steady, num_found = list[Microbatch](), None, 0, 0
    for number in range(400):
        if rng.random() < 0.1:
            scheduler.waiting.append(make_request(f"r{number}", rng.randrange(1, 14), rng.randrange(1, 40)))
        for request in list(group.running):
            if request.is_moving:
                scheduler.fleet.resume(request)
            elif rng.random() < 0.01:
                scheduler.fleet.suspend(request)
            elif rng.random() < 0.01 and request.finish_reason is None:
                request.finish_reason = FinishReason.ABORT
                if not request.num_in_flight:
                    scheduler.fleet.release(request)
        found = alike(group, may_run_ahead=num_ahead > 0)
        if steady is not None and steady.goes_on(group, may_run_ahead=num_ahead > 0):
            assert found == (steady.requests, bool(group.in_flight), [])
            num_steady += 1
        num_found += found is not None and len(found.decoding) == len(group.running) > 0
        if len(in_flight) <= num_ahead and (batch := scheduler.schedule(group, [group], 0)) is not None:
            in_flight.append(batch)
            steady = Steady.after(batch, group, steady)
        if in_flight and (len(in_flight) > num_ahead or rng.random() < 0.4):
            commit(scheduler, group, in_flight.pop(0), stops=0.02)
    assert num_steady > num_found // 2 > 10  # as nearly always
