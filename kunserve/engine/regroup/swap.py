"""Swap: copies the KV of requests that make way to host memory and back, hidden behind the devices' forward time.

The scheduler decides who leaves and who returns (swap_queue.py); this asks for the transfers and paces them.
Per iteration of a device no more bytes move than fit into its measured forward time at the measured copy speed
(InferCept's swap budget), in and out together; while nothing computes there is nothing to hide behind. A request whose
copy fails is recomputed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kunserve.averages import smooth
from kunserve.engine.group import Group, Stage
from kunserve.engine.regroup.transfer import Transfer, Transfers
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.schedule.swap_queue import SwapMove
from kunserve.engine.signals import Signals
from kunserve.gpu.copies import BlockCopy, host_blocks
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.links import HOST, Links
from kunserve.gpu.queue import gather_all
from kunserve.gpu.refusal import log_failure


@dataclass(slots=True)
class CopyBudget:
    """How many bytes one device may copy in the present iteration. Pure."""

    bytes_per_s: float | None = None
    step_s: float | None = None
    num_bytes_left: int = 0
    is_untouched: bool = True  # nothing copied in this iteration

    def stepped(self, seconds: float) -> None:
        """Note that an iteration which took so long is over, and that the next begins."""
        self.step_s = smooth(self.step_s, seconds)
        self.num_bytes_left = int((self.bytes_per_s or 0.0) * self.step_s)
        self.is_untouched = True

    def copied(self, num_bytes: int, seconds: float) -> None:
        """Note that a copy took so long."""
        self.bytes_per_s = smooth(self.bytes_per_s, num_bytes / max(seconds, 1e-9))

    def take(self, layer_bytes: int, num_layers: int) -> int:
        """Return how many of `num_layers` may be copied now. One in every iteration, however large, so that all end."""
        granted = min(num_layers, self.num_bytes_left // layer_bytes) or int(self.is_untouched)
        self.num_bytes_left = max(0, self.num_bytes_left - granted * layer_bytes)
        self.is_untouched &= granted == 0
        return granted


@dataclass(frozen=True, slots=True)
class _Paced:
    """Lets a transfer of a group go only while its devices compute. Implements `transfer.Pace`."""

    group: Group
    budget: CopyBudget
    signals: Signals

    async def grant(self, layer_bytes: int, num_layers: int) -> int:
        """See `Pace.grant`."""
        while self.group.num_in_flight:
            if granted := self.budget.take(layer_bytes, num_layers):
                return granted
            await self.signals.next_commit(self.group)
        return num_layers

    def copied(self, num_bytes: int, seconds: float) -> None:
        """See `Pace.copied`."""
        self.budget.copied(num_bytes, seconds)


class SwapMover:
    """Does the copies that a scheduler asks for: one request of a group after the other."""

    def __init__(self, scheduler: Scheduler, memories: Sequence[DeviceMemory], links: Links, signals: Signals) -> None:
        self._scheduler, self._signals = scheduler, signals
        self._transfers = Transfers(memories, links)
        self._budgets: defaultdict[int, CopyBudget] = defaultdict(CopyBudget)  # by device
        self.buffers: dict[str, dict[int, Tensor]] = {}  # request id -> layer -> (blocks, *block_shape)
        self._moves: dict[int, deque[SwapMove]] = {}  # group id -> begun and not ended, the first under way
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_bytes(self) -> int:
        """Return the bytes that were copied since the server started."""
        return self._transfers.num_bytes

    # --- what the engine calls ----------------------------------------------------------------------------------

    def observe(self) -> None:
        """Begin the copies that the last round of scheduling asked for."""
        for move in self._scheduler.swapped.take_begun():
            group_id = move.group.group_id
            if group_id in self._moves:
                self._moves[group_id].append(move)
                continue
            self._moves[group_id] = deque([move])
            task = asyncio.create_task(self._work_off(group_id), name="swap")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def stepped(self, group: Group, seconds: float) -> None:
        """Note that an iteration which took so long is over, and that the next begins."""
        for stage in group.stages:
            self._budgets[stage.device].stepped(seconds / len(group.stages))

    def is_busy(self, groups: Sequence[Group]) -> bool:
        """Tell whether copies of these groups' requests are under way."""
        return any(group.group_id in self._moves for group in groups)

    def finished(self, request: Request) -> None:
        """Free an ended request's host memory, unless a copy works on it; then the copy's end does."""
        if not request.is_moving:
            self.buffers.pop(request.request_id, None)

    async def stop(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        under_way = [move for moves in self._moves.values() for move in moves]
        self._moves.clear()
        for move in (*under_way, *self._scheduler.swapped.take_begun()):
            self._end(move, is_lost=True)

    # --- copies -------------------------------------------------------------------------------------------------

    async def _work_off(self, group_id: int) -> None:
        moves = self._moves[group_id]
        while moves:
            move, is_lost = moves[0], False
            try:
                await self._copy(move)
            except Exception as error:
                log_failure("swap failed, recomputing", error, request=move.request.request_id)
                is_lost = True
            moves.popleft()
            if not moves:
                del self._moves[group_id]
            self._end(move, is_lost=is_lost)

    async def _copy(self, move: SwapMove) -> None:
        """Copy all layers of one request, all stages at once."""
        self.buffers.setdefault(move.request.request_id, {})
        await gather_all(self._copy_stage(move, stage) for stage in move.group.stages)

    async def _copy_stage(self, move: SwapMove, stage: Stage) -> None:
        """Copy the layers of one stage, as many at a time as the budget allows; nothing if the request has ended."""
        request, device, table = move.request, stage.device, move.request.table
        kv, buffers = self._transfers.kv(device), self.buffers[request.request_id]
        in_window = slice(move.num_behind, move.num_blocks)  # of those behind nothing is needed, and nothing comes back
        if table.near is None:
            parts = [(0, table.ids[device][in_window].tolist())]
        else:
            parts = [
                (0, table.ids[device][: move.num_blocks].tolist()),
                (1, table.near.ids[device][in_window].tolist()),
            ]
        ends = (device, HOST) if move.is_out else (HOST, device)
        for kind, ids in parts:
            layers = self._scheduler.fleet.layers_of(kind, range(stage.first_layer, stage.last_layer))
            copies = partial(_copies, kv, ids, buffers, is_out=move.is_out)
            transfer = Transfer(*ends, layers, len(ids), copies, lambda: request.finish_reason is None)
            await self._transfers.run(transfer, _Paced(move.group, self._budgets[device], self._signals))

    def _end(self, move: SwapMove, *, is_lost: bool = False) -> None:
        if is_lost or not move.is_out or move.request.finish_reason is not None:
            self.buffers.pop(move.request.request_id, None)
        self._scheduler.end_swap(move, is_lost=is_lost)
        self._signals.progress(move.group.group_id)
        self._signals.wake(move.group)


def _copies(
    kv: Sequence[Tensor], ids: Sequence[int], buffers: dict[int, Tensor], layers: Sequence[int], *, is_out: bool
) -> list[BlockCopy]:
    """Return copies of blocks `ids` of some layers into new host tensors, or back from those."""
    copies = []
    for layer in layers:
        if is_out:
            buffers[layer] = host_blocks(len(ids), kv[layer])
            copies.append(BlockCopy(kv[layer], ids, buffers[layer], range(len(ids))))
        else:
            copies.append(BlockCopy(buffers[layer], range(len(ids)), kv[layer], ids))
    return copies
