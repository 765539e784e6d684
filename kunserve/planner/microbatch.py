"""How the work of a chain is shared out to the microbatches in flight, so that no stage waits for another."""

from __future__ import annotations


def decode_share(num_decoding: int, num_stages: int) -> int:
    """Rows that one microbatch of a chain may carry, so that `num_stages` microbatches in flight are balanced.

    At least 1. A chain that put all decoding requests into one microbatch would run one stage at a time.
    """
    assert num_decoding >= 0 and num_stages > 0
    return max(1, -(-num_decoding // num_stages))
