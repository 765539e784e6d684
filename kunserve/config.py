"""The flags of `kunserve serve` that an engine has, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kunserve.errors import ConfigError
from kunserve.faults import Fault
from kunserve.model.host_copy import HostCopy
from kunserve.policies import OverloadPolicy

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")  # each kind of devices serves some of them
CPU_KV_DTYPES = ("auto", "float16", "bfloat16")  # auto: that of the weights
KV_DTYPES = (*CPU_KV_DTYPES, "fp8", "fp8_e4m3")  # both fp8 are the same
DEFAULT_KV_BYTES = 1 << 30  # of one CPU device, where neither --device-memory nor a number of blocks is given
MAX_DEVICES = 64  # logical devices of one GPU, and virtual CPU devices


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Value of `--devices`: a kind ("cpu", "cuda", "auto") and the devices' indices ("cpu:2" is cpu 0 and 1)."""

    kind: str
    indices: tuple[int, ...]

    def resolved(self) -> DeviceSpec:
        """Return what "auto" stands for here: all GPUs, if there is one that torch can use, else two CPU devices."""
        if self.kind != "auto":
            return self
        import torch  # takes seconds: flags are judged before

        return DeviceSpec("cuda", ()) if torch.cuda.is_available() else DeviceSpec("cpu", (0, 1))


CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 128, 2048  # in a step


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The flags of all that is below HTTP. Names say whether sizes are in bytes, blocks or tokens."""

    model: str
    devices: DeviceSpec = DeviceSpec("cpu", (0, 1))
    device_memory_bytes: int | None = None  # whole budget of one device: weights + KV
    num_blocks_override: int | None = None  # instead: the weights plus so many blocks
    kv_bytes: int | None = None  # instead: the weights plus so much KV
    block_size: int = 16
    chunk_bytes: int = 2 << 20  # of physical memory on CPU devices; smaller only in tests
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"  # one of KV_DTYPES
    quantization: str | None = None  # fp8 also quantizes while loading; others only name what the checkpoint is
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None  # None: see `num_batched_tokens`
    max_num_seqs: int = 256
    max_num_queued_reqs: int = 1024
    enable_prefix_caching: bool = True  # requests that begin alike share KV
    async_scheduling: bool = True  # plan the next step while the current one runs
    pipeline_parallel_size: int | None = None
    microbatching: str = "lookahead"  # of chains: equal predicted time; "tokens": equally many tokens
    overload_policy: OverloadPolicy = OverloadPolicy.DROP
    watermark: float = 0.0
    swap_space_bytes: int = 4 << 30  # of host memory, for the KV of requests that make way
    drop_watermark: float = 0.95  # of what is mapped
    restore_watermark: float = 0.5  # of the undropped capacity
    restore_hold_s: float = 5.0
    device_timeout_s: float = 60.0  # a device that completes no work for so long is lost; 0: none ever is
    windowed_kv_share: float | None = None  # KV of a layer with a window over one that sees all; None: it follows need
    is_pinned: bool = False  # regroup only when an operator asks
    host_copy: HostCopy = HostCopy.AUTO  # what the host keeps of the weights
    gpu_memory_utilization: float = 0.92  # this one and the next: CUDA only
    enforce_eager: bool = False
    faults: tuple[Fault, ...] = ()  # injected into CPU devices, in tests

    @property
    def num_batched_tokens(self) -> int:
        """Return the token budget of a step: what was asked for, or what suits the kind of devices."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return GPU_BATCHED_TOKENS if self.devices.kind == "cuda" else CPU_BATCHED_TOKENS

    def check(self) -> None:
        """Raise ConfigError for a value out of its range, and for flags that exclude each other."""
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
            ("--windowed-kv-share", self.windowed_kv_share),
        ):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{flag} {share}: must be more than 0 and at most 1")
        if not 0 <= self.restore_hold_s < float("inf"):
            raise ConfigError(f"--restore-hold {self.restore_hold_s}: must be a number of seconds, at least 0")
        if not 0 <= self.device_timeout_s < float("inf"):
            raise ConfigError(f"--device-timeout {self.device_timeout_s}: must be a number of seconds, at least 0")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"--watermark {self.watermark}: must be at least 0 and less than 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        check_kv_dtype(self.kv_cache_dtype, self.devices.kind)
        budgets = (self.device_memory_bytes, self.num_blocks_override, self.kv_bytes)
        if sum(budget is not None for budget in budgets) > 1:
            raise ConfigError(
                "give one of --device-memory, --num-gpu-blocks-override and --kv-cache-memory-bytes, not both"
            )
        self._check_faults()

    def _check_faults(self) -> None:
        if self.faults and self.devices.kind != "cpu":
            raise ConfigError("--inject-faults is for CPU devices: give --devices cpu:N")
        for fault in self.faults:
            if fault.device not in self.devices.indices:
                count = len(self.devices.indices)
                raise ConfigError(
                    f"--inject-faults {fault}: no such device; --devices cpu:{count} are 0 to {count - 1}"
                )


def check_kv_dtype(name: str, kind: str) -> None:
    """Raise ConfigError for a dtype of KV that no model has on devices of a kind ("cpu", "cuda", "auto")."""
    if kind == "cpu" and name not in CPU_KV_DTYPES:
        known = ", ".join(CPU_KV_DTYPES)
        raise ConfigError(f"--kv-cache-dtype {name} is not served on CPU devices; use one of {known}")
    if name not in KV_DTYPES:
        raise ConfigError(
            f"--kv-cache-dtype {name} is not served: KV has 8 (e4m3), 16 or 32 bits; use one of {', '.join(KV_DTYPES)}"
        )


def parse_devices(text: str) -> DeviceSpec:
    """Return the devices of "cpu:2" (two virtual CPU devices), "cuda:0,1", "auto" ...; ConfigError otherwise."""
    text = text.strip()
    if text == "auto":
        return DeviceSpec("auto", ())
    if text.startswith("cuda"):
        return DeviceSpec("cuda", parse_cuda_devices(text))
    match = re.fullmatch(r"cpu(?::(\d+))?", text)
    if not match or not 0 < int(match[1] or 1) <= MAX_DEVICES:
        raise ConfigError(f"not devices: {text!r} (write for instance cpu:2, cuda or cuda:0*4)")
    return DeviceSpec("cpu", tuple(range(int(match[1] or 1))))


def parse_cuda_devices(text: str) -> tuple[int, ...]:
    """Return the GPU of each logical device: "cuda:0,1" -> (0, 1), "cuda:0*4" -> (0, 0, 0, 0), "cuda" -> (): all GPUs.

    ConfigError for anything else.
    """
    match = re.fullmatch(r"cuda(?::(\d+(?:\*\d+)?(?:,\d+(?:\*\d+)?)*))?", text.strip())
    if match is None:
        raise ConfigError(f"not devices: {text!r} (write for instance cuda, cuda:0,1 or cuda:0*4)")
    ordinals: list[int] = []
    for item in match[1].split(",") if match[1] else []:
        ordinal, _, times = item.partition("*")
        if not 0 < int(times or 1) <= MAX_DEVICES:
            raise ConfigError(f"not devices: {text!r}: between 1 and {MAX_DEVICES} logical devices on a GPU")
        if int(ordinal) in ordinals:
            raise ConfigError(f"not devices: {text!r} names cuda:{ordinal} twice (write cuda:{ordinal}*2 for two)")
        ordinals += [int(ordinal)] * int(times or 1)
    return tuple(ordinals)
