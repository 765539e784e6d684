"""Products in which another thread takes part: the same to the last bit, and over when they return."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_layers import Layer, Shape
from torch import Tensor

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.cpu_team import CpuTeam
from kunserve.model.quant.blocks import BLOCKS
from kunserve.model.quant.linear import Linear, StoredRows
from kunserve.sizes import ceil_div


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    try:
        return CpuOps(load_kernels())
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def team(ops: CpuOps) -> Iterator[CpuTeam]:
    """A team with one helper, until the test ends."""
    team, leave = ops.new_team(), ctypes.c_int32(0)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(team.help, leave)
        yield team
        leave.value = 1


def matrices() -> list[Linear]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))

    def blocks(name: str, N: int, K: int) -> Linear:
        rows = torch.randint(1, 60, (N, K // BLOCKS[name].num_values * BLOCKS[name].num_bytes)).byte()
        return Linear((StoredRows(rows, BLOCKS[name]),))

    floats = [Linear.of(made(N, K)) for N, K in [(3000, 100), (577, 900), (131, 8192)]]
    return [*floats, blocks("Q4_1", 1009, 576), blocks("Q8_0", 577, 4864), blocks("Q6_K", 2050, 512)]


@pytest.mark.parametrize("M", [1, 2, 7, 70])
def test_help_changes_no_bit(ops: CpuOps, team: CpuTeam, M: int) -> None:
    for matrix in matrices():
        N, K = matrix.shape
        x, bias, residual = torch.randn(M, K), torch.randn(N), torch.randn(M, N)
        alone = ops.linear(x, matrix, bias, residual)
        before = team.num_helped
        while True:  # until the helper had its part in one of them
            assert torch.equal(team.lead(lambda: ops.linear(x, matrix, bias, residual)), alone)  # noqa: B023
            if team.num_helped > before:
                break


def test_help_with_attention_changes_no_bit(ops: CpuOps, team: CpuTeam) -> None:
    layer = Layer(ops, Shape(), [700, 1, 300], torch.float32, seed=1)
    pieces = [(0, 700), (1, 1), (2, 300)]
    batch = layer.batch(pieces)
    alone = layer.append(pieces)
    qkv = torch.cat(layer.inputs)
    ops.rotate_and_append(qkv, layer.rope, layer.kv, batch)
    before = team.num_helped
    while team.num_helped == before:  # until the helper had its part in it
        assert torch.equal(team.lead(lambda: ops.attention(qkv, layer.kv, batch, layer.shape.num_heads)), alone)


def test_a_thread_leads_only_meanwhile(ops: CpuOps, team: CpuTeam) -> None:
    (matrix, *_), x = matrices(), torch.randn(1, 100)

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        team.lead(fails)
    before = team.num_helped
    for _ in range(100):
        ops.linear(x, matrix)
    assert team.num_helped == before


Judge = Callable[[int, int], int]


@pytest.fixture
def judge(ops: CpuOps) -> Judge:
    """What a leader thinks of a helper: ns that it gave and cost in a product -> products to come without it."""
    kernels = load_kernels()
    memory = (ctypes.c_int64 * ceil_div(kernels.team_bytes(), 8))()
    return lambda gained_ns, waited_ns: int(kernels.judge_help(ctypes.byref(memory), gained_ns, waited_ns))


def test_help_that_costs_more_than_it_gives_is_done_without_for_ever_longer(judge: Judge) -> None:
    assert judge(5_000, 4_000) == 0
    rests = [judge(0, 50_000) for _ in range(12)]
    assert rests[0] > 0 and rests == sorted(rests) and rests[1] == 2 * rests[0] and rests[-1] == rests[-2]


def test_a_late_piece_now_and_then_is_no_reason_to_do_without_help(judge: Judge) -> None:
    """As of who streams the tokens, and has the helper's core for a moment."""
    for _ in range(50):
        assert not any(judge(10_000, 2_000) for _ in range(100))
        assert judge(10_000, 500_000) == 0


def test_after_help_has_paid_again_a_rest_is_short(judge: Judge) -> None:
    rests = [judge(0, 50_000) for _ in range(8)]
    for _ in range(1000):
        judge(10_000, 2_000)
    assert judge(0, 20_000_000) == rests[0] < rests[-1]
