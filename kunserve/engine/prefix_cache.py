"""The prefix cache: finds blocks by what is in them, on whichever group they are.

The key of a full block is a hash over its tokens and the key of the block before it, so that equal keys mean equal
tokens from the beginning on. Blocks that requests use and blocks that nobody uses any more are found alike; the
latter are idle: the fleet counts them as free, and takes the one that was not used for longest when it needs one.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from heapq import nsmallest
from itertools import accumulate
from typing import Protocol
from zlib import crc32

from kunserve.engine.blocks.block_table import Block
from kunserve.engine.group import Group
from kunserve.engine.request import Request

NumBehind = Callable[[int], int]
KEY_BYTES = 16  # two different prefixes with one key would give a client another one's KV: not in the age of the world
MOST_LOOKED_AT = 256  # requests that wait, to see what they have in common: 3 ms
# Keys that are made at once for that: 8 ms. To look at eight that are made takes as long as to make one.
MOST_NEW_KEYS = 8192


def extend_keys(request: Request, block_size: int, most: int = sys.maxsize) -> Sequence[bytes]:
    """Return the keys of all full blocks of a request's tokens, or at least of the first `most`; each is made once."""
    keys, tokens = request.block_keys, request.token_ids
    end = min(most, len(tokens) // block_size) * block_size
    for start in range(len(keys) * block_size, end, block_size):
        before = keys[-1] if keys else _digest(b"salt " + request.cache_salt.encode())
        keys.append(_digest(before + array("I", tokens[start : start + block_size]).tobytes()))
    return keys


def num_full(request: Request, block_size: int) -> int:
    """Return how many of its blocks a request has filled."""
    return min(request.num_computed_tokens, len(request.token_ids)) // block_size


def full_keys(request: Request, block_size: int) -> Sequence[bytes]:
    """Return the keys of the blocks that it has filled."""
    return extend_keys(request, block_size)[: num_full(request, block_size)]


def most_found(request: Request, block_size: int) -> int:
    """Return with how many blocks of others a waiting request could begin: the last token has to be computed.

    All have to be if their logits are asked for; and none is if its KV comes back from the host, whole.
    """
    if request.params.num_prompt_logprobs is not None or request.num_computed_tokens:
        return 0
    return (request.num_tokens - 1) // block_size


def is_being_computed(key: bytes, index: int, group: Group) -> bool:
    """Return whether a running request of a group will soon have computed the block of a key, its `index`-th."""
    end = (index + 1) * group.block_size
    return any(
        r.num_computed_tokens < end <= r.num_tokens
        and r.finish_reason is None
        and not (r.is_moving or r.has_failed)
        and extend_keys(r, group.block_size)[index] == key
        for r in group.running
    )


def _sample(sizes: Mapping[Request, int]) -> list[tuple[Request, int]]:
    """Return some requests with their sizes, or all if they are few: any, but the same ones each time.

    Others would need keys that are not made yet.
    """
    picked = nsmallest(MOST_LOOKED_AT, sizes.items(), key=lambda item: crc32(item[0].request_id.encode()))
    num_keys = accumulate(size - len(request.block_keys) * 7 // 8 for request, size in picked)
    return [item for item, number in zip(picked, num_keys, strict=True) if number <= MOST_NEW_KEYS] or picked[:1]


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=KEY_BYTES).digest()


class Listener(Protocol):
    """The receiver of what all groups have cached, taken together: requests come to the server and not to a group."""

    def stored(self, key: bytes, parent: bytes | None, token_ids: Sequence[int], salt: str) -> None:
        """Hear that a first group has this block now. `parent`: the key of the block before it, if there is one."""

    def removed(self, key: bytes) -> None:
        """Hear that the last group which had this block has it no more."""


class PrefixCache:
    """Knows which groups hold the block of a key. It holds nothing itself: the fleet does.

    `num_behind`: how many of the first n blocks are behind the window of what follows them; None: there is no window.
    """

    def __init__(self, num_behind: NumBehind | None = None) -> None:
        self._num_behind = num_behind
        self._holders: dict[bytes, dict[int, Block]] = {}  # key -> group id -> block
        self._version = 0  # of what can be found
        self.listener: Listener | None = None
        self._away = Counter[bytes]()  # keys of blocks on their way to a group

    @property
    def version(self) -> int:
        """Return another number whenever other blocks can be found."""
        return self._version

    @property
    def keys(self) -> frozenset[bytes]:
        """Return the keys of all blocks that can be found in some group, or that are on their way to one."""
        return frozenset([*self._holders, *self._away])

    def add(self, group: Group, block: Block, key: bytes, parent: bytes | None) -> bool:
        """Let a block of a group be found by its key; False, and no change, if another one of that group is.

        `parent`: the key of the block before it.
        """
        holders = self._holders.setdefault(key, {})
        if holders.setdefault(group.group_id, block) is not block:
            return False
        block.key, block.parent = key, parent
        self._version += 1
        return True

    def remove(self, group: Group, block: Block) -> None:
        """Let a block of a group be found no more."""
        if block.key is None:
            return
        holders = self._holders[block.key]
        del holders[group.group_id]
        if not holders:
            del self._holders[block.key]
            self._told(block.key)
        block.key = block.parent = None
        self._version += 1

    def has(self, key: bytes) -> bool:
        """Return whether any group has a block of a key, or gets one."""
        return key in self._holders or key in self._away

    def leave(self, group: Group, block: Block) -> None:
        """Let a block be found no more until it is added to another group: it is on its way, see `came`."""
        assert block.key is not None
        self._away[block.key] += 1
        self.remove(group, block)

    def came(self, key: bytes) -> None:
        """Note that a block is no more on its way: it was added where it came, or it is gone."""
        self._away[key] -= 1
        if not self._away[key]:
            del self._away[key]
        self._told(key)

    def tell_stored(self, request: Request, indices: Sequence[int], block_size: int) -> None:
        """Tell the listener of blocks of a request that a first group has now."""
        if self.listener is None:
            return
        for index in indices:
            tokens = request.token_ids[index * block_size : (index + 1) * block_size]
            parent = request.block_keys[index - 1] if index else None
            self.listener.stored(request.block_keys[index], parent, tokens, request.cache_salt)

    def _told(self, key: bytes) -> None:
        """Tell the listener if nobody has the block of a key any more."""
        if self.listener is not None and key not in self._holders and key not in self._away:
            self.listener.removed(key)

    def get(self, group: Group, key: bytes) -> Block | None:
        """Return the block of a group with this key."""
        return self._holders.get(key, {}).get(group.group_id)

    def find(self, group: Group, keys: Sequence[bytes]) -> tuple[int, list[Block]]:
        """Return with how many of these keys' blocks a request can begin, and those that are not behind its window."""
        number = self.lengths(keys).get(group.group_id, 0)
        found = [self.get(group, key) for key in keys[self._behind(number) : number]]
        return number, [block for block in found if block is not None]

    def num_shared(self, group: Group, keys: Sequence[bytes]) -> int:
        """Return how many blocks a request that begins with these keys need not take: they are used, or behind."""
        number, found = self.find(group, keys)
        return number - len(found) + sum(block.num_refs > 0 for block in found)

    def num_repeated(self, waiting: Iterable[Request], block_size: int) -> int:
        """Estimate how many blocks fewer waiting requests need as they share some: with those who run, or each other.

        As if all joined one group, where whatever windows need is there; blocks that are still being computed are not
        seen. Where many wait, or for long prompts, a sample stands for all: on average, it has less in common.
        """
        sizes = {r: size for r in waiting if (size := most_found(r, block_size))}
        sample = _sample(sizes)
        num_looked_at = sum(size for _, size in sample)
        return self._num_repeated(sample, block_size) * sum(sizes.values()) // max(1, num_looked_at)

    def _num_repeated(self, alike: Sequence[tuple[Request, int]], block_size: int) -> int:
        """Return how many blocks fewer requests need if each counts once, of as many first ones as each one could find.

        It goes on with a request only while the last block is another one's, too: of those that share little, few keys
        are made and looked at.
        """
        num_repeated, first, end = 0, 0, 1
        while alike:
            keys = set[bytes]()
            for request, size in alike:
                its = extend_keys(request, block_size, min(end, size))[first : min(end, size)]
                num_repeated += len(its)
                keys.update(its)
            used = set(filter(self._is_used, keys))
            num_repeated -= len(keys) - len(used)
            ends = [(request.block_keys[end - 1], request, size) for request, size in alike if size > end]
            number = Counter(key for key, _, _ in ends)
            alike = [(request, size) for key, request, size in ends if number[key] > 1 or key in used]
            first, end = end, 2 * end
        return num_repeated

    def _is_used(self, key: bytes) -> bool:
        """Return whether a request of any group uses a block with this key."""
        return any(block.num_refs for block in self._holders.get(key, {}).values())

    def lengths(self, keys: Sequence[bytes]) -> dict[int, int]:
        """Return with how many of these keys' blocks a request can begin, by group id; without groups with none.

        All that it needs are there: of the last ones, as many as its window reaches back.
        """
        lengths: dict[int, int] = {}
        runs: dict[int, int] = {}  # group id -> of the keys so far, the last ones that it has without a gap
        for number, key in enumerate(keys, 1):
            holders = self._holders.get(key, {})
            needed = number - self._behind(number)
            runs = {i: runs.get(i, 0) + 1 for i in holders if needed < number or number == 1 or i in runs}
            lengths.update((i, number) for i, run in runs.items() if run >= needed)
            if not runs and self._num_behind is None:
                break
        return lengths

    def _behind(self, number: int) -> int:
        return 0 if self._num_behind is None else self._num_behind(number)

    def check(self, groups: Sequence[Group], blocks: Collection[Block]) -> None:
        """Assert that a key leads to blocks that are there, on all devices of their group, and know it."""
        devices = {group.group_id: {stage.device for stage in group.stages} for group in groups}
        for key, holders in self._holders.items():
            assert holders
            for group_id, block in holders.items():
                assert block.key == key and block in blocks and block.ids.keys() >= devices[group_id]
