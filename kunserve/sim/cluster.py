"""What is simulated: clusters of GPUs, what each device of them can do, and the links between them.

The testbeds are the paper's (KunServe, table 2): A is one A800 per server with 200 Gbit/s RDMA; B is eight H800 per
server. An instance of a model that needs several GPUs is one device here, with their rates and memory added up:
tensor parallelism without its overhead. Times come from datasheets (models/costs/devices.toml): derived, not measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kunserve.errors import ConfigError
from kunserve.gpu.links import HOST
from kunserve.model.config import ModelConfig
from kunserve.model.costs import derive, device_rates
from kunserve.model.layout import weight_units
from kunserve.planner.cost import CostModel

GIB = 1 << 30
USABLE = 0.9  # of the memory, for weights and KV (vLLM 0.6's default); the rest is activations and the driver's


@dataclass(frozen=True, slots=True)
class Cluster:
    """Servers of one kind of GPU. Bandwidths of one GPU in one direction, in bytes per second."""

    name: str
    num_gpus: int
    kind: str  # as in models/costs/devices.toml
    gpus_per_server: int
    nvlink: float
    rdma: float
    pcie: float = 25e9
    memory_bytes: int = 80 * GIB
    memory_times: int = 1  # each GPU as if it had so many times its memory, in instances of as many GPUs as without


# Links as datasheets give them: NVLink in one direction; where there is none, PCIe between two GPUs (a 4090 goes
# through the host: twice), and a network card of 200 or 400 Gbit/s.
_KINDS = {
    "A100-40": Cluster("", 0, "a100-40", 8, 300e9, 25e9, memory_bytes=40 * GIB),
    "A100-80": Cluster("", 0, "a100-80", 8, 300e9, 25e9),
    "A800": Cluster("", 0, "a800", 1, 200e9, 25e9),
    "L40S": Cluster("", 0, "l40s", 8, 25e9, 25e9, memory_bytes=48 * GIB),
    "4090": Cluster("", 0, "rtx-4090", 8, 12e9, 12e9, memory_bytes=24 * GIB),
    "H100": Cluster("", 0, "h100", 8, 450e9, 50e9),
    "H800": Cluster("", 0, "h800", 8, 300e9, 50e9),
    "H200": Cluster("", 0, "h200", 8, 450e9, 50e9, pcie=50e9, memory_bytes=141 * GIB),
    "B200": Cluster("", 0, "b200", 8, 900e9, 50e9, pcie=50e9, memory_bytes=180 * GIB),
}


def parse_cluster(text: str) -> Cluster:
    """Read `8xA800`: so many GPUs, in servers as the paper has them; ConfigError otherwise."""
    match = re.fullmatch(r"(\d{1,5})x([\w-]+)", text.strip())
    if not match or match[2] not in _KINDS or int(match[1]) < 1:
        raise ConfigError(f"--cluster {text}: write for instance 8xA800; known GPUs are {', '.join(_KINDS)}")
    return replace(_KINDS[match[2]], name=text.strip(), num_gpus=int(match[1]))


@dataclass(frozen=True, slots=True)
class Instances:
    """The devices of a cluster for one model, each of `gpus` GPUs."""

    cluster: Cluster
    gpus: int

    @classmethod
    def of(cls, model: ModelConfig, cluster: Cluster) -> Instances:
        """Choose the least power of two of GPUs that hold the weights, and a quarter more for KV, as an instance.

        ConfigError if the cluster has not so many.
        """
        weights, gpus = sum(unit.num_bytes for unit in weight_units(model, "bfloat16")), 1
        while weights * 1.25 > cluster.memory_bytes * USABLE * gpus:
            gpus *= 2
        if gpus > cluster.num_gpus:
            raise ConfigError(f"--cluster {cluster.name}: one instance of the model needs {gpus} GPUs")
        return cls(cluster, gpus)

    @property
    def num_devices(self) -> int:
        """Return the number of devices, which is that of instances."""
        return self.cluster.num_gpus // self.gpus

    @property
    def memory_bytes(self) -> int:
        """Return the bytes that each device has for weights and KV."""
        return int(self.cluster.memory_bytes * USABLE) * self.gpus * self.cluster.memory_times

    def cost(self, model: ModelConfig) -> CostModel:
        """Return the predicted times of a model on one instance."""
        rates = device_rates()[self.cluster.kind]
        flops, num_bytes = rates.flops_per_s * self.gpus, rates.bytes_per_s * self.gpus
        return derive(model, replace(rates, flops_per_s=flops, bytes_per_s=num_bytes))

    def server(self, device: int) -> int:
        """Return the server of an instance: within a server links are fast."""
        return device * self.gpus // self.cluster.gpus_per_server

    def bandwidth(self, source: int, destination: int) -> float:
        """Return the bytes per second: to the host by PCIe, within a server by NVLink, else by RDMA."""
        if HOST in (source, destination):
            return self.cluster.pcie * self.gpus
        is_near = self.server(source) == self.server(destination)
        return (self.cluster.nvlink if is_near else self.cluster.rdma) * self.gpus
