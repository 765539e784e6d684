"""From a configuration to an engine that serves: open devices, place the model, load it, join everything together."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch

from kunserve.config import EngineConfig
from kunserve.engine.block_pool import BlockPool
from kunserve.engine.control import OverloadControl
from kunserve.engine.engine import Engine, ServingLimits
from kunserve.engine.executor import DeviceExecutor
from kunserve.engine.group import Group, Stage
from kunserve.engine.placement import budget_chunks, model_shape, place
from kunserve.engine.policy import OverloadPolicy, make_policy
from kunserve.engine.reconfigure import Reconfigure
from kunserve.engine.scheduler import Limits, Scheduler
from kunserve.engine.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice, available_bytes
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.metrics import Metrics
from kunserve.model.card import ModelFiles, resolve_model
from kunserve.model.checkpoint import WeightSource, open_weights
from kunserve.model.config import ModelConfig
from kunserve.model.cpu_ops import cpu_ops_or_reference
from kunserve.model.decoder import Decoder
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.planner.overload import Thresholds
from kunserve.planner.snapshot import DeviceView, ModelShape, Origin, StageView

log = structlog.get_logger()

Progress = Callable[[str, float], None]  # what is being done, share of it done

DEFAULT_KV_BYTES = 1 << 30  # of one device, where neither --device-memory nor a number of blocks is given
DEFAULT_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class Served:
    """An engine and what is known of its model."""

    engine: Engine
    control: OverloadControl
    files: ModelFiles
    tokenizer: Tokenizer
    metrics: Metrics


async def launch(config: EngineConfig, served_name: str, progress: Progress) -> Served:
    """Build an engine. ConfigError, with nothing left open, if it cannot be."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # a device computes on its own thread
    files = await asyncio.to_thread(
        resolve_model, config.model, load_format=config.load_format, progress=lambda text: progress(text, 0.0)
    )
    model, dtype = files.config, _dtype(config.dtype)
    kv_shape = KVShape.of(model, config.block_size, dtype)
    shape = model_shape(model, kv_shape, config.chunk_bytes)
    views = [DeviceView(i, _budget(config, shape)) for i in config.devices.indices]
    default_len = (files.card and files.card.defaults.max_model_len) or DEFAULT_MAX_MODEL_LEN
    max_model_len = config.max_model_len or min(default_len, model.max_position_embeddings)
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {model.max_position_embeddings} positions"
        )
    placement = place(
        shape,
        views,
        max_model_len=max_model_len,
        is_len_required=config.max_model_len is not None,
        devices_per_group=config.pipeline_parallel_size,
    )
    source = await asyncio.to_thread(open_weights, files.folder, model, config.load_format, config.seed)
    ops, ops_note = await asyncio.to_thread(cpu_ops_or_reference, dtype, model.head_dim)
    devices = await _open_devices(views, config.chunk_bytes)
    try:
        units = weight_units(model, dtype.itemsize)
        memories = [DeviceMemory(device, units, model.num_layers, kv_shape, dtype) for device in devices]
        await _load(model, memories, placement.groups, shape, source, progress)
        tokenizer = await asyncio.to_thread(_tokenizer, files)
    except BaseException:
        for device in devices:
            device.close()
        raise
    groups = _groups(placement.groups, memories, config.block_size)
    engine = Engine(
        model,
        ServingLimits(placement.max_model_len, config.max_num_queued_reqs),
        Scheduler(
            Limits(config.max_num_batched_tokens, config.max_num_seqs),
            make_policy(config.overload_policy, config.watermark),
        ),
        groups,
        memories,
        DeviceExecutor(devices, [Decoder(model, ops, m.weights, m.kv, placement.max_model_len) for m in memories]),
        tokenizer,
        Metrics(served_name, placement.max_model_len, lambda: engine.stats()),
        config.seed,
    )
    links = Links()
    thresholds = Thresholds(config.drop_watermark, config.restore_watermark, config.restore_hold_s)
    is_automatic = config.overload_policy is OverloadPolicy.DROP and not config.is_pinned
    control = OverloadControl(
        engine, Reconfigure(engine, shape, source, links), shape, views, thresholds, is_automatic=is_automatic
    )
    engine.control = control
    log.info(
        "loaded",
        model=files.name,
        seconds=round(time.perf_counter() - started, 1),
        groups=[[f"{s.device}: {s.first_layer}-{s.last_layer}" for s in g] for g in placement.groups],
        kv_tokens=sum(g.num_blocks for g in groups) * config.block_size,
        max_model_len=placement.max_model_len,
        operations=ops_note,
    )
    return Served(engine, control, files, tokenizer, engine.metrics)


def _dtype(name: str) -> torch.dtype:
    """The dtype of weights and KV. "auto" is float32 on CPU devices: they have no fast bfloat16."""
    known = {"auto": torch.float32, "float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise ConfigError(f"--dtype {name} is not served on CPU devices; use one of {', '.join(known)}")
    return known[name]


def _tokenizer(files: ModelFiles) -> Tokenizer:
    if files.folder is None:
        return Tokenizer.dummy(files.config.vocab_size, files.config.eos_token_ids)
    return Tokenizer(files.folder)


def _budget(config: EngineConfig, shape: ModelShape) -> int:
    share = available_bytes() * 4 // 5 // len(config.devices.indices)
    weights = shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes
    default = max(0, min(DEFAULT_KV_BYTES, share - weights))
    return budget_chunks(shape, config.device_memory_bytes, config.num_blocks_override, default)


async def _open_devices(views: Sequence[DeviceView], chunk_bytes: int) -> list[HostDevice]:
    """Open all devices at once; each pinned to a core of its own while there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    opened = await asyncio.gather(
        *(
            asyncio.to_thread(
                HostDevice, v.device, v.budget_chunks, chunk_bytes, core=cores[i] if len(views) <= len(cores) else None
            )
            for i, v in enumerate(views)
        ),
        return_exceptions=True,
    )
    failed = [result for result in opened if isinstance(result, BaseException)]
    devices = [result for result in opened if isinstance(result, HostDevice)]
    if failed:
        for device in devices:
            device.close()
        raise failed[0]
    return devices


async def _load(
    model: ModelConfig,
    memories: Sequence[DeviceMemory],
    groups: Sequence[Sequence[StageView]],
    shape: ModelShape,
    source: WeightSource,
    progress: Progress,
) -> None:
    """Map every stage's weights and KV, and fill the weights: all devices at once from the one host copy."""
    stages = [stage for group in groups for stage in group]
    total = sum(shape.weight_chunks(s.first_layer, s.last_layer) for s in stages)
    done = 0

    async def load_stage(memory: DeviceMemory, stage: StageView) -> None:
        nonlocal done
        for unit in units_of_stage(model, stage.first_layer, stage.last_layer):
            memory.weights.map(unit)
            await memory.device.run(lambda unit=unit: memory.weights.fill(unit, source))  # type: ignore[misc]
            done += memory.weights.num_chunks(unit)
            progress("loading weights", done / total)
        per_layer = shape.kv_chunks(memory.device.num_chunks, stage.first_layer, stage.last_layer)
        for layer in range(stage.first_layer, stage.last_layer):
            memory.kv.resize(layer, per_layer)

    await asyncio.gather(*(load_stage(memories[stage.device], stage) for stage in stages))


def _groups(placed: Sequence[Sequence[StageView]], memories: Sequence[DeviceMemory], block_size: int) -> list[Group]:
    groups = []
    for group_id, stages in enumerate(placed):
        pools = [BlockPool(memories[s.device].kv.num_blocks(s.first_layer)) for s in stages]
        chain = (Stage(s.device, s.first_layer, s.last_layer, p) for s, p in zip(stages, pools, strict=True))
        groups.append(Group(group_id, tuple(chain), block_size, origin=Origin(tuple(stages))))
    return groups
