"""Bytes from one CUDA device to another: directly where GPUs reach each other, through pinned host memory elsewhere."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kunserve.gpu.cuda import CudaDevice
from kunserve.gpu.cuda_stream import Launched, StreamQueue

SLICE_BYTES = 8 << 20
NUM_BUFFERS = 2  # one filled while the other is emptied


async def transfer(
    source: CudaDevice, src: Tensor, target: CudaDevice, dst: Tensor, slice_bytes: int = SLICE_BYTES
) -> None:
    """Copy `src` on `source` into `dst` on `target`: same shape and dtype, contiguous. Returns when it is there.

    Nobody else touches both meanwhile; a cancelled caller waits for what was launched. Where the hardware has no peer
    access, the copy out of one slice overlaps the copy in of the one before.
    """
    assert src.shape == dst.shape and src.dtype == dst.dtype
    if target.driver.can_access(source.driver.ordinal):
        await target.peer.run(partial(dst.copy_, src, non_blocking=True))
        return
    from_bytes, to_bytes = src.view(-1).view(torch.uint8), dst.view(-1).view(torch.uint8)
    buffers = [source.driver.pinned(min(slice_bytes, len(from_bytes))) for _ in range(NUM_BUFFERS)]
    copies: list[tuple[StreamQueue, Launched[Tensor]]] = []  # out, in, out, in, ...
    try:
        for i, start in enumerate(range(0, len(from_bytes), slice_bytes)):
            piece = slice(start, start + slice_bytes)
            buffer = buffers[i % NUM_BUFFERS][: len(from_bytes[piece])]
            emptied = [copies[2 * (i - NUM_BUFFERS) + 1][1].ready] if i >= NUM_BUFFERS else []
            fill = partial(buffer.copy_, from_bytes[piece], non_blocking=True)
            copies.append((source.copy_out, await source.copy_out.launch(fill, emptied)))
            empty = partial(to_bytes[piece].copy_, buffer, non_blocking=True)
            copies.append((target.copy_in, await target.copy_in.launch(empty, [copies[-1][1].ready])))
    finally:
        for queue, launched in copies[-2:]:
            await queue.finish(launched)
