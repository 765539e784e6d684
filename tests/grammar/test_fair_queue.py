from __future__ import annotations

from kunserve.grammar.fair_queue import FairQueue


def order(queue: FairQueue[str], costs: dict[str, float], num_at_a_time: int = 1) -> list[str]:
    """Run everything that waits, so many at a time; each item costs what its first letter says."""
    begun: list[str] = []
    running: list[tuple[str, str]] = []
    while len(queue) or running:
        while len(running) < num_at_a_time and (turn := queue.pop()) is not None:
            running.append(turn)
            begun.append(turn[1])
        owner, item = running.pop(0)
        queue.done(owner, costs[item[0]])
    return begun


def filled(*items: str) -> FairQueue[str]:
    """Items of the owner that their first letter names."""
    queue = FairQueue[str](1.0)
    for item in items:
        queue.push(item[0], item)
    return queue


def test_one_owner_s_come_in_their_order() -> None:
    assert order(filled("a1", "a2", "a3"), {"a": 1.0}) == ["a1", "a2", "a3"]


def test_who_comes_late_does_not_wait_for_all_of_another_s() -> None:
    assert order(filled("a1", "a2", "a3", "b1", "b2"), {"a": 1.0, "b": 1.0}) == ["a1", "b1", "a2", "b2", "a3"]


def test_many_cheap_ones_cost_as_much_time_as_one_dear_one() -> None:
    items = [*(f"a{i}" for i in range(4)), *(f"b{i}" for i in range(20))]
    begun = order(filled(*items), {"a": 1.0, "b": 0.125})
    assert begun[0] == "a0" and begun.index("a1") == 1 + 8  # 1.0 of the one's time, then of the other's


def test_what_runs_counts_although_its_cost_is_not_known() -> None:
    assert order(filled("a1", "a2", "a3", "b1"), {"a": 1.0, "b": 0.1}, num_at_a_time=2)[:2] == ["a1", "b1"]


def test_a_pause_saves_nothing_up() -> None:
    queue = filled("a1", "b1", "a2", "a3", "a4")
    costs = {"a": 1.0, "b": 1.0}
    for _ in range(4):
        owner, item = queue.pop() or ("", "")
        queue.done(owner, costs[item[0]])
    for item in ("b2", "b3", "b4"):  # it has had less, but did not ask
        queue.push("b", item)
    assert order(queue, costs)[:2] != ["b2", "b3"]


def test_an_item_can_be_taken_out() -> None:
    queue = filled("a1", "a2")
    queue.remove("a", "a1")
    assert order(queue, {"a": 1.0}) == ["a2"] and queue.pop() is None
