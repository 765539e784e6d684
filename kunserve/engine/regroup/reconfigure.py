"""Reconfigure: the one place that applies plans. Drops weights and merges groups; brings weights back and splits.

A transition is two-phase: it prepares while everything serves, then commits a new epoch at a step boundary, or rolls
back to the old one. Merges of different groups run side by side; a restore runs alone, and gives way to a new burst at
any point before its split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.regroup.boundary import Boundary
from kunserve.engine.regroup.exchange import Exchange, Moving
from kunserve.engine.regroup.followers import Followers
from kunserve.engine.regroup.live_kv import by_admission, live_requests
from kunserve.engine.regroup.remap import Layouts, Remap
from kunserve.engine.regroup.transition import Transition, Transitions
from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals
from kunserve.errors import ConflictError
from kunserve.gpu.queue import gather_all
from kunserve.gpu.refusal import log_failure
from kunserve.planner.exchange import plan_exchange
from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.plan import ExchangeMode, ExchangePlan, Join, Merge, RestorePlan, Split
from kunserve.planner.restore import HeldRequest, assign_requests
from kunserve.planner.snapshot import Lineage, ModelShape, Snapshot, StageView


class _CancelledError(Exception):
    """A new burst came before the weights were back."""


class Reconfigure:
    """Applies plans to the fleet, its devices and its requests."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        boundary: Boundary,
        remap: Remap,
        exchange: Exchange,
        loader: WeightLoader,
        transitions: Transitions,
        signals: Signals,
    ) -> None:
        self._fleet, self._scheduler, self.boundary, self.remap = fleet, scheduler, boundary, remap
        self.exchange, self.loader = exchange, loader
        self._followers = Followers(fleet, exchange.transfers)
        self._signals = signals
        self.transitions = transitions
        self._is_cancelled = False  # the restore

    @property
    def shape(self) -> ModelShape:
        """Return the sizes that plans are made with: the share of near KV is what it is now."""
        return self.remap.shape

    # --- drop ---------------------------------------------------------------------------------------------------

    async def drop(
        self,
        snapshot: Snapshot,
        merge: Merge,
        on_commit: Callable[[Transition], None] | None = None,
        *,
        most_lost_blocks: int | None = 0,
    ) -> Transition:
        """Merge groups into one chain; returns when every request has arrived. `on_commit` is called when it commits.

        Merges of other groups may run at the same time: none waits for another's step boundary. `most_lost_blocks`: if
        the KV of live requests cannot follow its layers, all of them are recomputed if they hold fewer blocks than
        that; None: however many.

        Raises ConflictError, and nothing has changed, if a group is gone or in another transition, or KV cannot follow;
        DeviceError after rolling back.
        """
        with self.transitions.begin("drop", merge.group_ids) as (transition, old):
            transition.planned_bytes = merge.freed_bytes
            await self._merge_at_boundary(transition, old, snapshot, merge, on_commit, most_lost_blocks)
        return transition

    async def join(self, plan: Join) -> Transition:
        """Let devices that are in no group become stages of one; returns when every request has arrived.

        They load their weights while it serves. Raises as `drop`; what they have loaded stays there then.
        """
        with self.transitions.begin("add", [plan.group_id]) as (transition, old):
            layouts = {stage.device: self.remap.of_stage(stage) for stage in plan.newcomers}
            with self.transitions.step(transition, "remap"):
                await self.remap.apply(layouts)
            transition.planned_bytes = self.remap.num_unfilled_bytes(layouts)
            with self.transitions.step(transition, "load"):
                transition.weight_bytes = await self.remap.load(layouts, lambda: old[0].is_suspect)
            if self.remap.num_unfilled_bytes(layouts):
                raise ConflictError("a device does not answer", retry_after_s=1)
            for stage in plan.newcomers:
                self._fleet.refill(stage.device, *self.remap.num_blocks(stage))
            await self._merge_at_boundary(transition, old, plan.snapshot, plan.merge, None, 0)
        return transition

    async def _merge_at_boundary(
        self,
        transition: Transition,
        old: Sequence[Group],
        snapshot: Snapshot,
        merge: Merge,
        on_commit: Callable[[Transition], None] | None,
        most_lost_blocks: int | None,
    ) -> None:
        """Put one chain in the place of groups, and bring it the KV of their requests."""
        with self.boundary.paused(old):
            with self.transitions.step(transition, "boundary"):  # 2
                await self.boundary.reached(old, gives_up=True)
                await self._repair_layouts(old)
            exchange = self._plan_exchange(snapshot, merge, old, most_lost_blocks)
            if exchange.moves or exchange.mode is ExchangeMode.INFEASIBLE:
                transition.exchange_mode = str(exchange.mode)
            for group in old:  # remapping gives the KV of layers that go and that nobody uses away, even if it fails
                if group.group_id not in exchange.cached_groups:
                    self._fleet.forget_idle(group)
            with self.transitions.step(transition, "remap"):  # 3
                await self.remap.apply(self.remap.planned(exchange.layouts))
            transition.weight_bytes += merge.freed_bytes
            new, moving = self._merge(merge, old, exchange)
            self.transitions.commit(transition, old, [new], on_commit)  # 4
            with self.transitions.step(transition, "exchange"), self._exchanged(transition, [new], moving):  # 5, 6
                if exchange.mode is ExchangeMode.BY_LAYER:
                    await self.exchange.by_layer(new, moving, exchange)
                else:
                    await self.exchange.by_request(moving)
                transition.num_cached_blocks = await self._followers.bring(new)
                await self.remap.reassign_chunks(new.stages)
                self._signals.wake()

    def would_drop(self, merge: Merge) -> dict[int, list[str]]:
        """Return the weight units that a merge would unmap, by device; without those that it would not."""
        dropped = {stage.device: self.remap.units_beyond(stage) for stage in merge.stages}
        return {device: units for device, units in dropped.items() if units}

    def _plan_exchange(
        self, snapshot: Snapshot, merge: Merge, groups: Sequence[Group], most_lost_blocks: int | None
    ) -> ExchangePlan:
        """Plan how the KV of live requests will follow; if it cannot, preempt all of them now: they are recomputed.

        By layer, all wait for the last layer. Requests without a first token are preempted then: recomputing is sooner.
        """
        cached_groups = frozenset(group.group_id for group in groups if group.idle and self._has_room())
        exchange = plan_exchange(snapshot, merge, live_requests(groups), cached_groups)
        is_too_much = most_lost_blocks is not None and sum(group.num_used for group in groups) >= most_lost_blocks
        if exchange.mode is ExchangeMode.INFEASIBLE and is_too_much:
            raise ConflictError("the KV of live requests cannot follow its layers any more: nothing was dropped")
        if exchange.mode is ExchangeMode.BY_LAYER:
            self._recompute(groups, lambda request: request.num_output_tokens == 0)
            exchange = plan_exchange(snapshot, merge, live_requests(groups))
        if exchange.mode is ExchangeMode.INFEASIBLE:
            self._recompute(groups, lambda _: True)
        return exchange

    def _has_room(self) -> bool:
        """Tell whether nobody waits for the memory that cached blocks on their way would occupy."""
        head = self._scheduler.waiting.head
        return head is None or any(
            g.free_for(head.num_tokens) >= g.blocks_for(head.num_tokens) for g in self._fleet.groups
        )

    def _recompute(self, groups: Sequence[Group], is_meant: Callable[[Request], bool]) -> None:
        """Preempt some of the requests of these groups; the last admitted first, so that the first is back first."""
        for request, group in reversed(by_admission(groups)):
            if is_meant(request):
                self._scheduler.preempt(group, request)

    def _merge(self, merge: Merge, groups: Sequence[Group], exchange: ExchangePlan) -> tuple[Group, list[Moving]]:
        """Make the merged group and bind all requests to it, in the order in which they were admitted."""
        new = self._new_group(merge.stages, merge.lineage)
        by_layer = {growth.device: growth for growth in exchange.early_growth}
        for group in groups:
            if group.group_id not in exchange.cached_groups:
                self._fleet.forget_idle(group)  # of requests that have ended since then
        self._followers.merge(groups, new)
        for stage in new.stages:
            mapped = self.remap.num_blocks(stage)
            self._fleet.grow(stage.device, *mapped)
            if by_layer:  # and ids of blocks that are mapped layer by layer
                self._fleet.grow(stage.device, *by_layer[stage.device].by_kind(len(mapped)))
                self._fleet.limit(stage.device, *mapped)
        moving = [self.exchange.begin(request, group, new) for request, group in by_admission(groups)]
        order = {request_id: i for i, move in enumerate(exchange.moves) for request_id in move.request_ids}
        moving.sort(key=lambda m: order.get(m.request.request_id, -1))
        self.exchange.reserve(moving, is_beyond_limit=bool(by_layer))
        return new, moving

    async def _repair_layouts(self, groups: Sequence[Group]) -> None:
        """Bring devices to their groups' layouts, if an earlier transition failed to."""
        await self.remap.reassign_chunks(stage for group in groups for stage in group.stages)

    # --- restore ------------------------------------------------------------------------------------------------

    async def restore(self, plan: RestorePlan, on_commit: Callable[[Transition], None] | None = None) -> Transition:
        """Apply a restore plan; returns when every request has arrived in its new group. `on_commit` as in `drop`.

        Raises ConflictError if the plan is of another epoch or a transition runs, DeviceError after rolling back.
        If a new burst cancels it before the split, the old grouping is back and the outcome says so.
        """
        group_ids = [split.group_id for split in plan.splits]
        if plan.epoch != self._fleet.epoch:
            raise ConflictError(f"the plan is of epoch {plan.epoch}, the server in epoch {self._fleet.epoch}")
        with self.transitions.begin("restore", group_ids) as (transition, old), ExitStack() as pause:
            self._is_cancelled = False
            transition.planned_bytes = self._bytes_to_load(old, plan)
            await self._repair_layouts(old)
            before = self.remap.now(old)
            try:
                await self._bring_weights_back(transition, old, plan, before)
                with self.transitions.step(transition, "split"):
                    pause.enter_context(self.boundary.paused(old))
                    await self.boundary.reached(old)
                self._give_way()
            except BaseException as error:
                await gather_all(self._back_to_chain(group, before) for group in old)
                if isinstance(error, _CancelledError):
                    transition.outcome = "cancelled"
                    return transition
                raise
            new, moving = self._split(old, plan.splits)
            self.transitions.commit(transition, old, new, on_commit)
            with self.transitions.step(transition, "exchange"), self._exchanged(transition, new, moving):
                await self.exchange.by_request(moving)
                transition.num_cached_blocks = sum(await gather_all(self._followers.bring(group) for group in new))
        return transition

    def cancel_restore(self) -> None:
        """Give up a restore that has not split yet, for a new burst. Nothing happens if there is none."""
        if self.is_cancellable:
            self._is_cancelled = True
            self._signals.progress()

    @property
    def is_cancellable(self) -> bool:
        """Return whether `cancel_restore` would do something that it has not done yet."""
        current = self.transitions.current
        return current is not None and current.kind == "restore" and current.epoch is None and not self._is_cancelled

    def _bytes_to_load(self, old: Sequence[Group], plan: RestorePlan) -> int:
        """Return the bytes of weights that the parts of a restore hold more than the chains they are made of."""
        after = [stage for split in plan.splits for half in split.into for stage in half.stages]
        before = [stage.view for group in old for stage in group.stages]
        chunks = [sum(self.shape.weight_chunks(s.first_layer, s.last_layer) for s in of) for of in (after, before)]
        return (chunks[0] - chunks[1]) * self.shape.chunk_bytes

    def _give_way(self) -> None:
        if self._is_cancelled:
            raise _CancelledError

    async def _bring_weights_back(
        self, transition: Transition, old: Sequence[Group], plan: RestorePlan, before: Layouts
    ) -> None:
        """Shrink KV, map the weights where it was, and load them while the chain keeps serving."""
        halves = [half for split in plan.splits for half in split.into]
        targets = {layout.stage.device: blocks_of(self.shape, layout) for half in halves for layout in half.layouts}
        with ExitStack() as pause:
            with self.transitions.step(transition, "shrink"):
                # Limits first: else requests that run on between two tries would take new ids in the very tails.
                for device, num_blocks in targets.items():
                    self._fleet.limit(device, *num_blocks)
                pause.enter_context(self.boundary.paused(old))
                await self.boundary.reached(old)
                while not await self._empty_tails(old, targets):
                    pause.close()  # not enough room in front yet: somebody has to finish first
                    await self._signals.next_commit()
                    self._give_way()
                    pause.enter_context(self.boundary.paused(old))
                    await self.boundary.reached(old)
                for group in old:
                    self._fleet.end_following(group)
            with self.transitions.step(transition, "remap"):
                # Ranges shrink only at their tails: a block still used there would be unmapped under its request.
                for device, num_blocks in targets.items():
                    self._fleet.shrink(device, *num_blocks)
                await self.remap.apply(self.remap.planned(layout for half in halves for layout in half.layouts))
        with self.transitions.step(transition, "load"):
            transition.weight_bytes = await self.remap.load(before, lambda: self._is_cancelled)
        self._give_way()

    async def _empty_tails(self, groups: Sequence[Group], targets: Mapping[int, tuple[int, ...]]) -> bool:
        """Move live blocks from beyond the targets to free ones before them; False if these are too few."""
        is_empty = True
        for group in groups:
            for stage in group.stages:
                for kind, limit in enumerate(targets[stage.device]):
                    is_empty &= await self._empty_tail(group, stage, limit, kind)
        return is_empty

    async def _empty_tail(self, group: Group, stage: Stage, limit: int, kind: int) -> bool:
        """Move the live blocks of one stage; cached ones with them, unless that fails: they are given up then."""
        try:
            with self._fleet.emptying(group, stage, limit, kind) as tail:
                layers = self._fleet.layers_of(kind, range(stage.first_layer, stage.last_layer))
                await self.exchange.transfers.within(stage.device, layers, tail.moved)
        except Exception as error:
            if not self._fleet.give_up_followers(group):
                raise
            log_failure("cached blocks are lost", error, group=group.group_id)
            return await self._empty_tail(group, stage, limit, kind)
        return tail.is_whole

    async def _back_to_chain(self, group: Group, before: Layouts) -> None:
        """Undo a restore of a group before its split: drop what came, and give the chunks to KV again."""
        with self.boundary.paused([group]):
            await self.boundary.reached([group])
            await self.remap.apply({stage.device: before[stage.device] for stage in group.stages})
            for stage in group.stages:
                self._fleet.grow(stage.device, *self.remap.num_blocks(stage))
            self._fleet.end_following(group)

    def _split(self, old: Sequence[Group], splits: Sequence[Split]) -> tuple[list[Group], list[Moving]]:
        """Make the new groups, and bind every request to one of them; a block id means the same in all layers."""
        made, moving = [], []
        for group, split in zip(old, splits, strict=True):
            new = [self._new_group(half.stages, half.lineage) for half in split.into]
            held = [HeldRequest(r.request_id, r.num_blocks) for r in group.running]
            stages = [stage.view for stage in group.stages]
            max_running = [self._scheduler.limits.max_running(half) for half in new]
            ids_by_half = assign_requests(held, stages, [half.stages for half in split.into], max_running)
            by_id = {request_id: to for to, ids in zip(new, ids_by_half, strict=True) for request_id in ids}
            destinations = {request: by_id[request.request_id] for request in group.running}
            self._followers.split(group, destinations, new)
            moving += [self.exchange.begin(request, group, to) for request, to in destinations.items()]
            made += new
        self.exchange.reserve(moving)  # they have blocks everywhere already
        return made, moving

    # --- kinds of KV --------------------------------------------------------------------------------------------

    async def rebalance(self, share: int) -> Transition:
        """Give layers with a window another share of KV on all devices: chunks go from one kind to the other.

        Blocks in use move to where their kind keeps its memory; if there is too little room for them by now, nothing
        changes and the outcome says so. Raises ConflictError if another transition runs or a device is suspected,
        DeviceError after rolling back.
        """
        shape, group_ids = self.shape.with_share(share), [group.group_id for group in self._fleet.groups]
        with self.transitions.begin("rebalance", group_ids) as (transition, groups), self.boundary.paused(groups):
            with self.transitions.step(transition, "boundary"):
                await self.boundary.reached(groups, gives_up=True)
                await self._repair_layouts(groups)
            stages = [stage for group in groups for stage in group.stages]
            chunks = {stage.device: self.remap.memories[stage.device].pool.num_chunks for stage in stages}
            layouts = {stage.device: stage_layout(shape, chunks[stage.device], stage.view) for stage in stages}
            kept = {
                stage.device: tuple(map(min, self.remap.num_blocks(stage), blocks_of(shape, layouts[stage.device])))
                for stage in stages
            }
            try:
                with self.transitions.step(transition, "shrink"):
                    for device, num_blocks in kept.items():
                        self._fleet.limit(device, *num_blocks)
                    has_room = await self._empty_tails(groups, kept)
                if has_room:
                    with self.transitions.step(transition, "remap"):
                        for group in groups:
                            self._fleet.end_following(group)
                        for device, num_blocks in kept.items():
                            self._fleet.shrink(device, *num_blocks)
                        await self.remap.apply(self.remap.planned(layouts.values()))
                    self.remap.shape = shape
            finally:
                for stage in stages:
                    self._fleet.grow(stage.device, *self.remap.num_blocks(stage))
                for group in groups:
                    self._fleet.end_following(group)
            if has_room:
                self.transitions.commit(transition, [], [])
                transition.new_groups = transition.old_groups
            else:
                transition.outcome = "cancelled"
        return transition

    # --- both ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _exchanged(self, transition: Transition, new: Sequence[Group], moving: Sequence[Moving]) -> Iterator[None]:
        """Note what the block exchanges, and what it loses, however it ends."""
        devices = [stage.device for group in new for stage in group.stages]  # no other transition copies to them
        num_bytes = self.exchange.transfers.bytes_to(devices)
        try:
            yield
        finally:
            transition.exchange_bytes = self.exchange.transfers.bytes_to(devices) - num_bytes
            transition.num_lost = sum(m.is_lost for m in moving)

    def _new_group(self, stages: Sequence[StageView], lineage: Lineage | None) -> Group:
        return self._fleet.make_group(stages, self.shape.block_size, lineage)
