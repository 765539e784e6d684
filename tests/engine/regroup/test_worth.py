"""Whether a merge is worth it, by what is seen of an engine that runs."""

from __future__ import annotations

from groups import make_group, make_request, make_scheduler

from kunserve.engine.regroup.worth import Worth
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.gpu.links import Links
from kunserve.planner.drop import plan_drop
from kunserve.planner.overload import Thresholds
from kunserve.planner.plan import Merge, NewGroup, RestorePlan, Split
from kunserve.planner.price import BUBBLE
from kunserve.planner.snapshot import DeviceView, GroupView, ModelShape, Snapshot, StageView

SHAPE = ModelShape(8, 8, 0, 0, tied=True, kv_block_bytes=1 << 20, chunk_bytes=1 << 20, block_size=4)
BUDGET = 8 * (8 + 16)  # chunks: the weights, and 16 blocks of KV beside them; a merged group holds 40
NEED = 40


class Scene:
    """Two groups, some requests that run and some that wait."""

    def __init__(self, num_running: int, num_waiting: int, num_prompt: int = 8, links: Links | None = None) -> None:
        self.groups = [make_group(i) for i in range(2)]
        self.scheduler: Scheduler = make_scheduler(*self.groups)
        self.worth = Worth(self.scheduler.fleet, self.scheduler, links or Links(1e9), SHAPE, Thresholds())
        for i in range(num_running):
            self.scheduler.fleet.admit(make_request(f"running {i}", num_prompt, 8), self.groups[i % 2])
        for i in range(num_waiting):
            self.wait(f"waiting {i}", num_prompt)

    def wait(self, name: str, num_prompt: int) -> None:
        self.scheduler.waiting.append(make_request(name, num_prompt, 8))

    def merges(self, now_s: float, demand_blocks: int, answer_tokens: float = 8.0) -> list[Merge]:
        """Return what is begun of the plan for as many blocks as two merged groups hold."""
        devices = tuple(DeviceView(10 * i, BUDGET) for i in range(2))
        views = [
            GroupView(group.group_id, tuple(stage.view for stage in group.stages), group.num_used)
            for group in self.groups
        ]
        snapshot = Snapshot(0, SHAPE, devices, tuple(views))
        plan = plan_drop(snapshot, NEED)
        assert len(plan.merges) == 1 and plan.added_blocks == 8
        return self.worth.merges(now_s, snapshot, plan, demand_blocks, answer_tokens)


def test_many_that_wait_are_worth_a_short_pause() -> None:
    scene = Scene(num_running=8, num_waiting=10)
    for group in scene.groups:
        group.step_s = 0.1
    assert scene.merges(1.0, demand_blocks=60)


def test_a_burst_that_has_only_begun_its_prompts_is_worth_it_too() -> None:
    """Hardly a token has come: what a step takes does not depend on that."""
    scene = Scene(num_running=16, num_waiting=40)
    for now_s in (0.0, 0.3, 0.6):
        scene.worth.look(now_s)
    assert all(group.step_s is None for group in scene.groups)  # nothing has come back at all
    assert scene.merges(0.7, demand_blocks=200)


def test_nobody_is_paused_for_long_to_save_one_a_short_wait() -> None:
    scene = Scene(num_running=16, num_waiting=1, links=Links(1e6))  # all KV moves in two minutes and more
    assert not scene.merges(1.0, demand_blocks=33)


def test_a_queue_that_drains_before_a_merge_would_pay_is_let_drain() -> None:
    def merges(num_leaving: int) -> list[Merge]:
        scene = Scene(num_running=16, num_waiting=40, links=Links(20e6))
        for group in scene.groups:
            group.step_s = 0.1
        for i in range(9):
            scene.worth.look(i * 0.5)
            for _ in range(num_leaving):
                scene.scheduler.waiting.popleft()
        return scene.merges(4.5, demand_blocks=40)

    assert merges(num_leaving=0) and not merges(num_leaving=4)


def test_one_huge_prompt_is_one_request() -> None:
    """By the mean of all it would count as many, each of which would be saved the wait."""
    scene = Scene(num_running=16, num_waiting=0, links=Links(20e6))
    scene.wait("huge", 4 * 30)
    assert not scene.merges(1.0, demand_blocks=62)
    many = Scene(num_running=16, num_waiting=15, links=Links(20e6))
    assert many.merges(1.0, demand_blocks=62)


def test_there_is_nothing_to_gain_where_demand_falls_below_what_there_is() -> None:
    scene = Scene(num_running=16, num_waiting=40)
    for i in range(9):
        scene.worth.look(i * 0.5)
        for _ in range(4):
            scene.scheduler.waiting.popleft()
    assert not scene.merges(4.5, demand_blocks=10)


class Chain:
    """A chain of two devices, and the plan that splits it."""

    def __init__(self) -> None:
        self.group = make_group(0, num_stages=2)
        self.scheduler = make_scheduler(self.group)
        self.worth = Worth(self.scheduler.fleet, self.scheduler, Links(1e9), SHAPE, Thresholds())
        halves = [NewGroup((StageView(10 + i, 0, SHAPE.num_layers),), (16,), (), None) for i in range(2)]
        self.plan = RestorePlan(0, (Split(0, (halves[0], halves[1])),))

    def run_one(self) -> None:
        self.scheduler.fleet.admit(make_request("running", 8, 8), self.group)
        self.group.step_s = 0.12

    def is_split_after(self, calm_s: float) -> bool:
        splits = self.worth.splits(self.plan, calm_s)
        assert splits in ([], list(self.plan.splits))
        return bool(splits)


def test_a_split_waits_until_the_calm_has_lasted_as_long_as_its_pause_takes_to_pay_back() -> None:
    chain = Chain()
    assert chain.is_split_after(0.0)  # nobody runs: nothing is lost
    chain.run_one()
    moved_s = 2 * 8 * (1 << 20) / 4 / 1e9  # two blocks of eight layers: a half of their KV, both ways at once
    even_s = (0.12 + moved_s / 2) / BUBBLE
    assert not chain.is_split_after(0.99 * even_s)
    assert chain.is_split_after(1.01 * even_s)


def test_a_split_pays_sooner_where_chains_have_lost_much() -> None:
    chain, calm_s = Chain(), 0.3 * 0.12 / BUBBLE
    chain.run_one()
    chain.worth.look(0.0)
    assert not chain.is_split_after(calm_s)
    for _ in range(2):
        chain.group.occupancy.enter(0, 1.0)
    chain.worth.look(300.0)  # two microbatches were at the first stage all the time
    assert chain.is_split_after(calm_s)
