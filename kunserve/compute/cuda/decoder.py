"""The decoder on a CUDA device: the same layers, fed from the host through stable addresses, replayed for decode."""

from __future__ import annotations

import torch
from torch import Tensor

from kunserve.compute.cuda.attention import PlannedBatch, Planner, StepBuffers, StepLimits, load_attention
from kunserve.compute.cuda.graphs import CudaCapture, DecodeGraphs, Run, batch_buckets, bucket_for, cut_into_runs
from kunserve.compute.cuda.ops import CudaOps, load_kernels
from kunserve.compute.decoder import Decoder
from kunserve.compute.ops import AttentionBatch, Ops
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig


class CudaDecoder(Decoder):
    """`Decoder` that takes its batch from the host: plans it, copies it and launches; nothing waits for results.

    Call `forward` and `feed` from the device's launcher only. Without `graphs` every step runs eagerly.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: Weights,
        kv: KVMemory,
        max_model_len: int,
        planner: Planner,
        buffers: StepBuffers,
        graphs: DecodeGraphs | None,
    ) -> None:
        super().__init__(config, ops, weights, kv, max_model_len)
        self._planner, self._buffers, self.graphs = planner, buffers, graphs
        self._fed = torch.zeros_like(buffers.token_ids.device)

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
        """As `Decoder.forward`, with `batch`, `sampled_rows` and token ids on the host; hidden states on any GPU.

        A token id below 0 stands for one that was sampled, but that the host has not seen: -1 - i is the i-th of those
        last given to `feed`.
        """
        graphs, buffers = self.graphs, self._buffers
        is_decode = len(batch.positions) == len(batch.context_lens)
        bucket = bucket_for(len(batch.positions), graphs.buckets) if graphs and is_decode else None
        buffers.wait_writable()
        planned = self._planner.plan(batch, bucket)
        rows = buffers.sampled_rows.put(sampled_rows.int().numpy())
        x = self._token_ids(x) if first_layer == 0 else self._here(x)
        buffers.mark_written()
        if graphs is None or bucket is None:
            return super().forward(first_layer, last_layer, x, planned, rows, with_head=with_head)
        y = self._replay(graphs, bucket, first_layer, last_layer, x, planned, rows)
        return self.logits(y) if with_head and last_layer == self._config.num_layers else y

    def feed(self, token_ids: Tensor) -> None:
        """Remember sampled ids (R,), of any GPU: the next step may name them before the host knows them."""
        if token_ids.is_cuda:  # its memory must not be used again before this stream has read it
            token_ids.record_stream(torch.cuda.current_stream(token_ids.device))
        self._fed[: len(token_ids)].copy_(token_ids)

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
        for run, is_whole in cut_into_runs(first_layer, last_layer, graphs.run_layers):

            def work(run: Run = run) -> None:
                y = hidden
                for layer in range(*run):
                    y = self._layer(layer, y, batch)
                hidden.copy_(y)

            if is_whole:
                graphs.run(run, bucket, work)
            else:
                work()
        if last_layer < self._config.num_layers:
            return hidden[:num_rows].clone()  # the next step changes `hidden` while the next stage still reads this
        return hidden[sampled_rows]

    def _token_ids(self, x: Tensor) -> Tensor:
        """Ids (T,) from the host, with the device's own put in where the host did not know them."""
        ids = self._buffers.token_ids.put(x.numpy())
        if not bool((x < 0).any()):
            return ids
        return torch.where(ids < 0, self._fed[(-1 - ids).clamp(min=0)], ids)

    def _here(self, x: Tensor) -> Tensor:
        """Hidden states on this GPU. The launcher has made its stream wait for the stage that computes them."""
        if x.is_cuda:  # its memory must not be used again before this stream has read it
            x.record_stream(torch.cuda.current_stream(x.device))
        return x.to(self._buffers.torch_device, non_blocking=True)


def cuda_decoder(
    config: ModelConfig,
    weights: Weights,
    kv: KVMemory,
    max_model_len: int,
    limits: StepLimits,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    enforce_eager: bool,
) -> tuple[CudaDecoder, str]:
    """Put a device's decoder together; and what it is made of, for the log. ConfigError if something is missing."""
    buffers = StepBuffers(limits, device)
    kernels, kernels_note = load_kernels(device)
    max_bucket = batch_buckets(limits.max_num_seqs)[-1]
    attention, attention_note = load_attention(config, block_size, dtype, buffers, max_bucket)
    is_capturable = kernels.is_capturable and attention.is_capturable
    graphs = None
    if is_capturable and not enforce_eager:
        graphs = DecodeGraphs(limits.max_num_seqs, config.hidden_size, dtype, device, CudaCapture())
    planner = Planner(buffers, attention)
    decoder = CudaDecoder(config, CudaOps(kernels), weights, kv, max_model_len, planner, buffers, graphs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # buffers were made on the default stream, which ours do not wait for
    note = f"{kernels_note}, attention: {attention_note}, {'graphs' if graphs else 'eager'}"
    return decoder, note
