"""Microbenchmark of the CPU kernels on one pinned core: GFLOP/s or GB/s, against torch with one thread.

    python scripts/bench/kernels/bench_cpu_ops.py [--core 1] [--quick] [--cflags=-mno-avx512f]

Shapes are SmolLM2-135M's. Weights and KV are read from memory, not from caches (as in serving): each timed run passes
over at least 32 MiB of them. Shown is the median CPU time of the one thread, ours and torch's by turns: the speed of a
shared core varies by 1.4 times, which a best of n would hide. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from math import prod
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kunserve.compute.cpu_kernels import load_kernels
from kunserve.compute.cpu_ops import KV_DTYPES, CpuOps
from kunserve.compute.ops import AttentionBatch, Ops, rope_table
from kunserve.compute.torch_ops import TorchOps
from kunserve.model.quant.linear import Linear
from kunserve.sizes import ceil_div

HUGE_PAGE_BYTES = 2 << 20
COLD_BYTES = 32 << 20
HIDDEN, INNER, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 576, 1536, 49152, 30, 9, 3, 64, 16
Multiply = Callable[[Tensor, Tensor], Tensor]
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LINEARS = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (VOCAB, HIDDEN),
}


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random tensor on 2 MiB pages where the system has them, as device memory is."""
    num_bytes = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=dtype)
    first = -flat.data_ptr() % HUGE_PAGE_BYTES // dtype.itemsize
    return flat[first : first + prod(shape)].view(shape).normal_(std=0.05)


def median_s(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median CPU seconds of a call of each, after one to warm up; by turns, as the machine changes."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            start = time.thread_time()
            run()
            if i:
                seconds.append(time.thread_time() - start)
    return [median(seconds) for seconds in times]


def bench_linear(ops: CpuOps, rows: list[int], repeats: int) -> list[dict[str, float | str]]:
    """Time each matrix at each number of rows."""
    results: list[dict[str, float | str]] = []
    print(f"{'linear':8} {'N':>6} {'K':>5} {'M':>4} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'torch GFLOP/s':>14}")
    for name, (N, K) in LINEARS.items():
        weights = [huge(N, K) for _ in range(max(1, COLD_BYTES // (N * K * 4)))]
        for M in rows:
            if name == "head" and M > 64:
                continue
            x = torch.randn(M, K)

            def run(call: Multiply, weights: list[Tensor] = weights, x: Tensor = x) -> None:
                for weight in weights:
                    call(x, weight)

            seconds = median_s(
                [partial(run, lambda x, w: ops.linear(x, Linear.of(w))), partial(run, F.linear)], repeats
            )
            ours, theirs = (s / len(weights) for s in seconds)
            flops, gbps = 2e-9 * M * N * K, N * K * 4e-9 / ours
            print(
                f"{name:8} {N:6} {K:5} {M:4} {ours * 1e6:9.1f} {flops / ours:8.1f} {gbps:6.1f} {flops / theirs:14.1f}",
                flush=True,
            )
            results.append(
                {
                    "op": name,
                    "M": M,
                    "us": ours * 1e6,
                    "gflops": flops / ours,
                    "gbps": gbps,
                    "torch_gflops": flops / theirs,
                }
            )
    return results


def sequences(contexts: list[int], num_new: int, first_block: int) -> AttentionBatch:
    """Make a batch of sequences with these contexts, each with `num_new` new tokens at its end; blocks are shuffled."""
    counts = [ceil_div(n, BLOCK_SIZE) for n in contexts]
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    order = torch.randperm(sum(counts)).int() + first_block
    for row, end, count in zip(tables, accumulate(counts), counts, strict=True):
        row[:count] = order[end - count : end]
    return AttentionBatch(
        positions=torch.cat([torch.arange(n - num_new, n) for n in contexts]).int(),
        cu_seqlens_q=(torch.arange(len(contexts) + 1) * num_new).int(),
        context_lens=torch.tensor(contexts).int(),
        block_tables=tables,
        block_size=BLOCK_SIZE,
    )


def bench_attention(ops: CpuOps, repeats: int, dtype: torch.dtype = torch.float32) -> list[dict[str, float | str]]:
    """Decode and prefill attention, over enough layers' KV (of `dtype`) to be cold."""
    cases = {
        "decode 16 x 463": ([463] * 16, 1),
        "prefill 256 after 0": ([256], 256),
        "prefill 256 after 1000": ([1256], 256),
    }
    results: list[dict[str, float | str]] = []
    kind = str(dtype).removeprefix("torch.")
    print(f"\n{'attention, KV in ' + kind:24} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'torch us':>9}")
    for name, (contexts, num_new) in cases.items():
        num_blocks = sum(ceil_div(n, BLOCK_SIZE) for n in contexts)
        kv_bytes = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
        shape, num_layers = (num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), ceil_div(COLD_BYTES, kv_bytes)
        kvs = [huge(*shape, dtype=dtype) for _ in range(num_layers)]
        batch = sequences(contexts, num_new, 0)
        qkv = torch.randn(len(batch.positions), QKV)
        layers = kvs if num_new == 1 else kvs[:2]

        def run(which: Ops, layers: list[Tensor] = layers, qkv: Tensor = qkv, batch: AttentionBatch = batch) -> None:
            for kv in layers:
                which.attention(qkv, kv, batch, HEADS)

        ours, theirs = (s / len(layers) for s in median_s([partial(run, ops), partial(run, TorchOps())], repeats))
        pairs = sum(num_new * (2 * n - num_new + 1) // 2 for n in contexts)
        gflops, gbps = 4e-9 * pairs * HEADS * HEAD_DIM / ours, kv_bytes * 1e-9 / ours
        print(f"{name:24} {ours * 1e6:9.1f} {gflops:8.1f} {gbps:6.1f} {theirs * 1e6:9.1f}", flush=True)
        row: dict[str, float | str] = {
            "op": name,
            "kv": kind,
            "us": ours * 1e6,
            "gflops": gflops,
            "gbps": gbps,
            "torch_us": theirs * 1e6,
        }
        results.append(row)
    return results


def bench_model(ops: Ops, rows: list[int], repeats: int, context: int = 200) -> list[dict[str, float | str]]:
    """Time a decode step (30 layers and head) with `context` tokens per sequence, and its floor: bytes read once."""
    shapes = {"norm": (2, HIDDEN), **LINEARS}
    weights = [{name: huge(*shape) for name, shape in shapes.items() if name != "head"} for _ in range(LAYERS)]
    head, rope = (
        huge(VOCAB, HIDDEN),
        rope_table(HEAD_DIM, 1e5 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), 2048, torch.float32),
    )
    num_blocks = max(rows) * ceil_div(context, BLOCK_SIZE)
    kvs = [huge(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in range(LAYERS)]
    weight_bytes = 4 * (head.numel() + sum(w.numel() for layer in weights for w in layer.values()))
    results: list[dict[str, float | str]] = []
    print(f"\n{'decode step':12} {'M':>4} {'ms':>8} {'tokens/s':>9} {'GB/s':>6}")
    for M in rows:
        batch, x0 = sequences([context] * M, 1, 0), torch.randn(M, HIDDEN)

        def step(batch: AttentionBatch = batch, x0: Tensor = x0) -> Tensor:
            x = x0
            for layer, kv in zip(weights, kvs, strict=True):
                qkv = ops.linear(ops.rms_norm(x, layer["norm"][0], 1e-5), Linear.of(layer["qkv"]))
                ops.rotate_and_append(qkv, rope, kv, batch)
                x = ops.linear(ops.attention(qkv, kv, batch, HEADS), Linear.of(layer["o"]), residual=x)
                inner = ops.act_and_mul(
                    ops.linear(ops.rms_norm(x, layer["norm"][1], 1e-5), Linear.of(layer["gate_up"]))
                )
                x = ops.linear(inner, Linear.of(layer["down"]), residual=x)
            return ops.linear(x, Linear.of(head))

        (seconds,) = median_s([step], repeats)
        gbps = (weight_bytes + 2 * 4 * M * context * KV_HEADS * HEAD_DIM * LAYERS) * 1e-9 / seconds
        print(f"{'':12} {M:4} {seconds * 1e3:8.2f} {M / seconds:9.1f} {gbps:6.1f}", flush=True)
        results.append({"op": "decode step", "M": M, "ms": seconds * 1e3, "tokens_per_s": M / seconds, "gbps": gbps})
    return results


def bench_calls(ops: CpuOps, repeats: int) -> dict[str, float]:
    """Time a call of each operation on next to nothing, in microseconds: what the binding itself costs."""
    x, weight, kv = torch.randn(1, 24), torch.randn(4, 24), torch.zeros(1, 2, 1, 1, 8)
    rope, batch = torch.zeros(1, 8), sequences([1], 1, 0)
    matrix = Linear.of(weight)
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: ops.linear(x, matrix),
        "rms_norm": lambda: ops.rms_norm(x, weight[0], 1e-5),
        "silu_and_mul": lambda: ops.act_and_mul(x),
        "rotate_and_append": lambda: ops.rotate_and_append(x, rope, kv, batch),
        "attention": lambda: ops.attention(x, kv, batch, 1),
    }  # fmt: skip

    def many(call: Callable[[], object]) -> None:
        for _ in range(1000):
            call()

    seconds = median_s([partial(many, call) for call in calls.values()], repeats)
    results = {name: s * 1e3 for name, s in zip(calls, seconds, strict=True)}
    print("\nus per call:", ", ".join(f"{name} {us:.2f}" for name, us in results.items()), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--cflags", default="", help="further compiler flags, separated by spaces")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops = CpuOps(load_kernels(tuple(args.cflags.split())))
    rows, repeats = ([1, 8, 16, 128], 7) if args.quick else ([1, 2, 4, 8, 16, 32, 64, 128, 256], 11)
    result = {
        "linear": bench_linear(ops, rows, repeats),
        "attention": [row for dtype in KV_DTYPES for row in bench_attention(ops, repeats, dtype)],
        "decode": bench_model(ops, [m for m in rows if m <= 32], repeats),
        "call_us": bench_calls(ops, repeats),
    }
    print(json.dumps({"bench": "cpu_ops", "cflags": args.cflags, **result}))


if __name__ == "__main__":
    main()
