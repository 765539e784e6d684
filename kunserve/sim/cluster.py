"""What is simulated: clusters of GPUs with their datasheet rates and links, and what a stage takes on them.

The testbeds are the paper's (KunServe, table 2): A is one A800 per server with 200 Gbit/s RDMA; B is eight H800 per
server. An instance of a model that needs several GPUs is one device here, with their rates and memory added up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name, weight_units
from kunserve.planner.cost import CostModel

GIB = 1 << 30

# Shares of the datasheet's rates that large kernels reach: assumptions, the same for every policy.
MATRIX_EFFICIENCY, ATTENTION_EFFICIENCY, MEMORY_EFFICIENCY = 0.6, 0.5, 0.8
STAGE_S = 1e-3  # of a stage whatever it holds: launches, and what the host cannot hide
OVERLAP = 3.0  # of reading weights and multiplying
USABLE = 0.9  # of the memory, for weights and KV (vLLM 0.6's default); the rest is activations and the driver's


@dataclass(frozen=True, slots=True)
class GPU:
    """Datasheet rates of one GPU, per second: floating-point operations (dense, 16 bit) and bytes."""

    name: str
    flops: float
    memory_bytes_per_s: float
    memory_bytes: int
    nvlink_bytes_per_s: float  # in one direction
    pcie_bytes_per_s: float = 25e9  # from and to the host

    def times(self, num: int) -> GPU:
        """So many as one device: tensor parallelism without its overhead."""
        return replace(
            self,
            flops=self.flops * num,
            memory_bytes_per_s=self.memory_bytes_per_s * num,
            memory_bytes=self.memory_bytes * num,
            pcie_bytes_per_s=self.pcie_bytes_per_s * num,
        )


A800 = GPU("A800", 312e12, 2.039e12, 80 * GIB, 200e9)
H800 = GPU("H800", 989e12, 3.35e12, 80 * GIB, 300e9)
H100 = GPU("H100", 989e12, 3.35e12, 80 * GIB, 450e9)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Servers of one kind of GPU, and the network between them, per device."""

    name: str
    gpu: GPU
    num_gpus: int
    gpus_per_server: int
    rdma_bytes_per_s: float  # of one GPU's share, in one direction


_KINDS = {
    "A800": Cluster("", A800, 0, 1, 25e9),
    "H800": Cluster("", H800, 0, 8, 50e9),
    "H100": Cluster("", H100, 0, 8, 50e9),
}


def parse_cluster(text: str) -> Cluster:
    """`8xA800`: so many GPUs, in servers as the paper has them; ConfigError otherwise."""
    match = re.fullmatch(r"(\d{1,5})x(\w+)", text.strip())
    if not match or match[2] not in _KINDS or int(match[1]) < 1:
        raise ConfigError(f"--cluster {text}: write for instance 8xA800; known GPUs are {', '.join(_KINDS)}")
    return replace(_KINDS[match[2]], name=text.strip(), num_gpus=int(match[1]))


def gpus_per_instance(model: ModelConfig, gpu: GPU) -> int:
    """The least power of two of GPUs that hold the weights with a quarter more for KV."""
    weights = sum(unit.num_bytes for unit in weight_units(model, 2))
    num = 1
    while weights * 1.25 > gpu.memory_bytes * USABLE * num:
        num *= 2
    return num


def datasheet_cost(model: ModelConfig, gpu: GPU, item_bytes: int = 2) -> CostModel:
    """Constants of `model` on `gpu`, derived from its datasheet: not measured."""
    units = {unit.name: unit.num_bytes for unit in weight_units(model, item_bytes)}
    layer_bytes = units[layer_name(0)]
    head_bytes = units.get("head", units["embed"])
    flop_s = 1 / (gpu.flops * MATRIX_EFFICIENCY)
    byte_s = 1 / (gpu.memory_bytes_per_s * MEMORY_EFFICIENCY)
    return CostModel(
        pair_s=4 * model.q_size / (gpu.flops * ATTENTION_EFFICIENCY),
        key_s=2 * model.kv_size * item_bytes * byte_s,
        token_s=2 * layer_bytes / item_bytes * flop_s,
        chunk_s=0.0,
        load_s=layer_bytes * byte_s,
        embed_token_s=model.hidden_size * item_bytes * byte_s,
        head_row_s=2 * head_bytes / item_bytes * flop_s,
        head_load_s=head_bytes * byte_s,
        sample_s=2 * model.vocab_size * 4 * byte_s,
        stage_s=STAGE_S,
        overlap=OVERLAP,
    )
