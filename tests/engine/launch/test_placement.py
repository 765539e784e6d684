"""Where models go at launch: chains as short as the model fits, and errors that name the figures."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from groups import shape_of, views

from kunserve.engine.launch.placement import Placement, budget_chunks, choose_placement
from kunserve.errors import ConfigError
from kunserve.planner.snapshot import DeviceView, ModelShape, capacity_blocks

GIB, MIB = 1 << 30, 1 << 20


def check(placement: Placement, shape: ModelShape, devices: list[DeviceView]) -> None:
    """Every device once, every group all layers in order, within budget, with room for the longest request."""
    used = [stage.device for group in placement.groups for stage in group]
    assert sorted(used) == [view.device for view in devices]
    budgets = {view.device: view.budget_chunks for view in devices}
    for group in placement.groups:
        assert group[0].first_layer == 0 and group[-1].last_layer == shape.num_layers
        assert all(a.last_layer == b.first_layer for a, b in pairwise(group))
        assert capacity_blocks(shape, budgets, group) * shape.block_size >= placement.max_model_len


def lengths(placement: Placement) -> list[int]:
    return [len(group) for group in placement.groups]


@pytest.mark.parametrize(
    ("card", "num_devices", "gib", "expected"),
    [
        ("llama-8b", 8, 80, [1] * 8),
        ("llama-70b", 8, 80, [2] * 4),  # 131 GiB of weights: two devices are the fewest
        ("llama-70b", 8, 140, [1] * 8),
        ("llama-70b", 8, 40, [4] * 2),
        ("llama-70b", 7, 80, [3, 2, 2]),  # nobody idles
        ("qwen2.5-14b", 2, 24, [2]),
        ("smollm2-135m", 3, 1, [1] * 3),
    ],
)
def test_chains_are_as_short_as_the_model_fits(card: str, num_devices: int, gib: int, expected: list[int]) -> None:
    shape = shape_of(card)
    devices = views(num_devices, gib * GIB, shape)
    placement = choose_placement(shape, devices, max_model_len=4096, is_len_required=True, devices_per_group=None)
    assert sorted(lengths(placement), reverse=True) == expected
    check(placement, shape, devices)


def test_a_length_that_is_asked_for_makes_chains_longer() -> None:
    shape = shape_of("llama-8b")
    devices = views(4, 17 * GIB, shape)  # 15 GiB of weights each: about 2 GiB of KV, 128 KiB per token
    short = choose_placement(shape, devices, max_model_len=8192, is_len_required=True, devices_per_group=None)
    long = choose_placement(shape, devices, max_model_len=65536, is_len_required=True, devices_per_group=None)
    assert lengths(short) == [1] * 4 and lengths(long) == [2] * 2
    check(long, shape, devices)


def test_a_length_that_is_only_a_default_shrinks_to_what_fits() -> None:
    shape = shape_of("llama-8b")
    devices = views(4, 17 * GIB, shape)
    placement = choose_placement(shape, devices, max_model_len=65536, is_len_required=False, devices_per_group=None)
    assert lengths(placement) == [1] * 4
    assert 8192 < placement.max_model_len < 65536
    check(placement, shape, devices)


def test_a_default_length_does_not_shrink_to_nothing_while_devices_are_left() -> None:
    shape = shape_of("llama-8b")
    devices = views(2, shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes + 64 * MIB, shape)
    # a chunk of KV per layer: 512 tokens
    placement = choose_placement(shape, devices, max_model_len=65536, is_len_required=False, devices_per_group=None)
    assert lengths(placement) == [2]
    check(placement, shape, devices)


def test_the_flag_decides_how_long_chains_are() -> None:
    shape = shape_of("smollm2-135m")
    devices = views(4, 2 * GIB, shape)
    for size in (1, 2, 4):
        placement = choose_placement(shape, devices, max_model_len=4096, is_len_required=True, devices_per_group=size)
        assert lengths(placement) == [size] * (4 // size)
        check(placement, shape, devices)


def test_chains_longer_than_devices_or_layers_are_refused() -> None:
    shape = shape_of("smollm2-135m")
    for num_devices, size in ((2, 3), (40, 31)):
        with pytest.raises(ConfigError, match=f"chains of {size} devices .* {num_devices} devices and 30 layers"):
            choose_placement(
                shape, views(num_devices, GIB, shape), max_model_len=64, is_len_required=False, devices_per_group=size
            )


@pytest.mark.parametrize("is_len_required", [True, False])
def test_too_little_memory_names_the_figures(is_len_required: bool) -> None:
    shape = shape_of("llama-70b")
    weights_gib = shape.weight_chunks(0, 80) * 2 * 10 // 1024 / 10  # rounded down
    with pytest.raises(ConfigError) as caught:
        choose_placement(
            shape,
            views(2, 60 * GIB, shape),
            max_model_len=4096,
            is_len_required=is_len_required,
            devices_per_group=None,
        )
    message = caught.value.message
    assert "\n" not in message
    assert f"the weights take {weights_gib:.1f} GiB" in message and 131 < weights_gib < 140
    assert "--max-model-len 4096 1280 MiB of KV" in message
    assert "2 device(s) have 60.0 GiB each" in message


def test_weights_that_fit_without_a_request_are_too_little() -> None:
    shape = shape_of("smollm2-135m", torch.float32)
    devices = [DeviceView(0, shape.weight_chunks(0, 30) + 29)]  # a chunk short of one per layer
    with pytest.raises(ConfigError, match="too little memory"):
        choose_placement(shape, devices, max_model_len=4096, is_len_required=False, devices_per_group=None)


def test_budgets() -> None:
    shape = shape_of("smollm2-135m", torch.float32)
    weights = shape.weight_chunks(0, 30)
    assert budget_chunks(shape, 730 * MIB, None, 0) == 365
    assert budget_chunks(shape, None, 256, 0) == weights + 30 * 3  # 24 KiB a block
    assert budget_chunks(shape, None, 257, 0) == weights + 30 * 4
    assert budget_chunks(shape, None, None, 100 * MIB) == weights + 50
