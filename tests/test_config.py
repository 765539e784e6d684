"""Flags to values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kunserve.config import DeviceSpec, EngineConfig, parse_cuda_devices, parse_devices
from kunserve.errors import ConfigError


def test_devices() -> None:
    assert parse_devices("cpu:2") == DeviceSpec("cpu", (0, 1))
    assert parse_devices(" cpu ") == parse_devices("cpu:1") == DeviceSpec("cpu", (0,))
    assert len(parse_devices("cpu:64").indices) == 64


@pytest.mark.parametrize(("has_gpu", "meant"), [(False, "cpu:2"), (True, "cuda")])
def test_devices_that_nobody_chose(has_gpu: bool, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert parse_devices("auto").resolved() == parse_devices(meant)
    assert parse_devices("cpu:3").resolved() == parse_devices("cpu:3")


@pytest.mark.parametrize("text", ["", "cpu:0", "cpu:-1", "cpu:65", "cpu:x", "gpu:1", "cpu:1,2", "cpu:9999999999999"])
def test_what_are_no_devices(text: str) -> None:
    with pytest.raises(ConfigError, match="not devices"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 0, "--block-size 0: must be at least 1"),
        ("max_num_batched_tokens", 0, "--max-num-batched-tokens 0"),
        ("max_num_seqs", -1, "--max-num-seqs -1"),
        ("max_num_queued_reqs", 0, "--max-num-queued-reqs 0"),
        ("max_model_len", 1, "--max-model-len 1: must be at least 2"),
        ("num_blocks_override", 0, "--num-gpu-blocks-override 0"),
        ("pipeline_parallel_size", 0, "--pipeline-parallel-size 0"),
        ("watermark", 1.0, "--watermark 1.0: must be at least 0 and less than 1"),
        ("watermark", -0.1, "--watermark -0.1"),
        ("watermark", float("nan"), "--watermark nan"),
    ],
)
def test_numbers_that_cannot_be_meant(field: str, value: float, message: str) -> None:
    change: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError) as caught:
        replace(EngineConfig("m"), **change).check()
    assert caught.value.message.startswith(message)


def test_one_budget_only() -> None:
    EngineConfig("m").check()
    with pytest.raises(ConfigError, match="not both"):
        EngineConfig("m", device_memory_bytes=1, num_blocks_override=1).check()


@pytest.mark.parametrize(
    ("text", "ordinals"),
    [
        ("cuda", ()),
        ("cuda:3", (3,)),
        ("cuda:0,1", (0, 1)),
        (" cuda:0*4 ", (0, 0, 0, 0)),
        ("cuda:1*2,0", (1, 1, 0)),
    ],
)
def test_the_gpus_of_logical_devices(text: str, ordinals: tuple[int, ...]) -> None:
    assert parse_cuda_devices(text) == ordinals


@pytest.mark.parametrize("text", ["cuda:", "cuda:0,", "cuda:a", "cuda:0*0", "cuda:0*65", "cuda:0,0", "gpu:0", "cuda0"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(ConfigError, match="not devices"):
        parse_cuda_devices(text)
