"""The CUDA decoder put together without a GPU: torch kernels, reference attention, and graphs that run again."""

from __future__ import annotations

import torch
from fake_cuda import FakeCuda

from kunserve.compute.cuda.arrays import StepBuffers, StepLimits
from kunserve.compute.cuda.attention import ReferenceAttention, StepUploader
from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.cuda.flash_infer import FlashInferAttention
from kunserve.compute.cuda.graphs import DecodeGraphs
from kunserve.compute.cuda.ops import CudaOps, TorchKernels
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.model.config import ModelConfig

CPU = torch.device("cpu")


class CapturableKernels(TorchKernels):
    """The reference, on a GPU that does all at once: a graph does it again."""

    is_capturable = True


def cuda_decoder_on_cpu(
    config: ModelConfig,
    memory: DeviceMemory,
    max_model_len: int,
    limits: StepLimits,
    run_layers: int | None = 2,
    attention: FlashInferAttention | None = None,
    dtype: torch.dtype | None = None,
) -> CudaDecoder:
    """A decoder whose every part but the GPU's is the real one; without graphs if `run_layers` is None.

    `dtype`: of what is computed; None: that of KV.
    """
    driver = FakeCuda()
    buffers = StepBuffers(limits, driver) if attention is None else attention.buffers
    block_size = memory.kv.shape.block_size
    graphs = None
    if run_layers is not None:
        dtype = dtype or memory.kv.shape.dtype
        graphs = DecodeGraphs(limits.max_num_seqs, config.hidden_size, dtype, CPU, driver.capture, run_layers)
    uploader = StepUploader(buffers, attention or ReferenceAttention(block_size, buffers))
    kernels = CudaOps(TorchKernels())
    return CudaDecoder(config, kernels, memory.weights, memory.kv, max_model_len, uploader, buffers, graphs, limits)
