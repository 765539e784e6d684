"""What a budget becomes at launch: chains where a device is too small, or an error with the figures and no trace."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from e2e.engines import assert_idle, generate_all, greedy, running_engine
from e2e.tiny import WIDE_KV, TinyModels, random_prompt
from kunserve.errors import ConfigError
from kunserve.policies import OverloadPolicy

MIB = 1 << 20
LARGER: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
}  # about 13 MiB a layer


async def test_a_model_too_large_for_a_device_starts_as_chains(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Without being told: four devices that hold half of it each are two chains of two. Its weights are dummies."""
    folder = tmp_path / "without-weights"
    folder.mkdir()
    for path in tiny_models.folder("llama", **LARGER).iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    prompts = [random_prompt(10 + 5 * i) for i in range(8)]

    async def tokens(devices: str, memory_mib: int, lengths: list[int]) -> list[list[int]]:
        settings = {"device_memory_bytes": memory_mib * MIB, "max_model_len": 512, "seed": 3}
        async with running_engine(folder, devices, load_format="dummy", **settings) as served:
            assert [len(group.stages) for group in served.engine.groups] == lengths
            generated = await generate_all(served.engine, prompts, greedy(24))
            await assert_idle(served.engine)
            return generated

    assert await tokens("cpu:4", 40, [2, 2]) == await tokens("cpu:1", 100, [1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_memory_bytes": 300 * MIB}, "the weights take 530 MiB .* 1 device.s. have 300 MiB each"),
        (
            {"device_memory_bytes": 600 * MIB, "max_model_len": 8192},
            "one request of --max-model-len 8192 360 MiB of KV; 1 device.s. have 600 MiB each",
        ),
        ({"max_model_len": 9000}, "--max-model-len 9000 is more than 8192: the model has 8192 positions"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 is not served on CPU devices"),
        ({"pipeline_parallel_size": 2}, "chains of 2 devices cannot be made from 1 devices"),
    ],
)
async def test_what_cannot_be_is_refused_with_figures(settings: dict[str, Any], message: str) -> None:
    files = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=message) as caught:
        async with running_engine("smollm2-135m", "cpu:1", **settings):
            pass
    assert "\n" not in caught.value.message
    assert sorted(os.listdir("/proc/self/fd")) == files


async def test_memory_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device alone would fit."""
    monkeypatch.setattr("kunserve.engine.launch.host_machine.available_bytes", lambda: 1000 * MIB)
    message = r"2 device\(s\) of 730 MiB need 1460 MiB: 1000 MiB of host memory are available"
    with pytest.raises(ConfigError, match=message):
        async with running_engine("smollm2-135m", "cpu:2", device_memory_bytes=730 * MIB):
            pass


ONE_COPY: dict[str, Any] = {"device_memory_bytes": 19 * MIB, "max_model_len": 512}


@pytest.mark.parametrize(
    ("devices", "settings", "why"),
    [
        ("cpu:2", ONE_COPY, "One copy of the weights .* fits: nothing can be dropped. Two would fit on 4 devices"),
        (
            "cpu:2",
            {"pipeline_parallel_size": 2},
            "Without --pipeline-parallel-size 2 these devices would hold 2 copies",
        ),
        ("cpu:1", {}, "Two would fit on 2 devices like this one"),
        ("cpu:2", {"num_blocks_override": 32, "max_model_len": 256}, None),
    ],
)
async def test_a_server_that_can_never_drop_says_so_and_what_would_change_it(
    devices: str, settings: dict[str, Any], why: str | None, tiny_models: TinyModels
) -> None:
    with capture_logs() as lines:
        async with running_engine(
            tiny_models.folder("llama", **WIDE_KV, num_hidden_layers=6), devices, **settings
        ) as served:
            copies = served.engine.state()["copies"]
    warnings = [line["because"] for line in lines if line["event"] == "no weights can make room for KV"]
    [loaded] = [line for line in lines if line["event"] == "loaded"]
    assert (loaded["dropped_kv_tokens"] > loaded["kv_tokens"]) == (why is None)  # what drops are worth
    if why is None:
        assert (copies["no_drop"], warnings) == (None, [])
    else:
        assert re.search(why, copies["no_drop"]) and warnings == [copies["no_drop"]]
        assert (copies["now"], copies["at_launch"]) == (1, 1)
        events = [line["event"] for line in lines]
        assert events.index("no weights can make room for KV") == events.index("loaded") + 1


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"overload_policy": OverloadPolicy.RECOMPUTE}, "--overload-policy recompute"), ({"is_pinned": True}, "--pin")],
)
async def test_a_flag_that_leaves_drops_to_operators_is_named_without_a_warning(
    settings: dict[str, Any], flag: str, tiny_models: TinyModels
) -> None:
    with capture_logs() as lines:
        async with running_engine(tiny_models.folder("llama"), "cpu:2", num_blocks_override=512, **settings) as served:
            assert served.engine.state()["copies"]["no_drop"] == (
                f"{flag}: weights are dropped only when an operator asks."
            )
    assert not [line for line in lines if line["event"] == "no weights can make room for KV"]


@pytest.mark.parametrize("broken", ["truncated", "missing", "tokenizer"])
async def test_a_broken_folder_leaves_nothing_open(broken: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny_models.folder("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    match broken:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
    files, maps = len(os.listdir("/proc/self/fd")), _num_pool_maps()
    with pytest.raises(ConfigError):
        async with running_engine(folder, "cpu:2", num_blocks_override=512):
            pass
    assert (len(os.listdir("/proc/self/fd")), _num_pool_maps()) == (files, maps)


async def test_an_engine_that_was_closed_leaves_nothing_open(tiny_models: TinyModels) -> None:
    folder = tiny_models.folder("llama")
    before = _num_pool_maps()  # a test before this one may have lost a device, whose memory stays mapped
    async with running_engine(folder, "cpu:2", num_blocks_override=512) as served:
        await generate_all(served.engine, [random_prompt(5)], greedy(5))
        assert _num_pool_maps() > before
    assert _num_pool_maps() == before
    assert not [thread for thread in asyncio.all_tasks() if thread.get_name() == "engine"]


def _num_pool_maps() -> int:
    """Mappings of device memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:kunserve")
