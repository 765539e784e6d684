"""What a cluster holds of a model, with and without a drop, and how many requests a second that carries. Estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kunserve.engine.launch.placement import choose_placement, model_shape
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.config import ModelConfig
from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.planner.drop import plan_drop
from kunserve.planner.snapshot import GroupView, Lineage, Snapshot
from kunserve.sim.cluster import Cluster, Instances
from kunserve.sim.machine import DTYPE, SimMachine, kv_token_bytes

ENDLESS = 1 << 40  # blocks: more than any server holds


@dataclass(frozen=True, slots=True)
class Capacity:
    """Copies of a model's weights on a cluster, and tokens of KV beside them."""

    gpus_per_copy: int
    num_copies: int
    weight_bytes: int  # of one copy
    kv_tokens: int  # beside all copies
    kv_token_bytes: int  # of one of them, in all layers
    max_model_len: int  # tokens of one request
    chains: tuple[tuple[int, int], ...]  # after the largest drop: of how many copies each is made, tokens it holds

    @classmethod
    def of(cls, model: ModelConfig, cluster: Cluster, block_size: int, kv_dtype: torch.dtype = DTYPE) -> Capacity:
        """Place a model as a launch does, and plan the largest drop. ConfigError if it does not fit."""
        instances = Instances.of(model, cluster)
        machine = SimMachine.of_gpus(model, cluster, block_size, kv_dtype=kv_dtype)
        shape = model_shape(model, KVShape.of(model, block_size, kv_dtype), machine.chunk_bytes, DTYPE)
        views = machine.views(shape)
        placed = choose_placement(
            shape, views, devices_per_group=1, max_model_len=model.max_position_embeddings, is_len_required=False
        )
        groups = tuple(GroupView(i, stages, 0, Lineage(stages)) for i, stages in enumerate(placed.groups))
        snapshot = Snapshot(0, shape, tuple(views), groups)
        merges = plan_drop(snapshot, ENDLESS, ENDLESS).merges
        merged = {group_id for merge in merges for group_id in merge.group_ids}
        unmerged = [group for group in groups if group.group_id not in merged]
        tokens = snapshot.capacity_blocks() * block_size
        return cls(
            instances.gpus,
            len(groups),
            shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes,
            tokens,
            kv_token_bytes(model, kv_dtype),
            placed.max_model_len,
            (
                *((len(merge.group_ids), merge.capacity_blocks * block_size) for merge in merges),
                *((1, tokens // len(groups)) for _ in unmerged),
            ),
        )

    @property
    def dropped_kv_tokens(self) -> int:
        """Return the tokens of KV after the largest drop."""
        return sum(tokens for _, tokens in self.chains)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean lengths of requests, in tokens."""

    prompt: float
    output: float


@dataclass(frozen=True, slots=True)
class RequestRates:
    """Requests a second that a cluster carries for long, all of mean length, until one thing or another runs out."""

    kv: float  # KV, without a drop
    dropped_kv: float  # KV, after the largest drop
    compute: float  # compute, had KV no end

    @classmethod
    def of(
        cls, capacity: Capacity, cost: CostModel, num_layers: int, lengths: Lengths, max_num_seqs: int = 1024
    ) -> RequestRates:
        """Estimate them from the times that the cost model predicts.

        A request in the middle of its answer holds its prompt and half of its output. As many as memory holds are
        decoded together; each step reads all weights once, whoever is in it. Prefills take their time from that.
        """
        middle = TokenSpan(round(lengths.prompt + lengths.output / 2), 1, 1)
        prefill_s = cost.added_time(num_layers, TokenSpan(0, max(1, round(lengths.prompt)), 1))

        def rate(chains: Sequence[tuple[int, int]]) -> float:
            total = 0.0
            for length, tokens in chains:
                held = min(tokens / (lengths.prompt + lengths.output / 2), max_num_seqs * length)
                rows = max(1.0, held / length)  # of one of `length` microbatches, each at another stage
                step_s = cost.work_time(num_layers, Work(*(rows * x for x in Work.of([middle]))), True, True)
                total += length / (lengths.output * step_s / rows + prefill_s)
            return total

        copy = capacity.kv_tokens // capacity.num_copies
        endless = lengths.output * cost.added_time(num_layers, middle) + prefill_s
        return cls(rate([(1, copy)] * capacity.num_copies), rate(capacity.chains), capacity.num_copies / endless)
