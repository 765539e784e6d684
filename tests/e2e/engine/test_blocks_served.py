"""Blocks served as they are: the answers of the dequantized weights, to the last bit, whatever regroups meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from tiny_gguf import write_tiny_gguf
from tiny_models import make_tiny_model
from tiny_quantized import write_tiny_mxfp4, write_tiny_quantized
from transition_harness import Answer, again, answer_while, checked_engine, make_requests, regroup_in_order

from kunserve.compute.cpu_ops import has_block_kernels
from kunserve.engine.survive import health
from kunserve.model.card import quantized_as
from kunserve.model.checkpoint import open_weights
from kunserve.model.gguf.prepare import convert_gguf
from kunserve.model.hf_config import load_hf_config
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import expected_shapes

pytestmark = pytest.mark.skipif(not has_block_kernels("auto"), reason="no C compiler")

SETTINGS: dict[str, Any] = {"chunk_bytes": 1 << 16, "max_model_len": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama in Q4_1, tokens in Q8_0": {"kind": Kind.Q4_1, "kinds": {"token_embd": Kind.Q8_0}},
    "qwen2 in Q4_K, layers unlike": {
        "family": "qwen2",
        "kind": Kind.Q4_K,
        "kinds": {"blk.1.ffn_down": Kind.Q6_K, "attn_v": Kind.Q6_K, "blk.0.attn_k": Kind.F32},
    },
    "qwen2 in MXFP4": {"family": "qwen2", "kind": Kind.MXFP4, "num_hidden_layers": 4},  # of 3 a drop frees too little
    "qwen3 in Q5_0": {"family": "qwen3", "kind": Kind.Q5_0, "kinds": {"output.": Kind.BF16}},
    "gemma3 in Q4_0": {
        "family": "gemma3",
        "kind": Kind.Q4_0,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 9,  # of fewer a drop frees too little
        "metadata": {"attention.sliding_window_pattern": 3},
    },
    "mixtral in Q8_0": {"family": "mixtral", "kind": Kind.Q8_0},
    "qwen3-moe in Q4_K": {
        "family": "qwen3-moe",
        "kind": Kind.Q4_K,
        "kinds": {"ffn_down_exps": Kind.Q6_K},
        "moe_intermediate_size": 256,
        "mlp_only_layers": [],
    },
    "phi3 in Q5_1": {"family": "phi3", "kind": Kind.Q5_1, "num_hidden_layers": 6},
}


def assert_equal(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, its in zip(answers, expected, strict=True):
        assert (answer.token_ids, answer.text, answer.finish) == (its.token_ids, its.text, its.finish)
        assert answer.error is its.error is None
        assert [one.logprob for one in answer.logprobs] == [one.logprob for one in its.logprobs]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Companion folders go elsewhere; kernels stay where they were built."""
    from kunserve.model import card

    monkeypatch.setattr(card, "cache_root", lambda: tmp_path / "cache")


@pytest.fixture(autouse=True)
def _slow_devices_are_no_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine they would be overdue, and no drop would merge their groups."""
    monkeypatch.setattr(health, "STEP_FLOOR_S", 60.0)


@pytest.mark.parametrize("name", MODELS)
async def test_answers_are_those_of_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, **MODELS[name])
    convert_gguf(path, tmp_path / "dequantized")
    requests = make_requests(24, longest_prompt=20, most_tokens=9)
    async with checked_engine(tmp_path / "dequantized", "cpu:1", 640, **SETTINGS) as checked:
        expected = await checked.answer_all(again(requests))
    assert len({tuple(answer.token_ids) for answer in expected}) > 12
    for devices, num_blocks in (("cpu:1", 640), ("cpu:2", 128)):
        async with checked_engine(path, devices, num_blocks, **SETTINGS) as checked:
            one_by_one = [await checked.answer(request) for request in again(requests)[:6]]
            assert_equal(one_by_one, expected[:6])
            assert_equal(await checked.answer_all(again(requests)), expected)
            if devices == "cpu:1":
                continue
            for seed in range(3):
                regroup = partial(regroup_in_order, checked, random.Random(seed))
                assert_equal(await answer_while(checked, again(requests), regroup), expected)
                await checked.undo_drops()
            assert checked.num_outcomes("drop", "done") > 0 and checked.num_outcomes("restore", "done") > 0


MOE: dict[str, Any] = {"moe_intermediate_size": 128}
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    **{
        kind: partial(write_tiny_quantized, kind)
        for kind in ("awq", "gptq act-order", "w4a16 asymmetric", "w8a8", "fp8 of blocks")
    },
    "fp8 with experts": partial(write_tiny_quantized, "fp8 of blocks", family="qwen3-moe", **MOE),
    "mxfp4": write_tiny_mxfp4,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
async def test_a_quantized_checkpoint_answers_as_its_dequantized_weights(kind: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[kind](tmp_path)
    requests = make_requests(16, longest_prompt=20, most_tokens=9)
    async with checked_engine(tmp_path / "dequantized", "cpu:1", 640, **SETTINGS) as checked:
        expected = await checked.answer_all(again(requests))
        num_bytes = {unit: checked.engine.memories[0].weights.num_tensor_bytes(unit) for unit in ("layers.0", "embed")}
    async with checked_engine(folder, "cpu:2", 128, **SETTINGS) as checked:
        weights = checked.engine.memories[0].weights
        assert weights.num_tensor_bytes("embed") == num_bytes["embed"]
        assert (weights.num_tensor_bytes("layers.0") < 0.5 * num_bytes["layers.0"]) == (kind != "gptq act-order")
        one_by_one = [await checked.answer(request) for request in again(requests)[:4]]
        assert_equal(one_by_one, expected[:4])
        regroup = partial(regroup_in_order, checked, random.Random(1))
        assert_equal(await answer_while(checked, again(requests), regroup), expected)
        await checked.undo_drops()


@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
async def test_fp8_made_while_loading_answers_as_what_it_stands_for(family: str, tmp_path: Path) -> None:
    """It is made anew at each restore: the same bytes."""
    folder = make_tiny_model(family, tmp_path / "plain", dtype=torch.bfloat16, moe_intermediate_size=32)
    config = quantized_as(load_hf_config(folder), "fp8")
    tensors: dict[str, torch.Tensor] = {}
    source = open_weights(folder, config, "auto")
    for tensor, shape in expected_shapes(config).items():
        source.copy_into(tensor, tensors.setdefault(tensor, torch.empty(shape)))
    dequantized = make_tiny_model(family, tmp_path / "dequantized", moe_intermediate_size=32)
    save_file(tensors, dequantized / "model.safetensors")
    requests = make_requests(16, longest_prompt=20, most_tokens=9)
    async with checked_engine(dequantized, "cpu:1", 640, **SETTINGS) as checked:
        expected = await checked.answer_all(again(requests))
        num_bytes = checked.engine.memories[0].weights.num_tensor_bytes("layers.0")
    async with checked_engine(folder, "cpu:2", 128, quantization="fp8", **SETTINGS) as checked:
        assert checked.engine.memories[0].weights.num_tensor_bytes("layers.0") < 0.5 * num_bytes
        one_by_one = [await checked.answer(request) for request in again(requests)[:4]]
        assert_equal(one_by_one, expected[:4])
        regroup = partial(regroup_in_order, checked, random.Random(1))
        assert_equal(await answer_while(checked, again(requests), regroup), expected)
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "done") > 0 and checked.num_outcomes("restore", "done") > 0


@pytest.mark.parametrize("host_copy", [HostCopy.PINNED, HostCopy.NONE])
async def test_the_host_copy_holds_blocks(host_copy: HostCopy, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, kind=Kind.Q4_1, kinds={"token_embd": Kind.Q8_0})
    requests = make_requests(4, longest_prompt=20, most_tokens=9)
    async with checked_engine(path, "cpu:1", 640, **SETTINGS) as checked:
        expected = await checked.answer_all(again(requests))
    async with checked_engine(path, "cpu:2", 128, host_copy=host_copy, **SETTINGS) as checked:
        weights = checked.engine.memories[0].weights
        stored = sum(weights.num_tensor_bytes(unit) for unit in weights.present)
        assert stored < 0.45 * 4 * sum(p.numel() for p in _parameters(tmp_path / "reference"))
        assert checked.reconfigure.loader.host.kind is host_copy
        await checked.control.drop(is_forced=True)
        await checked.settled()
        assert_equal(await checked.answer_all(again(requests)), expected)
        await checked.undo_drops()
        assert_equal(await checked.answer_all(again(requests)), expected)


def _parameters(folder: Path) -> list[Any]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


async def test_devices_that_do_not_multiply_with_blocks_hold_numbers(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, Kind.Q8_0)
    async with checked_engine(path, "cpu:1", 640, max_model_len=128, dtype="float64") as checked:
        assert not checked.engine.model.formats.by_name
        answers = await checked.answer_all(make_requests(4, longest_prompt=20, most_tokens=9))
        assert all(answer.error is None for answer in answers)
