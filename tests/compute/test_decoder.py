"""The decoder's logits against transformers', for every family: in one pass, in chunks, as stages, after a remap."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, load_reference, make_tiny_deepseek, make_tiny_model
from torch import Tensor

from kunserve.compute.cpu_ops import cpu_ops_or_reference
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch
from kunserve.compute.torch_ops import TorchOps
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import layer_name, units_of_stage, weight_units
from kunserve.sizes import ceil_div

IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))  # `make test-models`
BLOCK_SIZE, NUM_CHUNKS, CHUNK_BYTES, MAX_MODEL_LEN = 8, 128, 1 << 16, 256
NUM_LAYERS = 3


class TinyDecoder:
    """A decoder with all its weights on a device of its own, and one sequence in scattered blocks."""

    def __init__(
        self, folder: Path, memory: DeviceMemory, dtype: torch.dtype, is_reference: bool, max_model_len: int
    ) -> None:
        self.memory = memory
        self.source = SafetensorsSource(folder, load_hf_config(folder))
        for unit in units_of_stage(load_hf_config(folder), 0, NUM_LAYERS):
            memory.weights.map(unit)
            memory.weights.fill(unit, self.source)
        for layer in range(NUM_LAYERS):
            memory.kv.resize(layer, 2 * ceil_div(max_model_len, MAX_MODEL_LEN))
        ops = TorchOps() if is_reference else cpu_ops_or_reference(dtype, 16)[0]
        self.decoder = Decoder(load_hf_config(folder), ops, memory.weights, memory.kv, max_model_len)
        blocks = list(range(memory.kv.num_blocks(0)))
        random.Random(1).shuffle(blocks)
        self.block_table = torch.tensor([blocks], dtype=torch.int32)

    def logits(self, ids: list[int], start: int, stages: tuple[int, ...] = (NUM_LAYERS,)) -> Tensor:
        """Logits after each of `ids`, which stand at `start` and on; the layers cut at `stages`."""
        x = torch.tensor(ids, dtype=torch.int32)
        end, first_layer = start + len(ids), 0
        batch = AttentionBatch(
            positions=torch.arange(start, end, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, len(ids)], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=self.block_table[:, : ceil_div(end, BLOCK_SIZE)].contiguous(),
            block_size=BLOCK_SIZE,
        )
        for last_layer in stages:
            x = self.decoder.forward(first_layer, last_layer, x, batch, torch.arange(len(ids)))
            first_layer = last_layer
        return x


@contextmanager
def tiny_decoder(
    folder: Path, dtype: torch.dtype, is_reference: bool = False, max_model_len: int = MAX_MODEL_LEN
) -> Iterator[TinyDecoder]:
    config = load_hf_config(folder)
    device = HostDevice(0, NUM_CHUNKS * ceil_div(max_model_len, MAX_MODEL_LEN), CHUNK_BYTES)
    try:
        shape = KVShape.of(config, BLOCK_SIZE, dtype)
        memory = DeviceMemory(device, weight_units(config, dtype), NUM_LAYERS, shape)
        yield TinyDecoder(folder, memory, dtype, is_reference, max_model_len)
        memory.check()
    finally:
        device.close()


def prompt(length: int = 70) -> list[int]:
    return random.Random(length).choices(range(VOCAB_SIZE), k=length)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: make_tiny_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Tensor]:
    """transformers' logits of `prompt()`."""
    with torch.inference_mode():
        return {
            family: load_reference(folder)(torch.tensor([prompt()])).logits[0] for family, folder in folders.items()
        }


WAYS = [(torch.float32, False), (torch.float32, True), (torch.float64, True)]


@pytest.mark.parametrize(("dtype", "is_reference"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(
    family: str, dtype: torch.dtype, is_reference: bool, folders: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    with tiny_decoder(folders[family], dtype, is_reference) as tiny:
        whole = tiny.logits(prompt(), 0)
        assert whole.dtype is dtype
        torch.testing.assert_close(whole.float(), expected[family], atol=2e-4, rtol=1e-4)


WAYS_TO_CUT = [([7] * 10, (1, 3)), ([64, 1, 5], (2, 3)), ([8, 8, 54], (1, 2, 3)), ([1] * 20 + [50], (3,))]


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_stages_change_nothing(family: str, folders: dict[str, Path]) -> None:
    with tiny_decoder(folders[family], torch.float64) as tiny:
        whole = tiny.logits(prompt(), 0)
    for sizes, stages in WAYS_TO_CUT:
        with tiny_decoder(folders[family], torch.float64) as tiny:  # a new one: its KV is empty
            start, parts = 0, []
            for size in sizes:
                parts.append(tiny.logits(prompt()[start : start + size], start, stages))
                start += size
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_views_survive_drop_and_restore(family: str, folders: dict[str, Path]) -> None:
    """A layer's weights leave, its chunks go elsewhere and other chunks come: the same logits at the same addresses."""
    with tiny_decoder(folders[family], torch.float32) as tiny:
        before = tiny.logits(prompt(), 0)
        memory = tiny.memory
        for unit in (layer_name(1), layer_name(0), "embed"):
            memory.weights.drop(unit)
        for layer in range(NUM_LAYERS):
            memory.kv.resize(layer, 3)
        for unit in ("embed", layer_name(0), layer_name(1)):
            memory.weights.map(unit)
            memory.weights.fill(unit, tiny.source)
        assert torch.equal(tiny.logits(prompt(), 0), before)


@torch.inference_mode()
def test_experts_may_be_shared_without_a_gate(tmp_path: Path) -> None:
    ours = make_tiny_deepseek(tmp_path)
    expected = load_reference(tmp_path / "qwen")(torch.tensor([prompt()])).logits[0]
    with tiny_decoder(ours, torch.float32) as tiny:
        torch.testing.assert_close(tiny.logits(prompt(), 0), expected, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def last_logits(folder: Path, ids: list[int], piece: int = 1024) -> Tensor:
    """transformers' logits after the last of many ids: in pieces, since eager attention keeps all scores of one."""
    model, cache = load_reference(folder), None
    for start in range(0, len(ids), piece):
        out = model(torch.tensor([ids[start : start + piece]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    logits: Tensor = out.logits[0, -1]
    return logits


def our_last_logits(folder: Path, ids: list[int], max_model_len: int) -> Tensor:
    """Ours, in pieces of the same kind."""
    with tiny_decoder(folder, torch.float32, max_model_len=max_model_len) as tiny:
        for start in range(0, len(ids), 1000):
            last = tiny.logits(ids[start : start + 1000], start)[-1]
    return last


@pytest.mark.parametrize(("original", "num_tokens"), [(1024, 3000)] + [(4096, 12_000)] * IS_WHOLE)
def test_yarn_beyond_the_original_length(tmp_path: Path, original: int, num_tokens: int) -> None:
    """Who stretches a model leaves its positions as they were: what is served follows from the scaling."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": original}
    folder = make_tiny_model("llama-yarn", tmp_path, rope_parameters=yarn, max_position_embeddings=original)
    assert load_hf_config(folder).max_position_embeddings == 4 * original
    ids = prompt(num_tokens)
    expected, actual = last_logits(folder, ids), our_last_logits(folder, ids, num_tokens + 72)
    # transformers' angles are products of float32: at 3000 radians their last bit is a quarter of a thousandth.
    torch.testing.assert_close(actual, expected, atol=2e-3 * num_tokens / 3000, rtol=1e-3)


def test_longrope_beyond_the_original_length(tmp_path: Path) -> None:
    """A server that takes longer requests rotates all of them as transformers does the longer ones."""
    folder = make_tiny_model("phi3-longrope", tmp_path)
    for length, max_model_len in ((650, 700), (900, 1024)):
        expected, actual = last_logits(folder, prompt(length)), our_last_logits(folder, prompt(length), max_model_len)
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
