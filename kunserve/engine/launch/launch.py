"""From a configuration to an engine that serves: find model and machine, have them joined, say what there is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

import structlog

from kunserve.compute.cpu_ops import has_block_kernels
from kunserve.config import EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.launch.assemble import assemble
from kunserve.engine.launch.context_length import reason_for_max_model_len, wanted_max_model_len
from kunserve.engine.launch.host_machine import HostMachine
from kunserve.engine.launch.machine import Machine
from kunserve.engine.launch.restore_time import measure_restore
from kunserve.engine.regroup.control import OverloadControl
from kunserve.engine.step.own_steps import OwnSteps
from kunserve.engine.text.tokenizer import Tokenizer, tokenizer_of
from kunserve.gpu.kv_memory import E4M3
from kunserve.host.memory import MemoryAhead
from kunserve.model.card import ModelFiles, resolve_model
from kunserve.model.checkpoint import WeightSource, kv_scales, open_weights
from kunserve.model.config import ModelConfig
from kunserve.model.config_fields import shorten
from kunserve.model.costs import cost_model, device_kind
from kunserve.model.disk_source import DiskSource
from kunserve.model.gguf.source import GgufSource
from kunserve.model.host_copy import HostCopy
from kunserve.observe.metrics import Metrics
from kunserve.planner.copies import most_added_blocks
from kunserve.planner.microbatch import Lookahead
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


async def launch(
    config: EngineConfig, served_name: str, progress: Progress, ahead: MemoryAhead | None = None
) -> Served:
    """Build an engine, on memory that was taken `ahead`. ConfigError, with nothing left open, if it cannot be."""
    started = time.perf_counter()
    config = replace(config, devices=config.devices.resolved())
    files = await asyncio.to_thread(
        resolve_model,
        config.model,
        load_format=config.load_format,
        progress=progress,
        quantization=config.quantization,
    )
    files = replace(files, config=await asyncio.to_thread(_as_stored, files.config, config))
    machine = await asyncio.to_thread(_make_machine, files.config, config, ahead)
    try:
        if machine.kv_dtype == E4M3:
            await asyncio.to_thread(_log_kv_of_8_bits, files, config)
        served = await _launch_on(machine, files, config, served_name, progress)
        await _log_host_copy(served)
    except BaseException:
        await asyncio.to_thread(machine.close)
        raise
    groups, max_model_len = served.engine.groups, served.engine.limits.max_model_len
    num_blocks, num_more = sum(group.num_blocks for group in groups), most_added_blocks(served.control.snapshot())
    log.info(
        "loaded",
        model=files.name,
        seconds=round(time.perf_counter() - started, 1),
        groups=[[f"{s.device}: {s.first_layer}-{s.last_layer}" for s in group.stages] for group in groups],
        kv_tokens=num_blocks * config.block_size,
        dropped_kv_tokens=(num_blocks + num_more) * config.block_size,
        max_model_len=max_model_len,
    )
    if reason := reason_for_max_model_len(files, config, max_model_len):
        is_by_default = max_model_len == wanted_max_model_len(files, config) < files.config.max_position_embeddings
        say = log.info if is_by_default else log.warning
        say("requests are shorter than the model allows", max_model_len=max_model_len, because=reason)
    if served.engine.view.no_drop and config.overload_policy is OverloadPolicy.DROP and not config.is_pinned:
        log.warning("no weights can make room for KV", because=served.engine.view.no_drop)
    return served


def _make_machine(model: ModelConfig, config: EngineConfig, ahead: MemoryAhead | None) -> Machine:
    """Return the machine of `--devices`. ConfigError, in one line, if it has none of these devices."""
    if config.devices.kind == "cpu":
        return HostMachine(model, config, ahead)
    from kunserve.engine.launch.cuda_machine import CudaMachine, CudaOptions  # needs more than a CPU build has

    return CudaMachine(model, CudaOptions.of(model, config))


def _as_stored(model: ModelConfig, config: EngineConfig) -> ModelConfig:
    """Return the model as devices store it: in blocks for C kernels, in planes for GPUs, or dequantized."""
    formats, scheme = model.formats, model.formats.scheme
    is_made = scheme is not None and scheme.is_made
    if is_made:
        log.info(
            "quantized while loading",
            to=config.quantization,
            matrices=len(formats.quantized),
            left_alone="embeddings, head, routers, gates, norms, biases, matrices whose columns are no multiple of 32",
        )
    if not formats.by_name or (config.load_format == "dummy" and not is_made):
        kept = formats.as_numbers()
    elif config.devices.kind != "cpu":
        kept = formats.as_planes()
    else:
        kept = formats if has_block_kernels(config.dtype, model.head_dim) else formats.as_numbers()
    if lost := len(formats.by_name) - len(kept.by_name):
        log.warning("matrices are dequantized while they load", matrices=lost, kept=len(kept.by_name))
    return model if kept is formats else replace(model, formats=kept)


def _log_kv_of_8_bits(files: ModelFiles, config: EngineConfig) -> None:
    """Say what KV of 8 bits costs, and which of the checkpoint's scales are not used."""
    log.info(
        "KV has 8 bits",
        dtype="float8_e4m3fn",
        scale=1.0,
        costs="3 bits of mantissa; what is beyond 448 is kept as 448: answers differ from those of KV in 16 bits",
    )
    if files.folder is None or files.gguf is not None or config.load_format == "dummy":
        return
    if names := kv_scales(files.folder):
        log.warning("the checkpoint's scales of KV are not used", tensors=shorten(names), count=len(names))


async def _launch_on(
    machine: Machine, files: ModelFiles, config: EngineConfig, served_name: str, progress: Progress
) -> Served:
    def weights() -> WeightSource:
        keeps_pages = config.host_copy is not HostCopy.NONE
        if files.gguf is not None and config.load_format != "dummy":
            return GgufSource(files.gguf, files.config, keeps_pages=keeps_pages)
        is_quantized = files.config.formats.scheme is not None
        if not keeps_pages and not is_quantized and files.folder is not None and config.load_format != "dummy":
            return DiskSource(files.folder, files.config)
        return open_weights(files.folder, files.config, config.load_format, config.seed)

    max_model_len = wanted_max_model_len(files, config)
    model = files.config
    tokenizer = await asyncio.to_thread(tokenizer_of, files.folder, model.vocab_size, model.eos_token_ids)
    lookahead = _lookahead(machine, files, config)
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
    if lookahead is not None:
        engine.own_steps = OwnSteps(lookahead, shares_head=engine.executor.shares_head)
    log.info("forming microbatches", of_chains=config.microbatching, constants=lookahead and lookahead.source)
    return Served(engine, control, files, tokenizer, engine.metrics, machine)


def _lookahead(machine: Machine, files: ModelFiles, config: EngineConfig) -> Lookahead | None:
    """Return what makes the microbatches of chains; None: tokens are counted."""
    if config.microbatching != "lookahead":
        return None
    cost, source = cost_model(files.name, files.config, device_kind(machine.device_name))
    cost = cost.with_kv(machine.kv_dtype.itemsize / machine.dtype.itemsize)
    return Lookahead(cost, files.config.num_layers, config.num_batched_tokens, source)


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
        restore_from=[str(source) for source in loader.num_bytes - before],
    )
