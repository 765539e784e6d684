"""The decoder on a CPU device with C kernels: decode steps of few rows are recorded, and pass through by one call."""

from __future__ import annotations

import copy
import ctypes

from torch import Tensor

from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.cpu_recording import Recording
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig

MOST_ROWS = 16  # of a step that is recorded: with more, what a call from Python costs is not seen


class CpuDecoder(Decoder):
    """`Decoder` whose layers run as they were recorded, where they are nothing but kernels and the rows are few.

    Which experts rows choose is not in a recording: the kernels find out again.
    """

    def __init__(self, config: ModelConfig, ops: CpuOps, weights: Weights, kv: KVMemory, max_model_len: int) -> None:
        super().__init__(config, ops, weights, kv, max_model_len)
        self._kernels: ctypes.CDLL = ops.kernels
        self._range, self.recordings = (0, 0), dict[int, Recording]()  # by rows, of a range of layers
        self._is_recorded = config.residual_scale == 1  # another one is multiplied by torch

    def _through(self, first_layer: int, last_layer: int, x: Tensor, batch: AttentionBatch) -> Tensor:
        num_rows = len(x)
        is_decode = num_rows == len(batch.context_lens) <= MOST_ROWS and batch.near is None
        if not (is_decode and self._is_recorded):
            return super()._through(first_layer, last_layer, x, batch)
        if self._range != (first_layer, last_layer):  # its group has changed
            self._range, self.recordings = (first_layer, last_layer), {}
        if (recording := self.recordings.get(num_rows)) is not None:
            return recording.replay(x, batch)

        def layers(ops: CpuOps, x: Tensor) -> Tensor:
            decoder = copy.copy(self)
            decoder._ops = ops
            return super(CpuDecoder, decoder)._through(first_layer, last_layer, x, batch)

        recording = self.recordings[num_rows] = Recording(self._kernels, layers, x)
        return recording.result
