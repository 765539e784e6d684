"""FlashInfer's two wrappers without a GPU: they keep its rules, and attend by the reference when they run.

What is read when is as in flashinfer 0.6.18: `plan` reads lengths from the host, `run` reads block ids and lengths from
the device's buffers. With graphs, a wrapper is of one batch size and its buffers never change; so whatever is captured
reads what a later plan has put there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.compute.torch_ops import TorchOps


class _Wrapper:
    """What both have in common."""

    def __init__(self, floats: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        self.workspaces = [floats]
        self.num_plans = 0

    def reset_workspace_buffer(self, floats: Tensor, ints: Tensor) -> None:
        self.workspaces = [floats, ints]

    def _attend(self, q: Tensor, kv: Tensor, ends: Tensor, indptr: Tensor, indices: Tensor, last: Tensor) -> Tensor:
        counts = indptr.diff().long()
        tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = indices[: indptr[-1]]
        contexts = (counts - 1) * kv.shape[3] + last
        positions = [torch.arange(int(c) - n, int(c)) for c, n in zip(contexts, ends.diff().tolist(), strict=True)]
        batch = AttentionBatch(torch.cat(positions).int(), ends, contexts.int(), tables, kv.shape[3])
        return TorchOps().attention(q.flatten(1), kv, batch, q.shape[1]).view(q.shape)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Mixed batches."""

    def __init__(self, floats: Tensor, kv_layout: str, backend: str) -> None:
        super().__init__(floats, kv_layout)
        assert backend == "fa2"

    def plan(
        self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last: Tensor,
        num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, **dtypes: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal and set(dtypes) == {"q_data_type", "kv_data_type"}
        self.num_plans += 1
        self._planned = qo_indptr.clone(), indptr.clone(), indices, last.clone()

    def run(self, q: Tensor, kv: Tensor) -> Tensor:
        return self._attend(q, kv, *self._planned)


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

    def plan(self, indptr: Tensor, indices: Tensor, last: Tensor, *shape: int, **dtypes: torch.dtype) -> None:
        assert len(shape) == 4 and set(dtypes) == {"q_data_type", "kv_data_type"}
        self._check(indptr, indices, last)
        for buffer, values in zip(self.buffers, (indptr, indices, last), strict=True):
            buffer[: len(values)].copy_(values)

    def _check(self, indptr: Tensor, indices: Tensor, last: Tensor) -> None:
        assert len(last) == self.batch_size, "the batch size is fixed in graphs"
        assert len(indptr) == self.batch_size + 1 and int(indptr[-1]) == len(indices) <= len(self.buffers[1])
        self.num_plans += 1

    def run(self, q: Tensor, kv: Tensor) -> Tensor:
        assert len(q) == self.batch_size
        return self._attend(q, kv, torch.arange(self.batch_size + 1, dtype=torch.int32), *self.buffers)


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper, indptr: Tensor, indices: Tensor, last: Tensor, *shape: int,
    global_override_indptr_cpu: Tensor, **dtypes: torch.dtype,
) -> None:  # fmt: skip
    """Plan without copying: the buffers have the arrays already."""
    assert wrapper.num_plans, "the first plan is the full one"
    assert len(shape) == 4 and set(dtypes) == {"q_data_type", "kv_data_type"}
    assert global_override_indptr_cpu.device.type == "cpu"
    wrapper._check(indptr, indices, last)
    for buffer, values in zip(wrapper.buffers, (indptr, indices, last), strict=True):
        assert torch.equal(buffer[: len(values)], values), "the buffers have not been written"


def modules() -> dict[str, Any]:
    """What takes the place of flashinfer in sys.modules."""
    wrappers = (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper)
    package = SimpleNamespace(**{wrapper.__name__: wrapper for wrapper in wrappers})
    return {"flashinfer": package, "flashinfer.decode": SimpleNamespace(fast_decode_plan=fast_decode_plan)}
