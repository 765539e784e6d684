from __future__ import annotations

import random

import pytest
from planner_oracle import SMOLLM2, SMOLLM2_BUDGET, all_splits, blocks_of, random_model
from seeds import seeds

from kunserve.planner.layer_split import cuts_around, cuts_within, split_layers
from kunserve.planner.snapshot import DeviceView, StageView
from kunserve.sizes import ceil_div


def smollm2_pair(need_tokens: int) -> tuple[tuple[int, int], int]:
    """Lengths of the two stages and the tokens they hold."""
    devices = [DeviceView(i, SMOLLM2_BUDGET) for i in range(2)]
    stages = split_layers(SMOLLM2, devices, ceil_div(need_tokens, SMOLLM2.block_size))
    assert stages is not None
    blocks = min(blocks_of(SMOLLM2, SMOLLM2_BUDGET, s.first_layer, s.last_layer) for s in stages)
    return (stages[0].last_layer, 30 - stages[0].last_layer), blocks * SMOLLM2.block_size


def test_smollm2_alone_holds_4096_tokens() -> None:
    assert blocks_of(SMOLLM2, SMOLLM2_BUDGET, 0, 30) * 16 == 4096


def test_the_need_comes_before_balance() -> None:
    assert smollm2_pair(0) == ((19, 11), 12_288)  # balanced: the head costs as much as 8 layers
    assert smollm2_pair(15_000) == ((17, 13), 15_008)  # as near to balance as the need allows
    assert smollm2_pair(17_000) == ((15, 15), 17_744)
    assert smollm2_pair(99_000) == ((15, 15), 17_744)  # cannot be: the most


@pytest.mark.parametrize("seed", seeds(300))
def test_best_of_all_splits(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    num_stages = rng.randint(1, 4)
    budgets = [rng.randint(5, 90) for _ in range(num_stages)]
    held = [(0, model.num_layers)] * num_stages
    cuts = None
    if num_stages > 1 and rng.random() < 0.5:
        held = [
            (rng.randint(0, model.num_layers // 2), rng.randint(model.num_layers // 2, model.num_layers))
            for _ in range(num_stages)
        ]
        held = sorted(held)
        held[0], held[-1] = (0, held[0][1]), (held[-1][0], model.num_layers)
        cuts = cuts_within(held)
    need = rng.randint(0, 60)
    stages = split_layers(model, [DeviceView(i, b) for i, b in enumerate(budgets)], need, cuts)
    splits = list(all_splits(model, budgets, held))
    if stages is None:
        assert not splits
        return
    ends = tuple(stage.last_layer for stage in stages)
    blocks, time = next((blocks, time) for blocks, time, other in splits if other == ends)
    # Several capacities in chunks may be the same in blocks: the oracle compares what a request sees.
    enough = [split for split in splits if split[0] >= need]
    if enough:
        least = min(time for _, time, _ in enough)
        assert blocks >= need
        assert time == pytest.approx(least)
        assert blocks == max(b for b, t, _ in enough if t == pytest.approx(least))
    else:
        assert blocks == max(b for b, _, _ in splits)
        assert time == pytest.approx(min(t for b, t, _ in splits if b == blocks))


def test_many_devices_and_layers() -> None:
    devices = [DeviceView(i, 4000) for i in range(64)]
    model = SMOLLM2
    assert split_layers(model, devices, 0) is None  # more devices than layers
    stages = split_layers(model, devices[:30], 0)
    assert stages == tuple(StageView(i, i, i + 1) for i in range(30))


def test_cuts_around_leave_every_device_what_it_has() -> None:
    kept = [(0, 9), (17, 24)]
    stages = split_layers(SMOLLM2, [DeviceView(0, 365), DeviceView(2, 365)], 0, cuts_around(kept))
    assert stages is not None
    assert stages[0].last_layer in range(9, 18)


def test_no_split_if_the_weights_do_not_fit() -> None:
    assert split_layers(SMOLLM2, [DeviceView(0, 200)], 0) is None
