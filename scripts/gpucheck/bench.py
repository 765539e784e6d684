"""What all parts of the GPU check share: devices with a model on them, steps to run there, and clocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import StepLimits
from kunserve.compute.cuda.decoder import CudaDecoder, cuda_decoder
from kunserve.compute.cuda.sampling import PendingTokens
from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow
from kunserve.gpu.copies import bits_of
from kunserve.gpu.cuda.device import CudaDevice, choose_chunk_bytes, open_cuda_devices, open_drivers
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.card import load_card
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.sampling import SamplingParams
from kunserve.sizes import ceil_div

GIB = 1 << 30
BLOCK_SIZE = 16


def llama_8b() -> ModelConfig:
    """Return the shape of Llama 3.1 8B."""
    return load_card("llama-8b").config


def llama_1b() -> ModelConfig:
    """Return the shape of Llama 3.2 1B, with FlashInfer's commonest head_dim."""
    return replace(
        llama_8b(), hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=16, tie_embeddings=True
    )


class RandomSource:
    """Weights drawn where they go: for figures that do not depend on them."""

    def copy_into(self, name: str, out: Tensor) -> None:
        """See `WeightSource.copy_into`."""
        if name.endswith("norm.weight"):
            out.fill_(1.0)
        elif not out.is_floating_point():  # codes
            out.random_(256)
        else:
            out.normal_(std=0.02)


@dataclass(frozen=True, slots=True)
class RoundedSource:
    """Weights as bf16 has them, in any dtype: what differs then is the arithmetic."""

    source: WeightSource

    def copy_into(self, name: str, out: Tensor) -> None:
        """See `WeightSource.copy_into`."""
        self.source.copy_into(name, out)
        out.copy_(out.to(torch.bfloat16))


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on one device, all of it present; `num_blocks` blocks of KV in every layer."""

    device: CudaDevice
    memory: DeviceMemory
    decoder: CudaDecoder
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Bench:
    """One GPU, or in tests what stands for it."""

    ordinal: int = 0
    is_quick: bool = False
    open_driver: Callable[[int], Driver] | None = None

    @property
    def torch_device(self) -> torch.device:
        """Return where tensors are: on the GPU, or with fake drivers on the host."""
        return torch.device("cuda", self.ordinal) if self.open_driver is None else torch.device("cpu")

    @contextmanager
    def place(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        source: WeightSource,
        *,
        num_tokens: int,
        num_seqs: int,
        num_blocks: int,
        num_devices: int = 1,
        enforce_eager: bool = False,
        kv_dtype: torch.dtype | None = None,
    ) -> Iterator[list[Placed]]:
        """Open logical devices on the GPU, each with the whole model and at least `num_blocks` of KV.

        `kv_dtype`: None: `dtype`.
        """
        drivers = open_drivers([self.ordinal] * num_devices, self.open_driver)
        units, shape = weight_units(config, dtype), KVShape.of(config, BLOCK_SIZE, kv_dtype or dtype)
        wanted = sum(unit.num_bytes for unit in units) + config.num_layers * num_blocks * shape.block_bytes
        chunk = choose_chunk_bytes(config, dtype, shape.block_bytes, drivers[0].granularity, wanted)
        weights = sum(ceil_div(unit.num_bytes, chunk) for unit in units)
        per_layer = ceil_div(num_blocks * shape.block_bytes, chunk)
        devices = open_cuda_devices(drivers, weights + config.num_layers * per_layer, chunk)
        limits = StepLimits(num_tokens, num_seqs, num_blocks)
        placed = []
        try:
            for device in devices:
                memory = DeviceMemory(device, units, config.num_layers, shape)
                for unit in units:
                    memory.weights.map(unit.name)
                    memory.weights.fill(unit.name, source)
                for layer in range(config.num_layers):
                    memory.kv.resize(layer, per_layer)
                    bits_of(memory.kv.layers[layer])[: memory.kv.num_blocks(layer)].zero_()
                decoder, _ = cuda_decoder(
                    config, memory.weights, memory.kv, num_blocks * BLOCK_SIZE, limits,
                    dtype=dtype, driver=device.driver, enforce_eager=enforce_eager,
                )  # fmt: skip
                with device.computing():
                    decoder.capture()
                placed.append(Placed(device, memory, decoder, memory.kv.num_blocks(0)))
            self.synchronize()
            yield placed
        finally:
            self.synchronize()
            placed.clear()
            for device in devices:
                device.close()
            if self.torch_device.type == "cuda":
                torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for all of the GPU."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def seconds(self, work: Callable[[], object], repeats: int, *, warm_up: int = 2) -> float:
        """Return the seconds of one call, averaged over calls launched one after the other."""
        for _ in range(warm_up):
            work()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - started) / repeats

    def on_device(self, placed: Placed, work: Callable[[], Tensor]) -> Tensor:
        """Run work on the device's compute queue, as the engine does."""
        return asyncio.run(placed.device.run(work))


@dataclass(frozen=True, slots=True)
class Step:
    """Inputs of one microbatch, on the host."""

    token_ids: Tensor
    batch: AttentionBatch
    rows: Tensor


def make_step(starts: Sequence[int], lens: Sequence[int], vocab_size: int, seed: int = 0, max_len: int = 0) -> Step:
    """Make a step: sequence i computes tokens [starts[i], starts[i] + lens[i]); its blocks hold `max_len` tokens."""
    longest = max_len or max(s + n for s, n in zip(starts, lens, strict=True))
    width = ceil_div(longest, BLOCK_SIZE)
    tables = torch.arange(len(lens) * width, dtype=torch.int32).view(len(lens), width)
    counts, begins = torch.tensor(lens), torch.tensor(starts)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    positions = torch.arange(int(ends[-1])) - (ends[:-1] - begins).repeat_interleave(counts)
    ids = torch.randint(0, vocab_size, (int(ends[-1]),), generator=torch.Generator().manual_seed(seed))
    batch = AttentionBatch(positions.int(), ends.int(), (begins + counts).int(), tables, BLOCK_SIZE)
    return Step(ids.int(), batch, ends[1:] - 1)


def forward(placed: Placed, step: Step, first_layer: int, last_layer: int, x: Tensor | None = None) -> Tensor:
    """Launch layers of a step; call it on the device's queue."""
    return placed.decoder.forward(first_layer, last_layer, step.token_ids if x is None else x, step.batch, step.rows)


def launch_greedy(placed: Placed, step: Step) -> PendingTokens:
    """Launch a step and the choice of the most likely tokens; call it on the device's queue."""
    rows = [SamplingRow(SamplingParams(1, temperature=0.0), 0, (), (), ())] * len(step.rows)
    return placed.decoder.launch_tokens(0, step.token_ids, step.batch, step.rows, rows)
