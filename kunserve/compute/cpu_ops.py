"""The decoder's operations on a virtual CPU device, float32: one call into cpu_kernels.c per operation.

Single-threaded, as a virtual device is one core, and the GIL is dropped meanwhile. Batch invariant: a token's results
are bitwise the same however requests are batched, prompts are cut into pieces and blocks are placed.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import torch
from torch import Tensor

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_team import CpuTeam
from kunserve.compute.ops import PLAIN_SCORES, AttentionBatch, ExpertWeights, Ops, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.errors import EngineError
from kunserve.model.config import ACTIVATIONS, SWIGLU_ALPHA
from kunserve.model.quant.blocks import BLOCKS, Blocks
from kunserve.model.quant.linear import Linear

MAX_HEAD_DIM = 256  # DMAX in cpu_kernels.c
ENDLESS = 1 << 60  # tokens of a window that ends nowhere
FLOAT, INT = torch.float32, torch.int32
FORMATS = tuple(BLOCKS)  # cpu_blocks.c has them in the same order
KV_DTYPES = (FLOAT, torch.float16, torch.bfloat16)  # cpu_halves.c has them in the same order
FLOATS = -1  # the format of a matrix of numbers in cpu_team.c


def _is_ours(tensor: Tensor) -> bool:
    """Tell whether the kernels read a tensor: float32 without gaps."""
    return tensor.dtype is FLOAT and tensor.is_contiguous()


class CpuOps(Ops):
    """`Ops` on contiguous float32 CPU tensors. Implements kunserve.compute.ops.Ops; head_dim 8, 16, ... 256.

    KV may be of 16 bits: it is rounded where it is appended, and what is read are floats.
    """

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._linear, self._take_rows = kernels.linear, kernels.take_rows
        self._rms_norm = kernels.rms_norm
        self._act_and_mul = kernels.act_and_mul
        self._add, self._softcap = kernels.add, kernels.softcap
        self._route, self._experts, self._gate_rows = kernels.route, kernels.experts, kernels.gate_rows
        self._rotate_and_append = kernels.rotate_and_append
        self._attention = kernels.attention
        self.kernels = kernels

    def new_team(self) -> CpuTeam:
        """Return a team whose leader's products others can take part in."""
        return CpuTeam(self.kernels)

    def new(self, *shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        """Return a tensor for what a kernel computes; nothing is in it yet."""
        return torch.empty(shape, dtype=dtype)

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Take the rows of `weight` (V, H) for `token_ids` (T,) int32 -> (T, H)."""
        (part,) = weight.parts
        if part.blocks is None:
            return weight.rows(token_ids)
        assert token_ids.dtype is INT and token_ids.is_contiguous()
        if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < part.num_rows:
            raise IndexError("a token id is outside the vocabulary")
        out = torch.empty(len(token_ids), part.num_columns, dtype=FLOAT)
        self._take_rows(
            FORMATS.index(part.blocks.name), part.data.data_ptr(), token_ids.data_ptr(), out.data_ptr(),
            *out.shape, part.data.shape[1],
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (T, H) -> (T, H)."""
        assert _is_ours(x) and _is_ours(weight)
        T, H = x.shape
        y = self.new(T, H)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), T, H, eps, offset)
        return y

    def linear(self, x: Tensor, weight: Linear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return `residual + x @ weight.T + bias`: (T, K), (N, K), (N,), (T, N) -> (T, N). K and N at least 1."""
        y = self.new(len(x), weight.shape[0])
        self._multiply(x, weight, bias, residual, y)
        return y

    def linear_into(self, x: Tensor, weight: Linear, y: Tensor) -> None:
        """See `Ops.linear_into`."""
        self._multiply(x, weight, None, None, y)

    def _multiply(self, x: Tensor, weight: Linear, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
        T, K = x.shape
        assert _is_ours(x) and weight.shape[1] == K
        assert bias is None or _is_ours(bias)
        assert residual is None or (_is_ours(residual) and residual.shape == y.shape)
        assert y.dtype is FLOAT and y.shape == (T, weight.shape[0]) and y.stride(1) == 1
        first = 0
        for part in weight.parts:
            assert part.data.is_contiguous()
            self._linear(
                x.data_ptr(),
                part.data.data_ptr(),
                None if bias is None else bias.data_ptr() + FLOAT.itemsize * first,
                None if residual is None else residual.data_ptr() + FLOAT.itemsize * first,
                y.data_ptr() + FLOAT.itemsize * first,
                *(T, part.num_rows, K, y.stride(0)),
                *_stored(part.data, part.blocks),
            )
            first += part.num_rows

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
    ) -> None:
        """Norm and rotate q (in place in `qkv`) and k; write k and v into their slots of `kv`.

        Raises EngineError if a block table names no block of `kv` for a token, or `rope` ends before its position.
        """
        num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        assert _is_ours(qkv) and kv.is_contiguous() and _is_ours(rope) and head_dim <= MAX_HEAD_DIM
        max_positions, rotary_dim = rope.shape
        is_whole = q_norm is not None and q_norm.numel() != head_dim
        bad = self._rotate_and_append(
            qkv.data_ptr(),
            rope.data_ptr(),
            kv.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            *where(batch),
            num_blocks, num_kv_heads, block_size, head_dim, KV_DTYPES.index(kv.dtype),
            num_heads, max_positions, rotary_dim, is_whole, eps, offset,
        )  # fmt: skip
        if bad:
            raise_unslotted(bad - 1)

    def attention(
        self,
        qkv: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        scores: Scores = PLAIN_SCORES,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally with the q part of `qkv` to the blocks: -> (T, num_heads * head_dim).

        Raises EngineError if a block table names no block of `kv` for a position that is read.
        """
        num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
        assert _is_ours(qkv) and kv.is_contiguous() and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
        out = self.new(qkv.shape[0], num_heads * head_dim)
        bad = self._attention(
            qkv.data_ptr(), kv.data_ptr(), out.data_ptr(), *where(batch),
            num_blocks, num_kv_heads, block_size, head_dim, KV_DTYPES.index(kv.dtype), num_heads,
            ENDLESS if scores.window is None else scores.window, None if sinks is None else sinks.data_ptr(),
            head_dim**-0.5 if scores.scale is None else scores.scale, scores.softcap or 0.0,
        )  # fmt: skip
        if bad:
            raise_unread(bad - 1)
        return out

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I)."""
        assert _is_ours(gate_up)
        T, width = gate_up.shape
        y = self.new(T, width // 2)
        kind = ACTIVATIONS.index(activation)
        self._act_and_mul(gate_up.data_ptr(), y.data_ptr(), T, width // 2, kind, limit, SWIGLU_ALPHA)
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute x + y, element by element: (T, N) each."""
        assert _is_ours(x) and _is_ours(y) and x.shape == y.shape
        total = self.new(*x.shape)
        self._add(x.data_ptr(), y.data_ptr(), total.data_ptr(), x.numel())
        return total

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """Compute cap * tanh(x / cap), element by element."""
        y = x.clone(memory_format=torch.contiguous_format)
        assert _is_ours(y)
        self._softcap(y.data_ptr(), y.numel(), cap)
        return y

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute x * sigmoid(gate): (T, H), (T, 1) -> (T, H)."""
        assert _is_ours(x) and _is_ours(gate) and gate.shape == (len(x), 1)
        y = self.new(*x.shape)
        self._gate_rows(x.data_ptr(), gate.data_ptr(), y.data_ptr(), *x.shape)
        return y

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """Route each row to its experts, and sum what they make of it in the order of their numbers: -> (T, H)."""
        assert _is_ours(x) and experts.gate_up.is_contiguous() and experts.down.is_contiguous()
        (T, H), (E, width, _) = x.shape, experts.gate_up.shape
        I = width // 2  # noqa: E741
        logits = self.linear(x, experts.router, experts.router_bias)
        weights, y, gathered, out = (self.new(T, n) for n in (E, H, H, H))
        rows, inner = self.new(T, dtype=torch.int64), self.new(T, 3 * I)
        self._route(logits.data_ptr(), weights.data_ptr(), T, E, experts.num_per_token, experts.normalize)
        self._experts(
            x.data_ptr(), weights.data_ptr(),
            experts.gate_up.data_ptr(), None if experts.gate_up_bias is None else experts.gate_up_bias.data_ptr(),
            *_stored(experts.gate_up, experts.gate_up_blocks),
            experts.down.data_ptr(), None if experts.down_bias is None else experts.down_bias.data_ptr(),
            *_stored(experts.down, experts.down_blocks),
            y.data_ptr(), rows.data_ptr(), gathered.data_ptr(), inner.data_ptr(), out.data_ptr(),
            T, E, H, I, ACTIVATIONS.index(experts.activation), experts.limit, SWIGLU_ALPHA,
        )  # fmt: skip
        return y


def _stored(rows: Tensor, blocks: Blocks | None) -> tuple[int, int]:
    """Return the number of the format that rows (..., bytes or floats) are stored in, and the bytes of each."""
    assert blocks is not None or rows.dtype is FLOAT
    return FLOATS if blocks is None else FORMATS.index(blocks.name), rows.shape[-1] * rows.itemsize


def where(batch: AttentionBatch) -> tuple[int, int, int, int, int]:
    """Return the addresses of positions, cu_seqlens_q and block_tables, and the shape (B, W) of the last."""
    positions, ends, tables = batch.positions, batch.cu_seqlens_q, batch.block_tables
    assert positions.dtype is INT and ends.dtype is INT and tables.dtype is INT and tables.is_contiguous()
    return (positions.data_ptr(), ends.data_ptr(), tables.data_ptr(), *tables.shape)


def raise_unslotted(token: int) -> NoReturn:
    """Raise EngineError for a token whose K and V have no place."""
    raise EngineError(f"token {token} of the batch has no slot: position outside rope or block table")


def raise_unread(token: int) -> NoReturn:
    """Raise EngineError for a token that would read what is not there."""
    raise EngineError(f"token {token} of the batch reads a position that its block table does not name")


def has_block_kernels(dtype: str, head_dim: int = 64) -> bool:
    """Return whether CPU devices that compute in a dtype of `--dtype` multiply with matrices in blocks."""
    return dtype in ("auto", "float32") and isinstance(cpu_ops_or_reference(FLOAT, head_dim)[0], CpuOps)


def cpu_ops_or_reference(dtype: torch.dtype, head_dim: int = 64) -> tuple[Ops, str]:
    """Return a CPU device's operations: the kernels where they apply, else TorchOps; which and why, for the log."""
    if dtype is not FLOAT:
        return TorchOps(), f"torch reference: the kernels are float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return TorchOps(), f"torch reference: head_dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    try:
        return CpuOps(load_kernels()), "C kernels for this CPU"
    except KernelsUnavailableError as error:
        return TorchOps(), f"torch reference: {error}"
