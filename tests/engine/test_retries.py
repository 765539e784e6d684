"""A step that fails costs time and nothing else: its requests start over, elsewhere, and the guilty one ends alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from e2e.engines import LAYOUTS, assert_idle, running_engine
from engine_fakes import read, token_ids
from groups import make_group, make_request, make_scheduler
from structures import constraint, open_pool
from tiny_models import VOCAB_SIZE
from transition_harness import again, make_requests

from kunserve.engine.batch import Microbatch
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Output, Request
from kunserve.engine.survive import retries
from kunserve.engine.survive.health import Health
from kunserve.errors import DeviceError, EngineError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.pool import Pool
from kunserve.observe.gauges import EngineStats
from kunserve.observe.metrics import Metrics
from kunserve.sampling import SamplingParams
from kunserve.sim.clock import simulate

REQUESTS = make_requests(10, seed=4, longest_prompt=40, most_tokens=20)
LONG = 12  # the last of `requests`, whose prompt takes several steps
Fails = Callable[[Group, Microbatch], bool]


def fail_if(engine: Engine, fails: Fails) -> list[int]:
    """Let the steps that `fails` names raise once they were computed; returns their groups, as they come."""
    failed, execute = list[int](), engine.executor.execute

    async def run(group: Group, batch: Microbatch, *inputs: Any) -> Any:
        tokens = await execute(group, *inputs)
        if fails(group, batch):
            failed.append(group.group_id)
            raise DeviceError("the step failed")
        return tokens

    engine.executor.execute = lambda group, *inputs: run(group, group.in_flight[-1], *inputs)  # type: ignore[method-assign, misc]
    return failed


async def requests(pool: Pool) -> list[Request]:
    made = again(REQUESTS)
    for i, pattern in enumerate(("(ab|ba|c){1,9}", "[a-f]{30}")):
        params = SamplingParams(40, temperature=0.9, seed=i)
        request = Request(f"g{i}", [5, 6, 7 + i], params)
        request.constraint = await constraint(pool, ("regex", pattern))
        made.append(request)
    scored = SamplingParams(8, temperature=0.0, ignore_eos=True, num_prompt_logprobs=0)
    made.append(Request("scored", [(7 * i) % VOCAB_SIZE for i in range(70)], scored))
    return made


def seen(outputs: list[Output]) -> tuple[list[int], list[float]]:
    """Return the tokens, and the logprobs of the prompt."""
    return token_ids(outputs), [scored.logprob for o in outputs for scored in o.prompt_logprobs]


async def answers(
    folder: Path, layout: str, fails: Fails, **settings: Any
) -> tuple[list[Any], list[int], list[Request]]:
    """What is answered, which steps failed, and the requests."""
    settings = {"num_blocks_override": 60, "block_size": 4, "chunk_bytes": 1 << 13, "max_model_len": 128} | settings
    async with running_engine(
        folder, **LAYOUTS[layout].settings, dtype="float32", max_num_batched_tokens=16, is_pinned=True, **settings
    ) as served:
        vocabulary = Vocabulary(served.tokenizer.to_json, VOCAB_SIZE, served.files.config.eos_token_ids[:1])
        async with open_pool(vocabulary) as pool:
            asked, failed = await requests(pool), fail_if(served.engine, fails)
            found = await asyncio.gather(*(read(served.engine.submit(r)) for r in asked), return_exceptions=True)
            await assert_idle(served.engine)
    return [seen(o) if isinstance(o, list) else o for o in found], failed, asked


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Any]:
    return asyncio.run(answers(six_layers, "cpu:1", lambda *_: False, num_blocks_override=600))[0]


class Sometimes:
    """Names one of so many steps at random, but none with a request that it would be given up for."""

    def __init__(self, number: int) -> None:
        self._number, self._random, self._num_failed = number, random.Random(number), Counter[str]()

    def __call__(self, group: Group, batch: Microbatch) -> bool:
        names = [span.request.request_id for span in batch.spans]
        is_spared = any(self._num_failed[name] == retries.MOST_FAILURES - 1 for name in names)
        if self._random.randrange(self._number) or is_spared:
            return False
        self._num_failed.update(names)
        return True


@pytest.mark.parametrize("layout", ["cpu:1", "cpu:2", "chain"])
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("every", [2, 4, 8])
async def test_steps_that_fail_now_and_then_change_no_token(
    layout: str, is_ahead: bool, every: int, six_layers: Path, expected: list[Any]
) -> None:
    found, failed, asked = await answers(six_layers, layout, Sometimes(every), async_scheduling=is_ahead)
    assert found == expected and len(failed) >= 3
    assert sum(request.num_preemptions for request in asked) >= 3


async def test_a_group_that_always_fails_is_left(
    six_layers: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PROBE_S", 3600.0)
    found, failed, asked = await answers(six_layers, "cpu:2", lambda group, _: group.group_id == 0)
    assert found == expected and set(failed) == {0}
    assert 1 <= len(failed) < len(asked)  # who was there already fails once


class Marks(Health):
    """Marks devices, without a look at them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def fails(self, devices: Sequence[int]) -> bool:
        is_new = not self._fleet.groups[0].is_suspect
        for device in devices:
            self._fleet.mark(device, is_suspect=True, is_lost=False)
        return is_new

    def take_fault(self, devices: Iterable[int]) -> bool:
        return False

    def trust(self, devices: Sequence[int]) -> None:
        for device in devices:
            self._fleet.mark(device, is_suspect=False, is_lost=False)


def test_a_suspected_group_is_tried_again_after_a_while() -> None:
    async def main() -> None:
        group = make_group(num_blocks=60)
        scheduler = make_scheduler(group)
        metrics = Metrics("m", 100, lambda: EngineStats(0, 0, 0, 0, 4))
        found = retries.Retries(scheduler.fleet, scheduler, Marks(scheduler.fleet), metrics)
        scheduler.waiting.append(make_request("a", 8, 4))

        def fail() -> None:
            batch = scheduler.schedule(group, [group], 0)
            assert batch is not None
            scheduler.commit(group, batch)
            assert found.failed(group, batch, DeviceError("the step failed")) == []

        states = list[bool]()
        for _ in range(retries.SUSPECT_AFTER):
            states.append(group.is_suspect)
            fail()
        states.append(group.is_suspect)
        for seconds in (retries.PROBE_S / 2, retries.PROBE_S):
            await asyncio.sleep(seconds)
            states.append(group.is_suspect)
        fail()
        assert [*states, group.is_suspect] == [*[False] * retries.SUSPECT_AFTER, True, True, False, True]

    simulate(main())


@pytest.mark.parametrize("layout", ["cpu:1", "cpu:2", "chain"])
@pytest.mark.parametrize("is_ahead", [False, True])
async def test_what_fails_everywhere_fails_alone(
    layout: str, is_ahead: bool, six_layers: Path, expected: list[Any]
) -> None:
    """One request is poison wherever it is computed; nobody who shared a step with it notices."""

    def fails(_: Group, batch: Microbatch) -> bool:
        return any(span.request.request_id == "r3" for span in batch.spans)

    found, failed, asked = await answers(six_layers, layout, fails, async_scheduling=is_ahead)
    assert isinstance(found[3], EngineError) and "the step failed" in found[3].message
    assert found[:3] + found[4:] == expected[:3] + expected[4:]
    assert len(failed) >= asked[3].num_failures == retries.MOST_FAILURES


@pytest.mark.parametrize("layout", ["cpu:1", "cpu:2", "chain"])
@pytest.mark.parametrize("is_ahead", [False, True])
async def test_what_always_fails_at_its_beginning_ends(
    layout: str, is_ahead: bool, six_layers: Path, expected: list[Any]
) -> None:
    """Its next piece may be in flight behind the one that fails: that this comes back is no progress."""

    def fails(_: Group, batch: Microbatch) -> bool:
        return any(span.request.request_id == "scored" and span.start == 0 for span in batch.spans)

    found, _, asked = await answers(six_layers, layout, fails, async_scheduling=is_ahead)
    assert asked[LONG].request_id == "scored"
    assert isinstance(found[LONG], EngineError) and "the step failed" in found[LONG].message
    assert found[:LONG] + found[LONG + 1 :] == expected[:LONG] + expected[LONG + 1 :]
