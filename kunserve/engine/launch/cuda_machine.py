"""GPUs as a `Machine`: budgets from what is free, chunks that suit the model, FlashInfer decoders."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from kunserve.compute.cuda.arrays import StepLimits
from kunserve.compute.cuda.decoder import CudaDecoder, cuda_decoder
from kunserve.compute.cuda.graphs import RUN_LAYERS
from kunserve.compute.cuda.ops import cuda_dtype
from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow, sample
from kunserve.config import EngineConfig
from kunserve.engine.launch.machine import Machine
from kunserve.engine.launch.placement import budget_chunks
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.cuda.device import (
    CudaDevice,
    budget_bytes,
    choose_chunk_bytes,
    islands,
    open_cuda_devices,
    open_drivers,
)
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.cuda.kv_dtype import cuda_kv_dtype
from kunserve.gpu.device_memory import DeviceMemory, Layout
from kunserve.gpu.host_weights import HostWeights, keep_host_copy
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import weight_units
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sampling import SamplingParams
from kunserve.sizes import ceil_div, format_size

GRAPH_BYTES = 192 << 20  # of one logical device: what the driver keeps of graphs, also of single layers


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What flags say. Sizes in bytes, tokens or sequences as named."""

    ordinals: tuple[int, ...]  # of each logical device; none: every GPU once
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_bytes: int | None = None
    utilization: float = 0.92
    enforce_eager: bool = False
    host_copy: HostCopy = HostCopy.AUTO
    num_blocks: int | None = None  # the budget is then the weights plus so many blocks
    kv_bytes: int | None = None  # or plus so much KV

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig) -> CudaOptions:
        """Read the flags. ConfigError for a dtype that is not served."""
        dtype = cuda_dtype(config.dtype, model.dtype)
        return cls(
            ordinals=config.devices.indices,
            dtype=dtype,
            kv_dtype=cuda_kv_dtype(config.kv_cache_dtype, dtype, model.head_dim),
            block_size=config.block_size,
            max_num_batched_tokens=config.num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            memory_bytes=config.device_memory_bytes,
            utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            host_copy=config.host_copy,
            num_blocks=config.num_blocks_override,
            kv_bytes=config.kv_bytes,
        )

    def kv_shape(self, model: ModelConfig) -> KVShape:
        """Return the shape of a model's blocks."""
        return KVShape.of(model, self.block_size, self.kv_dtype)


class CudaMachine(Machine):
    """Drivers, later devices, that are open, and the sizes that were found."""

    shares_head = False  # decoding is bound by reading the head's matrix: both ends would read all of it

    def __init__(
        self,
        model: ModelConfig,
        options: CudaOptions,
        open_driver: Callable[[int], Driver] | None = None,
        measure: Callable[[Driver, ModelConfig, CudaOptions], int] | None = None,
    ) -> None:
        """Open the drivers, measure a step's activations and divide the memory. ConfigError, with nothing open."""
        self._model, self._options, self.dtype = model, options, options.dtype
        self._devices: list[CudaDevice] = []
        self._host: HostWeights | None = None
        self._has_kinds = False
        self._drivers = open_drivers(options.ordinals, open_driver)
        self.device_name = self._drivers[0].gpu_name
        try:
            ordinals = [driver.ordinal for driver in self._drivers]
            first = {driver.ordinal: driver for driver in reversed(self._drivers)}
            reserved = _measured(measure or measure_activations, self._drivers[0], model, options)
            self.budget_bytes = budget_bytes(
                ordinals,
                {ordinal: driver.memory() for ordinal, driver in first.items()},
                memory_bytes=options.memory_bytes,
                utilization=options.utilization,
                reserved_bytes=reserved,
            )
            self._block_bytes = options.kv_shape(model).block_bytes
            self.chunk_bytes = choose_chunk_bytes(
                model, options.dtype, self._block_bytes, self._drivers[0].granularity, self._wanted_bytes()
            )
            self.num_chunks = self.budget_bytes // self.chunk_bytes
        except BaseException:
            self.close()
            raise

    @property
    def kv_dtype(self) -> torch.dtype:
        """See `Machine.kv_dtype`."""
        return self._options.kv_dtype

    def _wanted_bytes(self) -> int:
        """Return what of the budget is asked for: all of it, or weights and so much KV, in the smallest chunks."""
        model, options, step = self._model, self._options, self._drivers[0].granularity
        kv_bytes = options.kv_bytes
        if options.num_blocks is not None:
            kv_bytes = model.num_layers * options.num_blocks * self._block_bytes
        if kv_bytes is None:
            return self.budget_bytes
        ranges = [unit.num_bytes for unit in weight_units(model, options.dtype)]
        ranges += [ceil_div(kv_bytes, model.num_layers)] * model.num_layers
        return min(self.budget_bytes, sum(ceil_div(num_bytes, step) * step for num_bytes in ranges))

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`."""
        self._has_kinds = shape.num_kinds > 1
        num_blocks, kv_bytes = self._options.num_blocks, self._options.kv_bytes
        if num_blocks is not None or kv_bytes is not None:
            asked = budget_chunks(shape, None, num_blocks, kv_bytes or 0)
            if asked > self.num_chunks:
                by_blocks = f"--num-gpu-blocks-override {num_blocks}"
                flag = f"--kv-cache-memory-bytes {kv_bytes}" if num_blocks is None else by_blocks
                raise ConfigError(
                    f"{flag} needs {format_size(asked * self.chunk_bytes)} on each device; "
                    f"{format_size(self.budget_bytes)} are there"
                )
            self.num_chunks = asked
        return [DeviceView(i, self.num_chunks, island) for i, island in enumerate(islands(self._drivers))]

    def links(self) -> Links:
        """See `Machine.links`. KV is taken to go at half of what PCIe 4.0 allows until some has gone."""
        return Links(usual_bytes_per_s=12e9)

    def open(self) -> Sequence[CudaDevice]:
        """See `Machine.open`: create all chunks; the devices own the drivers from now on."""
        drivers, self._drivers = self._drivers, []
        self._devices = open_cuda_devices(drivers, self.num_chunks, self.chunk_bytes)
        return self._devices

    def host_weights(self, source: WeightSource) -> HostWeights:
        """See `Machine.host_weights`."""
        units, driver = weight_units(self._model, self._options.dtype), self._devices[0].driver
        self._host = keep_host_copy(self._options.host_copy, source, units, driver)
        return self._host

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[CudaExecutor, str]:
        """See `Machine.executor`."""
        options = self._options
        limits = StepLimits(
            options.max_num_batched_tokens, options.max_num_seqs, self.budget_bytes // self._block_bytes
        )
        if self._has_kinds and self._model.window is not None:
            limits = limits.with_near(self._model.window, options.block_size)
        made = []
        for device, memory in zip(self._devices, memories, strict=True):
            made.append(_decoder(self._model, options, memory, max_model_len, limits, device.driver))
            _capture(device, made[-1][0], is_cut=len(self._devices) > 1)
        watched = [memory.device for memory in memories]
        return CudaExecutor(self._devices, [decoder for decoder, _ in made], watched), made[0][1]

    def close(self) -> None:
        """See `Machine.close`."""
        if self._host is not None:
            with suppress(DeviceError):  # after a fault every call fails
                self._host.close()
            self._host = None
        for device in self._devices:
            device.close()
        self._devices = [device for device in self._devices if device.is_open or device.is_lost]
        while self._drivers:
            self._drivers.pop().close()

    def stuck(self) -> list[str]:
        """See `Machine.stuck`. A lost device's context is: Python, as it ends, would free what torch has there."""
        return [device.name for device in self._devices]


def _decoder(
    model: ModelConfig,
    options: CudaOptions,
    memory: DeviceMemory,
    max_model_len: int,
    limits: StepLimits,
    driver: Driver,
) -> tuple[CudaDecoder, str]:
    return cuda_decoder(
        model,
        memory.weights,
        memory.kv,
        max_model_len,
        limits,
        dtype=options.dtype,
        driver=driver,
        enforce_eager=options.enforce_eager,
    )


def _capture(device: CudaDevice, decoder: CudaDecoder, *, is_cut: bool) -> None:
    """Capture a decoder's graphs. ConfigError, in a line, if that cannot be: nothing goes on after it."""
    try:
        with device.computing():
            decoder.capture(is_cut=is_cut)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{device.name}: CUDA graphs failed: {reason}; start with --enforce-eager") from error


def _measured(
    measure: Callable[[Driver, ModelConfig, CudaOptions], int], driver: Driver, model: ModelConfig, options: CudaOptions
) -> int:
    """Return what `measure` says; ConfigError if a first step cannot be: no memory, or kernels do not compile."""
    try:
        return measure(driver, model, options)
    except ConfigError:
        raise
    except Exception as error:  # torch says RuntimeError; who compiles, FileNotFoundError, CalledProcessError and more
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"cuda:{driver.ordinal}: a step of {options.max_num_batched_tokens} tokens (--max-num-batched-tokens) "
            f"failed: {reason}"
        ) from error


def measure_activations(driver: Driver, model: ModelConfig, options: CudaOptions) -> int:
    """Return the bytes that torch takes for one logical device: workspaces, and steps as large as they get.

    They are a step at the full token budget, whose tokens are chosen in both ways, each on a stream of its own, which
    keeps memory of its own; and a step that is captured. The model has as few layers as a graph, as activations do not
    depend on how many there are. What it took is given back to the GPU, so that what is free then is as it was.
    """
    small, device = replace(model, num_layers=min(model.num_layers, RUN_LAYERS)), driver.torch_device
    num_tokens, num_seqs = options.max_num_batched_tokens, min(options.max_num_seqs, options.max_num_batched_tokens)
    shape = options.kv_shape(model)
    num_blocks = ceil_div(num_tokens, options.block_size) + num_seqs
    units = weight_units(small, options.dtype)
    chunk = driver.granularity
    kv_chunks = ceil_div(num_blocks * shape.block_bytes, chunk)
    num_chunks = kv_chunks * small.num_layers + sum(ceil_div(unit.num_bytes, chunk) for unit in units)
    (opened,) = open_cuda_devices(open_drivers((driver.ordinal,)), num_chunks, chunk)
    try:
        before = torch.cuda.memory_reserved(device)
        memory = DeviceMemory(opened, units, small.num_layers, shape)
        memory.rearrange(Layout(tuple(unit.name for unit in units), (kv_chunks,) * small.num_layers))
        limits = StepLimits(num_tokens, num_seqs, num_blocks)
        decoder, _ = _decoder(small, options, memory, num_tokens, limits, opened.driver)
        with opened.computing():
            logits = decoder.forward(0, small.num_layers, *full_step(num_tokens, num_seqs, options.block_size))
            logits = torch.zeros_like(logits)  # weights are whatever was there
            decoder.launch_sample(logits, _rows(num_seqs, SamplingParams(1)))
            decoder.capture(is_cut=False)
        with opened.sampling.lent():
            sample(logits, _rows(num_seqs, SamplingParams(1, top_p=0.5)))
        opened.driver.synchronize_all()
        taken = torch.cuda.memory_reserved(device) - before
        del decoder, logits, memory
    finally:
        opened.close()
    gc.collect()
    torch.cuda.empty_cache()
    return taken + (0 if options.enforce_eager else GRAPH_BYTES)


def _rows(count: int, params: SamplingParams) -> list[SamplingRow]:
    return [SamplingRow(params, 0, (), (), ())] * count


def full_step(num_tokens: int, num_seqs: int, block_size: int) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
    """Return the largest microbatch: `num_seqs` prompts with `num_tokens` tokens together, all sampled."""
    lens = torch.full((num_seqs,), num_tokens // num_seqs)
    lens[: num_tokens % num_seqs] += 1
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    width = ceil_div(int(lens.max()), block_size)
    counts = ceil_div(lens, block_size)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])[:-1]
    tables = (starts[:, None] + torch.arange(width)).clamp(max=int(counts.sum()) - 1)
    positions = torch.arange(num_tokens) - ends[:-1].repeat_interleave(lens)
    batch = AttentionBatch(positions.int(), ends.int(), lens.int(), tables.int(), block_size)
    return torch.zeros(num_tokens, dtype=torch.int32), batch, ends[1:] - 1
