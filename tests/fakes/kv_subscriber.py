"""A subscriber of KV events, with the structures that vLLM publishes since 0.24."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kunserve.observe.kv_events import KVEventsConfig

END = (-1).to_bytes(8, "big", signed=True)


class VllmEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(VllmEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(VllmEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(VllmEvent):
    pass


class VllmBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


decode = msgspec.msgpack.Decoder(VllmBatch).decode


async def replayed(config: KVEventsConfig, first: int = 0) -> list[tuple[int, VllmBatch]]:
    """All batches from a number on that are still kept."""
    batches: list[tuple[int, VllmBatch]] = []
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        assert config.replay_endpoint is not None
        socket.linger = 0
        socket.connect(config.replay_endpoint)
        await socket.send_multipart([b"", first.to_bytes(8, "big")])
        while True:
            _, number, payload = await socket.recv_multipart()
            if number == END:
                return batches
            batches.append((int.from_bytes(number, "big"), decode(payload)))
