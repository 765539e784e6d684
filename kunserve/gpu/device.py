"""The device protocol: the first box of the memory flow. Everything above it is independent of the kind of device.

A device owns `num_chunks` chunks of physical memory, created once when it opens and released when it closes. Chunks
are named by their index. Virtual addresses are reserved apart and get chunks mapped into them; a tensor over a
reserved range stays valid whatever is mapped, and only mapped parts of it may be touched.

Work is submitted to two queues, each in order: `run` for compute, `run_copy` for transfers that overlap with it.
`copy` moves blocks between devices, and to and from the host, in whatever way the hardware has; `copy_tensor` whole
tensors between devices.
Three implementations pass one contract (tests/gpu/device_contract.py): host (memfd and mmap), null (counts only), cuda
(cuMem*).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kunserve.gpu.copies import BlockCopy

T = TypeVar("T")


class Device(Protocol):
    """Memory and compute with a budget of its own. Sizes in bytes; addresses are integers.

    Raises `DeviceError` where the operating system, the driver or the rules of `Mappings` refuse; then nothing has
    changed. A cancelled caller of `run` or of a copy waits until that has ended, however often it is cancelled.
    """

    name: str  # "cpu:0", "cuda:1"
    torch_device: torch.device
    chunk_bytes: int
    num_chunks: int  # the whole budget
    is_lost: bool  # given up: what it has is neither read nor written any more

    def reserve(self, num_bytes: int) -> int:
        """Reserve virtual addresses (a multiple of `chunk_bytes`), aligned to `chunk_bytes`; nothing is mapped."""

    def release(self, address: int, num_bytes: int) -> None:
        """Give a reserved range back; what is mapped in it is unmapped."""

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """Map chunks one after the other from `address`, readable and writable. Content comes along."""

    def unmap(self, address: int, num_chunks: int) -> None:
        """Unmap `num_chunks` from `address`; the addresses stay reserved, the chunks keep their content."""

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Return a flat uint8 tensor over a reserved range, mapped or not; nobody's, valid until `release`."""

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        """Run `work` on the compute queue, after everything submitted before; returns when its results are there."""

    def run_copy(self, work: Callable[[], T]) -> Awaitable[T]:
        """Run `work` on the copy queue, beside compute; returns when the copied bytes are there."""

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """Copy blocks beside compute; returns when they are there. Nobody else touches them meanwhile.

        They come from `source`, a device of the same kind, or from this one or host memory if that is None; they go to
        this device, or with `is_to_host` from it to host memory.
        """

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """Copy `read`, on `source`, a device of the same kind, into `write`, on this one, beside compute.

        Both are contiguous, of the same shape and dtype. Returns when all is there; nobody writes either meanwhile.
        """

    def abandon(self) -> None:
        """Give the device up: begin no more work, and wait for nothing. Its memory stays until its work has ended."""

    def copies_have_ended(self, timeout_s: float) -> bool:
        """Return whether no copy of an abandoned device runs any more, at the latest after so many seconds. Blocks."""

    def close(self) -> None:
        """End the queues and release all memory; of an abandoned device that still works, nothing. Idempotent."""
