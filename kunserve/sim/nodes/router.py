"""Routers: which of several servers gets a request. Pure, but for what a router remembers of its own decisions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from numpy.random import default_rng


class Load(NamedTuple):
    """What a router sees of a server at the moment of its decision: nothing it sees is stale, as nothing is scraped."""

    num_open: int  # requests sent there that have not ended
    num_waiting: int  # of these, those that are not admitted yet
    kv_usage: float  # share of the KV mapped now that requests use
    num_blocks: int  # of KV mapped now: so many blocks of prompts may be cached there


class Router(Protocol):
    """Chooses a server for each request."""

    def pick(self, loads: Sequence[Load], keys: Sequence[bytes]) -> int:
        """Return the index of the server; `keys`: of the prompt's full blocks, from the beginning on."""


class Least:
    """Picks the server with the fewest open requests; of equal ones the one that was picked longest ago."""

    def __init__(self) -> None:
        self._picks: dict[int, int] = {}
        self._num_picks = 0

    def pick(self, loads: Sequence[Load], keys: Sequence[bytes]) -> int:
        """See `Router.pick`."""
        found = min(range(len(loads)), key=lambda i: (loads[i].num_open, self._picks.get(i, -1), i))
        self._num_picks += 1
        self._picks[found] = self._num_picks
        return found


class Random:
    """Picks a server at random, each as often as the others."""

    def __init__(self, seed: int) -> None:
        self._rng = default_rng([seed, 11])

    def pick(self, loads: Sequence[Load], keys: Sequence[bytes]) -> int:
        """See `Router.pick`."""
        return int(self._rng.integers(len(loads)))


QUEUE, KV, PREFIX = 2.0, 2.0, 3.0  # weights of the scores: those of llm-d's guide to precise prefix-cache routing


class Prefix:
    """Picks the server with the highest score: a short queue, free KV, and the prompt's beginning sent there before.

    As llm-d's endpoint picker adds its scorers up. What is cached where follows from what was sent where, of which as
    many blocks are remembered as a server has: its own cache may keep others.
    """

    def __init__(self) -> None:
        self._sent: dict[int, OrderedDict[bytes, None]] = {}  # the newest last

    def pick(self, loads: Sequence[Load], keys: Sequence[bytes]) -> int:
        """See `Router.pick`."""
        queues = [load.num_waiting for load in loads]
        shortest, longest = min(queues), max(queues)

        def score(i: int) -> float:
            free_queue = (longest - queues[i]) / (longest - shortest) if longest > shortest else 1.0
            return QUEUE * free_queue + KV * (1 - loads[i].kv_usage) + PREFIX * self._share(i, keys)

        found = max(range(len(loads)), key=lambda i: (score(i), -loads[i].num_open, -i))
        self._remember(found, keys, loads[found].num_blocks)
        return found

    def _share(self, server: int, keys: Sequence[bytes]) -> float:
        """Return which share of a prompt's blocks a server has seen, in one piece from the beginning."""
        sent = self._sent.setdefault(server, OrderedDict())
        seen = next((i for i, key in enumerate(keys) if key not in sent), len(keys))
        return seen / max(1, len(keys))

    def _remember(self, server: int, keys: Sequence[bytes], most: int) -> None:
        sent = self._sent.setdefault(server, OrderedDict())
        for key in reversed(keys):  # the beginning is the newest: without it the rest is of no use
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > most:
            sent.popitem(last=False)


_MAKERS: dict[str, Callable[[int], Router]] = {
    "least": lambda seed: Least(),
    "random": Random,
    "prefix": lambda seed: Prefix(),
}
ROUTERS = tuple(_MAKERS)


def make_router(name: str, seed: int) -> Router:
    """Return the router of one of `ROUTERS`."""
    return _MAKERS[name](seed)
