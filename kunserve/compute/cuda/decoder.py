"""The decoder on a CUDA device: the same layers, on arrays at stable addresses, so that decode steps replay graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import StepBuffers, StepLimits, padding_arrays, step_arrays
from kunserve.compute.cuda.attention import PlannedStep, StepUploader
from kunserve.compute.cuda.flash_infer import load_attention
from kunserve.compute.cuda.graphs import (
    EMBEDDING,
    DecodeGraphs,
    Run,
    batch_buckets,
    bucket_for,
    captured_runs,
    cut_into_runs,
    head_of,
)
from kunserve.compute.cuda.ops import CudaOps, load_kernels
from kunserve.compute.cuda.sampling import (
    PendingTokens,
    TokenBuffers,
    is_greedy,
    launch_sample,
    most_likely,
    pending,
)
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch, Ops, Scores
from kunserve.compute.sampler import SamplingRow
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name

NO_IDS = np.zeros(0, np.int32)


class CudaDecoder(Decoder):
    """`Decoder` that takes its batch from the host: plans it, copies it and launches; nothing waits for results.

    Call what launches from the device's launcher only. Without `graphs` every step runs eagerly.
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
        self._head_run = head_of(config.num_layers)
        self._previous_ids = torch.zeros_like(buffers.token_ids.device)  # what the next step may begin with
        self._chosen = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=buffers.driver.torch_device)
        self._fed: Tensor | None = None  # the tokens, part of `_previous_ids`, that a graph has put there

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
        bucket, step, x = self._send(first_layer, x, batch, sampled_rows)
        if bucket is None:
            return super().forward(first_layer, last_layer, x, step.batch, step.sampled_rows, with_head=with_head)
        hidden = self._replay(bucket, first_layer, last_layer, x, step)
        if last_layer < self._config.num_layers:
            x = hidden[: len(batch.positions)]
            return x.clone()  # the next step changes `hidden` while the next stage still reads this
        y = hidden[step.sampled_rows]
        return self.logits(y) if with_head else y

    @torch.inference_mode()
    def launch_tokens(
        self, first_layer: int, x: Tensor, batch: AttentionBatch, sampled_rows: Tensor, rows: Sequence[SamplingRow]
    ) -> PendingTokens:
        """Run from `first_layer` to the end and choose a token for each sampled row; as `forward`. All rows are plain.

        Where all are greedy, what a decode step needs after its arrays is in graphs. On a GPU that has all layers the
        next step's tokens are then where its embedding reads them: so the step that is launched behind this one has to
        take them, before another is launched.
        """
        num_layers, is_whole = self._config.num_layers, first_layer == 0
        is_chosen_by_graph = len(sampled_rows) == len(batch.positions) and is_greedy(rows)
        if self._bucket(batch) is None or not is_chosen_by_graph:
            return self.launch_sample(self.forward(first_layer, num_layers, x, batch, sampled_rows), rows)
        bucket, step, x = self._send(first_layer, x, batch, sampled_rows)
        assert self.graphs is not None and bucket is not None
        hidden = self._replay(bucket, first_layer, num_layers, x, step)
        self.graphs.run(self._head_run, bucket, partial(self._choose, hidden))
        fed = self._previous_ids[: len(rows)]
        self._fed = fed if is_whole else None
        # The first stage of a chain is on another device, and takes them when more steps have been launched here.
        return pending(self._chosen[: len(rows)], fed if is_whole else fed.clone(), self._tokens)

    def put_previous_tokens(self, token_ids: Tensor) -> None:
        """Remember sampled ids (R,), on this GPU: the next step may name them before the host knows them."""
        if token_ids is not self._fed:
            self._previous_ids[: len(token_ids)].copy_(token_ids)
            self._fed = None

    def launch_sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
        """Choose one token per row of logits (R, V), on the current stream: see `sampling.launch_sample`."""
        return launch_sample(logits, rows, self._tokens)

    @torch.inference_mode()
    def capture(self, *, is_cut: bool = True) -> None:
        """Capture all runs of layers at all batch sizes, on the current stream. Before serving: see `Driver.capture`.

        is_cut: stages may begin and end at any layer, as those of chains do.
        Layers that are not present are captured, too, where layers like them are: nothing of theirs is touched before a
        replay. Embedding and head are, where they are present. So all that is captured has run before, as a capture can
        load no kernels; the rest runs eagerly. RuntimeError if a capture fails; torch allocates no memory any more
        after that, so the process has to end.
        """
        graphs = self.graphs
        if graphs is None:
            return
        with _no_garbage():
            for bucket in reversed(graphs.buckets):  # smaller ones fit into what the largest has taken
                self._capture_bucket(graphs, bucket, is_cut=is_cut)

    def _capture_bucket(self, graphs: DecodeGraphs, bucket: int, *, is_cut: bool) -> None:
        num_layers, hidden = self._config.num_layers, graphs.hidden(bucket)
        padding, ids = padding_arrays(bucket, self._uploader.num_kinds), np.zeros(bucket, np.int32)
        step = self._uploader.upload(padding, bucket, NO_IDS, ids)
        layers = captured_runs(num_layers, graphs.run_layers, is_cut=is_cut)
        works: dict[Run, Callable[[], None]] = {EMBEDDING: partial(self._begin, hidden, step.token_ids)}
        works |= {run: partial(self._run, run, hidden, step.batch) for run in layers}
        works[self._head_run] = partial(self._choose, hidden)
        have_run = set[int]()
        for run in filter(self._is_here, works):  # each layer, as they may differ
            if run not in layers or not have_run.issuperset(range(*run)):
                works[run]()  # compiles, and loads what a capture could not
                have_run.update(range(*run))
        known = {self._kind_of(layer) for layer in have_run}
        for run, work in works.items():
            is_known = run in layers and known.issuperset(map(self._kind_of, range(*run)))
            if is_known or self._is_here(run):
                graphs.capture(run, bucket, work)

    def _kind_of(self, layer: int) -> Hashable:
        """Return what decides which kernels a layer runs: how its tensors are stored, and how it attends."""
        specs = self._weights.specs(layer_name(layer))
        return Scores.of(self._config, layer), *((spec.shape, spec.dtype, spec.blocks) for spec in specs)

    def _is_here(self, run: Run) -> bool:
        present = self._weights.present
        return all(unit in present for unit in self._units(run)) and all(
            self._kv_memory.num_blocks(i) for i in range(*run)
        )

    def _units(self, run: Run) -> list[str]:
        if run == EMBEDDING or (run == self._head_run and self._config.tie_embeddings):
            return ["embed"]
        return ["head"] if run == self._head_run else [layer_name(i) for i in range(*run)]

    def _begin(self, hidden: Tensor, ids: Tensor) -> None:
        """Embed the tokens (B,) of a decode step."""
        hidden.copy_(self._embedded(self._known(ids)))

    def _run(self, run: Run, hidden: Tensor, batch: AttentionBatch) -> None:
        hidden.copy_(self._through(*run, hidden, batch))

    def _choose(self, hidden: Tensor) -> None:
        """Choose the most likely token after each row (B, H): for the host, and for the next step."""
        chosen = most_likely(self.logits(hidden))
        self._chosen[: len(hidden)].copy_(chosen)
        self._previous_ids[: len(hidden)].copy_(chosen.clamp(min=0))

    def _bucket(self, batch: AttentionBatch) -> int | None:
        """Return the batch size whose graphs run a step; None if it runs eagerly."""
        num_tokens = len(batch.positions)
        is_decode = num_tokens == len(batch.context_lens)
        return bucket_for(num_tokens, self.graphs.buckets) if self.graphs and is_decode else None

    def _send(
        self, first_layer: int, x: Tensor, batch: AttentionBatch, sampled_rows: Tensor
    ) -> tuple[int | None, PlannedStep, Tensor]:
        """Send the arrays of a step; returns its bucket, what was sent, and token ids or hidden states on this GPU."""
        bucket = self._bucket(batch)
        ids = x.numpy() if first_layer == 0 else NO_IDS
        if bucket is not None and first_layer == 0:
            ids = np.pad(ids, (0, bucket - len(ids)))
        arrays = step_arrays(batch, bucket, self._config.window)
        step = self._uploader.upload(arrays, bucket, sampled_rows.int().numpy(), ids)
        if first_layer == 0:
            x = self._known(step.token_ids) if bucket is None and (ids < 0).any() else step.token_ids
        return bucket, step, x

    def _replay(self, bucket: int, first_layer: int, last_layer: int, x: Tensor, step: PlannedStep) -> Tensor:
        """Run a decode step's layers, with the embedding before layer 0: (bucket, H), until the next one."""
        graphs = self.graphs
        assert graphs is not None
        hidden = graphs.hidden(bucket)
        if first_layer == 0:
            graphs.run(EMBEDDING, bucket, partial(self._begin, hidden, x))
        else:
            hidden[: len(x)] = x
        for run in cut_into_runs(first_layer, last_layer, self._config.num_layers, graphs.run_layers):
            graphs.run(run, bucket, partial(self._run, run, hidden, step.batch))
        return hidden

    def _known(self, ids: Tensor) -> Tensor:
        """Return ids (T,) from the host, with sampled ones in the place of placeholders."""
        return torch.where(ids < 0, self._previous_ids[(-1 - ids).clamp(min=0)], ids)


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
    attention, attention_note = load_attention(config, kv.shape, dtype, buffers, max_bucket)
    is_capturable = kernels.is_capturable and attention.is_capturable
    graphs = None
    if is_capturable and not enforce_eager:
        graphs = DecodeGraphs(limits.max_num_seqs, config.hidden_size, dtype, driver.torch_device, driver.capture)
    uploader = StepUploader(buffers, attention)
    decoder = CudaDecoder(config, CudaOps(kernels), weights, kv, max_model_len, uploader, buffers, graphs, limits)
    driver.synchronize_all()  # buffers were made on the default stream, which ours do not wait for
    note = f"{kernels_note}, attention: {attention_note}, {'graphs' if graphs else 'eager'}"
    return decoder, note
