"""Whole answers are exact however KV is exchanged, down to one chain and back, and whichever copies fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loaded_groups import loaded, two_devices
from mixed_crowd import NUM_REQUESTS, Crowd, assert_same, pool_of
from tiny_models import make_tiny_model
from transition_harness import Checked, checked_engine

from kunserve.errors import ConflictError, DeviceError
from kunserve.grammar.pool import Pool


@dataclass(frozen=True, slots=True)
class Load:
    """A crowd, and memory in which its KV is exchanged in one way only. Freed are 8 chunks of 32 blocks a device."""

    num_prompt_tokens: int
    num_tokens: int
    num_blocks: int  # of a device
    max_model_len: int = 128


LOADS = {
    "by_request": Load(30, 24, 320),
    "by_layer": Load(104, 22, 128),  # all blocks are in use, three times what is freed
    "infeasible": Load(350, 26, 384, 400),
}
Fails = Callable[[int], bool]  # whether the copy of this number does
FAILING: dict[str, Fails] = {
    "none": lambda number: False,
    "first": lambda number: number == 0,
    "middle": lambda number: number == 4,
    "all": lambda number: True,
}


@pytest.fixture(scope="module")
def crowds(six_layers: Path) -> dict[str, Crowd]:
    async def make() -> dict[str, Crowd]:
        return {
            mode: await Crowd.make(six_layers, load.num_prompt_tokens, load.num_tokens) for mode, load in LOADS.items()
        }

    return asyncio.run(make())


@pytest.fixture
async def pool(six_layers: Path) -> AsyncIterator[Pool]:
    async with pool_of(six_layers) as pool:
        yield pool


class Copies:
    """Counts the copies of KV to all devices, and lets some fail: every other time not with an error that we know."""

    def __init__(self, checked: Checked) -> None:
        self.num_copies = self.num_failed = 0
        self.fails: Fails = FAILING["none"]
        for memory in checked.engine.memories:
            device: Any = memory.device
            device.copy = partial(self._copy, device.copy)

    def begin(self, fails: Fails) -> None:
        """Count from zero, and let other copies fail."""
        self.num_copies, self.num_failed, self.fails = 0, 0, fails

    async def _copy(self, copy: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        self.num_copies += 1
        if self.fails(self.num_copies - 1):
            self.num_failed += 1
            raise OSError("lost") if self.num_failed % 2 else DeviceError("lost")
        await copy(*arguments, **more)


def num_lost(mode: str, failing: str) -> int:
    """Return how many requests an exchange loses: by layer, everybody needs every layer."""
    if failing == "none":
        return 0
    return NUM_REQUESTS if mode == "by_layer" or failing == "all" else 1


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("mode", ["by_request", "by_layer"])
async def test_a_drop_changes_no_answer(
    mode: str, failing: str, crowds: dict[str, Crowd], six_layers: Path, pool: Pool
) -> None:
    load, crowd = LOADS[mode], crowds[mode]
    async with two_devices(six_layers, load.num_blocks, load.max_model_len) as checked:
        answers, copies = await loaded(checked, await crowd.new(pool)), Copies(checked)
        copies.begin(FAILING[failing])
        await checked.control.drop()
        (drop,) = await checked.settled()
        assert (drop.outcome, drop.exchange_mode, drop.num_lost) == ("done", mode, num_lost(mode, failing))
        assert copies.num_copies > 0 and (copies.num_failed > 0) == (failing != "none")
        assert_same(await answers, crowd)
        await checked.undo_drops()


async def test_a_drop_that_can_exchange_nothing_changes_no_answer(
    crowds: dict[str, Crowd], six_layers: Path, pool: Pool
) -> None:
    load, crowd = LOADS["infeasible"], crowds["infeasible"]
    async with two_devices(six_layers, load.num_blocks, load.max_model_len) as checked:
        requests = await crowd.new(pool)
        answers, copies = await loaded(checked, requests), Copies(checked)
        copies.begin(FAILING["all"])  # there are none
        await checked.control.drop(is_forced=True)
        (drop,) = await checked.settled()
        assert (drop.outcome, drop.exchange_mode, drop.exchange_bytes) == ("done", "infeasible", 0)
        assert copies.num_copies == 0 and all(request.num_preemptions for request in requests)
        assert_same(await answers, crowd)
        await checked.undo_drops()


@pytest.mark.parametrize("failing", FAILING)
async def test_a_restore_changes_no_answer(
    failing: str, crowds: dict[str, Crowd], six_layers: Path, pool: Pool
) -> None:
    """Its KV always goes by request, since it has room on both sides."""
    load, crowd = LOADS["by_request"], crowds["by_request"]
    async with two_devices(six_layers, load.num_blocks, load.max_model_len) as checked:
        requests = await crowd.new(pool)
        answers, copies = await loaded(checked, requests), Copies(checked)
        await checked.control.drop()
        with checked.reconfigure.boundary.paused(list(checked.engine.groups)):  # nobody ends before KV goes back
            await checked.settled()
            assert all(len(request.block_tables) == 2 for request in requests)
            copies.begin(FAILING[failing])
            await checked.control.restore()
        (restore,) = await checked.settled()
        assert (restore.outcome, restore.num_lost) == ("done", num_lost("by_request", failing))
        assert (restore.exchange_bytes > 0) == (failing != "all")
        assert copies.num_copies >= NUM_REQUESTS and (copies.num_failed > 0) == (failing != "none")
        assert_same(await answers, crowd)
        await checked.undo_drops()


# --- cascades ---------------------------------------------------------------------------------------------------------

LAYERS = {5: 10, 6: 6}  # by devices: such that a chain of all holds more than two of some


@pytest.fixture(scope="module", params=LAYERS)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Crowd]:
    """A number of devices, a model for them, and a crowd."""
    folder = tmp_path_factory.mktemp(f"deep{request.param}")
    make_tiny_model("llama", folder, num_hidden_layers=LAYERS[request.param], hidden_size=32)
    load = LOADS["by_request"]
    crowd = asyncio.run(Crowd.make(folder, load.num_prompt_tokens, load.num_tokens))
    return request.param, folder, crowd


async def cascade(checked: Checked) -> list[list[int]]:
    """Merge groups until there is one, and take it apart again; return the lengths of the chains there were."""
    engine = checked.engine

    def lengths() -> list[int]:
        return sorted(len(group.stages) for group in engine.groups)

    seen = [lengths()]
    for verb, num_groups in ((checked.control.drop, 1), (checked.control.restore, len(engine.memories))):
        while len(engine.groups) != num_groups:
            await checked.commits(2)
            with suppress(ConflictError, DeviceError, OSError):  # does not fit before some have ended; a copy failed
                await verb()
            await checked.settled()
            if lengths() != seen[-1]:
                seen.append(lengths())
    return seen


async def ask_until(done: asyncio.Future[Any], checked: Checked, crowd: Crowd, pool: Pool, first: int) -> int:
    """Ask for one half of a crowd again and again; return how often. The answers are always the same."""
    num_rounds = 0
    while not done.done():
        requests = (await crowd.new(pool))[first::2]
        for request in requests:
            request.request_id = f"{request.request_id}-{num_rounds}"
        for answer, its in zip(await checked.answer_all(requests), crowd.answers[first::2], strict=True):
            answer.assert_same(its)
        num_rounds += 1
    return num_rounds


@pytest.mark.parametrize("is_failing", [False, True])
async def test_cascades_down_to_one_chain_and_back_change_no_answer(
    is_failing: bool, deep: tuple[int, Path, Crowd], pool: Pool
) -> None:
    num_devices, folder, crowd = deep
    async with checked_engine(folder, f"cpu:{num_devices}", 64, max_num_batched_tokens=512) as checked:
        copies = Copies(checked)
        copies.begin(lambda number: is_failing and number % 3 == 1)
        cascading = asyncio.create_task(cascade(checked))
        await asyncio.gather(*(ask_until(cascading, checked, crowd, pool, first) for first in (0, 1)))
        seen = await cascading
        copies.fails = FAILING["none"]
        await checked.undo_drops()
        assert seen[0] == seen[-1] == [1] * num_devices and seen.count([num_devices]) == 1
        assert len(seen) == 2 * num_devices - 1  # two groups merge at a time, and one comes apart
        assert checked.num_outcomes("drop", "done", "by_request") > 0
        assert {outcome for _, outcome, _ in checked.outcomes} <= ({"done", "rolled back"} if is_failing else {"done"})
        assert copies.num_copies > 0 and (copies.num_failed > 0) == is_failing
