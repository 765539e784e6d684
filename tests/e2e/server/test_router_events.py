"""A server started as a router's operator starts one: what it caches is told, in vLLM's format."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
from kv_subscriber import AllBlocksCleared, BlockStored, replayed

from e2e.server_process import running_server
from kunserve.observe.kv_events import kv_events_config


async def test_a_router_hears_what_a_request_left_in_the_cache(tiny_flags: tuple[str, ...], tmp_path: Path) -> None:
    values = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv@pod@tiny"}
    values |= {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}
    config = kv_events_config(values)
    assert config is not None
    prompt = list(range(3, 3 + 40))
    with running_server(*tiny_flags, "--kv-events-config", json.dumps(values)) as server:
        assert [batch.events for _, batch in await replayed(config)] == [[AllBlocksCleared()]]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "ignore_eos": True, "temperature": 0}
        async with aiohttp.ClientSession() as session:
            for _ in range(2):  # the second time it is found, and nothing new is stored
                async with session.post(f"{server.url}/v1/completions", json=body) as response:
                    assert response.status == 200
                    await response.read()
        stored = [event for _, batch in await replayed(config, 1) for event in batch.events]
    assert all(isinstance(event, BlockStored) and event.block_size == 16 for event in stored)
    tokens = [token for event in stored if isinstance(event, BlockStored) for token in event.token_ids]
    assert tokens[:40] == prompt and len(tokens) == 48  # the last token has no KV
    hashes = [block_hash for event in stored if isinstance(event, BlockStored) for block_hash in event.block_hashes]
    parents = [event.parent_block_hash for event in stored if isinstance(event, BlockStored)]
    assert len(set(hashes)) == 3 and parents[0] is None and set(parents[1:]) <= set(hashes)
