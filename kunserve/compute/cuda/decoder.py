"""The decoder on a CUDA device: the same layers, on arrays at stable addresses, so that decode steps replay graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import StepBuffers, StepLimits, padding_arrays, step_arrays
from kunserve.compute.cuda.attention import PlannedBatch, StepUploader
from kunserve.compute.cuda.flash_infer import load_attention
from kunserve.compute.cuda.graphs import DecodeGraphs, Run, batch_buckets, bucket_for, cut_into_runs
from kunserve.compute.cuda.ops import CudaOps, load_kernels
from kunserve.compute.cuda.sampling import PendingTokens, TokenBuffers, launch_sample
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch, Ops
from kunserve.compute.sampler import SamplingRow
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name

NO_IDS = np.zeros(0, np.int32)


class CudaDecoder(Decoder):
    """`Decoder` that takes its batch from the host: plans it, copies it and launches; nothing waits for results.

    Call `forward` and `put_previous_tokens` from the device's launcher only. Without `graphs` every step runs eagerly.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: Weights,
        kv: KVMemory,
        max_model_len: int,
        uploader: StepUploader,
        buffers: StepBuffers,
        graphs: DecodeGraphs | None,
        limits: StepLimits,
    ) -> None:
        super().__init__(config, ops, weights, kv, max_model_len)
        self._uploader, self._buffers, self.graphs, self._kv_memory = uploader, buffers, graphs, kv
        self._tokens = TokenBuffers(buffers.driver, limits.max_num_seqs)
        self._previous_ids = torch.zeros_like(buffers.token_ids.device)

    @torch.inference_mode()
    def forward(
        self,
        first_layer: int,
        last_layer: int,
        x: Tensor,
        batch: AttentionBatch,
        sampled_rows: Tensor,
        *,
        with_head: bool = True,
    ) -> Tensor:
        """Run as `Decoder.forward`, with `batch`, rows and token ids on the host; hidden states on this GPU.

        A token id below 0 stands for one that was sampled, but that the host has not seen: -1 - i is the i-th of those
        last given to `put_previous_tokens`.
        """
        graphs = self.graphs
        is_decode = len(batch.positions) == len(batch.context_lens)
        bucket = bucket_for(len(batch.positions), graphs.buckets) if graphs and is_decode else None
        ids = x.numpy() if first_layer == 0 else NO_IDS
        arrays = step_arrays(batch, bucket, self._config.window)
        step = self._uploader.upload(arrays, bucket, sampled_rows.int().numpy(), ids)
        if first_layer == 0:
            x = self._known(step.token_ids, has_placeholders=bool((ids < 0).any()))
        rows = step.sampled_rows
        if graphs is None or bucket is None:
            return super().forward(first_layer, last_layer, x, step.batch, rows, with_head=with_head)
        y = self._replay(graphs, bucket, first_layer, last_layer, x, step.batch, rows)
        return self.logits(y) if with_head and last_layer == self._config.num_layers else y

    def put_previous_tokens(self, token_ids: Tensor) -> None:
        """Remember sampled ids (R,), on this GPU: the next step may name them before the host knows them."""
        self._previous_ids[: len(token_ids)].copy_(token_ids)

    def launch_sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
        """Choose one token per row of logits (R, V), on the current stream: see `sampling.launch_sample`."""
        return launch_sample(logits, rows, self._tokens)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all runs of layers at all batch sizes, on the current stream. Before serving: see `Driver.capture`.

        Layers that are not present are captured, too: nothing of theirs is touched before a replay. RuntimeError if a
        capture fails; torch allocates no memory any more after that, so the process has to end.
        """
        graphs = self.graphs
        if graphs is None:
            return
        with _no_garbage():
            for bucket in reversed(graphs.buckets):  # smaller ones fit into what the largest has taken
                self._capture_bucket(graphs, bucket)

    def _capture_bucket(self, graphs: DecodeGraphs, bucket: int) -> None:
        num_layers = self._config.num_layers
        step = self._uploader.upload(padding_arrays(bucket, self._uploader.num_kinds), bucket, NO_IDS, NO_IDS)
        runs = [run for run, _ in cut_into_runs(0, num_layers, num_layers, graphs.run_layers)]
        works = {run: partial(self._run, run, graphs.hidden(bucket), step.batch) for run in runs}
        for run in filter(self._is_here, runs):  # each, as layers may differ
            works[run]()  # compiles, and loads what a capture could not
        for run, work in works.items():
            graphs.capture(run, bucket, work)

    def _is_here(self, run: Run) -> bool:
        present = self._weights.present
        return all(layer_name(i) in present and self._kv_memory.num_blocks(i) for i in range(*run))

    def _run(self, run: Run, hidden: Tensor, batch: AttentionBatch) -> None:
        hidden.copy_(self._through(*run, hidden, batch))

    def _replay(
        self,
        graphs: DecodeGraphs,
        bucket: int,
        first_layer: int,
        last_layer: int,
        x: Tensor,
        batch: PlannedBatch,
        sampled_rows: Tensor,
    ) -> Tensor:
        num_rows, hidden = len(x), graphs.hidden(bucket)
        hidden[:num_rows] = self._embedded(x) if first_layer == 0 else x
        for run, is_whole in cut_into_runs(first_layer, last_layer, self._config.num_layers, graphs.run_layers):
            work = partial(self._run, run, hidden, batch)
            if is_whole:
                graphs.run(run, bucket, work)
            else:
                work()
        if last_layer < self._config.num_layers:
            return hidden[:num_rows].clone()  # the next step changes `hidden` while the next stage still reads this
        return hidden[sampled_rows]

    def _known(self, ids: Tensor, *, has_placeholders: bool) -> Tensor:
        """Return ids (T,) from the host, with sampled ones in the place of placeholders."""
        return torch.where(ids < 0, self._previous_ids[(-1 - ids).clamp(min=0)], ids) if has_placeholders else ids


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect no garbage inside: a pinned buffer in a cycle would be freed during a capture (`Driver.capture`)."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cuda_decoder(
    config: ModelConfig,
    weights: Weights,
    kv: KVMemory,
    max_model_len: int,
    limits: StepLimits,
    *,
    block_size: int,
    dtype: torch.dtype,
    driver: Driver,
    enforce_eager: bool,
) -> tuple[CudaDecoder, str]:
    """Make a device's decoder; also returns, for the log, what it is made of. ConfigError if something is missing.

    Until `capture` all its steps run eagerly.
    """
    buffers = StepBuffers(limits, driver)
    kernels, kernels_note = load_kernels(driver.torch_device)
    max_bucket = batch_buckets(limits.max_num_seqs)[-1]
    attention, attention_note = load_attention(config, block_size, dtype, buffers, max_bucket)
    is_capturable = kernels.is_capturable and attention.is_capturable
    graphs = None
    if is_capturable and not enforce_eager:
        graphs = DecodeGraphs(limits.max_num_seqs, config.hidden_size, dtype, driver.torch_device, driver.capture)
    uploader = StepUploader(buffers, attention)
    decoder = CudaDecoder(config, CudaOps(kernels), weights, kv, max_model_len, uploader, buffers, graphs, limits)
    driver.synchronize_all()  # buffers were made on the default stream, which ours do not wait for
    note = f"{kernels_note}, attention: {attention_note}, {'graphs' if graphs else 'eager'}"
    return decoder, note
