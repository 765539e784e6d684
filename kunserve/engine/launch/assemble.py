"""Assembly: an engine, what regroups it, and what it runs on, joined together. Live and simulated ones alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from kunserve.config import EngineConfig
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.hooks import KvMover
from kunserve.engine.kinds.mixed_group import NearLayers, new_group
from kunserve.engine.launch.machine import Machine
from kunserve.engine.launch.placement import (
    choose_placement,
    model_shape,
    near_kv,
    num_copies,
    with_share_to_begin,
)
from kunserve.engine.regroup.boundary import Boundary
from kunserve.engine.regroup.control import OverloadControl
from kunserve.engine.regroup.exchange import Exchange
from kunserve.engine.regroup.membership import Membership
from kunserve.engine.regroup.migrate import Migration
from kunserve.engine.regroup.reconfigure import Reconfigure
from kunserve.engine.regroup.remap import Remap
from kunserve.engine.regroup.swap import SwapMover
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.regroup.transition import Transitions
from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.engine.regroup.worth import Worth
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.signals import Signals
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.gpu.queue import gather_all
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.observe.metrics import Metrics
from kunserve.planner.copies import why_no_drop
from kunserve.planner.cost import TokenSpan
from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.microbatch import Lookahead
from kunserve.planner.overload import Thresholds
from kunserve.planner.snapshot import DeviceView, Lineage, ModelShape, StageView
from kunserve.policies import OverloadPolicy
from kunserve.progress import Progress

log = structlog.get_logger()


async def assemble(
    machine: Machine,
    model: ModelConfig,
    config: EngineConfig,
    served_name: str,
    max_model_len: int,
    weights: Callable[[], WeightSource],
    tokenizer: Tokenizer | None,
    progress: Progress = lambda text, share: None,
    lookahead: Lookahead | None = None,
    metrics: type[Metrics] = Metrics,
) -> tuple[Engine, OverloadControl]:
    """Join an engine, its control and its mover on a machine: the live one and the simulated one are made here.

    `weights` is called once it is sure that they fit. `lookahead` makes the microbatches of chains; None: by tokens.
    ConfigError if that cannot be; the caller closes the machine.
    """
    kv_shape = KVShape.of(model, config.block_size, machine.kv_dtype)
    shape = _shape(machine, model, config, kv_shape)
    views, per_group = machine.views(shape), config.pipeline_parallel_size
    is_len_required = config.max_model_len is not None
    placement = choose_placement(
        shape, views, devices_per_group=per_group, max_model_len=max_model_len, is_len_required=is_len_required
    )
    placing, shape = shape, with_share_to_begin(shape, views, placement)
    memories, loader = await _open(machine, model, kv_shape, weights, [view.island for view in views])
    await _load(model, memories, placement.groups, shape, loader, progress)
    executor, note = await asyncio.to_thread(machine.executor, memories, placement.max_model_len)
    log.info("computing with", operations=note)
    links, fleet = machine.links(), _fleet(placement.groups, memories, model, config, shape)
    engine = Engine(
        model,
        _limits(config, placement.max_model_len),
        fleet,
        _scheduler(machine.scheduler, fleet, config, kv_shape.block_bytes * model.num_layers, links, lookahead),
        memories,
        executor,
        Signals(),
        tokenizer,
        metrics(served_name, placement.max_model_len, lambda: engine.stats()),
        config.seed,
    )
    engine.mover = _mover(engine, links, config.overload_policy)
    engine.control = control = make_control(
        engine,
        shape,
        views,
        loader,
        links,
        Thresholds(config.drop_watermark, config.restore_watermark, config.restore_hold_s),
        partial(_reopen, machine, model, kv_shape, memories),
        is_automatic=config.overload_policy is OverloadPolicy.DROP and not config.is_pinned,
        clock=machine.clock,
    )
    machine.tell_phases(lambda: control.reconfigure.transitions.phases)
    engine.view.overload_policy = config.overload_policy
    copies = partial(num_copies, max_model_len=max_model_len, is_len_required=is_len_required)
    by_hand = _only_by_hand(config) if len(placement.groups) > 1 else None
    engine.view.no_drop = by_hand or why_no_drop(placing, views, placement.groups, per_group, copies)
    return engine, control


def _limits(config: EngineConfig, max_model_len: int) -> ServingLimits:
    device_timeout_s = config.device_timeout_s or None
    return ServingLimits(max_model_len, config.max_num_queued_reqs, device_timeout_s=device_timeout_s)


def _scheduler(
    kind: type[Scheduler],
    fleet: Fleet,
    config: EngineConfig,
    block_bytes: int,
    links: Links,
    lookahead: Lookahead | None,
) -> Scheduler:
    """Return the scheduler; `block_bytes`: of all layers."""
    limits = SchedulerLimits(config.num_batched_tokens, config.max_num_seqs, int(config.async_scheduling))

    def is_host_faster(num_tokens: int, num_kept: int) -> bool:
        if lookahead is None:  # as if what is copied took as long as what is computed
            return 2 * num_kept <= num_tokens
        copied_s = 2 * num_tokens * block_bytes / config.block_size / links.host_kv_bytes_per_s  # there and back
        return copied_s < lookahead.added_time(TokenSpan(num_kept, num_tokens - num_kept))

    policy = make_policy(config.overload_policy, config.watermark, is_host_faster)
    return kind(fleet, limits, policy, _num_host_blocks(config, block_bytes), lookahead)


def make_control(
    engine: Engine,
    shape: ModelShape,
    views: Sequence[DeviceView],
    loader: WeightLoader,
    links: Links,
    thresholds: Thresholds,
    reopen: Callable[[int], None],
    *,
    is_automatic: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> OverloadControl:
    """Return what regroups an engine, whose mover is set. `reopen` as in `Membership`, `clock` as in `Transitions`."""
    fleet, scheduler, signals, metrics = engine.fleet, engine.scheduler, engine.signals, engine.metrics
    health, transitions = engine.device_health, Transitions(fleet, loader, signals, metrics, clock)
    longest = shape.blocks_for(engine.limits.max_model_len)
    boundary = Boundary(fleet, signals, engine.mover)
    remap = Remap(fleet, engine.model, shape, engine.memories, loader, links, health.lose)
    exchange = Exchange(fleet, scheduler, remap, Transfers(engine.memories, links), signals, metrics)
    reconfigure = Reconfigure(fleet, scheduler, boundary, remap, exchange, loader, transitions, signals)
    membership = Membership(
        fleet,
        scheduler,
        reconfigure,
        boundary,
        remap,
        health,
        signals,
        lambda: control.snapshot(),
        lambda: control.need_blocks(),
        longest,
        reopen,
        engine.limit_tokens,
        engine.halt,
    )
    worth = Worth(fleet, scheduler, links, shape, thresholds)
    control = OverloadControl(
        fleet,
        scheduler,
        reconfigure,
        membership,
        signals,
        metrics,
        worth,
        views,
        thresholds,
        longest,
        is_automatic=is_automatic,
    )
    health.on_lost = control.lost
    return control


def _reopen(machine: Machine, model: ModelConfig, kv_shape: KVShape, memories: list[DeviceMemory], device: int) -> None:
    """Put a new device in the place of one that is gone. ConflictError if that needs another process."""
    units = weight_units(model, machine.dtype)
    memories[device] = machine.reopen(device, lambda opened: DeviceMemory(opened, units, model.num_layers, kv_shape))


def _mover(engine: Engine, links: Links, policy: OverloadPolicy) -> KvMover | None:
    """Return who moves requests' KV because the policy wants it; None for policies that do not."""
    match policy:
        case OverloadPolicy.DROP | OverloadPolicy.SWAP:
            return SwapMover(engine.scheduler, engine.memories, links, engine.signals)
        case OverloadPolicy.MIGRATE:
            return Migration(engine.fleet, engine.scheduler, engine.memories, links, engine.signals)
        case _:
            return None


def _only_by_hand(config: EngineConfig) -> str | None:
    """Say by which flag no weights are dropped unless an operator asks; None if they are."""
    if config.overload_policy is not OverloadPolicy.DROP:
        return f"--overload-policy {config.overload_policy}: weights are dropped only when an operator asks."
    return "--pin: weights are dropped only when an operator asks." if config.is_pinned else None


def _num_host_blocks(config: EngineConfig, block_bytes: int) -> int:
    """Return how many blocks, of all layers, `--swap-space` holds."""
    if config.overload_policy not in (OverloadPolicy.DROP, OverloadPolicy.SWAP):
        return 0
    return config.swap_space_bytes // block_bytes


async def _open(
    machine: Machine,
    model: ModelConfig,
    kv_shape: KVShape,
    weights: Callable[[], WeightSource],
    islands: Sequence[int],
) -> tuple[list[DeviceMemory], WeightLoader]:
    """Open the devices: their memory, with nothing in it yet, and what fills it with weights."""
    source = await asyncio.to_thread(weights)
    devices = await asyncio.to_thread(machine.open)
    host = await asyncio.to_thread(machine.host_weights, source)
    units = weight_units(model, machine.dtype)
    memories = [DeviceMemory(device, units, model.num_layers, kv_shape) for device in devices]
    return memories, WeightLoader(memories, host, islands)


async def _load(
    model: ModelConfig,
    memories: Sequence[DeviceMemory],
    groups: Sequence[Sequence[StageView]],
    shape: ModelShape,
    loader: WeightLoader,
    progress: Progress,
) -> None:
    """Map every stage's weights and KV, then fill the weights, all devices at once.

    What is mapped does not change while devices copy from each other.
    """
    stages = [stage for group in groups for stage in group]
    for stage in stages:
        memory = memories[stage.device]
        for unit in units_of_stage(model, stage.first_layer, stage.last_layer):
            memory.weights.map(unit)
        for layer, num_chunks in enumerate(stage_layout(shape, memory.device.num_chunks, stage).kv_chunks):
            memory.kv.resize(layer, num_chunks)
    total = sum(shape.weight_chunks(s.first_layer, s.last_layer) for s in stages)
    links, done = Links(), 0  # nobody else is on the way yet

    async def load(device: int) -> None:
        nonlocal done
        weights = memories[device].weights
        for unit in weights.unfilled:
            await loader.load(device, unit, links)
            done += weights.num_chunks(unit)
            progress("loading weights", done / total)

    await gather_all(load(stage.device) for stage in stages)


def _shape(machine: Machine, model: ModelConfig, config: EngineConfig, kv_shape: KVShape) -> ModelShape:
    """Return the sizes that the planner works with."""
    near = near_kv(model, config, kv_shape, machine.chunk_bytes)
    return model_shape(model, kv_shape, machine.chunk_bytes, machine.dtype, shares_head=machine.shares_head, near=near)


def _fleet(
    placed: Sequence[Sequence[StageView]],
    memories: Sequence[DeviceMemory],
    model: ModelConfig,
    config: EngineConfig,
    shape: ModelShape,
) -> Fleet:
    """Return the fleet of groups that were placed."""
    near = None
    if shape.near is not None and model.window is not None:
        near = NearLayers(frozenset(shape.near.layers), model.window)
    groups = _groups(placed, memories, shape, near)
    return Fleet(groups, has_prefix_cache=config.enable_prefix_caching, window=model.common_window, near=near)


def _groups(
    placed: Sequence[Sequence[StageView]],
    memories: Sequence[DeviceMemory],
    shape: ModelShape,
    near: NearLayers | None,
) -> list[Group]:
    groups = []
    for group_id, stages in enumerate(placed):
        chain = []
        for stage in stages:
            layout = stage_layout(shape, memories[stage.device].device.num_chunks, stage)
            chain.append(Stage(*stage, *map(BlockPool, blocks_of(shape, layout))))
        groups.append(new_group(group_id, chain, shape.block_size, Lineage(tuple(stages)), near))
    return groups
