"""Flags to values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kunserve.config import DeviceSpec, EngineConfig, parse_cuda_devices, parse_devices
from kunserve.errors import ConfigError
from kunserve.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("730MiB", 730 << 20),
        ("18GiB", 18 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("2kb", 2000),
        ("4KiB", 4096),
        ("123", 123),
        (" 7 b ", 7),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


def test_a_plain_number_of_gibibytes() -> None:
    assert parse_size("4", "GiB") == 4 << 30
    assert parse_size("100MiB", "GiB") == 100 << 20


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1TiB", "1e9", "12 34", "1.2.3GiB", "0x10", "10 MiB each"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a size: .*730MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MiB"), (730 << 20, "730 MiB"), (10239 << 20, "10239 MiB"), (141 << 30, "141.0 GiB")]
)
def test_sizes_as_people_read_them(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


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
