"""Prompts of a trace that says which of them begin alike: what the prefix cache of a simulation finds them by.

Simulated tokens are all alike, and thousands of prompts of 100,000 tokens have to fit into memory: so nobody makes
token ids that tell prompts apart. A prompt brings the keys of its full blocks instead, made from the hash ids of the
trace as the engine makes them from tokens: equal keys mean equal hash ids from the beginning on.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from kunserve.engine.prefix_cache import KEY_BYTES
from kunserve.sim.traces import HASHED_TOKENS, TraceRow

ANY_TOKEN = 1


def make_prompt(row: TraceRow, number: int, num_tokens: int, block_size: int) -> tuple[list[int], list[bytes]]:
    """Return token ids of the first `num_tokens` of a row's prompt, and the keys of its full blocks.

    What no hash id covers is like no other prompt's (`number`: the row's). It has no keys: the engine makes those, and
    of the block in which the prompt ends, from the tokens, which name the row or the hash id there.
    """
    num_hashed = min(num_tokens, len(row.hash_ids) * HASHED_TOKENS)
    keys: list[bytes] = []
    before = b""
    for start in range(0, num_hashed - block_size + 1, block_size):
        first, last = start // HASHED_TOKENS, (start + block_size - 1) // HASHED_TOKENS
        before = blake2b(before + array("Q", row.hash_ids[first : last + 1]).tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(before)
    num_keyed = len(keys) * block_size
    ends_hashed = num_hashed == num_tokens and num_hashed > num_keyed
    rest = row.hash_ids[-1] if ends_hashed else number
    return [ANY_TOKEN] * num_keyed + [rest % (1 << 32)] * (num_tokens - num_keyed), keys
