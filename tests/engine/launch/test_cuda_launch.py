"""`--devices cuda` from the flags to tokens, on GPUs that are not there: launch, serve, drop, restore, close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from e2e.engines import assert_idle, generate, greedy
from fake_cuda import FakeCuda
from fake_gpus import ACTIVATIONS, MIB, Gpus
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from tiny_models import VOCAB_SIZE, make_tiny_model
from tiny_quantized import write_tiny_mxfp4, write_tiny_quantized

from kunserve import server
from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.launch.cuda_machine import GRAPH_BYTES, CudaOptions
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.errors import ConfigError, EngineError
from kunserve.model.card import quantized_as
from kunserve.model.checkpoint import open_weights
from kunserve.model.hf_config import load_hf_config
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import expected_shapes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def drivers(gpus: Gpus) -> list[FakeCuda]:
    return gpus.opened


@asynccontextmanager
async def serving(folder: Path, seen: list[tuple[str, float]] | None = None, **settings: Any) -> AsyncIterator[Served]:
    defaults: dict[str, Any] = {"devices": parse_devices("cuda:0*2"), "dtype": "float32"}
    config = EngineConfig(
        str(folder),
        block_size=8,
        max_model_len=200,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        is_pinned=True,
        **defaults | settings,
    )
    served = await launch(config, "tiny", lambda text, share: seen.append((text, share)) if seen is not None else None)
    try:
        await served.engine.start()
        yield served
    finally:
        await served.engine.stop()
        await served.close()


async def until_settled(served: Served) -> None:
    """Wait until no transition is under way."""
    while tasks := served.control.tasks:
        await asyncio.wait(set(tasks))


async def assert_same_tokens_through_drop_and_restore(served: Served) -> None:
    """Two groups become a chain and come apart again under requests that run; no token changes."""
    engine, num_groups = served.engine, len(served.engine.groups)
    expected = [await generate(engine, prompt(i), greedy(40)) for i in range(4)]
    streams = [asyncio.create_task(generate(engine, prompt(i), greedy(40))) for i in range(4)]
    while sum(len(group.running) for group in engine.groups) < 4:
        await engine.signals.next_commit()
    await engine.drop()
    assert sorted(len(group.stages) for group in engine.groups) == [1] * (num_groups - 2) + [2]
    await until_settled(served)
    await engine.restore()
    assert [len(group.stages) for group in engine.groups] == [1] * num_groups
    assert await asyncio.gather(*streams) == expected
    await until_settled(served)
    await assert_idle(engine)


def assert_same_weights(served: Served) -> None:
    """Both devices have all units again, and the same bytes in them."""
    first, second = (memory.weights for memory in served.engine.memories)
    assert first.present == second.present == list(first.chunks_of_unit) and not first.unfilled + second.unfilled
    assert all(torch.equal(first.content(unit), second.content(unit)) for unit in first.present)


def prompt(i: int) -> list[int]:
    return [3 + (7 * i + k) % (VOCAB_SIZE - 3) for k in range(4 + 9 * i)]


@pytest.mark.parametrize("host_copy", [HostCopy.PINNED, HostCopy.MAPPED, HostCopy.NONE])
async def test_from_the_flags_to_tokens_through_drop_and_restore(
    tiny: Path, drivers: list[FakeCuda], host_copy: HostCopy
) -> None:
    seen: list[tuple[str, float]] = []
    async with serving(tiny, seen, device_memory_bytes=24 * MIB, host_copy=host_copy) as served:
        engine = served.engine
        assert isinstance(engine.executor, CudaExecutor)
        assert [m.device.name for m in engine.memories] == ["cuda:0.0", "cuda:0.1"]
        assert sum(len(driver.pinned_ranges) for driver in drivers) == int(host_copy is HostCopy.PINNED)
        shares = [share for text, share in seen if text == "loading weights"]
        assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) >= 4
        await assert_same_tokens_through_drop_and_restore(served)


@pytest.mark.parametrize("devices", ["cuda", "cuda:0,1"])
@pytest.mark.parametrize("are_peers", [True, False])
@pytest.mark.parametrize("host_copy", [HostCopy.MAPPED, HostCopy.NONE])
async def test_two_gpus_directly_or_through_host_memory(
    tiny: Path, gpus: Gpus, devices: str, are_peers: bool, host_copy: HostCopy
) -> None:
    gpus.count, gpus.are_peers = 2, are_peers
    settings: dict[str, Any] = {"devices": parse_devices(devices), "host_copy": host_copy}
    async with serving(tiny, device_memory_bytes=24 * MIB, **settings) as served:
        assert [m.device.name for m in served.engine.memories] == ["cuda:0", "cuda:1"]
        assert served.machine.device_name == "GPU 0 that is not there"
        assert [view.island for view in served.control.snapshot().devices] == [0, 0 if are_peers else 1]
        await assert_same_tokens_through_drop_and_restore(served)
        (restore,) = (t for t in served.control.reconfigure.transitions.remembered if t.kind == "restore")
        assert restore.weight_sources.keys() == {"mate" if host_copy is HostCopy.NONE else "host"}
        assert_same_weights(served)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("host_copy", "are_peers"), [(HostCopy.PINNED, True), (HostCopy.NONE, True), (HostCopy.NONE, False)]
)
async def test_weights_come_back_in_whatever_order_streams_go_on(
    tiny: Path, gpus: Gpus, are_peers: bool, host_copy: HostCopy
) -> None:
    """What was dropped is restored from the host or from the other GPU, while work waits in its streams."""
    gpus.count, gpus.are_peers, gpus.are_async = 2, are_peers, True
    settings: dict[str, Any] = {"devices": parse_devices("cuda:0,1"), "host_copy": host_copy}
    async with serving(tiny, device_memory_bytes=24 * MIB, **settings) as served:
        await assert_same_tokens_through_drop_and_restore(served)
        assert_same_weights(served)


async def test_four_devices_on_one_gpu(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny, device_memory_bytes=24 * MIB, devices=parse_devices("cuda:0*4")) as served:
        assert [m.device.name for m in served.engine.memories] == [f"cuda:0.{i}" for i in range(4)]
        budgets = {m.device.num_chunks * m.device.chunk_bytes for m in served.engine.memories}
        assert budgets == {24 * MIB}
        await assert_same_tokens_through_drop_and_restore(served)


@pytest.mark.parametrize("utilization", [0.92, 0.7])
async def test_the_memory_is_what_a_full_step_leaves(
    tiny: Path, drivers: list[FakeCuda], utilization: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    forward = CudaDecoder.forward

    def seen(self: CudaDecoder, first: int, last: int, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        steps.append((len(x), len(rest[1])))
        return forward(self, first, last, x, *rest, **more)

    monkeypatch.setattr(CudaDecoder, "forward", seen)
    async with serving(tiny, gpu_memory_utilization=utilization) as served:
        total = 1 << 30
        expected = int(total * utilization) // 2 - ACTIVATIONS - GRAPH_BYTES
        for memory in served.engine.memories:
            budget = memory.device.num_chunks * memory.device.chunk_bytes
            assert expected - memory.device.chunk_bytes < budget <= expected
        assert steps == [(48, 8)]  # the full token budget, all sampled
        measured = drivers[2]  # opened for the step at full token budget, and closed
        assert len(drivers) == 3 and measured.is_clean() and measured.calls["create"] > 0
    assert drivers[0].is_clean()


async def test_a_number_of_blocks_is_met_or_refused(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny, num_blocks_override=64, enforce_eager=True) as served:
        block_bytes = served.engine.memories[0].kv.shape.block_bytes
        assert all(64 <= group.num_blocks < 64 + 2 * MIB // block_bytes for group in served.engine.groups)


async def test_so_much_kv_is_given(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny, kv_bytes=8 * MIB) as served:
        for memory in served.engine.memories:
            kv = memory.counts.kv * memory.device.chunk_bytes
            assert 0 <= 8 * MIB - kv < len(memory.kv.layers) * memory.device.chunk_bytes
        assert len(await generate(served.engine, prompt(1), greedy(5))) == 5


async def test_so_much_kv_leaves_nothing_open(tiny: Path, drivers: list[FakeCuda]) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes 8796093022208 needs 8192\.0 GiB on each device"):
        async with serving(tiny, kv_bytes=8 << 40):
            pass
    assert drivers


async def test_too_many_blocks_leave_nothing_open(tiny: Path, drivers: list[FakeCuda]) -> None:
    with pytest.raises(
        ConfigError, match=r"--num-gpu-blocks-override 1000000 needs [\d.]+ [MG]iB on each device; \d+ MiB"
    ):
        async with serving(tiny, num_blocks_override=1_000_000):
            pass
    assert drivers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, r"float64"),
        ({"kv_cache_dtype": "float16"}, r"^--kv-cache-dtype float16: on GPUs KV has the weights' dtype, float32, or 8"),
        ({"devices": parse_devices("cuda:3")}, r"there is no cuda:3; this machine has 1 GPU"),
        ({"device_memory_bytes": 900 * MIB}, r"cuda:0: too little memory: --device-memory asks for 2 x 900 MiB"),
        ({"device_memory_bytes": 2 * MIB}, r"MiB"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(
    tiny: Path, drivers: list[FakeCuda], settings: dict[str, Any], message: str
) -> None:
    flags: dict[str, Any] = {"devices": parse_devices("cuda:0*2"), "dtype": "float32"}
    config = EngineConfig(str(tiny), **flags | settings)
    with pytest.raises(ConfigError, match=message) as error:
        await launch(config, "tiny", lambda text, share: None)
    assert "\n" not in error.value.message


def test_kv_of_8_bits_is_refused_where_flashinfer_would_read_it_wrongly(tiny: Path) -> None:
    model = load_hf_config(tiny)
    settings: dict[str, Any] = {"devices": parse_devices("cuda"), "kv_cache_dtype": "fp8"}
    for head_dim, dtype in ((64, "bfloat16"), (128, "float16"), (256, "bfloat16"), (192, "float32")):
        options = CudaOptions.of(replace(model, head_dim=head_dim), EngineConfig("m", dtype=dtype, **settings))
        assert options.kv_shape(model).dtype is torch.float8_e4m3fn
    for head_dim in (192, 96):
        with pytest.raises(ConfigError, match=rf"^--kv-cache-dtype fp8: FlashInfer .* this model's have {head_dim};"):
            CudaOptions.of(replace(model, head_dim=head_dim), EngineConfig("m", dtype="bfloat16", **settings))


@pytest.mark.parametrize("kind", ["mxfp4", "experts in fp8", "fp8 while loading"])
async def test_what_is_quantized_is_served_as_what_it_stands_for(
    kind: str, tmp_path: Path, drivers: list[FakeCuda]
) -> None:
    """However GPUs keep it: tokens are those of a checkpoint with the dequantized weights."""
    settings: dict[str, Any] = {}
    match kind:
        case "mxfp4":
            folder = write_tiny_mxfp4(tmp_path)
        case "experts in fp8":
            folder = write_tiny_quantized("fp8 of blocks", tmp_path, "qwen3-moe", moe_intermediate_size=128)
        case _:
            folder, settings = make_tiny_model("llama", tmp_path / "plain"), {"quantization": "fp8"}
            config = quantized_as(load_hf_config(folder), "fp8")
            source = open_weights(folder, config, "auto")
            tensors: dict[str, torch.Tensor] = {}
            for name, shape in expected_shapes(config).items():
                source.copy_into(name, tensors.setdefault(name, torch.empty(shape)))
            save_file(tensors, make_tiny_model("llama", tmp_path / "dequantized") / "model.safetensors")
    prompts = [[5, 6, 7, 8], list(range(20, 60))]
    answers = []
    for model, more in ((folder, settings), (tmp_path / "dequantized", {})):
        async with serving(model, num_blocks_override=64, **more) as served:
            answers.append([await generate(served.engine, prompt, greedy(12)) for prompt in prompts])
    assert answers[0] == answers[1]


async def test_kv_of_8_bits_says_what_it_costs_and_which_scales_it_leaves(
    tiny: Path, tmp_path: Path, drivers: list[FakeCuda]
) -> None:
    folder = copytree(tiny, tmp_path / "calibrated")
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.0.self_attn"
    scales = {f"{layer}.k_scale", f"{layer}.v_scale", f"{layer}.k_proj.output_scale"}
    save_file(tensors | {name: torch.ones(1) for name in scales}, folder / "model.safetensors")
    said: list[dict[str, Any]] = []
    answers: list[list[int]] = []
    for model in (tiny, folder):
        with capture_logs() as lines:
            async with serving(model, num_blocks_override=64, kv_cache_dtype="fp8") as served:
                answers.append(await generate(served.engine, [5, 6, 7], greedy(5)))
        said.append({line["event"]: line for line in lines})
    assert answers[0] == answers[1]
    assert all("448" in events["KV has 8 bits"]["costs"] for events in said)
    event = "the checkpoint's scales of KV are not used"
    assert event not in said[0]
    assert said[1][event]["tensors"] == ", ".join(sorted(scales)) and said[1][event]["log_level"] == "warning"


async def test_flashinfer_that_is_missing_is_said_in_one_line(tmp_path: Path, drivers: list[FakeCuda]) -> None:
    tiny = make_tiny_model("llama", tmp_path, head_dim=64)
    with pytest.raises(ConfigError, match=r"^--devices cuda needs flashinfer-python: pip install[^\n]*$"):
        async with serving(tiny, dtype="bfloat16"):
            pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore of that"), "CUDA out of mem.*B"),
        (FileNotFoundError(2, "No such file or directory", "ninja"), ".*'ninja'"),
        (CalledProcessError(1, ["gcc", "main.c"]), ".*gcc.*"),
        (AssertionError(), "AssertionError"),
    ],
)
async def test_a_first_step_that_fails_is_said_in_one_line(
    error: Exception, reason: str, tiny: Path, drivers: list[FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(CudaDecoder, "forward", forward)
    with pytest.raises(ConfigError, match=rf"^cuda:0: a step of 48 tokens .* failed: {reason}$"):
        async with serving(tiny):
            pass


async def test_without_any_gpu_the_engine_ends(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny, device_memory_bytes=24 * MIB) as served:
        engine = served.engine
        for driver in drivers:
            driver.fail("CUDA_ERROR_ILLEGAL_ADDRESS")
        with pytest.raises(EngineError, match="cuda:0: cuEventSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
            await generate(engine, prompt(1), greedy(5))
        await engine.wait()
        assert engine.health() == "the engine has stopped"


def test_the_server_ends_with_the_line(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match=r"^kunserve: --devices cuda[^\n]*$"):
        server.run(["--model", str(tiny), "--devices", "cuda", "--port", "8391"])
