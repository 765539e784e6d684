"""Random operands of a decoder's operations, and an attention layer that sequences are appended to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.ops import PLAIN_SCORES, AttentionBatch, Scores, rope_table
from kunserve.compute.torch_ops import TorchOps
from kunserve.sizes import ceil_div

REFERENCE = TorchOps()
KERNEL_VARIANTS = ["native", "-mno-avx512f", "-march=x86-64"]


def _supports_avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512f" in info.read_text()


@pytest.fixture(scope="session", params=KERNEL_VARIANTS)
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuOps:
    """The kernels as built for this CPU, and for the narrower vectors that it can also run."""
    flags = () if request.param == "native" else (request.param,)
    if flags and not _supports_avx512():
        pytest.skip("only where the CPU has AVX-512: else the native build is already a narrower one")
    try:
        return CpuOps(load_kernels(flags))
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, ulps: float) -> None:
    """Within `ulps` of float32, relative to the largest expected value of the row."""
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    error = ((actual.double() - expected.double()).abs() / scale).max().item()
    assert error <= ulps * 2.0**-23, f"{error * 2**23:.2f} ulps"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an attention layer."""

    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class Layer:
    """One layer's KV (NaN where nothing was written) and sequences that are appended to it in batches."""

    def __init__(
        self,
        ops: CpuOps | TorchOps,
        shape: Shape,
        lengths: list[int],
        dtype: torch.dtype,
        seed: int,
        scores: Scores = PLAIN_SCORES,
        sinks: Tensor | None = None,
    ) -> None:
        self.scores, self.sinks = scores, sinks
        self.ops, self.shape, self.dtype = ops, shape, dtype
        counts = [ceil_div(n, shape.block_size) for n in lengths]
        order = torch.randperm(sum(counts) + 5, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in counts]
        kv_shape = (sum(counts) + 5, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self.kv = torch.full(kv_shape, float("nan"), dtype=dtype)
        self.inputs = [randn(n, shape.width, seed=seed + i).to(dtype) for i, n in enumerate(lengths)]
        frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.rope = rope_table(shape.head_dim, frequencies, 4096, torch.float32).to(dtype)
        self.norms = [randn(shape.head_dim, seed=seed + i + 100).to(dtype) for i in range(2)]
        self.contexts = [0] * len(lengths)
        self.outputs: list[list[Tensor]] = [[] for _ in lengths]

    def batch(self, pieces: list[tuple[int, int]]) -> AttentionBatch:
        """The next `n` tokens of each sequence `b`, for (b, n) in `pieces`."""
        positions = [torch.arange(self.contexts[b], self.contexts[b] + n) for b, n in pieces]
        tables = torch.zeros(len(pieces), max(len(table) for table in self.tables) + 2, dtype=torch.int32)
        for i, (b, _) in enumerate(pieces):
            tables[i, : len(self.tables[b])] = torch.tensor(self.tables[b])
        return AttentionBatch(
            positions=torch.cat(positions).int(),
            cu_seqlens_q=torch.tensor([0, *torch.tensor([n for _, n in pieces]).cumsum(0).tolist()]).int(),
            context_lens=torch.tensor([self.contexts[b] + n for b, n in pieces]).int(),
            block_tables=tables,
            block_size=self.shape.block_size,
        )

    def append(self, pieces: list[tuple[int, int]], norm: bool = False) -> Tensor:
        """Run rotation and attention of one batch; outputs are also kept per sequence."""
        batch = self.batch(pieces)
        qkv = torch.cat([self.inputs[b][self.contexts[b] : self.contexts[b] + n] for b, n in pieces])
        norms = self.norms if norm else [None, None]
        self.ops.rotate_and_append(qkv, self.rope, self.kv, batch, norms[0], norms[1], 1e-6)
        out = self.ops.attention(qkv, self.kv, batch, self.shape.num_heads, self.scores, self.sinks)
        ends = batch.cu_seqlens_q.tolist()
        for i, (b, n) in enumerate(pieces):
            self.contexts[b] += n
            self.outputs[b].append(out[ends[i] : ends[i + 1]])
        return out
