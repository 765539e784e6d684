"""FlashInfer's two wrappers without a GPU: they keep its rules, and attend by the reference when they run.

What is read when is as in flashinfer 0.6.18: `plan` reads lengths from the host, `run` reads block ids and lengths from
the device's buffers. With graphs, a wrapper is of one batch size and its buffers never change; so whatever is captured
reads what a later plan has put there.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch, Scores
from kunserve.compute.torch_ops import TorchOps

DTYPES, OPTIONS = {"q_data_type", "kv_data_type"}, {"sm_scale", "window_left", "logits_soft_cap"}


def _dtypes(options: dict[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """Those of q and KV, of which one module is compiled."""
    return options["q_data_type"], options["kv_data_type"]


def _scores(options: dict[str, Any]) -> Scores:
    """What a plan was told of scores; the window leaves out the query's own token."""
    assert DTYPES <= set(options) <= DTYPES | OPTIONS
    window = options.get("window_left")
    return Scores(options.get("sm_scale"), None if window is None else window + 1, options.get("logits_soft_cap"))


class _Wrapper:
    """What both have in common."""

    scores: Scores
    dtypes: tuple[torch.dtype, torch.dtype]

    def __init__(self, floats: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        self.workspaces, self.pinned = [floats], torch.empty(0)
        self.num_plans, self.splits = 0, list[int | None]()
        self.num_full_plans = 0  # of `num_plans`: by FlashInfer's own `plan`, in Python

    def reset_workspace_buffer(self, floats: Tensor, ints: Tensor) -> None:
        self.workspaces = [floats, ints]

    def _attend(
        self, q: Tensor, kv: Tensor, ends: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, return_lse: bool
    ) -> Any:
        assert (q.dtype, kv.dtype) == self.dtypes, "planned for other dtypes"
        counts = indptr.diff().long()
        tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = indices[: indptr[-1]]
        contexts = (counts - 1) * kv.shape[3] + last
        positions = [torch.arange(int(c) - n, int(c)) for c, n in zip(contexts, ends.diff().tolist(), strict=True)]
        batch = AttentionBatch(torch.cat(positions).int(), ends, contexts.int(), tables, kv.shape[3])
        ops = TorchOps()
        out = ops.attention(q.flatten(1), kv, batch, q.shape[1], self.scores).view(q.shape)
        if not return_lse:
            return out
        # With a sink of 0 the share of all others is sum / (sum + 1): that tells their sum.
        with_sinks = ops.attention(q.flatten(1), kv, batch, q.shape[1], self.scores, torch.zeros(q.shape[1]))
        share = (with_sinks.view(q.shape) * out).sum(-1) / (out * out).sum(-1)
        return out, torch.log2(share / (1 - share))


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Mixed batches."""

    def __init__(self, floats: Tensor, kv_layout: str, backend: str) -> None:
        super().__init__(floats, kv_layout)
        assert backend == "fa2"

    def plan(
        self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last: Tensor,
        num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, **options: Any,
    ) -> None:  # fmt: skip
        assert causal
        self.num_full_plans += 1
        self.scores, self.dtypes = _scores(options), _dtypes(options)
        self._qo_indptr_last, self._batch_size = int(qo_indptr[-1]), len(last)
        self._qo_indptr_buf, self._paged_kv_indptr_buf = qo_indptr.clone(), indptr.clone()
        self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = indices, last.clone()
        self._shape = num_heads, num_kv_heads, page_size, head_dim, options.get("window_left", -1)
        self._cached_module, self._pin_memory_int_workspace_buffer = SimpleNamespace(plan=self._plan), self.pinned
        lens, (floats, ints) = (indptr.diff() - 1) * page_size + last, self.workspaces
        self._plan_info = self._plan(
            floats, ints, self.pinned, qo_indptr, indptr, lens, self._qo_indptr_last, len(last), num_heads,
            num_kv_heads, page_size, False, head_dim, head_dim, True, options.get("window_left", -1), -1, False, 0, 0,
        )  # fmt: skip

    def _plan(
        self, floats: Tensor, ints: Tensor, pinned: Tensor, qo_indptr: Tensor, indptr: Tensor, lens: Tensor,
        num_rows: int, batch_size: int, num_heads: int, num_kv_heads: int, page_size: int, has_graph: bool,
        head_dim_qk: int, head_dim_vo: int, causal: bool, window_left: int, split: int, disable_split: bool,
        colocated: int, uniform_q_len: int,
    ) -> list[int]:  # fmt: skip
        """The compiled module's own, of backend fa2: positional, its arrays in host memory."""
        assert [floats, ints] == self.workspaces and pinned is self.pinned
        assert all(t.device.type == "cpu" and t.dtype is torch.int32 for t in (qo_indptr, indptr, lens))
        assert len(qo_indptr) == len(indptr) == len(lens) + 1 == batch_size + 1 and num_rows == int(qo_indptr[-1])
        assert (num_heads, num_kv_heads, page_size, head_dim_qk, window_left) == self._shape
        assert head_dim_vo == head_dim_qk and causal and not has_graph
        assert (split, disable_split, colocated, uniform_q_len) == (-1, False, 0, 0)
        self.num_plans += 1
        return [*lens.tolist()]

    def run(self, q: Tensor, kv: Tensor, return_lse: bool = False) -> Any:
        assert len(q) == self._qo_indptr_last and len(self._paged_kv_last_page_len_buf) == self._batch_size
        ends, indptr, indices, last = (
            self._qo_indptr_buf, self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf
        )  # fmt: skip
        assert self._plan_info == ((indptr.diff() - 1) * kv.shape[3] + last).tolist(), "planned for other lengths"
        return self._attend(q, kv, ends, indptr, indices, last, return_lse)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One token of each sequence."""

    def __init__(
        self, floats: Tensor, kv_layout: str, *, use_cuda_graph: bool, use_tensor_cores: bool, backend: str,
        paged_kv_indptr_buffer: Tensor, paged_kv_indices_buffer: Tensor, paged_kv_last_page_len_buffer: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(floats, kv_layout)
        assert use_cuda_graph and use_tensor_cores and backend == "fa2"
        self.batch_size = len(paged_kv_last_page_len_buffer)
        assert len(paged_kv_indptr_buffer) == self.batch_size + 1
        self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer

    def plan(self, indptr: Tensor, indices: Tensor, last: Tensor, *shape: int, **options: Any) -> None:
        assert len(shape) == 4
        self.num_full_plans += 1
        self.scores, self.dtypes = _scores(options), _dtypes(options)
        self.check(indptr, indices, last)
        for buffer, values in zip(self.buffers, (indptr, indices, last), strict=True):
            buffer[: len(values)].copy_(values)

    def check(self, indptr: Tensor, indices: Tensor, last: Tensor) -> None:
        assert len(last) == self.batch_size, "the batch size is fixed in graphs"
        assert len(indptr) == self.batch_size + 1 and int(indptr[-1]) == len(indices) <= len(self.buffers[1])
        self.num_plans += 1

    def run(self, q: Tensor, kv: Tensor, return_lse: bool = False) -> Any:
        assert len(q) == self.batch_size
        ends = torch.arange(self.batch_size + 1, dtype=torch.int32)
        return self._attend(q, kv, ends, *self.buffers, return_lse)


def check_splits(indptr: Tensor, num_heads: int, num_kv_heads: int, split: int | None) -> None:
    """Parts have places in the graph; and something is split, as the plan is else for kernels that merge nothing.

    As in scheduler.cuh: a tile has 16 rows of at most 16 heads, and two run on each of 132 multiprocessors at once.
    """
    if split is None:
        return
    batch_size, group = len(indptr) - 1, num_heads // num_kv_heads
    assert split > 0 and group <= 16
    num_parts = sum(math.ceil(n / split) for n in indptr.diff().tolist())
    most = max(2 * 132 // num_kv_heads, math.ceil(batch_size * group / 16) + batch_size - 1)
    assert batch_size < num_parts <= most, "FlashInfer refuses it, or plans for other kernels than a graph has"


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper, indptr: Tensor, indices: Tensor, last: Tensor, *shape: int,
    fixed_split_size: int | None, global_override_indptr_cpu: Tensor, **options: Any,
) -> None:  # fmt: skip
    """Plan without copying: the buffers have the arrays already."""
    check_splits(global_override_indptr_cpu, shape[0], shape[1], fixed_split_size)
    wrapper.splits.append(fixed_split_size)
    assert wrapper.num_plans, "the first plan is the full one"
    assert len(shape) == 4 and wrapper.scores == _scores(options) and wrapper.dtypes == _dtypes(options)
    assert global_override_indptr_cpu.device.type == "cpu"
    wrapper.check(indptr, indices, last)
    for buffer, values in zip(wrapper.buffers, (indptr, indices, last), strict=True):
        assert torch.equal(buffer[: len(values)], values), "the buffers have not been written"


def modules() -> dict[str, Any]:
    """What takes the place of flashinfer in sys.modules."""
    wrappers = (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper)
    package = SimpleNamespace(**{wrapper.__name__: wrapper for wrapper in wrappers})
    return {"flashinfer": package, "flashinfer.decode": SimpleNamespace(fast_decode_plan=fast_decode_plan)}
