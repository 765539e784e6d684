"""CUDA graphs of decode steps: one per run of layers and bucket of batch sizes, all captured before serving.

A graph reads and writes addresses that never change: weights, KV, the staged arrays of a step, one buffer of hidden
states per bucket, and the tokens that the last step has chosen. Runs are short and begin at multiples of their length,
so that a stage of any grouping is made of the same runs: after a drop or a restore the same graphs replay, and nothing
is captured again. Where a chain is cut within a run, each of its layers has a graph of its own as well: three launches
more on each side of a cut at the most. What comes before the layers and after them has graphs of its own, for the same
reason: whatever the grouping, and whoever samples, the layers are the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kunserve.gpu.cuda.driver import Graph

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
RUN_LAYERS = 4


class Run(NamedTuple):
    """Layers `[first_layer, last_layer)` that one graph runs; without any, what comes before that layer at an end."""

    first_layer: int
    last_layer: int


EMBEDDING = Run(0, 0)  # of tokens, those among them that the last step has chosen


def head_of(num_layers: int) -> Run:
    """Return what comes after all layers: the head, and the choice of the next tokens."""
    return Run(num_layers, num_layers)


def batch_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes that are captured: a few, and the largest that can come if it is not too large."""
    below = tuple(bucket for bucket in BUCKETS if bucket < max_num_seqs)
    return (*below, max_num_seqs) if max_num_seqs <= BUCKETS[-1] else BUCKETS


def bucket_for(num_seqs: int, buckets: tuple[int, ...]) -> int | None:
    """Return the smallest bucket for `num_seqs` sequences; None if there is none: such a step runs eagerly."""
    i = bisect_left(buckets, num_seqs)
    return buckets[i] if i < len(buckets) else None


def cut_into_runs(first_layer: int, last_layer: int, num_layers: int, run_layers: int) -> list[Run]:
    """Cut a stage at multiples of `run_layers`; where it begins or ends between two of them, into single layers.

    The model's own end is the same in every grouping, however short it is.
    """
    runs = []
    start = first_layer
    while start < last_layer:
        end = min(start + run_layers, num_layers)
        if start % run_layers or end > last_layer:
            end = start + 1
        runs.append(Run(start, end))
        start = end
    return runs


def captured_runs(num_layers: int, run_layers: int, *, is_cut: bool) -> list[Run]:
    """Return the runs of layers that are captured: those of the whole model, and if stages may be cut, each layer."""
    single = [Run(i, i + 1) for i in range(num_layers)] if is_cut else []
    return list(dict.fromkeys([*cut_into_runs(0, num_layers, num_layers, run_layers), *single]))


class DecodeGraphs:
    """The graphs of one device, and the hidden states that they work on."""

    def __init__(
        self,
        max_num_seqs: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Callable[[Callable[[], None]], Graph],
        run_layers: int = RUN_LAYERS,
    ) -> None:
        self.buckets, self.run_layers = batch_buckets(max_num_seqs), run_layers
        self._hidden = torch.zeros(self.buckets[-1], hidden_size, dtype=dtype, device=device)
        self._capture = capture
        self._graphs: dict[tuple[Run, int], Graph] = {}
        self.num_captures = 0
        self.num_replays = 0

    def hidden(self, bucket: int) -> Tensor:
        """Return the rows (bucket, H) that graphs of `bucket` change in place."""
        return self._hidden[:bucket]

    def capture(self, run: Run, bucket: int, work: Callable[[], None]) -> None:
        """Record `work`, which has run before: a capture compiles and loads nothing."""
        self._graphs[run, bucket] = self._capture(work)
        self.num_captures += 1

    def run(self, run: Run, bucket: int, work: Callable[[], None]) -> None:
        """Do `work`: replay it, if it was captured."""
        graph = self._graphs.get((run, bucket))
        if graph is None:
            work()
            return
        self.num_replays += 1
        graph.replay()
