"""From one CUDA device to another: directly where GPUs reach each other, through pinned host memory elsewhere.

A GPU reaches another one's memory only if torch has allocated it, not what a device maps. So everything is gathered
into such memory, taken over, and put down; on each GPU by streams of its own device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kunserve.gpu.copies import BlockCopy, copy_blocks
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.cuda.stream import Launched, StreamQueue

SLICE_BYTES = 8 << 20
NUM_BUFFERS = 2  # one filled while the other is emptied


class CopyEnd(Protocol):
    """What one end of a copy is: a CUDA device's driver, and its streams for copies."""

    driver: Driver
    torch_device: torch.device
    copy_in: StreamQueue
    copy_out: StreamQueue
    peer: StreamQueue
    hand_over: StreamQueue


async def copy_between(source: CopyEnd, target: CopyEnd, copies: Sequence[BlockCopy]) -> None:
    """Copy blocks: on one GPU at once, else gathered on the one, taken over as a whole, and put down on the other."""
    if source.driver.ordinal == target.driver.ordinal:
        await target.peer.run(partial(copy_blocks, copies))
        return
    blocks = await source.copy_out.run(lambda: torch.cat([copy.gather() for copy in copies]))

    def put_down(arrived: Tensor) -> None:
        pieces = torch.split(arrived, [len(copy.source_ids) for copy in copies])
        for copy, piece in zip(copies, pieces, strict=True):
            copy.scatter(piece)

    if target.driver.can_access(source.driver.ordinal):
        await target.copy_in.run(lambda: put_down(take_over(source, blocks, target)))
        return
    arrived = await target.copy_in.run(lambda: torch.empty_like(blocks, device=target.torch_device))
    await transfer(source, blocks, target, arrived)
    await target.copy_in.run(partial(put_down, arrived))


def take_over(source: CopyEnd, x: Tensor, target: CopyEnd) -> Tensor:
    """Return `x`, in memory of the other GPU, by a stream of both ends: `source.peer`, and the current one of `target`.

    torch copies on the stream that is current on the source's GPU: left alone the default one, the same for all. The
    current one must not be a `peer`: two that copy to each other at the same time would wait for each other's.
    """
    with source.peer.lent():
        return x.to(target.torch_device, non_blocking=True)


def bring(source: CopyEnd, target: CopyEnd, x: Tensor) -> Tensor:
    """Return `x`, which is on `source`, on `target`'s GPU: launched on its current stream, behind what makes `x`.

    The caller keeps `x` until that stream has come so far.
    """
    if source.driver.ordinal == target.driver.ordinal:
        return x
    with source.hand_over.lent():
        return x.to(target.torch_device, non_blocking=True)


async def transfer(source: CopyEnd, src: Tensor, target: CopyEnd, dst: Tensor, slice_bytes: int = SLICE_BYTES) -> None:
    """Copy `src` on `source` into `dst` on `target`: same shape and dtype, contiguous. Returns when it is there.

    Nobody else touches both meanwhile, and it must not be cancelled (`to_the_end`): it waits for what it has launched
    only when an error ends it. Slices go through two buffers, so that the copy out of one overlaps the copy in of the
    one before.
    """
    assert src.shape == dst.shape and src.dtype == dst.dtype
    if source.driver.ordinal == target.driver.ordinal:
        await target.peer.run(partial(dst.copy_, src, non_blocking=True))
        return
    from_bytes, to_bytes = src.view(-1).view(torch.uint8), dst.view(-1).view(torch.uint8)
    size = min(slice_bytes, len(from_bytes))
    buffers, empty = await _buffers(source, target, size)
    copies: list[tuple[StreamQueue, Launched[Tensor]]] = []  # out, in, out, in, ...
    try:
        for i, start in enumerate(range(0, len(from_bytes), slice_bytes)):
            piece = slice(start, start + slice_bytes)
            buffer = buffers[i % NUM_BUFFERS][: len(from_bytes[piece])]
            emptied = [copies[2 * (i - NUM_BUFFERS) + 1][1]] if i >= NUM_BUFFERS else []
            fill = partial(buffer.copy_, from_bytes[piece], non_blocking=True)
            copies.append((source.copy_out, await source.copy_out.launch(fill, emptied)))
            put = partial(empty, to_bytes[piece], buffer)
            copies.append((target.copy_in, await target.copy_in.launch(put, [copies[-1][1]])))
    finally:
        for queue, launched in copies[-2:]:
            await queue.finish(launched)


async def _buffers(
    source: CopyEnd, target: CopyEnd, num_bytes: int
) -> tuple[list[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Return buffers that `source` fills, and what empties one into memory of `target`, on its current stream."""

    def make() -> list[Tensor]:
        return [torch.empty(num_bytes, dtype=torch.uint8, device=source.torch_device) for _ in range(NUM_BUFFERS)]

    if not target.driver.can_access(source.driver.ordinal):
        return [source.driver.pinned(num_bytes) for _ in range(NUM_BUFFERS)], _copy

    def from_peer(write: Tensor, buffer: Tensor) -> Tensor:
        return write.copy_(take_over(source, buffer, target))

    return await source.copy_out.run(make), from_peer


def _copy(write: Tensor, read: Tensor) -> Tensor:
    return write.copy_(read, non_blocking=True)
