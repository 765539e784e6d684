"""How a server is set up: the flags of `python -m kunserve.server`, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kunserve.engine.policy import OverloadPolicy
from kunserve.errors import ConfigError
from kunserve.model.host_copy import HostCopy


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Value of `--devices`: a kind and the devices' indices ("cpu:2" is cpu 0 and 1)."""

    kind: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything below HTTP. Sizes in bytes, blocks or tokens as named."""

    model: str
    devices: DeviceSpec = DeviceSpec("cpu", (0, 1))
    device_memory_bytes: int | None = None  # whole budget of one device: weights + KV
    num_blocks_override: int | None = None  # then the budget is the weights plus so many blocks
    kv_bytes: int | None = None  # or the weights plus so much KV
    block_size: int = 16
    chunk_bytes: int = 2 << 20  # of physical memory on CPU devices; smaller only in tests
    dtype: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_batched_tokens: int = 128
    max_num_seqs: int = 256
    max_num_queued_reqs: int = 1024
    async_scheduling: bool = True  # plan the next step while the current one runs
    pipeline_parallel_size: int | None = None
    microbatching: str = "lookahead"  # of chains: equal predicted time; "tokens": equally many tokens
    overload_policy: OverloadPolicy = OverloadPolicy.DROP
    watermark: float = 0.0
    swap_space_bytes: int = 4 << 30  # of host memory, for the KV of requests that make way
    drop_watermark: float = 0.95  # of what is mapped
    restore_watermark: float = 0.5  # of the undropped capacity
    restore_hold_s: float = 5.0
    is_pinned: bool = False  # regroup only when an operator asks
    host_copy: HostCopy = HostCopy.AUTO  # what the host keeps of the weights
    gpu_memory_utilization: float = 0.92  # CUDA only, as is the next one
    enforce_eager: bool = False

    def check(self) -> None:
        """Raise ConfigError for a number that cannot be meant."""
        for flag, value, least in (
            ("--block-size", self.block_size, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-queued-reqs", self.max_num_queued_reqs, 1),
            ("--max-model-len", self.max_model_len, 2),
            ("--num-gpu-blocks-override", self.num_blocks_override, 1),
            ("--kv-cache-memory-bytes", self.kv_bytes, 1),
            ("--pipeline-parallel-size", self.pipeline_parallel_size, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{flag} {value}: must be at least {least}")
        for flag, share in (
            ("--gpu-memory-utilization", self.gpu_memory_utilization),
            ("--drop-watermark", self.drop_watermark),
            ("--restore-watermark", self.restore_watermark),
        ):
            if not 0 < share <= 1:
                raise ConfigError(f"{flag} {share}: must be more than 0 and at most 1")
        if self.restore_hold_s < 0:
            raise ConfigError(f"--restore-hold {self.restore_hold_s}: must not be negative")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"--watermark {self.watermark}: must be at least 0 and less than 1")
        budgets = (self.device_memory_bytes, self.num_blocks_override, self.kv_bytes)
        if sum(budget is not None for budget in budgets) > 1:
            raise ConfigError(
                "give one of --device-memory, --num-gpu-blocks-override and --kv-cache-memory-bytes, not both"
            )


_SIZES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}


def parse_size(text: str, plain_unit: str = "") -> int:
    """Bytes of "730MiB", "18GiB", "500MB" or a plain number of `plain_unit` (bytes); ConfigError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _SIZES.get((match[2] or plain_unit).lower())
    if not match or not unit:
        raise ConfigError(f"not a size: {text!r} (write for instance 730MiB or 18GiB)")
    return int(float(match[1]) * unit)


def parse_devices(text: str) -> DeviceSpec:
    """Devices of "cpu:2" (two virtual CPU devices), "cuda:0,1", ...; ConfigError otherwise.

    "auto": all GPUs, if there is one that torch can use, else two virtual CPU devices.
    """
    if text.strip() == "auto":
        import torch

        text = "cuda" if torch.cuda.is_available() else "cpu:2"
    if text.strip().startswith("cuda"):
        from kunserve.gpu.cuda import parse_cuda_devices  # imports torch

        return DeviceSpec("cuda", parse_cuda_devices(text))
    match = re.fullmatch(r"cpu(?::(\d+))?", text.strip())
    if not match or not 0 < int(match[1] or 1) <= 64:
        raise ConfigError(f"not devices: {text!r} (write for instance cpu:2, cuda or cuda:0*4)")
    return DeviceSpec("cpu", tuple(range(int(match[1] or 1))))
