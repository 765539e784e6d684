"""Call FlashInfer's real Python without a GPU: `flashinfer_host.py`. Its compiled module alone is made up.

Plans and runs of every kind of step go through FlashInfer's own wrappers, with all their checks of arguments, to a
module that keeps the signatures of the compiled one and attends in plain torch: what comes out is compared with the
reference. Prints a line of JSON for each step, and the time of both ways to plan a mixed one. Needs FlashInfer's files:
`pip install --no-deps flashinfer-python==0.6.18.post1 apache-tvm-ffi nvidia-ml-py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import StepBuffers, StepLimits, padding_arrays, step_arrays
from kunserve.compute.cuda.attention import PlannedBatch, StepUploader
from kunserve.compute.cuda.decoder import NO_IDS
from kunserve.compute.cuda.flash_infer import FlashInferAttention
from kunserve.compute.cuda.splits import captured_tiles
from kunserve.compute.ops import AttentionBatch, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.gpu.kv_memory import E4M3, KVShape
from kunserve.model.config import ModelConfig
from kunserve.sizes import ceil_div

BLOCK, WINDOW, DTYPE = 16, 40, torch.bfloat16
TOLERANCE = 2e-2  # of bfloat16: outputs are averages of numbers around 1
LIMITS = StepLimits(2048, 256, 20_000)
PLAIN = ModelConfig("qwen3", 100, 256, 256, 2, 8, 2, 64, 4096)
WINDOWED = replace(PLAIN, window=WINDOW, windowed_layers=(0,))
CASES = {
    "plain": PLAIN,
    "windows": WINDOWED,
    "more KV heads": replace(PLAIN, num_heads=16, num_kv_heads=8),  # so that few requests run at once
    "soft caps": replace(WINDOWED, attention_softcap=5.0, attention_scale=0.2),
    "KV of 8 bits": PLAIN,
    "KV of 8 bits, windows": WINDOWED,
}
EIGHT_BITS = ("KV of 8 bits", "KV of 8 bits, windows")
MIXED = [[(0, 70)], [(70, 71), (0, 130), (5, 6)], [(71, 72), (130, 160), (6, 7), (0, 1)]]  # first and last tokens
DECODING = [[(72, 73), (160, 161), (7, 8)], [(73, 74), (161, 162)]]
DECODING += [[(200 + i, 201 + i) for i in range(60)] + [(900, 901)]]  # more than run at once, one much longer
BUCKETS = (1, 2, 4, 64)
TIMED = {
    "4 prompts": [(0, 512)] * 4,
    "63 decode": [(900, 901)] * 63 + [(0, 512)],
    "255": [(900, 901)] * 255 + [(0, 512)],
}


class HostDriver:
    """The part of `Driver` that buffers of a step ask, in host memory."""

    torch_device, num_multiprocessors = torch.device("cpu"), 132

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def current_stream(self) -> int:
        return 0

    def record(self, stream: int) -> object:
        return object()

    def synchronize_event(self, event: object) -> None:
        return


class MadeUpModule:
    """The compiled module of batch prefill with backend fa2, as its bindings declare it."""

    ragged_run = None  # attention without blocks: not ours

    def plan(
        self, floats: Tensor, ints: Tensor, pinned: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_lens: Tensor,
        total_num_rows: int, batch_size: int, num_qo_heads: int, num_kv_heads: int, page_size: int,
        enable_cuda_graph: bool, head_dim_qk: int, head_dim_vo: int, causal: bool, window_left: int,
        fixed_split_size: int, disable_split_kv: bool, num_colocated_ctas: int, uniform_q_len: int,
    ) -> list[int]:  # fmt: skip
        assert len(floats) >= 128 << 20 and len(ints) == len(pinned) == 8 << 20
        assert all(t.dtype is torch.int32 and t.is_contiguous() for t in (qo_indptr, kv_indptr, kv_lens))
        assert len(qo_indptr) == len(kv_indptr) == batch_size + 1 and total_num_rows == int(qo_indptr[-1])
        counts = kv_indptr.diff()
        assert torch.equal(counts, ceil_div(kv_lens, page_size)), "lengths are not those of the blocks"
        assert not disable_split_kv and uniform_q_len == num_colocated_ctas == 0
        if fixed_split_size != -1:  # parts have places in the graph, and something is split
            places = captured_tiles(batch_size, num_qo_heads, num_kv_heads, head_dim_qk, HostDriver.num_multiprocessors)
            assert enable_cuda_graph and batch_size < int(ceil_div(counts, fixed_split_size).sum()) <= places
        assert num_qo_heads % num_kv_heads == 0 and head_dim_qk == head_dim_vo
        assert causal != enable_cuda_graph  # a step of a graph has one token of each
        return [total_num_rows, batch_size, window_left, *kv_lens.tolist()]

    def paged_run(
        self, floats: Tensor, ints: Tensor, plan_info: Sequence[int], q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, last_page_len: Tensor, out: Tensor,
        lse: Tensor | None, mask_mode: int, layout: int, window_left: int, enable_pdl: bool,
        custom_mask: None, mask_indptr: None, alibi_slopes: object, prefix_len: None, token_pos: None,
        max_item_len: None, key_scales: None, value_scales: None, soft_cap: float, scale: float,
        rope_rcp_scale: float, rope_rcp_theta: float, token_pos_len: int,
    ) -> None:  # fmt: skip
        rows, batch_size, planned_window, *kv_lens = plan_info
        assert len(q) == rows and planned_window == window_left and layout == 1  # HND
        assert len(qo_indptr) == len(kv_indptr) == batch_size + 1 and len(last_page_len) == batch_size
        indptr = kv_indptr.tolist()
        for b, (start, end) in enumerate(pairwise(qo_indptr.tolist())):
            blocks = kv_indices[indptr[b] : indptr[b + 1]].long()
            num = (len(blocks) - 1) * k.shape[2] + int(last_page_len[b])
            assert num == kv_lens[b], "the plan is of other lengths"
            keys, values = (t[blocks].movedim(1, 0).flatten(1, 2)[:, :num].float() for t in (k, v))
            shared = q.shape[1] // len(keys)
            keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
            x = q[start:end].float().transpose(0, 1) @ keys.mT * scale
            x = soft_cap * torch.tanh(x / soft_cap) if soft_cap > 0 else x
            behind = torch.arange(num - (end - start), num)[:, None] - torch.arange(num)
            unseen = (behind < 0) if window_left < 0 else (behind < 0) | (behind > window_left)
            x = x.masked_fill(unseen, float("-inf"))
            out[start:end] = (x.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
            if lse is not None:
                lse[start:end] = torch.log2(x.exp().sum(-1)).transpose(0, 1)


@contextmanager
def without_gpu() -> Iterator[None]:
    """Let FlashInfer take host memory for a GPU's inside, and the module that is made up for its compiled one."""
    import flashinfer.decode
    import flashinfer.prefill

    def empty(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        return real_empty(*size, **more)

    real_empty: Callable[..., Tensor] = torch.empty
    with ExitStack() as stack:
        for target, name, value in (
            (torch, "empty", empty),
            (torch.cuda, "device", lambda _: nullcontext()),
            (flashinfer.prefill, "gen_batch_prefill_module", lambda *_: _Spec()),
            (flashinfer.prefill, "device_support_pdl", lambda _: True),
            (flashinfer.decode, "device_support_pdl", lambda _: True),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


class _Spec:
    def build_and_load(self) -> MadeUpModule:
        return MadeUpModule()


def batch_of(spans: Sequence[tuple[int, int]], window: int | None) -> AttentionBatch:
    """Return a host batch of sequences from first to last token; near ones name no block behind the window."""
    starts, ends = (torch.tensor([span[i] for span in spans], dtype=torch.int32) for i in (0, 1))
    lens = ends - starts
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()])
    width = ceil_div(int(ends.max()), BLOCK)
    tables = torch.arange(len(spans) * width, dtype=torch.int32).view(len(spans), width)
    positions = torch.cat([torch.arange(start, end, dtype=torch.int32) for start, end in spans])
    near = None
    if window is not None:
        front = (starts + 1 - window).clamp(min=0) // BLOCK
        seen = torch.where(torch.arange(width) < front[:, None], 0, tables.flip(0))
        near = AttentionBatch(positions, cu_seqlens, ends, seen.int(), BLOCK)
    return AttentionBatch(positions, cu_seqlens, ends, tables, BLOCK, near=near)


def made(config: ModelConfig, kv_dtype: torch.dtype = DTYPE) -> tuple[StepUploader, FlashInferAttention]:
    """Return what sends and plans steps of a model, by FlashInfer."""
    limits = LIMITS if config.window is None else LIMITS.with_near(config.window, BLOCK)
    buffers = StepBuffers(limits, HostDriver())  # type: ignore[arg-type]
    attention = FlashInferAttention(config, KVShape.of(config, BLOCK, kv_dtype), DTYPE, buffers, BUCKETS[-1])
    uploader = StepUploader(buffers, attention)
    for bucket in BUCKETS:  # as graphs are captured: before anything else
        uploader.upload(padding_arrays(bucket, uploader.num_kinds), bucket, NO_IDS, NO_IDS)
    return uploader, attention


def largest_error(
    config: ModelConfig,
    kv_dtype: torch.dtype,
    uploader: StepUploader,
    spans: Sequence[tuple[int, int]],
    bucket: int | None,
) -> float:
    """Return how far all layers' attention is from the reference in one step, with and without sinks."""
    batch, errors = batch_of(spans, config.window), []
    planned = uploader.upload(step_arrays(batch, bucket, config.window), bucket, NO_IDS, NO_IDS).batch
    random, num_tokens = torch.Generator().manual_seed(len(spans)), len(batch.positions)
    for layer in range(config.num_layers):
        host, device = (batch.near, planned.near) if layer in config.near_layers else (batch, planned)
        assert host is not None and isinstance(device, PlannedBatch)
        num_blocks, heads = int(batch.block_tables.max()) + 1, (config.num_heads, config.head_dim)
        kv = torch.randn(num_blocks, 2, config.num_kv_heads, BLOCK, config.head_dim, generator=random).to(kv_dtype)
        q = torch.randn(bucket or num_tokens, *heads, generator=random).to(DTYPE)
        for sinks in (None, torch.randn(config.num_heads, generator=random)):
            scores, real = Scores.of(config, layer), q[:num_tokens].flatten(1)
            out = device.attend(q, kv, scores, sinks)[:num_tokens].flatten(1)
            expected = TorchOps().attention(real, kv, host, config.num_heads, scores, sinks)
            errors.append(float((out - expected).abs().max()))
    return max(errors)


def plan_us(spans: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Return the least microseconds of this thread to plan a mixed step, by the wrapper and by its module."""
    uploader, attention = made(PLAIN)
    arrays, [planner] = step_arrays(batch_of(spans, None)), attention.planners
    uploader.upload(arrays, None, NO_IDS, NO_IDS)
    least = {}
    for name, plan in (("wrapper", planner.plan_mixed), ("module", planner.plan_mixed_again)):
        seconds = []
        for _ in range(20):
            started = time.thread_time()
            plan(arrays)
            seconds.append(time.thread_time() - started)
        least[name] = round(min(seconds) * 1e6)
    return least


def main() -> None:
    """Run all cases. Exit status 1 if one is wrong, 2 without FlashInfer."""
    if find_spec("flashinfer") is None:
        print("FlashInfer is not installed: see the head of this file", file=sys.stderr)
        sys.exit(2)
    is_right = True
    with torch.inference_mode(), without_gpu():
        for name, config in CASES.items():
            kv_dtype = E4M3 if name in EIGHT_BITS else DTYPE
            uploader, _ = made(config, kv_dtype)
            steps = [(spans, None) for spans in MIXED] + [
                (spans, next(b for b in BUCKETS if b >= len(spans))) for spans in DECODING
            ]
            for spans, bucket in steps:
                error = largest_error(config, kv_dtype, uploader, spans, bucket)
                is_right &= error <= TOLERANCE
                print(json.dumps({"case": name, "tokens": spans, "bucket": bucket, "error": round(error, 5)}))
        for name, spans in TIMED.items():
            print(json.dumps({"plan": name, "us": plan_us(spans)}))
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
