"""The fleet: random verbs in any order, with `check()` after each; and that nobody else writes what it owns."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from groups import LAYERS, make_group, make_request
from seeds import seeds

import kunserve
from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.planner.snapshot import StageView

OWNED = {"group_id", "table", "is_moving", "running", "is_admitting", "num_pauses", "_epoch"}
POOL_VERBS = {"alloc", "free", "grow", "set_limit", "shrink"}


def ids(request: Request) -> set[tuple[int, int]]:
    return {(device, block) for device, blocks in request.table.ids.items() for block in blocks}


def chain_of(*groups: Group) -> list[StageView]:
    """All devices of some groups, in one chain of equal stages."""
    devices = [stage.device for group in groups for stage in group.stages]
    per_stage = LAYERS // len(devices)
    return [StageView(device, i * per_stage, (i + 1) * per_stage) for i, device in enumerate(devices)]


@pytest.mark.parametrize("seed", seeds(20))
def test_every_block_has_one_holder_whatever_is_asked_in_whatever_order(seed: int) -> None:
    rng = random.Random(seed)
    fleet = Fleet([make_group(i, num_stages=rng.choice([1, 2]), num_blocks=24) for i in range(3)])
    expected: list[tuple[Group, BlockTable]] = []
    for number in range(300):
        group = rng.choice(fleet.groups)
        action = rng.choice(["admit", "grow", "release", "expect", "extend", "hand over", "give up", "empty the tail"])
        request = rng.choice(group.running) if group.running else None
        if action == "admit":
            new = make_request(f"r{number}", rng.randrange(1, 20), 9)
            if group.blocks_for(new.num_tokens) <= group.num_free:
                fleet.admit(new, group)
                assert new in group.running and new.num_blocks == group.blocks_for(new.num_tokens)
        elif action == "grow" and request is not None:
            before, wanted = request.num_blocks, request.num_blocks + rng.randrange(4)
            is_possible = wanted - before <= group.num_free
            assert fleet.allocate(request, group, 4 * wanted) == is_possible
            assert request.num_blocks == (wanted if is_possible else before)
        elif action == "release" and request is not None:
            fleet.release(request)
            assert request.group_id is None and not request.block_tables and request not in group.running
        elif action == "expect":
            expected.append((group, fleet.expect(group)))
        elif action == "extend" and expected:
            to, table = rng.choice(expected)
            before, wanted, num_free = len(table.blocks), len(table.blocks) + rng.randrange(4), to.num_free
            assert fleet.extend(table, to, wanted) == (wanted - before <= num_free)
        elif action == "hand over" and request is not None and expected:
            to, table = expected[-1]
            if to is not group and len(table.blocks) >= request.num_blocks:
                expected.pop()
                fleet.hand_over(request, to, table)
                assert request.table is table and request in to.running and request not in group.running
        elif action == "give up" and expected:
            fleet.expect_no_more(*expected.pop(rng.randrange(len(expected))))
        elif action == "empty the tail":
            empty_a_tail(fleet, group, rng)
        fleet.check(LAYERS)
    for group, table in expected:
        fleet.expect_no_more(group, table)
    for request in [request for group in fleet.groups for request in group.running]:
        fleet.release(request)
    assert all(pool.num_used == 0 for pool in fleet.pools.values())


def empty_a_tail(fleet: Fleet, group: Group, rng: random.Random) -> None:
    stage, limit = rng.choice(group.stages), rng.randrange(1, 24)
    fleet.limit(stage.device, limit)
    is_failing = rng.random() < 0.3
    before = {request: list(request.table.ids[stage.device]) for request in group.running}
    try:
        with fleet.emptying(group, stage, limit) as tail:
            fleet.check(LAYERS)
            if group.running and rng.random() < 0.3:
                before.pop(request := rng.choice(group.running))
                fleet.release(request)
            if is_failing:
                raise ValueError
    except ValueError:
        assert all(list(request.table.ids[stage.device]) == blocks for request, blocks in before.items())
    else:
        for request, blocks in before.items():
            assert list(request.table.ids[stage.device]) == [tail.moved.get(block, block) for block in blocks]
    fleet.limit(stage.device, stage.pool.num_blocks)


@pytest.mark.parametrize("seed", seeds(10))
def test_a_merge_and_a_split_take_all_requests_along(seed: int) -> None:
    rng = random.Random(seed)
    first, second = make_group(0, num_blocks=16), make_group(1, num_blocks=16)
    fleet = Fleet([first, second])
    for i in range(rng.randrange(2, 8)):
        fleet.admit(make_request(f"r{i}", rng.randrange(1, 13), 9), rng.choice([first, second]))
    held = {request: ids(request) for group in fleet.groups for request in group.running}

    chain = fleet.make_group(chain_of(first, second), first.block_size, None)
    for device in (0, 10):
        fleet.grow(device, 40)
    for old in (first, second):
        for request in list(old.running):
            fleet.depart(request, old, chain)
            assert request.is_moving and not request.block_tables
    fleet.regroup([first, second], [chain])
    assert (fleet.groups, fleet.epoch, fleet.num_running) == ([chain], 1, len(held))
    for request in chain.running:
        assert fleet.reserve(request, chain)
        fleet.check(LAYERS)
        fleet.arrive(request, chain)
        fleet.check(LAYERS)
        assert ids(request) > held[request] and len(request.block_tables) == 2

    held = {request: ids(request) for request in chain.running}
    parts = [fleet.make_group([StageView(device, 0, LAYERS)], 4, None) for device in (0, 10)]
    for request in list(chain.running):
        fleet.depart(request, chain, rng.choice(parts))
    fleet.regroup([chain], parts)
    for part in parts:
        for request in part.running:
            assert fleet.reserve(request, part)  # it has blocks everywhere
            fleet.arrive(request, part)  # and leaves the other device
            fleet.check(LAYERS)
            assert ids(request) < held[request]


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    small, large = make_group(0, num_blocks=2), make_group(1, num_blocks=16)
    fleet = Fleet([small, large])
    fleet.admit(request := make_request("r", 20, 9), large)
    chain = fleet.make_group(chain_of(large, small), 4, None)
    fleet.depart(request, large, chain)
    fleet.regroup([small, large], [chain])
    assert not fleet.reserve(request, chain) and fleet.pools[0].num_used == 0
    fleet.check(LAYERS)
    fleet.lose(request)
    fleet.check(LAYERS)
    assert all(pool.num_used == 0 for pool in fleet.pools.values())


def test_a_shared_block_can_be_found_while_all_who_hold_it_are_on_their_way() -> None:
    """Its KV came with the first of them, which has ended since."""
    fleet = Fleet([make_group(0), make_group(1)], has_prefix_cache=True)
    old = list(fleet.groups)
    requests = [make_request(f"r{i}", 9, 9) for i in range(3)]
    for request in requests[:2]:
        fleet.admit(request, old[0], finds_prefix=True)
        request.num_computed_tokens = request.num_scheduled_tokens = request.num_tokens
        fleet.computed(request, old[0])
    assert fleet.num_shared == 2
    chain = fleet.make_group(chain_of(*old), 4, None)
    for request in requests[:2]:
        fleet.depart(request, old[0], chain)
    fleet.regroup(old, [chain])
    assert all(fleet.reserve(request, chain) for request in requests[:2])
    fleet.arrive(requests[0], chain)
    fleet.release(requests[0])
    fleet.check(LAYERS)
    fleet.admit(requests[2], chain, finds_prefix=True)
    assert requests[2].num_cached_tokens == 8
    fleet.arrive(requests[1], chain)
    fleet.check(LAYERS)
    for request in requests[1:]:
        fleet.release(request)
    fleet.check(LAYERS)
    assert len(chain.idle) == 2 and chain.num_used == 0


def test_check_sees_a_block_that_no_table_holds() -> None:
    fleet = Fleet([make_group()])
    fleet.admit(make_request("r", 9, 9), fleet.groups[0])
    fleet.check(LAYERS)
    assert fleet.pools[0].alloc(1) is not None
    with pytest.raises(AssertionError, match="not what requests hold"):
        fleet.check(LAYERS)


def writes(tree: ast.AST) -> Iterator[str]:
    """What a module writes of what the fleet owns: attributes that it sets or changes, and verbs of block pools."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            for part in ast.walk(target) if isinstance(target, ast.expr) else ():
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and part.attr in OWNED:
                    yield ast.unparse(part)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner.endswith(".running") and node.func.attr in ("append", "remove", "clear", "insert", "pop"):
                yield ast.unparse(node.func)
            if owner.endswith(("pool", "pools", "]")) and "pool" in owner and node.func.attr in POOL_VERBS:
                yield ast.unparse(node.func)


def test_nobody_else_writes_where_a_request_is() -> None:
    package = Path(kunserve.__file__).parent
    written = {
        str(path.relative_to(package)): found
        for path in sorted((package / "engine").rglob("*.py"))
        if (found := sorted(set(writes(ast.parse(path.read_text())))))
    }
    assert {Path(path).name for path in written} == {"fleet.py", "block_store.py"}, written
    assert not any("running" in what or what.split(".")[-1] in OWNED for what in written["engine/block_store.py"])
