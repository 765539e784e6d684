"""Which replica has seen the beginning of a body: by its bytes, whatever API they are of.

A server finds a prefix by its tokens; here only bytes are known, and clients write the same conversation the same way
each time. A body is known by the hashes of its first 256 bytes, its first 512, and so on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b

PIECE = 256  # bytes
MOST_PIECES = 128  # of one body: 32 KiB, about 8000 tokens
MOST_KEYS = 1 << 16  # that are remembered
LOAD_OF_ALL = 8.0  # requests more than the least loaded replica that one with the whole body may have


def keys_of(body: bytes) -> list[bytes]:
    """Return a key for each prefix of a body, the shortest first."""
    digest, keys = blake2b(digest_size=8), []
    for start in range(0, min(len(body) // PIECE, MOST_PIECES) * PIECE, PIECE):
        digest.update(body[start : start + PIECE])
        keys.append(digest.digest())
    return keys


class Prefixes:
    """Remembers where bodies went; the oldest are forgotten."""

    def __init__(self) -> None:
        """Begin: nothing is known."""
        self._replicas: OrderedDict[bytes, Hashable] = OrderedDict()

    def went(self, keys: Iterable[bytes], replica: Hashable) -> None:
        """Note which replica a body went to."""
        for key in keys:
            self._replicas[key] = replica
            self._replicas.move_to_end(key)
        while len(self._replicas) > MOST_KEYS:
            self._replicas.popitem(last=False)

    def shares(self, keys: Sequence[bytes]) -> dict[Hashable, float]:
        """Return which share of a body replicas have seen, those that have seen any."""
        found: dict[Hashable, float] = {}
        for i, key in enumerate(keys, 1):
            if (replica := self._replicas.get(key)) is None:
                break
            found[replica] = i / len(keys)
        return found


def ranked(loads: dict[Hashable, float], shares: dict[Hashable, float]) -> list[Hashable]:
    """Return replicas, the best first: what a replica has of the body makes up for so much of its load."""
    return sorted(loads, key=lambda replica: loads[replica] - LOAD_OF_ALL * shares.get(replica, 0.0))
