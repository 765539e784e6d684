"""Buckets, runs and captures of decode graphs."""

from __future__ import annotations

import pytest
import torch
from cuda_parts import CPU
from fake_cuda import FakeCuda

from kunserve.compute.cuda.graphs import (
    BUCKETS,
    RUN_LAYERS,
    DecodeGraphs,
    Run,
    batch_buckets,
    bucket_for,
    captured_runs,
    cut_into_runs,
)


@pytest.mark.parametrize(
    ("max_num_seqs", "buckets"),
    [(1, (1,)), (2, (1, 2)), (7, (1, 2, 4, 7)), (64, (1, 2, 4, 8, 16, 32, 64)), (512, BUCKETS), (1024, BUCKETS)],
)
def test_buckets(max_num_seqs: int, buckets: tuple[int, ...]) -> None:
    assert batch_buckets(max_num_seqs) == buckets


def test_every_batch_gets_the_smallest_bucket_that_holds_it() -> None:
    buckets = batch_buckets(100)
    for n in range(1, 101):
        bucket = bucket_for(n, buckets)
        assert bucket is not None and bucket >= n and all(b < n or b >= bucket for b in buckets)
        assert bucket <= max(2 * n, 1)  # padding costs less than the step
    assert bucket_for(101, buckets) is None


@pytest.mark.parametrize("num_layers", [32, 30, 5])
@pytest.mark.parametrize("run_layers", [1, 3, 4])
def test_runs_cover_any_stage_in_order_and_all_were_captured(run_layers: int, num_layers: int) -> None:
    whole_model = cut_into_runs(0, num_layers, num_layers, run_layers)
    assert captured_runs(num_layers, run_layers, is_cut=False) == whole_model
    captured = captured_runs(num_layers, run_layers, is_cut=True)
    assert len(set(captured)) == len(captured)
    for first in range(num_layers):
        for last in range(first + 1, num_layers + 1):
            runs = cut_into_runs(first, last, num_layers, run_layers)
            assert [layer for run in runs for layer in range(*run)] == list(range(first, last))
            assert set(runs) <= set(captured)
            assert len(set(runs) - set(whole_model)) <= 2 * (run_layers - 1)  # at each end, all but one of a run's


def test_a_drop_at_the_middle_replays_what_was_captured() -> None:
    assert cut_into_runs(0, 32, 32, RUN_LAYERS) == [
        run for half in ((0, 16), (16, 32)) for run in cut_into_runs(*half, 32, RUN_LAYERS)
    ]


def test_work_is_replayed_if_it_was_captured_and_done_if_not() -> None:
    graphs = DecodeGraphs(8, 4, torch.float32, CPU, FakeCuda().capture)
    hidden, run = graphs.hidden(4), Run(0, 4)

    def work() -> None:
        hidden.add_(1)

    graphs.run(run, 4, work)
    assert (graphs.num_captures, graphs.num_replays) == (0, 0)
    graphs.capture(run, 4, work)
    for i in range(3):
        assert (hidden == i + 1).all()
        graphs.run(run, 4, lambda: None)
    graphs.run(run, 8, work)
    graphs.run(Run(4, 8), 4, work)
    assert (graphs.num_captures, graphs.num_replays) == (1, 3) and (hidden == 6).all()


def test_hidden_states_of_a_bucket_stay_where_they_are() -> None:
    graphs = DecodeGraphs(8, 4, torch.float32, CPU, FakeCuda().capture)
    assert graphs.hidden(4).data_ptr() == graphs.hidden(8).data_ptr() == graphs.hidden(4).data_ptr()
