"""Where a model goes at launch: budgets, and chains as short as the model fits. Pure arithmetic of chunks.

Errors name the figures, before anything is opened or loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kunserve.config import EngineConfig
from kunserve.errors import ConfigError
from kunserve.gpu.kv_memory import KVShape, max_layer_chunks
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name, weight_units
from kunserve.planner.demand import near_blocks
from kunserve.planner.kinds.mix import most_share
from kunserve.planner.layer_split import split_layers
from kunserve.planner.snapshot import DeviceView, ModelShape, NearKv, StageView, capacity_blocks
from kunserve.sizes import ceil_div, format_size


@dataclass(frozen=True, slots=True)
class Placement:
    """Chains of stages, one per group, and the longest request that fits in each of them."""

    groups: tuple[tuple[StageView, ...], ...]
    max_model_len: int  # tokens


def near_kv(config: ModelConfig, settings: EngineConfig, kv_shape: KVShape, chunk_bytes: int) -> NearKv | None:
    """Return what KV layers with a window get; None if no layers, or all, have one, or the settings give them full KV.

    They get what one request needs at least, with all tokens that a step can compute of it. A share that is to follow
    demand is the greatest here, or the least if a length is required: `with_share_to_begin` sets where it begins.
    """
    share, is_fixed = settings.windowed_kv_share, settings.windowed_kv_share is not None
    if not config.near_layers or config.window is None or share == 1:
        return None
    if share is None:
        share = 1.0 if settings.max_model_len is None else 0.0
    num_blocks = near_blocks(config.max_position_embeddings, config.window, kv_shape.block_size)
    num_blocks += ceil_div(settings.num_batched_tokens, kv_shape.block_size)
    least_chunks = ceil_div(num_blocks * kv_shape.block_bytes, chunk_bytes)
    return NearKv(config.near_layers, max(1, round(1000 * share)), least_chunks, is_fixed)


def with_share_to_begin(shape: ModelShape, devices: Sequence[DeviceView], placement: Placement) -> ModelShape:
    """Return the shape with which a placement begins.

    A share that is to follow is as great as the longest request allows: short requests lose nothing.
    """
    if shape.near is None or shape.near.is_fixed:
        return shape
    budgets, longest = {view.device: view.budget_chunks for view in devices}, shape.blocks_for(placement.max_model_len)
    return shape.with_share(most_share(shape, budgets, placement.groups, longest))


def model_shape(
    config: ModelConfig,
    kv_shape: KVShape,
    chunk_bytes: int,
    dtype: torch.dtype | None = None,
    *,
    shares_head: bool = False,
    near: NearKv | None = None,
) -> ModelShape:
    """Return the sizes that the planner works with. Times are relative: bytes of weights that a step reads.

    Where layers are stored differently, all count as the largest. `dtype`: of weights that are stored as numbers; None:
    that of KV.
    `shares_head`: the executor lets both ends of a chain compute the head, if both have it.
    """
    units = {unit.name: unit for unit in weight_units(config, dtype or kv_shape.dtype)}
    embed, layers = units["embed"], [units[layer_name(i)] for i in range(config.num_layers)]
    layer, head = max(layers, key=lambda unit: unit.num_bytes), units.get("head")
    chunks = {name: ceil_div(unit.num_bytes, chunk_bytes) for name, unit in units.items()}
    return ModelShape(
        num_layers=config.num_layers,
        layer_chunks=chunks[layer.name],
        embed_chunks=chunks["embed"],
        head_chunks=chunks["head"] if head else 0,
        tied=config.tie_embeddings,
        kv_block_bytes=kv_shape.block_bytes,
        chunk_bytes=chunk_bytes,
        block_size=kv_shape.block_size,
        head_time=sum(t.num_bytes for t in (head or embed).tensors if len(t.shape) == 2) / layer.num_bytes,
        shares_head=shares_head and config.tie_embeddings,
        max_layer_chunks=max_layer_chunks(config.num_layers, chunk_bytes),
        near=near,
    )


def budget_chunks(shape: ModelShape, memory_bytes: int | None, num_blocks: int | None, default_bytes: int) -> int:
    """Return the chunks of one device: `--device-memory`, or the weights plus `num_blocks` or `default_bytes`."""
    weights = shape.weight_chunks(0, shape.num_layers)
    if num_blocks is not None:
        return weights + shape.num_layers * shape.chunks_for(num_blocks)
    if memory_bytes is not None:
        return memory_bytes // shape.chunk_bytes
    return weights + default_bytes // shape.chunk_bytes


def choose_placement(
    shape: ModelShape,
    devices: Sequence[DeviceView],
    *,
    max_model_len: int,
    is_len_required: bool,
    devices_per_group: int | None,
) -> Placement:
    """Cut the devices into chains, each as short as the model and one request of `max_model_len` fit.

    Without `is_len_required` the length may shrink to what fits. Raises ConfigError with the figures.
    """
    need = ceil_div(max_model_len, shape.block_size)
    sizes = [devices_per_group] if devices_per_group else range(1, len(devices) + 1)
    for size in sizes:
        if size > len(devices) or size > shape.num_layers:
            raise ConfigError(
                f"chains of {size} devices cannot be made from {len(devices)} devices and {shape.num_layers} layers"
            )
        chains = _chains(devices, size)
        groups = [split_layers(shape, chain, need) for chain in chains]
        if any(stages is None for stages in groups):
            continue
        fitting = tuple(stages for stages in groups if stages is not None)
        budgets = {view.device: view.budget_chunks for view in devices}
        capacity = min(capacity_blocks(shape, budgets, stages) for stages in fitting) * shape.block_size
        if capacity >= max_model_len:
            return Placement(fitting, max_model_len)
        if capacity > 0 and not is_len_required and (devices_per_group or size == len(devices) or capacity >= 1024):
            return Placement(fitting, capacity)
    raise ConfigError(_too_small(shape, devices, max_model_len))


def num_copies(
    shape: ModelShape,
    devices: Sequence[DeviceView],
    devices_per_group: int | None,
    *,
    max_model_len: int,
    is_len_required: bool,
) -> int:
    """Return how many copies of the weights `choose_placement` would put on these devices; 0 if it could not."""
    try:
        placement = choose_placement(
            shape,
            devices,
            max_model_len=max_model_len,
            is_len_required=is_len_required,
            devices_per_group=devices_per_group,
        )
    except ConfigError:
        return 0
    return len(placement.groups)


def _chains(devices: Sequence[DeviceView], size: int) -> list[Sequence[DeviceView]]:
    """Join neighbours in chains of `size`; those left over make the first chains longer, so that no device idles."""
    num_chains = len(devices) // size
    extra = len(devices) - num_chains * size
    chains, start = [], 0
    for i in range(num_chains):
        end = start + size + extra // num_chains + (i < extra % num_chains)
        chains.append(devices[start:end])
        start = end
    return chains


def _too_small(shape: ModelShape, devices: Sequence[DeviceView], max_model_len: int) -> str:
    budget = min(view.budget_chunks for view in devices) * shape.chunk_bytes
    weights = shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes
    of_kind = shape.chunks_by_kind(shape.chunks_for(ceil_div(max_model_len, shape.block_size)))
    num_layers = shape.by_kind(range(shape.num_layers))
    kv = sum(layers * chunks for layers, chunks in zip(num_layers, of_kind, strict=True)) * shape.chunk_bytes
    return (
        f"too little memory: the weights take {format_size(weights)} and one request of "
        f"--max-model-len {max_model_len} {format_size(kv)} of KV; {len(devices)} device(s) have "
        f"{format_size(budget)} each. Raise --device-memory, lower --max-model-len or use more devices"
    )
