"""What subscribers make of KV events is what the caches hold, whatever happens: drops, restores, evictions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from kv_subscriber import AllBlocksCleared, BlockStored, VllmBatch, replayed
from seeds import seeds
from test_prefix_cache import by_waves, make_family
from transition_harness import BLOCK_SIZE, Checked, checked_engine, regroup_forever, regroup_in_order

from kunserve.engine.prefix_cache import extend_keys
from kunserve.engine.request import Request
from kunserve.observe.kv_events import kv_events_config
from kunserve.observe.kv_publisher import KVPublisher, hash_of


def index_of(batches: Sequence[VllmBatch]) -> dict[int | bytes, tuple[int, ...]]:
    """Tokens of each block that a router believes in, by its hash."""
    index: dict[int | bytes, tuple[int, ...]] = {}
    for event in (event for batch in batches for event in batch.events):
        if isinstance(event, BlockStored):
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size == len(event.block_hashes) * 4
            for i, block_hash in enumerate(event.block_hashes):
                assert block_hash not in index, "stored twice"
                index[block_hash] = tuple(event.token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
        elif isinstance(event, AllBlocksCleared):
            index.clear()
        else:
            for block_hash in event.block_hashes:
                del index[block_hash]  # it was stored before
    return index


def tokens_by_hash(requests: Sequence[Request]) -> dict[int, tuple[int, ...]]:
    """Tokens of each full block of these requests, by the hash of its key."""
    found = {}
    for request in requests:
        for i, key in enumerate(extend_keys(request, BLOCK_SIZE)):
            found[hash_of(key)] = tuple(request.token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
    return found


async def assert_events_tell_what_is_there(
    checked: Checked, publisher: KVPublisher, endpoint: str, requests: Sequence[Request]
) -> int:
    config = kv_events_config({"enable_kv_cache_events": True, "replay_endpoint": endpoint})
    assert config is not None and checked.engine.fleet.prefixes is not None
    publisher.flush()
    expected = {hash_of(key) for key in checked.engine.fleet.prefixes.keys}
    batches = await replayed(config)
    assert [number for number, _ in batches] == list(range(len(batches)))
    index = index_of([batch for _, batch in batches])
    assert index.keys() == expected
    known = tokens_by_hash(requests)
    assert all(tokens == known[block_hash] for block_hash, tokens in index.items() if isinstance(block_hash, int))
    return len(index)


@pytest.mark.parametrize("disturb", [regroup_forever, regroup_in_order])
@pytest.mark.parametrize("num_blocks", [48, 1024])
@pytest.mark.parametrize("seed", seeds(2))
async def test_an_index_made_of_events_alone_is_what_the_caches_hold(
    seed: int,
    num_blocks: int,
    disturb: Callable[[Checked, random.Random], Awaitable[None]],
    six_layers: Path,
    tmp_path: Path,
) -> None:
    requests, rng = make_family(seed), random.Random(seed)
    endpoint = f"ipc://{tmp_path}/replay"
    values = {"enable_kv_cache_events": True, "endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": endpoint}
    config = kv_events_config({**values, "buffer_steps": 100_000})
    assert config is not None
    async with checked_engine(six_layers, "cpu:4", num_blocks) as checked:
        publisher = KVPublisher(config, BLOCK_SIZE)
        try:
            assert checked.engine.fleet.prefixes is not None
            checked.engine.fleet.prefixes.listener = publisher
            publisher.start()
            waves = asyncio.create_task(by_waves(checked, requests, rng))
            disturbing = asyncio.ensure_future(disturb(checked, rng))
            await waves
            disturbing.cancel()
            await asyncio.wait([disturbing])
            await checked.undo_drops()
            await assert_events_tell_what_is_there(checked, publisher, endpoint, requests)
            await by_waves(checked, more := make_family(seed + 100, 30), rng)  # on quiet groups: much is kept
            await checked.until_no_step_runs()
            assert await assert_events_tell_what_is_there(checked, publisher, endpoint, [*requests, *more]) > 0
            for group in checked.engine.groups:
                checked.engine.fleet.forget_idle(group)
            assert await assert_events_tell_what_is_there(checked, publisher, endpoint, []) == 0
        finally:
            publisher.close()


async def test_a_block_is_stored_once_for_all_groups_and_removed_with_the_last(six_layers: Path) -> None:
    """A server is one place to a router."""

    class Heard:
        def __init__(self) -> None:
            self.events: list[tuple[str, bytes]] = []

        def stored(self, key: bytes, parent: bytes | None, token_ids: Sequence[int], salt: str) -> None:
            self.events.append(("stored", key))

        def removed(self, key: bytes) -> None:
            self.events.append(("removed", key))

    async with checked_engine(six_layers, "cpu:2", 64) as checked:
        fleet, heard = checked.engine.fleet, Heard()
        assert fleet.prefixes is not None
        fleet.prefixes.listener = heard
        [request] = make_family(0, 1)
        keys = []
        for group in checked.engine.groups:
            copy = Request(f"r{group.group_id}", list(range(3, 3 + 2 * BLOCK_SIZE)), request.params)
            fleet.admit(copy, group)
            copy.num_computed_tokens = copy.num_scheduled_tokens = copy.num_tokens
            fleet.computed(copy, group)
            fleet.release(copy)
            keys = list(copy.block_keys)
        assert heard.events == [("stored", key) for key in keys]
        fleet.forget_idle(checked.engine.groups[0])
        assert heard.events == [("stored", key) for key in keys]
        fleet.forget_idle(checked.engine.groups[1])
        assert heard.events[2:] == [("removed", key) for key in reversed(keys)]
