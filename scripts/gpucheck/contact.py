"""First contact of packed weights: torch's product of 8-bit floats, and our kernel, by themselves and in a graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpucheck.packed import FORMS, random_part
from kunserve.compute.cuda.ops import FP8_SINCE
from kunserve.compute.cuda.packed import packed_linear

N, K, ROWS, REPEATS = 4096, 14336, (1, 16, 129), 50


def fp8_product(ordinal: int) -> dict[str, Any]:
    """Return error, microseconds and bytes of the matrix a second; AssertionError if it is wrong."""
    if (found := torch.cuda.get_device_capability(ordinal)) < FP8_SINCE:
        return {"skipped": f"compute capability {found}"}
    device, figures = torch.device("cuda", ordinal), dict[str, Any]()
    weight = torch.randn(N, K, device=device).clamp(-4, 4).to(torch.float8_e4m3fn)
    of_columns = torch.rand(1, N, device=device) + 0.5
    for num_rows in ROWS:
        x = torch.randn(num_rows, K, device=device).to(torch.float8_e4m3fn)
        of_rows = torch.rand(num_rows, 1, device=device) + 0.5
        work = partial(torch._scaled_mm, x, weight.t(), of_rows, of_columns, out_dtype=torch.bfloat16)
        expected = (x.float() @ weight.float().t()) * of_rows * of_columns
        figures[str(num_rows)] = _timed(ordinal, work, expected, weight.numel())
    return figures


def packed_products(ordinal: int) -> dict[str, Any]:
    """Check as `fp8_product` does, for each form of a matrix."""
    device, figures = torch.device("cuda", ordinal), dict[str, Any]()
    torch.cuda.set_device(ordinal)  # Triton launches there
    for name, planes in FORMS.items():
        part = random_part(planes, N, K, device)
        matrix = part.dense().to(torch.bfloat16).float()
        for num_rows in ROWS:
            x = torch.randn(num_rows, K, device=device).to(torch.bfloat16)
            figures[f"{name}, {num_rows}"] = _timed(
                ordinal, partial(packed_linear, x, part), x.float() @ matrix.t(), part.data.nbytes
            )
    return figures


def _timed(ordinal: int, work: Callable[[], Tensor], expected: Tensor, num_bytes: int) -> dict[str, Any]:
    found = work()
    error = float((found.float() - expected).norm() / expected.norm())
    assert error < 1e-2, f"relative error {error}"
    stream, graph = torch.cuda.Stream(ordinal), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(ordinal)
    with torch.cuda.stream(stream):
        work()
        graph.capture_begin(capture_error_mode="thread_local")
        replayed = work()
        graph.capture_end()
        graph.replay()
        stream.synchronize()
        assert torch.equal(found, replayed), "a replay differs"
        begun = time.perf_counter()
        for _ in range(REPEATS):
            graph.replay()
        stream.synchronize()
    us = (time.perf_counter() - begun) / REPEATS * 1e6
    return {"error": error, "us": us, "gb_per_s": num_bytes / us / 1e3}


def free_during_capture(ordinal: int) -> dict[str, Any]:
    """Free a pinned buffer of a stream that is captured, in another thread; tell whether torch's allocator goes on.

    KunServe captures before it serves, and frees none then: so either answer is well. Where it does not go on, no
    pinned memory can be had any more from torch in this process.
    """
    x = torch.ones(1024, device=torch.device("cuda", ordinal))
    stream, graph = torch.cuda.Stream(ordinal), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(ordinal)
    with torch.cuda.stream(stream):
        held = [torch.empty(1024, pin_memory=True)]
        held[0].copy_(x, non_blocking=True)
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        freeing = threading.Thread(target=held.clear)
        freeing.start()
        freeing.join()
        x.add_(1)
        try:
            graph.capture_end()
            for size in (1024, 2048):
                torch.empty(size, pin_memory=True)
        except RuntimeError as error:
            return {"goes_on": False, "because": str(error).partition("\n")[0]}
    return {"goes_on": True}
