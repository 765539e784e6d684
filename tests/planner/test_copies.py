"""When nothing can be dropped, and whether what is said to change it would."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from groups import shape_of, views
from planner_oracle import SMOLLM2, random_model
from seeds import seeds

from kunserve.engine.launch.placement import choose_placement, num_copies
from kunserve.errors import ConfigError
from kunserve.planner.copies import shrunk, why_no_drop
from kunserve.planner.snapshot import DeviceView, ModelShape, StageView
from kunserve.sizes import format_size

GIB, MIB = 1 << 30, 1 << 20


def why(shape: ModelShape, devices: Sequence[DeviceView], devices_per_group: int | None = None) -> str | None:
    """What a launch on these devices would say."""
    groups = choose_placement(
        shape, devices, max_model_len=4096, is_len_required=True, devices_per_group=devices_per_group
    ).groups
    return why_no_drop(
        shape, devices, groups, devices_per_group, partial(num_copies, max_model_len=4096, is_len_required=True)
    )


def test_two_copies_that_gain_from_a_merge_need_no_words() -> None:
    assert why(shape_of("llama-8b"), views(2, 20 * GIB, shape_of("llama-8b"))) is None
    assert why(shape_of("llama-70b"), views(4, 80 * GIB, shape_of("llama-70b"))) is None  # two chains of two


@pytest.mark.parametrize(
    ("card", "num_devices", "gib", "advice"),
    [
        ("llama-70b", 2, 80, "4 devices like these, or on these 2 with weights of at most 78.5 GiB."),
        ("llama-70b", 8, 20, "14 devices like these, or on these 8 with weights of at most 77.1 GiB."),
        ("llama-70b", 3, 72, "4 devices like these, or on these 3 with weights of at most 70.6 GiB."),
        ("llama-70b", 1, 160, "2 devices like this one."),
    ],
)
def test_one_copy_says_what_would_make_it_two(card: str, num_devices: int, gib: int, advice: str) -> None:
    shape = shape_of(card)
    assert why(shape, views(num_devices, gib * GIB, shape)) == (
        f"One copy of the weights (131.5 GiB) fits: nothing can be dropped. Two would fit on {advice}"
    )


def test_small_weights_are_given_in_mib() -> None:
    shape = shape_of("smollm2-135m", torch.float32)
    text = why(shape, [DeviceView(0, 400)])
    assert text is not None and "One copy of the weights (530 MiB) fits" in text


def test_a_flag_that_makes_one_chain_of_all_devices_is_named() -> None:
    shape = shape_of("llama-8b")
    text = why(shape, views(8, 40 * GIB, shape), devices_per_group=8)
    assert text is not None and text.endswith("Without --pipeline-parallel-size 8 these devices would hold 8 copies.")


def test_copies_beside_which_there_is_plenty_of_kv() -> None:
    shape = shape_of("smollm2-135m")
    text = why(shape, views(2, 60 * GIB, shape))
    assert text == (
        "2 copies of the weights fit, but no two groups would hold 8% more KV as one: nothing is dropped for so little."
    )


def test_fewer_layers_than_devices_of_two_groups() -> None:
    shape = replace(SMOLLM2, num_layers=1)
    text = why(shape, [DeviceView(i, 400) for i in range(2)])
    assert text == "1 layers cannot be spread over the devices of two groups: nothing can be dropped."


def copies(shape: ModelShape, devices: Sequence[DeviceView], devices_per_group: int | None = None) -> int:
    return num_copies(shape, devices, devices_per_group, max_model_len=64, is_len_required=True)


@pytest.mark.parametrize("seed", seeds(150))
def test_the_advice_is_what_a_launch_would_do(seed: int) -> None:
    """So many devices hold two copies and no fewer do; weights so large fit twice, and any larger do not."""
    rng = random.Random(seed)
    model, devices = one_copy(rng)
    length = next(n for n in range(1, 9) if copies(model, devices[:n]))
    devices = devices[:length]
    text = why_no_drop(model, devices, [[StageView(0, 0, model.num_layers)]], None, copies)
    assert text is not None and text.startswith("One copy")
    budget = devices[0].budget_chunks
    enough = [
        n for n in range(length + 1, 2 * length + 1) if copies(model, [DeviceView(i, budget) for i in range(n)]) > 1
    ]
    found = re.search(r"on (\d+) devices", text)
    assert (int(found[1]) if found else None) == (min(enough) if enough else None)
    fitting = [k for k in range(1, model.layer_chunks) if copies(shrunk(model, k), devices) > 1]
    if fitting:
        most = shrunk(model, max(fitting)).weight_chunks(0, model.num_layers) * model.chunk_bytes
        assert f"at most {format_size(most)}" in text
    else:
        assert "at most" not in text


def one_copy(rng: random.Random) -> tuple[ModelShape, list[DeviceView]]:
    """A model and eight equal devices that hold a part of it each, or little more than it."""
    while True:
        model = random_model(rng, max_layers=9)
        budget = rng.randint(1, model.weight_chunks(0, model.num_layers) * 2)
        devices = [DeviceView(i, budget) for i in range(8)]
        if any(copies(model, devices[:n]) == 1 for n in range(1, 9)):
            return model, devices


def test_what_does_not_fit_is_no_copy() -> None:
    shape = shape_of("llama-70b")
    with pytest.raises(ConfigError):
        choose_placement(
            shape, views(1, 80 * GIB, shape), devices_per_group=None, max_model_len=4096, is_len_required=True
        )
    assert num_copies(shape, views(1, 80 * GIB, shape), None, max_model_len=4096, is_len_required=True) == 0
