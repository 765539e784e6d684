"""Cached blocks through everything that moves or takes them: what is found is what was computed, block for block.

A model of KV memory without any device: each block of each layer of a device holds the tokens that it was computed
from. Requests begin alike, groups merge, split and shrink in any order, and after each step all that can be found is
compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import cast

import pytest
from groups import LAYERS, make_group
from seeds import seeds

from kunserve.engine.blocks.block_table import Block
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.prefix_cache import extend_keys
from kunserve.engine.regroup.followers import Followers
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.request import Request
from kunserve.gpu.links import Priority
from kunserve.planner.exchange import layer_moves
from kunserve.planner.snapshot import StageView
from kunserve.sampling import SamplingParams

BLOCK_SIZE, NUM_BLOCKS = 4, 24
Tokens = tuple[int, ...]


class KvModel:
    """KV of all devices: the tokens that each block of each layer was computed from, from the request's first on.

    In the place of `Transfers`: `between` copies; `at_copy` is called before it does.
    """

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int, int], Tokens] = {}  # device, layer, block id
        self.of_key: dict[bytes, Tokens] = {}
        self.at_copy: Callable[[], None] = lambda: None

    def blocks_in_turn(self, device: int) -> int:
        """Few, so that it takes many turns."""
        return 3

    async def between(
        self,
        source: int,
        destination: int,
        layers: range,
        read: Sequence[int],
        write: Sequence[int],
        is_wanted: Callable[[], bool],
        priority: Priority,
    ) -> bool:
        """See `Transfers.between`."""
        assert priority == Priority.CACHED_KV
        self.at_copy()
        self.copy(source, destination, layers, read, write)
        return True

    def copy(self, source: int, destination: int, layers: range, read: Sequence[int], write: Sequence[int]) -> None:
        for layer in layers:
            for old, new in zip(read, write, strict=True):
                self.tokens[destination, layer, new] = self.tokens[source, layer, old]

    def compute(self, request: Request, group: Group, first_block: int) -> None:
        """Fill the blocks of a request from `first_block` on."""
        for key, end in zip(extend_keys(request, BLOCK_SIZE), range(4, request.num_tokens + 1, 4), strict=True):
            self.of_key[key] = tuple(request.token_ids[:end])
        table = request.table
        for position, block in list(enumerate(table.blocks, table.num_behind))[
            max(0, first_block - table.num_behind) :
        ]:
            for stage in group.stages:
                for layer in range(stage.first_layer, stage.last_layer):
                    end = (position + 1) * BLOCK_SIZE
                    self.tokens[stage.device, layer, block.ids[stage.device]] = tuple(request.token_ids[:end])

    def holds(self, group: Group, block: Block) -> set[Tokens | None]:
        """What a block of a group holds in all layers: one thing, if it is whole."""
        return {
            self.tokens.get((stage.device, layer, block.ids[stage.device]))
            for stage in group.stages
            for layer in range(stage.first_layer, stage.last_layer)
        }


NUM_STEPS, MOST_STEPS = 150, 1500


class Scene:
    """Three devices with a prefix cache, and what may happen to them."""

    def __init__(self, seed: int, window: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.kv = KvModel()
        groups = [make_group(i, num_blocks=NUM_BLOCKS) for i in range(3)]
        self.fleet = Fleet(groups, has_prefix_cache=True, window=window)
        self.num_behind = 0
        self.followers = Followers(self.fleet, cast(Transfers, self.kv))
        self.prefixes = [[10 * i + j for j in range(self.rng.choice([4, 8, 12]))] for i in range(1, 4)]
        self.num_requests = self.num_found = self.num_convoys = 0

    @property
    def running(self) -> list[tuple[Request, Group]]:
        return [(request, group) for group in self.fleet.groups for request in group.running]

    def check(self) -> None:
        """All that requests hold, and all that they could find, was computed from the right tokens."""
        self.fleet.check(LAYERS)
        assert self.fleet.prefixes is not None
        for group in self.fleet.groups:
            for key, tokens in self.kv.of_key.items():
                if (block := self.fleet.prefixes.get(group, key)) is not None:
                    assert self.kv.holds(group, block) == {tokens}
            for request in group.running:
                table, num_full = request.table, request.num_computed_tokens // BLOCK_SIZE
                self.num_behind += table.num_behind
                for number, block in enumerate(table.blocks[: num_full - table.num_behind], 1 + table.num_behind):
                    assert self.kv.holds(group, block) == {tuple(request.token_ids[: BLOCK_SIZE * number])}

    def admit(self, among: Sequence[Group] | None = None) -> None:
        group = self.rng.choice(among or self.fleet.groups)
        self.num_requests += 1
        prompt = [*self.rng.choice(self.prefixes), *self.rng.choices(range(3), k=self.rng.randrange(1, 9))]
        request = Request(f"r{self.num_requests}", prompt, SamplingParams(max_tokens=99))
        if group.blocks_for(request.num_tokens) > group.num_free and not (
            self.fleet.give_up_followers(group) and group.blocks_for(request.num_tokens) <= group.num_free
        ):
            return
        self.fleet.admit(request, group, finds_prefix=True)
        num_found = request.num_computed_tokens // BLOCK_SIZE
        self.num_found += num_found
        self.kv.compute(request, group, num_found)
        request.num_computed_tokens = request.num_scheduled_tokens = request.num_tokens
        self.fleet.computed(request, group)

    def grow(self) -> None:
        if not (running := self.running):
            return
        request, group = self.rng.choice(running)
        request.token_ids += self.rng.choices(range(3), k=self.rng.randrange(1, 6))
        if self.fleet.allocate(request, group, request.num_tokens):
            self.kv.compute(request, group, request.num_computed_tokens // BLOCK_SIZE)
            request.num_computed_tokens = request.num_scheduled_tokens = request.num_tokens
            self.fleet.computed(request, group)
        else:
            assert group.missing_blocks(request, request.num_tokens) > group.num_free
            self.fleet.release(request)

    def release(self) -> None:
        if running := self.running:
            self.fleet.release(self.rng.choice(running)[0])

    async def merge(self) -> None:
        if len(self.fleet.groups) < 2:
            return
        old = self.rng.sample(self.fleet.groups, 2)
        devices = [stage.device for group in old for stage in group.stages]
        per_stage = LAYERS // len(devices)
        ends = [per_stage * (i + 1) for i in range(len(devices) - 1)] + [LAYERS]
        chain = [StageView(d, per_stage * i, end) for i, (d, end) in enumerate(zip(devices, ends, strict=True))]
        new = self.fleet.make_group(chain, BLOCK_SIZE, None)
        self.followers.merge(old, new)
        for device in devices:
            self.fleet.grow(device, self.fleet.pools[device].num_blocks + 8)
        await self.move([(request, group, new) for group in old for request in group.running], old, [new])

    async def split(self) -> None:
        chains = [group for group in self.fleet.groups if len(group.stages) > 1]
        if not chains:
            return
        old = self.rng.choice(chains)
        for stage in old.stages:
            await self.shrink(old, stage.device)
        parts = [self.fleet.make_group([StageView(s.device, 0, LAYERS)], BLOCK_SIZE, None) for s in old.stages]
        homes = {request: self.rng.choice(parts) for request in old.running}
        self.followers.split(old, homes, parts)
        await self.move([(request, old, home) for request, home in homes.items()], [old], parts)

    async def move(
        self, moving: Sequence[tuple[Request, Group, Group]], old: Sequence[Group], new: Sequence[Group]
    ) -> None:
        """Bring requests, then what follows; some are lost, others come and go meanwhile."""
        tables = [self.fleet.depart(*each) for each in moving]
        self.fleet.regroup(old, new)
        for (request, source, home), table in zip(moving, tables, strict=True):
            if not self.fleet.reserve(request, home) or self.rng.random() < 0.2:
                self.fleet.lose(request)
                continue
            for move in layer_moves([s.view for s in source.stages], [s.view for s in home.stages]):
                to_copy = [b for b in table.blocks if move.source in b.ids]  # others have come with another request
                read, write = [b.ids[move.source] for b in to_copy], [b.ids[move.destination] for b in to_copy]
                self.kv.copy(move.source, move.destination, range(move.first_layer, move.last_layer), read, write)
            self.fleet.arrive(request, home)
            self.check()
            if self.rng.random() < 0.3:
                self.admit(new)

        def meanwhile() -> None:
            self.num_convoys += 1
            match self.rng.choice(["release", "grow", "admit"]):
                case "release":
                    self.release()
                case "grow":
                    self.grow()
                case "admit":
                    self.admit(new)
            self.check()
            if self.rng.random() < 0.05:
                raise OSError("the copy failed")

        self.kv.at_copy = meanwhile
        for group in new:
            await self.followers.bring(group)
            self.check()

    async def shrink(self, group: Group, device: int) -> None:
        """Take the tail of a device's blocks away, as a restore does, and let it grow again."""
        stage = next(stage for stage in group.stages if stage.device == device)
        limit = max(1, stage.pool.num_blocks - self.rng.randrange(16))
        self.fleet.limit(device, limit)
        self.check()
        with self.fleet.emptying(group, stage, limit) as tail:
            layers = range(stage.first_layer, stage.last_layer)
            self.kv.copy(device, device, layers, list(tail.moved), list(tail.moved.values()))
        self.check()
        self.fleet.end_following(group)
        if tail.is_whole:
            self.fleet.shrink(device, limit)
        else:
            self.fleet.grow(device, stage.pool.num_blocks)
        self.check()


@pytest.mark.parametrize("seed", seeds(30))
async def test_what_is_found_is_what_was_computed(seed: int) -> None:
    window = None if seed % 3 else 6
    scene = Scene(seed, window)
    for count in range(MOST_STEPS):
        if count >= NUM_STEPS and scene.num_found and scene.num_convoys:
            break  # enough happened
        match scene.rng.choice(["admit", "admit", "admit", "grow", "release", "release", "merge", "split", "shrink"]):
            case "admit":
                scene.admit()
            case "grow":
                scene.grow()
            case "release":
                scene.release()
            case "merge" if scene.rng.random() < 0.6:
                await scene.merge()
            case "split" if scene.rng.random() < 0.6:
                await scene.split()
            case "shrink":
                group = scene.rng.choice(scene.fleet.groups)
                await scene.shrink(group, scene.rng.choice(group.stages).device)
        scene.check()
    assert scene.num_found and scene.num_convoys and (scene.num_behind > 0) is (window is not None)
    for request, _ in scene.running:
        scene.fleet.release(request)
    for group in scene.fleet.groups:
        scene.fleet.forget_idle(group)
    scene.check()
    assert all(pool.num_used == 0 for pool in scene.fleet.pools.values())


def cached(fleet: Fleet, group: Group, prompt: Sequence[int]) -> int:
    """How many blocks of a prompt a group has."""
    request = Request("q", [*prompt, 0], SamplingParams(max_tokens=1))
    return fleet.prefix_lengths(request).get(group.group_id, 0)


async def test_of_a_prefix_its_window_is_enough() -> None:
    scene = Scene(0, window=6)
    group, prompt = scene.fleet.groups[0], list(range(21))

    def admitted(name: str) -> Request:
        request = Request(name, list(prompt), SamplingParams(max_tokens=9))
        scene.fleet.admit(request, group, finds_prefix=True)
        return request

    first = admitted("first")
    scene.kv.compute(first, group, 0)
    first.num_computed_tokens = first.num_scheduled_tokens = 21
    scene.fleet.computed(first, group)
    assert (len(first.table.blocks), len(group.idle)) == (2, 4)  # of six
    scene.fleet.store(0).forget_oldest(group)
    scene.fleet.store(0).forget_oldest(group)
    second = admitted("second")
    assert second.num_computed_tokens == 20 and second.table.num_behind == 3 and second.table.num_places == 6
    scene.check()


async def test_equal_blocks_of_two_groups_become_one() -> None:
    scene = Scene(0)
    first, second, _ = scene.fleet.groups
    prompts = [list(range(20)), list(range(20, 40))]
    for number, (group, prompt) in enumerate([(first, 0), (second, 0), (second, 1)]):
        request = Request(f"r{number}", prompts[prompt], SamplingParams(max_tokens=9))
        scene.fleet.admit(request, group)
        scene.kv.compute(request, group, 0)
        request.num_computed_tokens = request.num_scheduled_tokens = 20
        scene.fleet.computed(request, group)
    requests = [request for request, _ in scene.running]
    chain = scene.fleet.make_group([StageView(0, 0, 4), StageView(10, 4, 8)], BLOCK_SIZE, None)
    scene.followers.merge([first, second], chain)
    tables = {request: request.table for request in requests}
    for request, source in [(r, g) for r, g in scene.running if g in (first, second)]:
        scene.fleet.depart(request, source, chain)
    scene.fleet.regroup([first, second], [chain])
    for request, source in zip(requests, [first, second, second], strict=True):
        assert scene.fleet.reserve(request, chain)
        there, here = (10, 0) if source is first else (0, 10)
        layers = range(4, 8) if source is first else range(4)
        table = tables[request]
        read, write = [b.ids[here] for b in table.blocks], [b.ids[there] for b in table.blocks]
        scene.kv.copy(here, there, layers, read, write)
        scene.fleet.arrive(request, chain)
        scene.check()
    assert scene.fleet.num_shared == 5 and requests[0].table.blocks == requests[1].table.blocks
    assert chain.num_used == 10


async def test_the_hottest_stay_when_memory_shrinks() -> None:
    scene = Scene(0)
    group = scene.fleet.groups[0]
    prompts = [[100 * i + j for j in range(16)] for i in range(6)]  # four blocks each: all blocks there are
    for i in [0, 1, 2, 3, 4, 5, 1, 0]:  # the last are the hottest
        request = Request(f"r{i}", prompts[i] + [0], SamplingParams(max_tokens=9))
        scene.fleet.admit(request, group, finds_prefix=True)
        scene.kv.compute(request, group, request.num_computed_tokens // BLOCK_SIZE)
        request.num_computed_tokens = request.num_scheduled_tokens = 17
        scene.fleet.computed(request, group)
        scene.fleet.release(request)
    assert [cached(scene.fleet, group, prompt) for prompt in prompts] == [4, 4, 3, 4, 4, 4]
    with scene.fleet.pause([group]):
        scene.fleet.limit(0, 10)
        with scene.fleet.emptying(group, group.stages[0], 10) as tail:
            scene.kv.copy(0, 0, range(LAYERS), list(tail.moved), list(tail.moved.values()))
        scene.fleet.end_following(group)
        scene.fleet.shrink(0, 10)
    scene.check()
    assert [cached(scene.fleet, group, prompt) for prompt in prompts] == [4, 4, 0, 0, 0, 2]
