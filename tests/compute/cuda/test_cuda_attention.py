"""FlashInfer is called as its rules want it, at stable addresses; host arrays are not overwritten before they left."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fake_flashinfer
import numpy as np
import pytest
import torch
from cuda_parts import CapturableKernels, cuda_decoder_on_cpu
from fake_cuda import FakeCuda
from test_cuda_decoder import BLOCK, CONFIG, DTYPE, LAYERS, LIMITS, PROMPTS, Pair, assert_same, decode, memory_on

from kunserve.compute.cuda import decoder as cuda_decoder
from kunserve.compute.cuda import flash_infer
from kunserve.compute.cuda.arrays import StepBuffers, StepLimits, padding_arrays, step_arrays
from kunserve.compute.cuda.attention import StepUploader
from kunserve.compute.cuda.flash_infer import MIN_FLOAT_WORKSPACE_BYTES, FlashInferAttention, float_workspace_bytes
from kunserve.compute.cuda.ops import TorchKernels
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch
from kunserve.compute.torch_ops import TorchOps
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import E4M3, KVShape
from kunserve.model.card import load_card
from kunserve.model.config import ModelConfig
from kunserve.sizes import ceil_div

NUM_SMS = 132  # of an H100


@pytest.fixture
def kv_dtype() -> torch.dtype:
    return DTYPE


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype) -> FlashInferAttention:
    for name, module in fake_flashinfer.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_infer, "HEAD_PIECE", CONFIG.head_dim)  # what stands for its kernels takes any head
    shape = KVShape.of(CONFIG, BLOCK, kv_dtype)
    return FlashInferAttention(CONFIG, shape, DTYPE, StepBuffers(LIMITS, FakeCuda()), LIMITS.max_num_seqs)


@pytest.fixture
def pair(attention: FlashInferAttention, kv_dtype: torch.dtype) -> Iterator[Pair]:
    """The plain decoder, and one that attends with FlashInfer, or what stands for it."""
    devices = [HostDevice(i, 30, 64 << 10) for i in range(2)]
    plain, cuda = (memory_on(device, kv_dtype) for device in devices)
    decoder = cuda_decoder_on_cpu(CONFIG, cuda, 64, LIMITS, attention=attention, dtype=DTYPE)
    decoder.capture()
    layers = [[kv[:12] for kv in memory.kv.layers] for memory in (plain, cuda)]
    yield Pair(Decoder(CONFIG, TorchOps(), plain.weights, plain.kv, 64), layers[0], decoder, layers[1])
    for device in devices:
        device.close()


@pytest.mark.parametrize("kv_dtype", [DTYPE, E4M3])
def test_mixed_steps_and_replays_through_any_chain_match_the_plain_decoder(
    pair: Pair, attention: FlashInferAttention
) -> None:
    for i, spans in enumerate(PROMPTS):
        assert_same(pair, spans, i)
    sequences, cuts = [[0, 1, 2], [0, 1, 2], [2, 1], [1], [1, 2, 0], [2, 0]], [(), (), (), (2,), (1, 4), (4,)]
    for i, (which, cut) in enumerate(zip(sequences, cuts, strict=True)):
        assert_same(pair, decode(i, which), 10 + i, cut)
    (planner,) = attention.planners
    buckets = planner.buckets
    assert set(buckets) == {1, 2, 4, 6}
    assert [buckets[n].num_plans - 1 for n in (1, 2, 4, 6)] == [1 + 2, 1 + 2, 2 + 3, 0]  # once per step and stage
    for wrapper in buckets.values():
        assert wrapper.workspaces == [attention.floats, planner.ints]  # one of each for all
    addresses = {tuple(buffer.data_ptr() for buffer in wrapper.buffers) for wrapper in buckets.values()}
    assert len(addresses) == 1
    # FlashInfer's own plan takes up to 2 ms of Python: each wrapper has it once, when it is made.
    assert [wrapper.num_full_plans for wrapper in (planner.mixed, *buckets.values())] == [1] * 5
    assert planner.mixed.num_plans == len(PROMPTS) - 1  # one of one token is a decode step


@pytest.mark.parametrize(
    ("config", "split"), [(CONFIG, 32), (replace(CONFIG, window=2000, windowed_layers=tuple(range(LAYERS))), None)]
)
def test_the_longest_context_of_many_is_split_in_a_graph(
    attention: FlashInferAttention, config: ModelConfig, split: int | None
) -> None:
    """FlashInfer stops splitting where the requests would not run all at once: 132 of two KV heads on an H100."""
    buffers = StepBuffers(StepLimits(150, 150, 6000), FakeCuda())
    many = FlashInferAttention(config, KVShape.of(config, BLOCK, DTYPE), DTYPE, buffers, 150)
    uploader, no_ids = StepUploader(buffers, many), np.zeros(0, np.int32)
    uploader.upload(padding_arrays(150), 150, no_ids, no_ids)
    contexts = torch.tensor([32 * BLOCK] * 149 + [600 * BLOCK], dtype=torch.int32)
    ends, tables = torch.arange(151, dtype=torch.int32), torch.zeros(150, 600, dtype=torch.int32)
    batch = AttentionBatch(contexts - 1, ends, contexts, tables, BLOCK)
    uploader.upload(step_arrays(batch, 150), 150, no_ids, no_ids)
    (planner,) = many.planners
    assert planner.buckets[150].splits == [split]


@pytest.mark.parametrize(("head_dim", "is_served"), [(64, True), (80, False), (96, False), (128, True), (192, True)])
def test_heads_that_flashinfer_would_read_wrongly_are_left_to_the_reference(
    attention: FlashInferAttention, monkeypatch: pytest.MonkeyPatch, head_dim: int, is_served: bool
) -> None:
    monkeypatch.undo()
    for name, module in fake_flashinfer.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    config = replace(CONFIG, head_dim=head_dim)
    shape, buffers = KVShape.of(config, BLOCK, torch.bfloat16), StepBuffers(LIMITS, FakeCuda())
    chosen, note = flash_infer.load_attention(config, shape, torch.bfloat16, buffers, 4)
    assert isinstance(chosen, FlashInferAttention) == is_served and (f"heads of {head_dim}" in note) != is_served


def test_the_builder_of_an_environment_that_nobody_activated_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FlashInfer runs `ninja` by its name; pip has put it beside this Python."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    ninja = tmp_path / "ninja"
    ninja.touch(0o755)
    for path in ("/nowhere", ""):
        monkeypatch.setenv("PATH", path)
        flash_infer._find_build_tools()
        assert shutil.which("ninja") == str(ninja)
        flash_infer._find_build_tools()
        assert os.environ["PATH"].split(os.pathsep).count(str(tmp_path)) == 1


@pytest.mark.parametrize("kv_dtype", [DTYPE, E4M3])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_graphs_are_made_unless_flags_say_no(
    attention: FlashInferAttention, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool, kv_dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cuda_decoder, "load_kernels", lambda _: (CapturableKernels(), "some kernels"))
    with closing(HostDevice(0, 30, 64 << 10)) as device:
        memory = memory_on(device, kv_dtype)
        decoder, note = cuda_decoder.cuda_decoder(
            CONFIG, memory.weights, memory.kv, 64, LIMITS,
            dtype=torch.bfloat16, driver=FakeCuda(), enforce_eager=enforce_eager,
        )  # fmt: skip
        bits = ", on KV of 8 bits" if kv_dtype is E4M3 else ""
        assert note == f"some kernels, attention: FlashInfer{bits}, {'eager' if enforce_eager else 'graphs'}"
        assert (decoder.graphs is None) == enforce_eager
        assert decoder.graphs is None or decoder.graphs.buckets == (1, 2, 4, 6)
        del decoder, memory


@pytest.mark.parametrize(("kernels", "dtype"), [(TorchKernels(), torch.bfloat16), (CapturableKernels(), torch.float32)])
def test_no_graphs_are_made_of_what_cannot_be_captured(
    attention: FlashInferAttention, monkeypatch: pytest.MonkeyPatch, kernels: TorchKernels, dtype: torch.dtype
) -> None:
    """FlashInfer has no kernels for float32: then attention is the reference, which reads lengths on the host."""
    monkeypatch.setattr(cuda_decoder, "load_kernels", lambda _: (kernels, "Triton kernels, as a log would say"))
    with closing(HostDevice(0, 30, 64 << 10)) as device:
        memory = memory_on(device)
        decoder, note = cuda_decoder.cuda_decoder(
            CONFIG, memory.weights, memory.kv, 64, LIMITS,
            dtype=dtype, driver=FakeCuda(), enforce_eager=False,
        )  # fmt: skip
        assert decoder.graphs is None and note.endswith("eager")
        del decoder, memory


def test_workspace_for_partial_results() -> None:
    small, large = load_card("llama-8b").config, load_card("llama-70b").config
    assert float_workspace_bytes(small, 256, NUM_SMS) == MIN_FLOAT_WORKSPACE_BYTES  # 319 tiles of 16 rows: 80 MiB
    rows = (512 // 4 + 511) * 16
    assert float_workspace_bytes(small, 512, NUM_SMS) == rows * 32 * (128 + 1) * 4 + 64
    rows = (256 // 2 + 255) * 16
    assert float_workspace_bytes(large, 256, NUM_SMS) == rows * 64 * (128 + 1) * 4 + 64
    split = 2 * NUM_SMS // 8 * 128  # few prompts after long contexts: more than 128 MiB as well
    assert float_workspace_bytes(large, 1, NUM_SMS) == split * 64 * (128 + 1) * 4 + 64
    many_heads = replace(small, num_heads=48, num_kv_heads=2)  # 24 of a group: tiles of 64 rows
    rows = (ceil_div(256 * 24, 64) + 255) * 64
    assert float_workspace_bytes(many_heads, 256, NUM_SMS) == rows * 48 * (128 + 1) * 4 + 64
