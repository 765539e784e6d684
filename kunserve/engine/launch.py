"""From a configuration to an engine that serves: open devices, place the model, load it, join everything together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import structlog

from kunserve.config import EngineConfig
from kunserve.engine.block_pool import BlockPool
from kunserve.engine.context_length import reason_for_max_model_len, wanted_max_model_len
from kunserve.engine.control import OverloadControl
from kunserve.engine.engine import Engine, ServingLimits
from kunserve.engine.group import Group, Stage
from kunserve.engine.hooks import Mover
from kunserve.engine.host_machine import HostMachine
from kunserve.engine.machine import Machine
from kunserve.engine.migrate import Migration
from kunserve.engine.placement import model_shape, num_copies, place
from kunserve.engine.policy import make_policy
from kunserve.engine.reconfigure import Reconfigure
from kunserve.engine.restore_time import measure_restore
from kunserve.engine.scheduler import Limits, Scheduler
from kunserve.engine.swap import Swap
from kunserve.engine.tokenizer import Tokenizer
from kunserve.engine.weight_loader import WeightLoader
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.gpu.queue import gather_all
from kunserve.metrics import Metrics
from kunserve.model.card import ModelFiles, resolve_model
from kunserve.model.checkpoint import WeightSource, open_weights
from kunserve.model.config import ModelConfig
from kunserve.model.costs import cost_model, device_kind
from kunserve.model.disk_source import DiskSource
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.planner.copies import why_no_drop
from kunserve.planner.microbatch import Lookahead
from kunserve.planner.overload import Thresholds
from kunserve.planner.snapshot import ModelShape, Origin, StageView
from kunserve.policies import OverloadPolicy
from kunserve.progress import Progress

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Served:
    """An engine and what is known of its model."""

    engine: Engine
    control: OverloadControl
    files: ModelFiles
    tokenizer: Tokenizer
    metrics: Metrics
    machine: Machine

    async def close(self) -> None:
        """Release all devices; the engine has stopped."""
        await asyncio.to_thread(self.machine.close)


async def launch(config: EngineConfig, served_name: str, progress: Progress) -> Served:
    """Build an engine. ConfigError, with nothing left open, if it cannot be."""
    started = time.perf_counter()
    config = replace(config, devices=config.devices.resolved())
    files = await asyncio.to_thread(resolve_model, config.model, load_format=config.load_format, progress=progress)
    machine = await asyncio.to_thread(_make_machine, files.config, config)
    try:
        served = await _launch_on(machine, files, config, served_name, progress)
        await _log_host_copy(served)
    except BaseException:
        await asyncio.to_thread(machine.close)
        raise
    groups, max_model_len = served.engine.groups, served.engine.limits.max_model_len
    log.info(
        "loaded",
        model=files.name,
        seconds=round(time.perf_counter() - started, 1),
        groups=[[f"{s.device}: {s.first_layer}-{s.last_layer}" for s in group.stages] for group in groups],
        kv_tokens=sum(group.num_blocks for group in groups) * config.block_size,
        max_model_len=max_model_len,
    )
    if reason := reason_for_max_model_len(files, config, max_model_len):
        is_by_default = max_model_len == wanted_max_model_len(files, config) < files.config.max_position_embeddings
        say = log.info if is_by_default else log.warning
        say("requests are shorter than the model allows", max_model_len=max_model_len, because=reason)
    if served.engine.no_drop and config.overload_policy is OverloadPolicy.DROP and not config.is_pinned:
        log.warning("no weights can make room for KV", because=served.engine.no_drop)
    return served


def _make_machine(model: ModelConfig, config: EngineConfig) -> Machine:
    """The machine of `--devices`. ConfigError, in one line, if it has none of these devices."""
    if config.devices.kind == "cpu":
        return HostMachine(model, config)
    from kunserve.engine.cuda_machine import CudaMachine, CudaOptions  # needs more than a CPU build has

    return CudaMachine(model, CudaOptions.of(model, config))


async def _launch_on(
    machine: Machine, files: ModelFiles, config: EngineConfig, served_name: str, progress: Progress
) -> Served:
    def weights() -> WeightSource:
        if config.host_copy is HostCopy.NONE and files.folder is not None and config.load_format != "dummy":
            return DiskSource(files.folder, files.config)
        return open_weights(files.folder, files.config, config.load_format, config.seed)

    max_model_len = wanted_max_model_len(files, config)
    tokenizer = await asyncio.to_thread(_tokenizer, files)
    lookahead, constants = _lookahead(machine, files, config)
    engine, control = await assemble(
        machine,
        files.config,
        config,
        served_name,
        max_model_len,
        weights,
        tokenizer,
        progress,
        lookahead,
    )
    log.info("forming microbatches", of_chains=config.microbatching, constants=constants)
    return Served(engine, control, files, tokenizer, engine.metrics, machine)


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
) -> tuple[Engine, OverloadControl]:
    """Join an engine, its control and its mover on a machine: the live one and the simulated one are made here.

    `weights` is called once it is sure that they fit. `lookahead` forms the microbatches of chains; None: by tokens.
    ConfigError if that cannot be; the caller closes the machine.
    """
    kv_shape = KVShape.of(model, config.block_size, machine.dtype)
    shape = model_shape(model, kv_shape, machine.chunk_bytes, shares_head=machine.shares_head)
    views = machine.views(shape)
    is_len_required, per_group = config.max_model_len is not None, config.pipeline_parallel_size
    placement = place(
        shape,
        views,
        max_model_len=max_model_len,
        is_len_required=is_len_required,
        devices_per_group=per_group,
    )
    memories, loader = await _open(machine, model, kv_shape, weights, [view.island for view in views])
    await _load(model, memories, placement.groups, shape, loader, progress)
    executor, note = await asyncio.to_thread(machine.executor, memories, placement.max_model_len)
    log.info("computing with", operations=note)
    engine = Engine(
        model,
        ServingLimits(placement.max_model_len, config.max_num_queued_reqs),
        Scheduler(
            Limits(config.max_num_batched_tokens, config.max_num_seqs, int(config.async_scheduling)),
            make_policy(config.overload_policy, config.watermark),
            _num_host_blocks(config, kv_shape, model),
            lookahead,
        ),
        _groups(placement.groups, memories, config.block_size),
        memories,
        executor,
        tokenizer,
        Metrics(served_name, placement.max_model_len, lambda: engine.stats()),
        config.seed,
    )
    links = machine.links()
    thresholds = Thresholds(config.drop_watermark, config.restore_watermark, config.restore_hold_s)
    is_automatic = config.overload_policy is OverloadPolicy.DROP and not config.is_pinned
    reconfigure = Reconfigure(engine, shape, loader, links, machine.clock)
    control = OverloadControl(engine, reconfigure, shape, views, thresholds, is_automatic=is_automatic)
    engine.control = control
    engine.overload_policy = config.overload_policy
    copies = partial(num_copies, max_model_len=max_model_len, is_len_required=is_len_required)
    by_hand = _only_by_hand(config) if len(placement.groups) > 1 else None
    engine.no_drop = by_hand or why_no_drop(shape, views, placement.groups, per_group, copies)
    engine.mover = _mover(engine, links, config.overload_policy)
    return engine, control


def _mover(engine: Engine, links: Links, policy: OverloadPolicy) -> Mover | None:
    """Return what moves KV of requests elsewhere when it does not fit, if the policy does that."""
    if policy is OverloadPolicy.SWAP:
        return Swap(engine, links)
    return Migration(engine, links) if policy is OverloadPolicy.MIGRATE else None


def _only_by_hand(config: EngineConfig) -> str | None:
    """Say by which flag no weights are dropped unless an operator asks; None if they are."""
    if config.overload_policy is not OverloadPolicy.DROP:
        return f"--overload-policy {config.overload_policy}: weights are dropped only when an operator asks."
    return "--pin: weights are dropped only when an operator asks." if config.is_pinned else None


def _lookahead(machine: Machine, files: ModelFiles, config: EngineConfig) -> tuple[Lookahead | None, str | None]:
    """What forms the microbatches of chains (None: tokens are counted), and where its constants come from."""
    if config.microbatching != "lookahead":
        return None, None
    cost, source = cost_model(files.name, files.config, device_kind(machine.device_name))
    return Lookahead(cost, files.config.num_layers, config.max_num_batched_tokens), source


def _tokenizer(files: ModelFiles) -> Tokenizer:
    if files.folder is None:
        return Tokenizer.dummy(files.config.vocab_size, files.config.eos_token_ids)
    return Tokenizer(files.folder)


def _num_host_blocks(config: EngineConfig, shape: KVShape, model: ModelConfig) -> int:
    """Blocks, of all layers, that `--swap-space` holds."""
    if config.overload_policy is not OverloadPolicy.SWAP:
        return 0
    return config.swap_space_bytes // (shape.block_bytes * model.num_layers)


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
    units = weight_units(model, machine.dtype.itemsize)
    memories = [DeviceMemory(device, units, model.num_layers, kv_shape, machine.dtype) for device in devices]
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
        per_layer = shape.kv_chunks(memory.device.num_chunks, stage.first_layer, stage.last_layer)
        for layer in range(stage.first_layer, stage.last_layer):
            memory.kv.resize(layer, per_layer)
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


async def _log_host_copy(served: Served) -> None:
    """Say what weights come back from after a drop, why, what that takes of the host, and how long it would take."""
    loader, dropped = served.control.reconfigure.loader, served.control.would_drop()
    before, memories = loader.num_bytes.copy(), served.engine.memories
    seconds = await measure_restore(memories, loader, dropped) if dropped else None
    log.info(
        "host copy of the weights",
        kind=str(loader.host.kind),
        because=loader.host.because,
        host_bytes=loader.host.num_bytes,
        mapped_bytes=loader.host.mapped_bytes,
        restore_s=None if seconds is None else float(f"{seconds:.2g}"),  # None: there is nothing to drop
        restore_bytes=sum(memories[device].weights.num_tensor_bytes(u) for device, us in dropped.items() for u in us),
        restore_from=[str(origin) for origin in loader.num_bytes - before],
    )


def _groups(placed: Sequence[Sequence[StageView]], memories: Sequence[DeviceMemory], block_size: int) -> list[Group]:
    groups = []
    for group_id, stages in enumerate(placed):
        pools = [BlockPool(memories[s.device].kv.num_blocks(s.first_layer)) for s in stages]
        chain = (Stage(s.device, s.first_layer, s.last_layer, p) for s, p in zip(stages, pools, strict=True))
        groups.append(Group(group_id, tuple(chain), block_size, origin=Origin(tuple(stages))))
    return groups
