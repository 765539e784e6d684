from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kunserve.errors import ConfigError
from kunserve.model.card import list_cards, load_card
from kunserve.model.costs import COSTS, cost_file, cost_model, derive, device_kind, device_rates, write_costs
from kunserve.model.layout import weight_units
from kunserve.model.quant.blocks import BLOCKS
from kunserve.model.quant.formats import Formats
from kunserve.planner.cost import TokenSpan

GPUS = ("h100", "a800", "h800")
SMOLLM2, QWEN = load_card("smollm2-135m"), load_card("qwen2.5-14b")


def test_what_was_measured_here_goes_before_what_comes_along(tmp_path: Path) -> None:
    shipped, source = cost_model(SMOLLM2.name, SMOLLM2.config, "cpu", tmp_path)
    assert source.startswith("measured")
    mine = derive(SMOLLM2.config, device_rates()["cpu"])
    path = cost_file(SMOLLM2.name, tmp_path / "costs")
    write_costs(path, "cpu", mine, "mine")
    write_costs(path, "h100", shipped, "another table")
    found, source = cost_model(SMOLLM2.name, SMOLLM2.config, "cpu", tmp_path)
    assert source == "mine" and found.to_dict() == pytest.approx(mine.to_dict(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in list_cards() if name != "smollm2-135m"])
def test_constants_of_gpus_are_in_the_data_and_marked_as_derived(name: str, tmp_path: Path) -> None:
    card, rates = load_card(name), device_rates()
    assert cost_file(name, COSTS).exists()
    for kind in GPUS:
        cost, source = cost_model(name, card.config, kind, tmp_path)
        assert source.startswith("derived") and "datasheet" in source
        assert cost.to_dict() == pytest.approx(derive(card.config, rates[kind]).to_dict(), rel=1e-4)


def test_what_nobody_measured_is_derived(tmp_path: Path) -> None:
    for kind, like in (("cpu", "cpu"), ("h100", "h100"), ("unheard-of", "a800")):
        cost, source = cost_model("my-own/model", QWEN.config, kind, tmp_path)
        assert cost == derive(QWEN.config, device_rates()[like]) and source.startswith("derived")


def test_derived_times_are_those_of_the_roofline() -> None:
    cost = derive(QWEN.config, device_rates()["a800"])
    decode_s = cost.stage_time(48, [TokenSpan(1000, 1, 1)], True, True)
    assert 29.5e9 / 2.039e12 < decode_s < 2 * 29.5e9 / 2.039e12  # reading 29.5 GB of weights
    prefill_s = cost.stage_time(48, [TokenSpan(0, 4096, 1)], True, True)
    assert 4096 * 26e9 / 312e12 < prefill_s < 2 * 4096 * 26e9 / 312e12  # 2 flops for each of 13 G parameters
    assert cost.key_s > 15 * cost.pair_s


@pytest.mark.parametrize(
    ("text", "named"), [("[cpu", "cannot read"), ("[cpu]\npair_s = 1.0", "table cpu"), ("cpu = 3", "table cpu")]
)
def test_a_bad_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    path = cost_file("m", tmp_path / "costs")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as error:
        cost_model("m", SMOLLM2.config, "cpu", tmp_path)
    assert str(path) in error.value.message


def test_kinds_of_devices_by_name() -> None:
    names = ("cpu", "NVIDIA H100 80GB HBM3", "NVIDIA A800-SXM4-80GB", "Some GPU 9000")
    assert [device_kind(name) for name in names] == ["cpu", "h100", "a800", "a800"]


def test_reading_blocks_takes_the_time_of_their_bytes() -> None:
    config, rates = load_card("smollm2-135m").config, device_rates()["cpu"]
    names = [spec.name for unit in weight_units(config, "float32") for spec in unit.tensors if len(spec.shape) == 2]
    plain = derive(config, rates)
    packed = derive(replace(config, formats=Formats(dict.fromkeys(names, BLOCKS["Q4_1"]))), rates)
    assert packed.load_s / plain.load_s == pytest.approx(20 / 128, rel=0.01)
    assert packed.head_load_s / plain.head_load_s == pytest.approx(20 / 128, rel=0.01)
    assert replace(packed, load_s=plain.load_s, head_load_s=plain.head_load_s) == plain
