"""The CUDA decoder's planning, padding, graphs and token feedback, against the plain decoder in float64, on the CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_parts import cuda_decoder_on_cpu
from torch import Tensor

from kunserve.compute.cuda.arrays import StepLimits, step_arrays
from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.cuda.sampling import PendingTokens
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow, sample
from kunserve.compute.torch_ops import TorchOps
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.sampling import SamplingParams
from kunserve.sizes import ceil_div

BLOCK, LAYERS = 4, 5
CONFIG = ModelConfig("qwen3", 50, 16, 24, LAYERS, 4, 2, 8, 64, qkv_bias=True, qk_norm=True)
LIMITS = StepLimits(32, 6, 64)
DTYPE = torch.float64
LENGTHS = [7, 1, 9, 4]
TABLES = [[11, 3, 8], [5], [9, 0, 7, 2], [1, 4]]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same weights behind both decoders, and KV for each."""

    plain: Decoder
    plain_kv: list[Tensor]
    cuda: CudaDecoder
    cuda_kv: list[Tensor]


def memory_on(device: HostDevice, kv_dtype: torch.dtype = DTYPE) -> DeviceMemory:
    memory = DeviceMemory(device, weight_units(CONFIG, DTYPE), LAYERS, KVShape.of(CONFIG, BLOCK, kv_dtype))
    for unit in ("embed", *(f"layers.{i}" for i in range(LAYERS)), "head"):
        memory.weights.map(unit)
        memory.weights.fill(unit, DummySource(CONFIG))
    for layer in range(LAYERS):
        memory.kv.resize(layer, 1)
    return memory


def captured(decoder: CudaDecoder) -> CudaDecoder:
    decoder.capture()
    return decoder


@pytest.fixture
def pair() -> Iterator[Pair]:
    devices = [HostDevice(i, 30, 64 << 10) for i in range(2)]
    plain, cuda = (memory_on(device) for device in devices)
    yield Pair(
        Decoder(CONFIG, TorchOps(), plain.weights, plain.kv, 64),
        [kv[:12] for kv in plain.kv.layers],
        captured(cuda_decoder_on_cpu(CONFIG, cuda, 64, LIMITS)),
        [kv[:12] for kv in cuda.kv.layers],
    )
    for device in devices:
        device.close()


def step(spans: list[tuple[int, int, int]]) -> tuple[AttentionBatch, Tensor]:
    """A host batch of (sequence, first token, one past the last), and the rows at the spans' ends."""
    lens = torch.tensor([end - start for _, start, end in spans])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    width = max(ceil_div(end, BLOCK) for _, _, end in spans)
    tables = torch.zeros(len(spans), width, dtype=torch.int32)
    for row, (sequence, _, end) in zip(tables, spans, strict=True):
        held = TABLES[sequence][: ceil_div(end, BLOCK)]
        row[: len(held)] = torch.tensor(held)
    contexts = torch.tensor([end for _, _, end in spans])
    return AttentionBatch(positions.int(), ends.int(), contexts.int(), tables, BLOCK), ends[1:] - 1


PROMPTS = [[(0, 0, 5), (1, 0, 1)], [(2, 0, 9), (0, 5, 7), (3, 0, 3)], [(3, 3, 4)]]


def decode(i: int, sequences: list[int]) -> list[tuple[int, int, int]]:
    return [(s, LENGTHS[s] + i, LENGTHS[s] + i + 1) for s in sequences]


def ids_of(batch: AttentionBatch, seed: int) -> Tensor:
    return torch.randint(0, 50, batch.positions.shape, generator=torch.Generator().manual_seed(seed)).int()


def assert_same(pair: Pair, spans: list[tuple[int, int, int]], seed: int, cuts: tuple[int, ...] = ()) -> None:
    """Run a step through both, stage by stage, and compare logits and all KV."""
    batch, rows = step(spans)
    x = y = ids_of(batch, seed)
    for first, last in zip((0, *cuts), (*cuts, LAYERS), strict=True):
        x = pair.plain.forward(first, last, x, batch, rows)
        y = pair.cuda.forward(first, last, y, batch, rows)
    torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-11)
    for a, b in zip(pair.plain_kv, pair.cuda_kv, strict=True):
        torch.testing.assert_close(b.double(), a.double(), rtol=1e-9, atol=1e-11)


def test_mixed_and_decode_steps_match_the_plain_decoder(pair: Pair) -> None:
    for i, spans in enumerate(PROMPTS):
        assert_same(pair, spans, i)
    for i, sequences in enumerate([[0, 1, 2], [0, 1, 2], [2, 1], [1]]):
        assert_same(pair, decode(i, sequences), 10 + i)
    graphs = pair.cuda.graphs
    assert graphs is not None and graphs.num_replays > 0


def test_all_is_captured_before_serving_and_a_drop_captures_nothing(pair: Pair) -> None:
    graphs = pair.cuda.graphs
    assert graphs is not None
    captures = graphs.num_captures
    num_runs = ceil_div(LAYERS, graphs.run_layers)
    # All runs, all single layers that are none, the embedding and the head.
    assert graphs.run_layers == 2 and captures == len(graphs.buckets) * (num_runs + LAYERS - 1 + 2)
    for i, spans in enumerate(PROMPTS):
        assert_same(pair, spans, i)
    replays = graphs.num_replays
    assert_same(pair, decode(0, [0, 1, 2]), 10)
    assert graphs.num_replays == replays + 1 + num_runs  # the embedding, and the model's end as well
    chains = [((2,), 3), ((4,), 3), ((3,), 4), ((1, 4), 4)]  # of any grouping, with ragged ends as well
    for i, (cuts, num_graphs) in enumerate(chains):
        replays = graphs.num_replays
        assert_same(pair, decode(1 + i, [1] if i == 3 else [1, 2, 0] if i < 2 else [2, 1, 0]), 20 + i, cuts)
        assert graphs.num_replays == replays + 1 + num_graphs
    assert graphs.num_captures == captures


@pytest.mark.parametrize(("present", "eager"), [((0, 1, 2, 3, 4), 0), ((1, 2), 0), ((2, 3), 2), ((0,), 3)])
def test_only_layers_like_those_that_are_here_are_captured(present: tuple[int, ...], eager: int) -> None:
    """Layers 0 and 1 have a window, the others none: of a kind that is not here no kernel may be loaded yet."""
    config = replace(CONFIG, window=6, windowed_layers=(0, 1))
    with closing(HostDevice(0, 30, 64 << 10)) as device:
        memory = DeviceMemory(device, weight_units(config, DTYPE), LAYERS, KVShape.of(config, BLOCK, DTYPE))
        for layer in present:
            memory.weights.map(f"layers.{layer}")
            memory.weights.fill(f"layers.{layer}", DummySource(config))
            memory.kv.resize(layer, 1)
        decoder = captured(cuda_decoder_on_cpu(config, memory, 64, LIMITS))
        graphs = decoder.graphs
        assert graphs is not None
        single = {run for run, _ in graphs._graphs if len(range(*run)) == 1}
        assert len(single) == LAYERS - eager
        del decoder, memory, graphs


def test_ids_below_zero_are_those_that_were_fed(pair: Pair) -> None:
    for i, spans in enumerate(PROMPTS):
        assert_same(pair, spans, i)
    batch, rows = step(decode(0, [0, 1, 2]))
    expected = pair.plain.forward(0, LAYERS, torch.tensor([7, 30, 12], dtype=torch.int32), batch, rows)
    pair.cuda.put_previous_tokens(torch.tensor([12, 7, 49]))
    actual = pair.cuda.forward(0, LAYERS, torch.tensor([-2, 30, -1], dtype=torch.int32), batch, rows)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


GREEDY = SamplingRow(SamplingParams(9, temperature=0.0), 0, (), (), ())
DRAWN = SamplingRow(SamplingParams(9, temperature=0.8), 5, (), (), ())


def launch(
    pair: Pair,
    spans: Sequence[tuple[int, int, int]],
    ids: Sequence[int],
    row: SamplingRow = GREEDY,
    cuts: tuple[int, ...] = (),
) -> PendingTokens:
    """Run a step of known tokens through a chain whose end chooses tokens: those that the plain decoder gives."""
    batch, rows = step(list(spans))
    x = y = torch.tensor(ids, dtype=torch.int32)
    starts = (0, *cuts)
    for first, last in zip(starts, (*cuts, LAYERS), strict=True):
        x = pair.plain.forward(first, last, x, batch, rows)
        y = pair.cuda.forward(first, last, y, batch, rows) if last < LAYERS else y
    pending = pair.cuda.launch_tokens(starts[-1], y, batch, rows, [row] * len(rows))
    assert pending.tokens() == sample(x, [row] * len(rows))
    assert pending.on_device.tolist() == [token.token_id for token in pending.tokens()]
    return pending


@pytest.fixture
def prompted(pair: Pair) -> Pair:
    """Decoders that have seen the prompts."""
    for i, spans in enumerate(PROMPTS):
        assert_same(pair, spans, i)
    return pair


def test_the_most_likely_tokens_are_chosen_in_a_graph_at_the_end_of_any_chain(prompted: Pair) -> None:
    graphs = prompted.cuda.graphs
    assert graphs is not None
    chains = [([0, 1, 2], (), 3), ([0, 1, 2], (2,), 3), ([2, 1], (3,), 4), ([1], (1, 4), 4)]  # with ragged runs, too
    for i, (sequences, cuts, num_runs) in enumerate(chains):
        replays = graphs.num_replays
        launch(prompted, decode(i, sequences), [20 + s for s in sequences], GREEDY, cuts)
        assert graphs.num_replays == replays + num_runs + 2  # the embedding and the head


def test_the_next_step_begins_with_the_tokens_that_a_graph_has_chosen(prompted: Pair) -> None:
    first = launch(prompted, decode(0, [0, 1, 2]), [7, 30, 12])
    prompted.cuda.put_previous_tokens(first.on_device)
    ids = [token.token_id for token in first.tokens()]
    batch, rows = step(decode(1, [2, 0]))
    expected = prompted.plain.forward(0, LAYERS, torch.tensor([ids[2], ids[0]], dtype=torch.int32), batch, rows)
    actual = prompted.cuda.forward(0, LAYERS, torch.tensor([-3, -1], dtype=torch.int32), batch, rows)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_steps_that_a_chain_launches_meanwhile_leave_the_tokens_of_one_as_they_are(prompted: Pair) -> None:
    first = launch(prompted, decode(0, [0, 1, 2]), [7, 30, 12], GREEDY, (2,))
    ids = first.on_device.tolist()
    second = launch(prompted, decode(1, [2, 1, 0]), [1, 2, 3], GREEDY, (2,))
    assert first.on_device.tolist() == ids != second.on_device.tolist()
    assert [token.token_id for token in first.tokens()] == ids


def test_other_steps_do_not_replay_the_head(prompted: Pair) -> None:
    graphs = prompted.cuda.graphs
    assert graphs is not None
    replays = graphs.num_replays
    launch(prompted, decode(0, [0, 1, 2]), [7, 30, 12], DRAWN)
    assert graphs.num_replays == replays + 1 + 3
    batch, _ = step(decode(1, [0, 1, 2]))
    some, ids = torch.tensor([1]), torch.tensor([7, 30, 12], dtype=torch.int32)  # the others' prompts go on
    expected = sample(prompted.plain.forward(0, LAYERS, ids, batch, some), [GREEDY])
    assert prompted.cuda.launch_tokens(0, ids, batch, some, [GREEDY]).tokens() == expected
    assert graphs.num_replays == replays + 2 * (1 + 3)
    launch(prompted, [(3, 4, 6)], [3, 4])  # two tokens of one sequence are no step of a graph
    assert graphs.num_replays == replays + 2 * (1 + 3)


def test_a_row_without_a_finite_logit_has_no_token_in_a_graph(prompted: Pair) -> None:
    prompted.cuda_kv[0][TABLES[2][0]] = torch.nan
    batch, rows = step(decode(0, [0, 2, 1]))
    pending = prompted.cuda.launch_tokens(0, torch.tensor([7, 30, 12], dtype=torch.int32), batch, rows, [GREEDY] * 3)
    assert [token.error is None for token in pending.tokens()] == [True, False, True]
    assert int(pending.on_device[1]) == 0  # an id: the next step looks it up


def test_arrays_of_a_mixed_batch() -> None:
    batch, _ = step([(2, 3, 9), (0, 6, 7)])
    arrays = step_arrays(batch)
    assert arrays.positions.tolist() == [3, 4, 5, 6, 7, 8, 6]
    assert arrays.kv[0].slots.tolist() == [9 * 4 + 3, 0, 1, 2, 3, 7 * 4, 3 * 4 + 2]
    assert arrays.kv[0].kv_indptr.tolist() == [0, 3, 5]
    assert arrays.kv[0].kv_indices.tolist() == [9, 0, 7, 11, 3]
    assert arrays.kv[0].last_block_len.tolist() == [1, 3]
    assert all(a.dtype.name == "int32" for a in (*arrays.kv[0], arrays.cu_seqlens_q))


def test_padding_writes_nothing_and_reads_a_block_that_is_there() -> None:
    batch, _ = step([(0, 6, 7), (3, 3, 4)])
    arrays = step_arrays(batch, 4)
    assert arrays.kv[0].slots.tolist() == [3 * 4 + 2, 1 * 4 + 3, -1, -1]
    assert arrays.kv[0].kv_indptr.tolist() == [0, 2, 3, 4, 5]
    assert arrays.kv[0].kv_indices.tolist() == [11, 3, 1, 11, 11]
    assert arrays.kv[0].last_block_len.tolist() == [3, 4, 1, 1]
    assert arrays.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]


def test_near_arrays_name_no_block_behind_the_window() -> None:
    batch, _ = step([(2, 3, 9), (0, 6, 7)])
    arrays = step_arrays(replace(batch, near=batch), window=3)
    full, near = arrays.kv
    assert near.kv_indptr.tolist() == [0, 3, 4] and near.kv_indices.tolist() == [9, 0, 7, 3]
    assert full.kv_indices.tolist() == [9, 0, 7, 11, 3]
    assert near.slots.tolist() == full.slots.tolist() and near.last_block_len.tolist() == [1, 3]
    assert full.lens(BLOCK).tolist() == [9, 7] and near.lens(BLOCK).tolist() == [9, 3]
    decoding, _ = step([(0, 6, 7), (3, 3, 4)])
    padded = step_arrays(replace(decoding, near=decoding), 4, window=3).kv[1]
    assert padded.kv_indices.tolist() == [3, 1, 3, 3] and padded.slots.tolist() == [3 * 4 + 2, 1 * 4 + 3, -1, -1]


@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_no_step_names_more_near_blocks_than_there_is_room_for(window: int) -> None:
    limits = StepLimits(32, 6, 1000).with_near(window, BLOCK)
    rng = random.Random(window)
    for _ in range(50):
        lens = [rng.randint(1, 32 // 6) for _ in range(6)]
        starts = torch.tensor([rng.randint(0, 60) for _ in lens])
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lens).cumsum(0)])
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts.tolist(), lens, strict=True)])
        tables = torch.arange(6 * 20, dtype=torch.int32).view(6, 20)
        batch = AttentionBatch(positions.int(), ends.int(), (starts + torch.tensor(lens)).int(), tables, BLOCK)
        near = step_arrays(replace(batch, near=batch), window=window).kv[1]
        assert len(near.kv_indices) <= limits.max_blocks_by_kind[1]
