"""Attention of a captured decode step by shape: which kernel, and into which parts contexts are split. Pure.

The kernel is FlashInfer's for tensor cores, whatever the shape. The one for CUDA cores is slower from 4 query heads for
each KV head on (SGLang's pull request 8624, with Llama 3 8B), and below no faster (vLLM's 23214, FlashInfer's 520,
on an H100). FlashInfer's own advice, to take it up to 4 (SGLang's 2169), is older. It is made for some counts of heads
only, and would be a second module to compile.

How contexts are split depends on the shape. FlashInfer's plan (PrefillSplitQOKVIndptr in scheduler.cuh, 0.6.18) splits
as long as all parts run at once, two tiles on each multiprocessor: with 8 KV heads on an H100, 33 requests. With more
it splits none, and the step waits for its longest context. But a graph has places for as many tiles as the rows of its
bucket could make in requests of unequal lengths; a decode step needs one for each request, and `split_blocks` gives the
others to the longest contexts.
"""

from __future__ import annotations

from kunserve.compute.cuda.arrays import Ints
from kunserve.sizes import ceil_div

MIN_SPLIT_TOKENS = 128  # FlashInfer splits no finer


def tiles_at_once(num_kv_heads: int, num_sms: int) -> int:
    """Return how many tiles of queries, each with all KV heads, FlashInfer takes a GPU to run at a time."""
    return 2 * num_sms // num_kv_heads


def rows_per_tile(group: int, head_dim: int) -> int:
    """Return how many rows a tile has where each request has one token; `group`: query heads of a KV head."""
    return 16 if group <= 16 else 64 if group <= 64 or head_dim >= 256 else 128


def captured_tiles(bucket: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int) -> int:
    """Return for how many tiles the graph of a batch size has places."""
    group = num_heads // num_kv_heads
    unequal = ceil_div(bucket * group, rows_per_tile(group, head_dim)) + bucket - 1
    return max(tiles_at_once(num_kv_heads, num_sms), unequal)


def split_blocks(num_blocks: Ints, num_tiles: int, at_once: int, block_size: int) -> int | None:
    """Return into parts of how many blocks contexts are split at most; None: as FlashInfer's plan does by itself.

    num_blocks: of each request (B,), those of padding, too. As small as `num_tiles` places allow. Never so large that
    no context is split: FlashInfer then plans for kernels that do not merge parts, and a graph's do.
    """
    longest = int(num_blocks.max())
    if num_tiles <= at_once:
        return None
    low = max(ceil_div(MIN_SPLIT_TOKENS, block_size), ceil_div(int(num_blocks.sum()), num_tiles))
    high = longest
    while low < high:
        middle = (low + high) // 2
        if int(ceil_div(num_blocks, middle).sum()) > num_tiles:
            low = middle + 1
        else:
            high = middle
    return low if low < longest else None
