"""Copies of KV blocks between ranges, on one device or from device to device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_blocks(source: Tensor, source_ids: Sequence[int], destination: Tensor, destination_ids: Sequence[int]) -> None:
    """Copy blocks of one layer: `destination[destination_ids] = source[source_ids]`. Only named blocks are touched.

    source, destination: (num_blocks, ...) of the same block shape and dtype. Blocking; run it on a copy queue.
    """
    read = torch.tensor(source_ids, device=source.device)
    write = torch.tensor(destination_ids, device=destination.device)
    destination.index_copy_(0, write, source.index_select(0, read).to(destination.device))
