"""What the layers of a decode step ask of the CPU kernels, recorded once and then made again by one call into C.

With one row a call from Python costs as much as a small product. Recorded are addresses and sizes, as weights and KV
stay where they are (cpu_replay.c); the kernels and what they compute are the same.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import c_float, c_int64
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kunserve.compute.cpu_ops import FLOAT, CpuOps, raise_unread, raise_unslotted, where
from kunserve.compute.ops import AttentionBatch

KERNELS = (  # cpu_replay.c has the same order
    "linear",
    "rms_norm",
    "act_and_mul",
    "rotate_and_append",
    "attention",
    "add",
    "route",
    "experts",
    "gate_rows",
)
NUM_FLOATS = (0, 2, 2, 2, 2, 0, 0, 2, 0)  # of their arguments, the last ones
MOST_NUMBERS = 20  # of the others


class Call(ctypes.Structure):
    """A call, as cpu_replay.c reads it."""

    _fields_ = (("kernel", c_int64), ("a", c_int64 * MOST_NUMBERS), ("f", c_float * 2))


class RecordingOps(CpuOps):
    """`CpuOps` that keeps a record of what it calls, and owns what it returns.

    A tensor that nobody holds any more is returned again: nothing that comes later can read what was in it.
    """

    def __init__(self, kernels: ctypes.CDLL) -> None:
        super().__init__(kernels)
        self.calls: list[Call] = []
        self._tensors: list[Tensor] = []
        for kernel, name in enumerate(KERNELS):
            setattr(self, f"_{name}", partial(self._record, kernel, getattr(kernels, name)))

    def _record(self, kernel: int, function: Callable[..., Any], *arguments: Any) -> Any:
        num_floats = NUM_FLOATS[kernel]
        numbers = [int(a or 0) for a in arguments[: len(arguments) - num_floats]]
        floats = arguments[len(arguments) - num_floats :]
        self.calls.append(Call(kernel, (c_int64 * MOST_NUMBERS)(*numbers), (c_float * 2)(*floats)))
        return function(*arguments)

    def new(self, *shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        """See `CpuOps.new`."""
        for tensor in self._tensors:
            is_free = sys.getrefcount(tensor) == 3  # the list's, the loop's and its argument's
            if is_free and tensor.shape == shape and tensor.dtype is dtype:
                return tensor
        self._tensors.append(torch.empty(shape, dtype=dtype))
        return self._tensors[-1]


class Recording:
    """A pass of T rows through some layers: made once by `layers`, and again by `replay` with other rows and places."""

    def __init__(self, kernels: ctypes.CDLL, layers: Callable[[CpuOps, Tensor], Tensor], x: Tensor) -> None:
        """Run `layers`, which calls nothing but the operations it is given, on `x` (T, H)."""
        ops = RecordingOps(kernels)
        self._replay, self._x, self._held = kernels.replay, x.clone(), ops
        self._y = layers(ops, self._x)
        self._calls = (Call * len(ops.calls))(*ops.calls)

    @property
    def result(self) -> Tensor:
        """Return a copy of what the newest pass has made: (T, H)."""
        return self._y.clone()

    def replay(self, x: Tensor, batch: AttentionBatch) -> Tensor:
        """Pass `x` (T, H), one token of each sequence of `batch`, through the layers. Raises EngineError as they do."""
        self._x.copy_(x)
        bad = self._replay(ctypes.addressof(self._calls), len(self._calls), *where(batch))
        if bad > 0:
            raise_unslotted(bad - 1)
        if bad < 0:
            raise_unread(-bad - 1)
        return self.result
