"""Block pool: random operations against a plain model, with `check()` after each."""

from __future__ import annotations

import random

import pytest
from seeds import seeds

from kunserve.engine.blocks.block_pool import BlockPool


@pytest.mark.parametrize("seed", seeds(20))
def test_random_operations(seed: int) -> None:
    rng = random.Random(seed)
    pool, held = BlockPool(30), []
    for _ in range(400):
        action = rng.choice(["alloc", "free", "share", "grow", "limit", "shrink"])
        if action == "alloc":
            wanted, free = rng.randrange(8), pool.num_free
            blocks = pool.alloc(wanted)
            assert (blocks is None) == (wanted > free)
            if blocks is not None:
                assert all(block < pool.limit for block in blocks)
                held.append(blocks)
        elif action == "free" and held:
            pool.free(held.pop(rng.randrange(len(held))))
        elif action == "share" and held:
            shared = rng.choice(held)
            pool.share(shared)
            held.append(list(shared))
        elif action == "grow":
            pool.grow(pool.num_blocks + rng.randrange(4))
        elif action == "limit":
            pool.set_limit(rng.randrange(pool.num_blocks + 1))
        elif action == "shrink":
            target = rng.randrange(pool.num_blocks + 1)
            pool.set_limit(target)
            in_the_way = pool.used_beyond(target)
            assert set(in_the_way) == {b for blocks in held for b in blocks if b >= target}
            if not in_the_way:
                pool.shrink(target)
        pool.check(held)
    for blocks in held:
        pool.free(blocks)
    assert pool.num_used == 0


def test_lowest_ids_first_so_that_the_tail_empties() -> None:
    pool = BlockPool(10)
    first, second = pool.alloc(4), pool.alloc(2)
    assert first == [0, 1, 2, 3] and second == [4, 5]
    pool.free([1, 3])
    assert pool.alloc(3) == [1, 3, 6]


def test_shrinking_under_used_blocks_is_refused() -> None:
    pool = BlockPool(10)
    blocks = pool.alloc(6)
    assert blocks is not None
    with pytest.raises(AssertionError):
        pool.shrink(5)
    pool.free([5])
    pool.shrink(5)
    assert pool.num_blocks == 5 and pool.num_free == 0
    pool.grow(8)
    assert pool.alloc(4) is None and pool.alloc(3) == [5, 6, 7]


def test_check_sees_a_block_that_nobody_admits_to() -> None:
    pool = BlockPool(4)
    blocks = pool.alloc(2)
    assert blocks is not None
    pool.check([blocks])
    with pytest.raises(AssertionError):
        pool.check([blocks[:1]])


def test_beyond_the_limit_go_the_last_ids() -> None:
    pool = BlockPool(6)
    assert pool.alloc(2) == [0, 1]
    pool.grow(10)
    pool.set_limit(6)
    assert sorted(pool.alloc(3, is_beyond_limit=True) or []) == [7, 8, 9]
    assert pool.num_free == 4 and pool.alloc(4) == [2, 3, 4, 5]
    assert pool.alloc(1) is None and pool.alloc(2, is_beyond_limit=True) is None
    assert pool.alloc(1, is_beyond_limit=True) == [6]
    pool.check()
