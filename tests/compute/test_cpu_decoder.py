"""Decode steps on CPU devices: what was recorded is what would have been computed, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model
from tiny_quantized import write_tiny_mxfp4, write_tiny_quantized
from torch import Tensor

from kunserve.compute.cpu_decoder import MOST_ROWS, CpuDecoder
from kunserve.compute.cpu_ops import CpuOps, cpu_ops_or_reference
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch
from kunserve.errors import EngineError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.checkpoint import open_weights
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import units_of_stage, weight_units

BLOCK_SIZE, NUM_LAYERS, BLOCKS_EACH = 8, 3, 4
LONGEST = BLOCK_SIZE * BLOCKS_EACH


@contextmanager
def decoders(folder: Path, num_chunks: int = 128) -> Iterator[tuple[Decoder, CpuDecoder]]:
    """A plain decoder and one that records, each on a device of its own."""
    config = load_hf_config(folder)
    ops, why = cpu_ops_or_reference(torch.float32, config.head_dim)
    if not isinstance(ops, CpuOps):
        pytest.skip(why)
    devices = [HostDevice(i, num_chunks, 1 << 16) for i in range(2)]
    try:
        source, memories = open_weights(folder, config, "auto"), []
        for device in devices:
            shape = KVShape.of(config, BLOCK_SIZE, torch.float32)
            memory = DeviceMemory(device, weight_units(config, torch.float32), NUM_LAYERS, shape)
            memories.append(memory)
            for unit in units_of_stage(config, 0, NUM_LAYERS):
                memory.weights.map(unit)
                memory.weights.fill(unit, source)
            for layer in range(NUM_LAYERS):
                memory.kv.resize(layer, num_chunks // 16)
        one, other = memories
        yield (
            Decoder(config, ops, one.weights, one.kv, LONGEST),
            CpuDecoder(config, ops, other.weights, other.kv, LONGEST),
        )
    finally:
        for device in devices:
            device.close()


def batch_of(lengths: list[int], first: int = 0, num_blocks: int = BLOCKS_EACH) -> AttentionBatch:
    """One more token for each sequence of so many; sequence i has blocks of its own, from `first` on."""
    tables = [[first + i * BLOCKS_EACH + j for j in range(num_blocks)] for i in range(len(lengths))]
    return AttentionBatch(
        positions=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32) + 1,
        block_tables=torch.tensor(tables, dtype=torch.int32),
        block_size=BLOCK_SIZE,
    )


def logits(decoder: Decoder, ids: list[int], batch: AttentionBatch, stages: tuple[int, ...] = (NUM_LAYERS,)) -> Tensor:
    x, first_layer = torch.tensor(ids, dtype=torch.int32), 0
    for last_layer in stages:
        x = decoder.forward(first_layer, last_layer, x, batch, torch.arange(len(ids)))
        first_layer = last_layer
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    numbers = random.Random(family)
    with decoders(make_tiny_model(family, tmp_path)) as (plain, recording):
        lengths = [0, 0]
        for step in range(LONGEST):
            num_rows = 1 if step % 3 == 0 else 2
            stages = (NUM_LAYERS,) if step < 12 else (1, NUM_LAYERS) if step < 18 else (2, NUM_LAYERS)
            ids = [numbers.randrange(VOCAB_SIZE) for _ in range(num_rows)]
            # wide and narrow block tables, as those of a batch are
            batch = batch_of(lengths[:num_rows], num_blocks=BLOCKS_EACH - (step < BLOCK_SIZE))
            assert torch.equal(logits(recording, ids, batch, stages), logits(plain, ids, batch, stages))
            lengths = [length + (i < num_rows) for i, length in enumerate(lengths)]
            if step == 11:  # all but multiplied residuals is recorded
                is_recorded = load_hf_config(tmp_path).residual_scale == 1
                assert sorted(recording.recordings) == ([1, 2] if is_recorded else [])


@pytest.mark.parametrize("kind", ["qwen2-moe", "gpt-oss", "mxfp4", "fp8 of blocks"])
def test_rows_that_choose_other_experts_are_the_same_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    """As many rows as are recorded, each with tokens of its own in each step, and experts as numbers and in blocks."""
    if kind == "mxfp4":
        folder = write_tiny_mxfp4(tmp_path)
    elif kind == "fp8 of blocks":
        folder = write_tiny_quantized(kind, tmp_path, "qwen3-moe", moe_intermediate_size=128)
    else:
        folder = make_tiny_model(kind, tmp_path)
    numbers = random.Random(kind)
    with decoders(folder, num_chunks=2048) as (plain, recording):
        for length in range(LONGEST):
            ids = [numbers.randrange(VOCAB_SIZE) for _ in range(MOST_ROWS)]
            batch = batch_of([length] * MOST_ROWS)
            found = logits(recording, ids, batch)
            assert torch.equal(found, logits(plain, ids, batch)) and len({*map(tuple, found.tolist())}) > 1
        assert sorted(recording.recordings) == [MOST_ROWS]


def test_steps_of_few_rows_are_recorded_once_for_each_number(tmp_path: Path) -> None:
    with decoders(make_tiny_model("llama", tmp_path)) as (_, recording):
        for num_rows in (1, 2, 1, 2):
            first = logits(recording, [5] * num_rows, batch_of([0] * num_rows))
            again = logits(recording, [5] * num_rows, batch_of([0] * num_rows))
            assert first.data_ptr() != again.data_ptr() and torch.equal(first, again)
        assert sorted(recording.recordings) == [1, 2]
        many = MOST_ROWS + 1
        logits(recording, [5] * many, batch_of([0] * many))
        assert sorted(recording.recordings) == [1, 2]
        logits(recording, [5], batch_of([0]), (2, NUM_LAYERS))
        assert sorted(recording.recordings) == [1]


def test_a_step_that_fails_says_so_and_spoils_nothing(tmp_path: Path) -> None:
    with decoders(make_tiny_model("llama", tmp_path)) as (plain, recording):
        logits(recording, [5], batch_of([0]))
        with pytest.raises(EngineError, match="token 0 of the batch has no slot"):
            logits(recording, [5], batch_of([0], first=1 << 20))
        with pytest.raises(EngineError, match="token 0 of the batch has no slot"):
            logits(recording, [5], batch_of([LONGEST]))
        unread = batch_of([BLOCK_SIZE])
        unread.block_tables[0, 0] = -1
        with pytest.raises(EngineError, match="token 0 of the batch reads a position"):
            logits(recording, [5], unread)
        assert torch.equal(logits(recording, [5], batch_of([0])), logits(plain, [5], batch_of([0])))
