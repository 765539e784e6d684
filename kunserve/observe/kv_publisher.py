"""Publishes which prefixes this server has, over ZMQ, in the format of vLLM since 0.24.

A message has three parts: the topic, a sequence number (8 bytes, big-endian) and a batch in MessagePack:
`[time, events, data parallel rank]`. An event is a map with its `type` (vLLM PR 42892; before 0.24 it was an array;
llm-d's index has read both since its version 0.9). Whoever sees a gap in the numbers asks the replay socket, a ROUTER,
for all batches from a number on.

A server is one cache to a router, whichever of its groups has a prefix: a block is stored when the first group has it
and removed when the last has lost it, and the rank is always 0. Block hashes are the last 8 bytes of our keys, as a
number: vLLM shortens its own so, too. The salt of a prompt, if it has one, goes to `extra_keys` as a digest: it may
tell whose prompt it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import structlog
import zmq
import zmq.asyncio

from kunserve.errors import ConfigError
from kunserve.observe.kv_events import FLAG, KVEventsConfig

log = structlog.get_logger()

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
MEDIUM = "GPU"  # where routers look for KV that costs nothing to use; our virtual CPU devices are no slower tier


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """What happened to some blocks; written as a map, with the name of the class as `type`."""


class BlockStored(KVCacheEvent):
    """Blocks can be found from now on; each follows the one before it, the first one `parent_block_hash`."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None  # one entry for each block


class BlockRemoved(KVCacheEvent):
    """Blocks cannot be found any more."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent):
    """No block can be found: the first event of a server, for those who knew the one before it at this address."""


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What happened in one round of the event loop; `ts` in seconds since 1970."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVPublisher:
    """Tells subscribers which blocks can be found. One that reads too slowly loses batches, and may ask for them again.

    Made, and used, on the event loop. ConfigError if an endpoint cannot be used.
    """

    def __init__(self, config: KVEventsConfig, block_size: int) -> None:
        self._block_size, self._topic = block_size, config.topic.encode()
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []  # of this round
        self._sent = deque[tuple[int, bytes]](maxlen=config.buffer_steps)
        self._next_number = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.asyncio.Context()
        self._publish: zmq.Socket[bytes] = zmq.Context.shadow(self._context.underlying).socket(zmq.PUB)
        self._publish.set_hwm(config.hwm)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.set_hwm(config.buffer_steps + 1)  # one whole replay: a router drops what is beyond
        self._replaying: asyncio.Task[None] | None = None
        try:
            _open(self._publish, config.endpoint, is_bound=_is_bound(config.endpoint))
            if config.replay_endpoint is not None:
                _open(self._replay, config.replay_endpoint, is_bound=True)
        except ConfigError:
            self.close()
            raise
        self._replaying = asyncio.create_task(self._replay_on(), name="replay of KV events")

    def start(self) -> None:
        """Let subscribers forget what they knew of an earlier server at this address."""
        self._add(AllBlocksCleared())

    def stored(self, key: bytes, parent: bytes | None, token_ids: Sequence[int], salt: str) -> None:
        """See `Listener.stored`. What follows the block that came before is one event with it.

        The first block alone names the salt, as in vLLM: all others follow from it. A salt of nothing but white space
        is the API's for a request without one.
        """
        last = self._events[-1] if self._events else None
        extra = (blake2b(salt.encode(), digest_size=16).hexdigest(),) if salt.strip() and parent is None else None
        before = None if parent is None else hash_of(parent)
        if isinstance(last, BlockStored) and before is not None and last.block_hashes[-1] == before:
            last.block_hashes.append(hash_of(key))
            last.token_ids.extend(token_ids)
            if last.extra_keys is not None:
                last.extra_keys.append(extra)
            return
        event = BlockStored([hash_of(key)], before, list(token_ids), self._block_size, None, MEDIUM, None, [extra])
        self._add(event)

    def removed(self, key: bytes) -> None:
        """See `Listener.removed`. What is removed at once is one event."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(hash_of(key))
        else:
            self._add(BlockRemoved([hash_of(key)], MEDIUM))

    def _add(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if not self._events:
            asyncio.get_running_loop().call_soon(self.flush)
        self._events.append(event)

    def flush(self) -> None:
        """Send what has happened in this round."""
        if not self._events or self._publish.closed:
            return
        payload = self._encoder.encode(KVEventBatch(time.time(), self._events, 0))
        number, self._events = self._next_number, []
        self._next_number += 1
        self._sent.append((number, payload))
        self._publish.send_multipart((self._topic, number.to_bytes(8, "big"), payload), zmq.NOBLOCK)

    async def _replay_on(self) -> None:
        """Answer one subscriber after the other with all batches from the number on that it asks for."""
        while True:
            client, *rest = await self._replay.recv_multipart()
            if len(rest) != 2 or rest[0] or len(rest[1]) != 8:
                log.warning("a request for KV events that is none", parts=[len(part) for part in rest])
                continue
            first = int.from_bytes(rest[1], "big")
            for number, payload in [entry for entry in self._sent if entry[0] >= first]:
                await self._replay.send_multipart((client, b"", number.to_bytes(8, "big"), payload))
                await asyncio.sleep(0)  # thousands of batches: others have their turn
            await self._replay.send_multipart((client, b"", END_OF_REPLAY, b""))

    def close(self) -> None:
        """Send nothing any more, and let go of the sockets."""
        if self._replaying is not None:
            self._replaying.cancel()
        self._publish.close(linger=0)  # by hand: the context would wait for a socket of its shadow for ever
        self._replay.close(linger=0)
        self._context.term()


def hash_of(key: bytes) -> int:
    """Return what routers know a block by."""
    return int.from_bytes(key[-8:], "big")


def _is_bound(endpoint: str) -> bool:
    """Tell, as vLLM does, an address to listen on from one of a subscriber that listens."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _open(socket: zmq.Socket[Any], endpoint: str, *, is_bound: bool) -> None:
    try:
        (socket.bind if is_bound else socket.connect)(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{FLAG}: cannot {'bind' if is_bound else 'connect to'} {endpoint}: {error}") from None
