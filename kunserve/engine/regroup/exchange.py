"""Exchange: KV of live requests follows its layers to other devices, while everything else keeps running.

A request that moves has departed (engine/fleet.py). It holds its blocks where it was and where it goes; when its last
layer has arrived it leaves the old ones and runs on. Here is who moves when; transfers (transfer.py) do it.
A request whose copy fails is recomputed: nothing is lost but time. Each counts as lost, in its transition and in
metrics, so that an exchange that moved everybody can be told from one that moved nobody.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kunserve.engine.blocks.block_table import Block, BlockTable
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.regroup.remap import Remap
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.request import Request
from kunserve.engine.schedule.budget import is_schedulable
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals
from kunserve.errors import EngineError
from kunserve.gpu.queue import gather_all
from kunserve.gpu.refusal import log_failure
from kunserve.observe.metrics import Metrics
from kunserve.planner.exchange import LayerMove, layer_moves
from kunserve.planner.layouts import given
from kunserve.planner.plan import ExchangePlan, KvMove
from kunserve.planner.snapshot import StageView


@dataclass(slots=True, eq=False)
class Moving:
    """One request on its way from the stages it ran on to those of its new group."""

    request: Request
    group: Group  # the new one
    left: tuple[StageView, ...]  # stages of the old one
    table: BlockTable  # blocks where it was, and where it has got some already
    has_blocks: bool = False  # on all devices of the new group
    is_lost: bool = False  # its KV did not arrive

    @property
    def tables(self) -> tuple[BlockTable, ...]:
        """Return its blocks of each kind."""
        return (self.table,) if self.table.near is None else (self.table, self.table.near)

    @property
    def moves(self) -> tuple[LayerMove, ...]:
        """Return the layers whose device changes."""
        return layer_moves(self.left, [stage.view for stage in self.group.stages])

    @property
    def devices(self) -> set[int]:
        """Return all devices that it leaves or comes to."""
        return {stage.device for stage in self.left} | {stage.device for stage in self.group.stages}


class Exchange:
    """Moves requests between the devices of a server."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        remap: Remap,
        transfers: Transfers,
        signals: Signals,
        metrics: Metrics,
    ) -> None:
        self._fleet, self._scheduler, self._remap, self._memories = fleet, scheduler, remap, remap.memories
        self.transfers, self._signals, self._metrics = transfers, signals, metrics
        self.moving: dict[str, Moving] = {}  # by request id
        self._moving_at = defaultdict[int, dict[str, Moving]](dict)  # device -> of those, who leaves it or comes to it

    def begin(self, request: Request, old: Group, new: Group) -> Moving:
        """Bind a request to its new group; until its KV has followed, it is not scheduled."""
        left = tuple(stage.view for stage in old.stages)
        moving = Moving(request, new, left, self._fleet.depart(request, old, new))
        self.moving[request.request_id] = moving
        for device in moving.devices:
            self._moving_at[device][request.request_id] = moving
        return moving

    def reserve(self, moving: Sequence[Moving], *, is_beyond_limit: bool = False) -> None:
        """Give requests blocks where they go, in this order, all at once, before anybody else can take them.

        Where they do not fit, their groups admit nobody until the last has them.
        """
        for m in moving:
            if not self._allocate(m, is_beyond_limit=is_beyond_limit):
                for other in moving:
                    self._fleet.set_admitting(other.group, False)
                return

    async def by_request(self, moving: Sequence[Moving]) -> None:
        """Move requests in the order of `reserve`; each runs on when its own layers have arrived.

        They get their blocks in that order too. Those that take the same links follow each other, so that the first is
        not held up by the last; those that take others, as from the other side of a merge, go at the same time.
        """
        lanes = defaultdict[frozenset[tuple[int, int]], asyncio.Lock](asyncio.Lock)
        there = defaultdict[LayerMove, set[Block]](set)  # of both kinds
        try:
            async with asyncio.TaskGroup() as tasks:
                under_way: list[asyncio.Task[None]] = []
                for m in moving:
                    if self._is_moving(m) and not (m.has_blocks or self._allocate(m)) and under_way:
                        await asyncio.wait(under_way)  # those leave ranges that can be given to the layers that stay
                    if self._is_moving(m) and await self._has_blocks(m):
                        links = frozenset((move.source, move.destination) for move in m.moves)
                        lane = lanes[links] if self.transfers.is_coordinated else asyncio.Lock()
                        under_way.append(tasks.create_task(self._bring(m, lane, there)))
        finally:
            self._end_all(moving)

    async def by_layer(self, group: Group, moving: Sequence[Moving], plan: ExchangePlan) -> None:
        """Move all requests, layer after layer: needs the room of one layer only. They run on together.

        That is once the freed chunks are theirs to grow into. Ranges grow in the order of the plan, each as soon as
        there are chunks for it, so that the next layers' ranges grow, which takes a step boundary, while one is copied;
        layers that take other links are copied at the same time.
        """
        by_id = {m.request.request_id: m for m in moving}
        try:
            if any(not m.has_blocks for m in moving):
                raise EngineError("no blocks for KV that was planned to fit")
            lanes = defaultdict[tuple[int, int], asyncio.Lock](asyncio.Lock)
            # Device -> chunks that ranges will grow by. Without it, two layers would count on the same free chunks,
            # and the growth that comes second would fail, and with it the exchange of all requests.
            promised = Counter[int]()
            async with asyncio.TaskGroup() as tasks:
                under_way = set[asyncio.Task[None]]()
                for move in plan.moves:
                    while under_way and not self._has_chunks(move, promised):
                        _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    growth = Counter({move.destination: self._missing_chunks(move)})
                    promised += growth
                    lane = lanes[move.source, move.destination]
                    under_way.add(tasks.create_task(self._bring_layer(by_id, move, lane, promised, growth)))
            # Before they run on: else they would lack blocks at once, and some be preempted whose KV has just come.
            await self._remap.reassign_chunks(group.stages)
        except Exception as error:
            log_failure("exchange by layer failed, recomputing", error, requests=len(moving))
        else:
            for m in moving:
                self._end(m)
        finally:
            self._end_all(moving)

    async def _bring_layer(
        self,
        moving: Mapping[str, Moving],
        move: KvMove,
        lane: asyncio.Lock,
        promised: Counter[int],
        growth: Counter[int],
    ) -> None:
        """Grow a layer's range by what was promised, copy all requests when its turn has come, unmap what it leaves."""
        await self._grow(move)  # before its turn: it waits for a step boundary, and the link would idle for as long
        promised -= growth
        step = LayerMove(move.first_layer, move.last_layer, move.source, move.destination)
        present = [moving[i] for i in move.request_ids if i in moving]  # others have left since the plan was made
        there = set[Block]()
        async with lane:
            if self.transfers.is_coordinated:
                for m in present:
                    await self._copy(m, step, there)
            else:
                await gather_all(self._copy(m, step, there) for m in present)
        await self._remap.resize_kv(move.source, dict.fromkeys(range(move.first_layer, move.last_layer), 0))

    async def _has_blocks(self, moving: Moving) -> bool:
        """Tell whether a request has its blocks now; one that cannot get any is recomputed."""
        try:
            if await self._wait_for_blocks(moving):
                return True
        except Exception as error:
            log_failure("no blocks, recomputing", error, request=moving.request.request_id)
        if self._is_moving(moving):
            self._end(moving, is_lost=True)
        return False

    async def _bring(self, moving: Moving, lane: asyncio.Lock, there: Mapping[LayerMove, set[Block]]) -> None:
        """Copy one request's layers when its turn has come; if that fails, it is recomputed."""
        is_lost = True
        try:
            async with lane:
                for move in moving.moves:
                    await self._copy(moving, move, there[move])
            is_lost = False
        except Exception as error:
            log_failure("exchange failed, recomputing", error, request=moving.request.request_id)
        if self._is_moving(moving):
            self._end(moving, is_lost=is_lost)

    async def _wait_for_blocks(self, moving: Moving) -> bool:
        """Return when a request has its blocks, or has ended; False if nobody is left who could make room for it."""
        group = moving.group
        while not moving.has_blocks and moving.request.finish_reason is None and not self._allocate(moving):
            if group.is_lost:
                return False
            self._end_finished(group)
            if not await self._make_room(group):
                if self._is_stuck(group):
                    return False
                await self._signals.next_commit(group)
        if not group.is_admitting:
            self._fleet.set_admitting(group, all(m.has_blocks for m in self._moving_to(group)))
            self._signals.wake(group)
        return True

    def _is_stuck(self, group: Group) -> bool:
        """Tell whether nothing runs and nothing can: all are on their way, or have arrived and lack blocks.

        A policy that preempts nobody would leave it so for ever.
        """
        here = [request for request in group.running if request.request_id not in self.moving]
        return not group.in_flight and all(
            is_schedulable(r) and group.missing_blocks(r, r.num_scheduled_tokens + 1) > group.num_free for r in here
        )

    def _allocate(self, moving: Moving, *, is_beyond_limit: bool = False) -> bool:
        """Give a request blocks on every device of its new group; False, and nothing taken, if one lacks them."""
        moving.has_blocks = self._fleet.reserve(moving.request, moving.group, is_beyond_limit=is_beyond_limit)
        return moving.has_blocks

    async def _copy(self, moving: Moving, move: LayerMove, there: set[Block]) -> None:
        """Copy one request's KV of some layers. Nothing is copied for a request that has ended.

        Blocks in `there` have been copied, for another request that shares them; those that are copied now join them.
        """
        request = moving.request
        for kind, table in enumerate(moving.tables):
            used = table.blocks[: moving.group.blocks_for(request.num_computed_tokens) - table.num_behind]
            blocks = [block for block in used if block not in there]
            if await self.transfers.between(
                move.source,
                move.destination,
                self._fleet.layers_of(kind, range(move.first_layer, move.last_layer)),
                [block.ids[move.source] for block in blocks],
                [block.ids[move.destination] for block in blocks],
                is_wanted=lambda: request.finish_reason is None,
            ):
                there.update(blocks)

    def _is_moving(self, moving: Moving) -> bool:
        return self.moving.get(moving.request.request_id) is moving

    def _moving_to(self, group: Group) -> list[Moving]:
        return [m for m in self._moving_at[group.stages[0].device].values() if m.group is group]

    def _end_finished(self, group: Group) -> None:
        """Free what requests hold whose clients left while they waited."""
        for m in self._moving_to(group):
            if m.request.finish_reason is not None:
                self._end(m)

    def _end_all(self, moving: Sequence[Moving]) -> None:
        """Leave nobody on the way, however an exchange ended; the last admitted is recomputed last."""
        for m in reversed(moving):
            if self._is_moving(m):
                self._end(m, is_lost=True)
            self._fleet.set_admitting(m.group, True)

    def _end(self, moving: Moving, *, is_lost: bool = False) -> None:
        """Let a request go on that arrived, was lost on the way, or ended: free what it holds elsewhere."""
        request, group = moving.request, moving.group
        del self.moving[request.request_id]
        for device in moving.devices:
            del self._moving_at[device][request.request_id]
        devices = {stage.device for stage in group.stages}
        if request.finish_reason is not None:
            self._fleet.lose(request)
        elif is_lost:
            moving.is_lost = True
            self._metrics.exchange_lost_request()
            self._fleet.lose(request)
            self._scheduler.requeue(group, request)
        else:
            self._fleet.arrive(request, group)
        # After a split, another group has the blocks.
        self._signals.wake(group if devices.issuperset(stage.device for stage in moving.left) else None)

    async def _make_room(self, group: Group) -> bool:
        """Give the KV of layers that everybody has left to those that stay; False if there is none."""
        self._fleet.give_up_followers(group)  # they may be in what is given away
        needed = {
            (move.source, layer)
            for stage in group.stages
            for m in self._moving_at[stage.device].values()
            for move in m.moves
            for layer in range(move.first_layer, move.last_layer)
        }
        has_grown = False
        for stage in group.stages:
            stay = range(stage.first_layer, stage.last_layer)
            memory = self._memories[stage.device]
            mapped = memory.layout.kv_chunks
            gone = [i for i, n in enumerate(mapped) if n and i not in stay and (stage.device, i) not in needed]
            if gone:
                shape = self._remap.shape
                spare = memory.counts.free + sum(mapped[i] for i in (*gone, *stay))
                grown = given(shape, stay, shape.chunks_within(spare, shape.by_kind(stay)))
                await self._remap.resize_kv(stage.device, dict.fromkeys(gone, 0) | grown)
                self._fleet.grow(stage.device, *self._remap.num_blocks(stage))
                has_grown = True
        return has_grown

    async def _grow(self, move: KvMove) -> None:
        """Map a layer's range at the destination up to the last block that anybody has there."""
        kv, missing = self._memories[move.destination].kv, self._missing_chunks(move)
        for layer in range(move.first_layer, move.last_layer):
            await self._remap.resize_kv(move.destination, {layer: kv.num_chunks(layer) + missing})

    def _has_chunks(self, move: KvMove, promised: Counter[int]) -> bool:
        """Tell whether `_grow` will find what it needs, beside what is promised to others."""
        device = move.destination
        return self._missing_chunks(move) + promised[device] <= self._memories[device].counts.free

    def _missing_chunks(self, move: KvMove) -> int:
        """Return the chunks by which each layer's range at the destination has to grow; all have as many."""
        kv, kind = self._memories[move.destination].kv, self._remap.shape.kind_of(move.first_layer)
        blocks = (block for m in self._moving_at[move.destination].values() for block in m.tables[kind].blocks)
        last = max((block.ids.get(move.destination, -1) for block in blocks), default=-1)
        return max(0, kv.chunks_for(last + 1) - kv.num_chunks(move.first_layer))
