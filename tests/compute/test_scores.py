"""What becomes of attention's scores: windows, soft caps, sinks; and rotation of parts of a head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_layers import REFERENCE, Layer, Shape, assert_near, randn

from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.ops import Scores

VARIED = [
    Scores(window=1),
    Scores(window=40, scale=0.3),
    Scores(window=33, softcap=2.0),
    Scores(softcap=0.5),
    Scores(window=32),
]


@pytest.mark.parametrize("scores", VARIED, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_caps_and_sinks_match_float64_and_ignore_chunks(ops: CpuOps, scores: Scores, with_sinks: bool) -> None:
    shape, lengths = Shape(6, 2, 24, 5), [150, 97]
    sinks = randn(6, seed=5) * 2 if with_sinks else None
    expected = Layer(REFERENCE, shape, lengths, torch.float64, 3, scores, None if sinks is None else sinks.double())
    whole = Layer(ops, shape, lengths, torch.float32, 3, scores, sinks)
    for b, n in enumerate(lengths):
        assert_near(whole.append([(b, n)]), expected.append([(b, n)]), ulps=64)
    for chunk in (1, 7, 64):
        pieces = Layer(ops, replace(shape, block_size=5 + chunk % 2), lengths, torch.float32, 3, scores, sinks)
        while step := [
            (b, min(chunk, n - pieces.contexts[b])) for b, n in enumerate(lengths) if n > pieces.contexts[b]
        ]:
            pieces.append(step)
        for b in range(len(lengths)):
            assert torch.equal(torch.cat(pieces.outputs[b]), whole.outputs[b][0])


def test_what_lies_behind_a_window_is_not_read(ops: CpuOps) -> None:
    """Its blocks may be anybody's by then: here they have numbers that would spoil every sum."""
    layer = Layer(ops, Shape(), [200], torch.float32, 1, Scores(window=40))
    layer.append([(0, 199)])
    behind = layer.tables[0][: (199 - 39 - 32) // 16]  # a tile of 32 positions may reach before the window
    layer.kv[behind] = float("nan")
    assert layer.append([(0, 1)]).isfinite().all()


def test_a_part_of_a_head_may_be_rotated_or_nothing_of_it(ops: CpuOps) -> None:
    for rotary_dim in (0, 8, 16):
        for whole in (False, True):
            results = []
            for o, dtype in ((ops, torch.float32), (REFERENCE, torch.float64)):
                layer = Layer(o, Shape(4, 2, 16, 4), [11], dtype, 5)
                layer.rope = layer.rope[:, :rotary_dim].contiguous()
                if whole:
                    layer.norms = [randn(n * 16, seed=n).to(dtype) for n in (4, 2)]
                layer.append([(0, 11)], norm=whole)
                results.append((layer.outputs[0][0], layer.kv[layer.tables[0]]))
            assert_near(results[0][0], results[1][0], ulps=48)
            torch.testing.assert_close(results[0][1].double(), results[1][1], rtol=1e-5, atol=1e-5, equal_nan=True)
