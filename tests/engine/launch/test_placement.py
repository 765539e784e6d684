"""Where models go at launch: chains as short as the model fits, and errors that name the figures."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from groups import shape_of, views

from kunserve.config import EngineConfig
from kunserve.engine.launch.placement import (
    Placement,
    budget_chunks,
    choose_placement,
    model_shape,
    near_kv,
    with_share_to_begin,
)
from kunserve.errors import ConfigError
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.card import find_config
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


def shape_of_gemma(share: float | None, max_model_len: int | None) -> ModelShape:
    """gemma-3-12b, in whose layers 5 of 6 have a window of 1,024 tokens."""
    model = find_config("gemma-3-12b")
    settings = EngineConfig("gemma-3-12b", windowed_kv_share=share, max_model_len=max_model_len)
    kv_shape = KVShape.of(model, 16, torch.bfloat16)
    near = near_kv(model, settings, kv_shape, 2 * MIB)
    return model_shape(model, kv_shape, 2 * MIB, near=near)


def test_a_share_that_follows_begins_with_the_most() -> None:
    """As much as layers that see all have, unless the length that is asked for would not fit: then it does just so."""
    for max_model_len, gib in ((None, 80), (131_072, 80), (131_072, 40)):
        shape = shape_of_gemma(None, max_model_len)
        devices, is_required = views(1, gib * GIB, shape), max_model_len is not None
        placement = choose_placement(
            shape, devices, max_model_len=131_072, is_len_required=is_required, devices_per_group=None
        )
        begun = with_share_to_begin(shape, devices, placement)
        assert begun.near is not None and placement.max_model_len == 131_072
        check(placement, begun, devices)
        if gib == 80:
            assert begun.near.share == 1000
        else:
            assert begun.near.share < 1000
            with pytest.raises(AssertionError):
                check(placement, begun.with_share(begun.near.share + 1), devices)
            with pytest.raises(ConfigError):  # of one kind
                choose_placement(
                    shape_of_gemma(1.0, max_model_len),
                    devices,
                    max_model_len=131_072,
                    is_len_required=True,
                    devices_per_group=None,
                )


def test_a_share_that_is_given_stays() -> None:
    shape = shape_of_gemma(0.25, None)
    devices = views(1, 80 * GIB, shape)
    placement = choose_placement(shape, devices, max_model_len=8192, is_len_required=True, devices_per_group=None)
    begun = with_share_to_begin(shape, devices, placement)
    assert begun == shape and shape.near is not None and shape.near.is_fixed and shape.near.share == 250
