"""How contexts are split in captured decode steps, against a slow search, and FlashInfer's limits."""

from __future__ import annotations

import random

import numpy as np
import pytest
from seeds import seeds

from kunserve.compute.cuda.splits import captured_tiles, rows_per_tile, split_blocks, tiles_at_once
from kunserve.sizes import ceil_div

NUM_SMS, BLOCK = 132, 16  # of an H100


def split(num_blocks: list[int], num_tiles: int, at_once: int) -> int | None:
    return split_blocks(np.array(num_blocks, np.int32), num_tiles, at_once, BLOCK)


def num_parts(num_blocks: list[int], size: int) -> int:
    return sum(ceil_div(n, size) for n in num_blocks)


def test_places_of_a_graph() -> None:
    assert tiles_at_once(8, NUM_SMS) == 33 and tiles_at_once(32, NUM_SMS) == 8
    assert captured_tiles(64, 32, 8, 128, NUM_SMS) == 64 * 4 // 16 + 63  # llama-8b
    assert captured_tiles(8, 32, 8, 128, NUM_SMS) == 33  # FlashInfer splits so few by itself
    assert captured_tiles(64, 64, 8, 128, NUM_SMS) == 64 * 8 // 16 + 63
    assert [rows_per_tile(group, 128) for group in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]
    assert rows_per_tile(65, 256) == 64


def test_the_longest_context_is_split_so_that_no_part_is_longer_than_the_others() -> None:
    contexts = [64] * 63 + [512]
    assert split(contexts, 79, 33) == 64 and num_parts(contexts, 64) == 71


@pytest.mark.parametrize(
    ("contexts", "num_tiles"),
    [([64] * 64, 79), ([5] * 40 + [8], 60), ([64] * 16 + [900], 33)],
    ids=["as long as each other", "short", "few requests"],
)
def test_flashinfer_plans_by_itself_where_nothing_can_be_gained(contexts: list[int], num_tiles: int) -> None:
    assert split(contexts, num_tiles, 33) is None


@pytest.mark.parametrize("seed", seeds(30))
def test_parts_are_as_short_as_the_places_allow(seed: int) -> None:
    rng = random.Random(seed)
    bucket = rng.choice([32, 64, 96, 256])
    contexts = [min(2000, int(rng.lognormvariate(4, 1)) + 1) for _ in range(rng.randint(bucket // 2 + 1, bucket))]
    contexts += [1] * (bucket - len(contexts))
    num_heads, num_kv_heads = rng.choice([(32, 8), (64, 8), (32, 32), (28, 4), (16, 8)])
    places, at_once = (
        captured_tiles(bucket, num_heads, num_kv_heads, 128, NUM_SMS),
        tiles_at_once(num_kv_heads, NUM_SMS),
    )
    chosen = split(contexts, places, at_once)
    fitting = [size for size in range(128 // BLOCK, max(contexts)) if num_parts(contexts, size) <= places]
    assert chosen == (fitting[0] if fitting and places > at_once else None)
    if chosen is not None:  # else FlashInfer would refuse it, or plan for kernels that merge no parts
        assert bucket < num_parts(contexts, chosen) <= places
