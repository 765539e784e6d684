"""KV events over real sockets, read with vLLM's structures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from kv_subscriber import AllBlocksCleared, BlockRemoved, BlockStored, decode, replayed

from kunserve.command.arguments import parse_args
from kunserve.errors import ConfigError
from kunserve.observe import kv_events
from kunserve.observe.kv_events import KVEventsConfig, kv_events_config
from kunserve.observe.kv_publisher import KVPublisher, hash_of

KEYS = [bytes([i]) * 16 for i in range(10)]
ON: dict[str, Any] = {"enable_kv_cache_events": True}


@asynccontextmanager
async def publishing(folder: Path, **more: Any) -> AsyncIterator[tuple[KVPublisher, KVEventsConfig]]:
    at = f"ipc://{folder}"
    config = kv_events_config(
        {**ON, "endpoint": f"{at}/events", "replay_endpoint": f"{at}/replay", "topic": "kv@p@m"} | more
    )
    assert config is not None
    publisher = KVPublisher(config, block_size=2)
    try:
        yield publisher, config
    finally:
        publisher.close()


async def test_a_subscriber_gets_topic_number_and_batch(tmp_path: Path) -> None:
    async with publishing(tmp_path) as (publisher, config):
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.connect(config.endpoint)
            socket.subscribe("kv@")
            while not await socket.poll(10):  # until the subscription has arrived
                publisher.removed(KEYS[0])
                await asyncio.sleep(0)
            first = int.from_bytes((await socket.recv_multipart())[1], "big")
            publisher.stored(KEYS[1], None, [5, 6], "\n")
            publisher.stored(KEYS[2], KEYS[1], [7, 8], "\n")
            publisher.removed(KEYS[3])
            publisher.removed(KEYS[4])
            publisher.stored(KEYS[5], None, [9, 9], "mine")
            publisher.stored(KEYS[6], KEYS[5], [9, 9], "mine")
            for expected in range(first + 1, 1 << 30):
                topic, number, payload = await socket.recv_multipart()
                assert topic == b"kv@p@m" and int.from_bytes(number, "big") == expected
                batch = decode(payload)
                if isinstance(batch.events[0], BlockStored):
                    break
    chain, removed, salted = batch.events
    assert batch.data_parallel_rank == 0 and batch.ts > 1e9
    hashes = [hash_of(key) for key in KEYS]
    assert chain == BlockStored([*hashes[1:3]], None, [5, 6, 7, 8], 2, None, "GPU", None, [None, None])
    assert removed == BlockRemoved([*hashes[3:5]], "GPU")
    assert isinstance(salted, BlockStored) and salted.extra_keys is not None
    [(digest,), rest] = salted.extra_keys  # type: ignore[misc]
    assert rest is None and "mine" not in digest


async def test_who_missed_batches_gets_them_again_as_far_as_they_are_kept(tmp_path: Path) -> None:
    async with publishing(tmp_path, buffer_steps=3) as (publisher, config):
        publisher.start()
        await asyncio.sleep(0)
        assert [(n, b.events) for n, b in await replayed(config)] == [(0, [AllBlocksCleared()])]
        for key in KEYS[:4]:
            publisher.removed(key)
            publisher.flush()
        assert [number for number, _ in await replayed(config)] == [2, 3, 4]
        assert [number for number, _ in await replayed(config, 4)] == [4]
        assert await replayed(config, 5) == []


async def test_what_is_no_request_for_a_replay_harms_nobody(tmp_path: Path) -> None:
    async with publishing(tmp_path) as (publisher, config):
        assert config.replay_endpoint is not None
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(config.replay_endpoint)
            for parts in ([b"x"], [b"", b"short"], [b"", b"", b"", b""]):
                await socket.send_multipart(parts)
            publisher.removed(KEYS[0])
            publisher.flush()
            assert len(await replayed(config)) == 1


async def test_an_endpoint_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    async with publishing(tmp_path, endpoint="tcp://*:*"):
        with pytest.raises(ConfigError, match=r"^--kv-events-config: cannot bind ipc:///nowhere/at/all: "):
            KVPublisher(KVEventsConfig(endpoint="ipc:///nowhere/at/all"), 2)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"enable": True}, "there is no 'enable', but enable_kv_cache_events, publisher"),
        ({"enable_kv_cache_events": "yes"}, "must be true or false, not 'yes'"),
        ({**ON, "hwm": 0}, "hwm must be a number of at least 1, not 0"),
        ({**ON, "buffer_steps": True}, "buffer_steps must be a number of at least 1, not True"),
        ({**ON, "endpoint": None}, "endpoint must be a string, not None"),
        ({**ON, "publisher": "kafka"}, "publisher must be zmq or null, not 'kafka'"),
    ],
)
def test_what_the_flag_cannot_mean_is_said(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        kv_events_config(values)


def test_the_flag_is_read_as_vllm_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def config_of(*flags: str) -> KVEventsConfig | None:
        return parse_args(["smollm2-135m", *flags]).http.kv_events

    assert config_of() is None
    assert config_of("--kv-events-config", '{"publisher": "zmq"}') is None  # not enabled
    assert config_of("--kv-events-config", json.dumps({**ON, "publisher": "null"})) is None
    assert config_of("--kv-events-config", json.dumps(ON)) == KVEventsConfig(enable_kv_cache_events=True)
    monkeypatch.setattr(kv_events, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--kv-events-config needs pyzmq .*: pip install 'kunserve\[kv-events\]'$"):
        config_of("--kv-events-config", json.dumps(ON))
