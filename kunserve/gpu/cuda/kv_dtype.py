"""The dtype of KV on GPUs, from its flag: what a server and a simulation of it take, and what both refuse."""

from __future__ import annotations

import torch

from kunserve.errors import ConfigError
from kunserve.gpu.kv_memory import E4M3


def cuda_kv_dtype(name: str, dtype: torch.dtype, head_dim: int) -> torch.dtype:
    """Return the dtype of KV on GPUs whose weights have `dtype`. ConfigError for one that they do not serve.

    FlashInfer 0.6.18 reads a row of KV 64 bytes at a time, if it is one, else 128: of other rows it loses the end, and
    says nothing (its issue 4976).
    """
    own = str(dtype).removeprefix("torch.")
    known = {"auto": dtype, own: dtype, "fp8": E4M3, "fp8_e4m3": E4M3}
    if name not in known:
        raise ConfigError(f"--kv-cache-dtype {name}: on GPUs KV has the weights' dtype, {own}, or 8 bits (fp8)")
    if known[name] == E4M3 and dtype != torch.float32 and head_dim != 64 and head_dim % 128:
        raise ConfigError(
            f"--kv-cache-dtype {name}: FlashInfer reads KV of 8 bits in heads of 64, 128 or 256 numbers, and this "
            f"model's have {head_dim}; leave the flag out"
        )
    return known[name]
