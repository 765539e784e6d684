"""GGUF: the weights of a file as a `WeightSource`. Blocks are copied as they are where a device stores them so."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import check_shape
from kunserve.model.config import ModelConfig
from kunserve.model.files import reading
from kunserve.model.gguf.file import GgufFile, GgufTensor
from kunserve.model.gguf.names import Parts, joined_axis, parts_of
from kunserve.model.gguf.shape import architecture_of
from kunserve.model.quant.dequantize import dequantize
from kunserve.model.quant.plane_codes import codes_plane, numbers_of, scales_plane
from kunserve.model.quant.planes import SCALES, Planes

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
# llama.cpp turns neighbours where transformers turns (i, i + head_dim / 2): its converter moved the rows of these.
MOVED = {"q_proj": "num_heads", "k_proj": "num_kv_heads"}


class GgufSource:
    """Memory-mapped GGUF files. Names and shapes are checked when it is opened; ConfigError says what is missing.

    keeps_pages: whether pages that were read may stay in the page cache.
    """

    def __init__(self, file: GgufFile, config: ModelConfig, *, keeps_pages: bool = True) -> None:
        self._config, self._keeps_pages = config, keeps_pages
        self._paths, self._architecture = file.paths, architecture_of(file)
        try:
            self._tensors = parts_of(file, config, self._architecture.layer_names)
        except ConfigError as error:
            raise ConfigError(f"{file.paths[0]}: {error.message}") from None
        self._maps: Mapping[Path, mmap.mmap] = {path: _map(path) for path in file.paths}

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of the mapped files: what the page cache holds of them at most."""
        return sum(path.stat().st_size for path in self._paths) if self._keeps_pages else 0

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`: rows of blocks as they are (uint8), else its numbers, cast to `out`'s dtype.

        Of planes the codes (uint8) or the scales. Raises ConfigError on another shape.
        """
        matrix = name.removesuffix(SCALES)
        parts, planes = self._tensors.get(matrix), self._config.formats.of(matrix)
        if parts is None:
            raise ConfigError(f"the file has no tensor {name}")
        where = str(parts[0].path)
        if name != matrix or (isinstance(planes, Planes) and out.dtype is torch.uint8):
            assert isinstance(planes, Planes) and parts[0].blocks is not None
            codes, scale, offset = numbers_of(self._rows(matrix, parts), parts[0].blocks)
            try:
                found = codes_plane(codes, planes) if name == matrix else scales_plane(scale, offset, planes)
            except ConfigError as error:
                raise ConfigError(f"{matrix} in {where} {error.message}") from None
        elif out.dtype is torch.uint8:
            found = self._rows(matrix, parts)
        else:
            found = self._numbers(matrix, parts)
        check_shape(name, tuple(found.shape), tuple(out.shape), where)
        out.copy_(found)
        del found
        if not self._keeps_pages:
            for part in parts:
                self._let_go(part.path)

    def _rows(self, name: str, parts: Parts) -> Tensor:
        """Return the bytes of the rows of a matrix: (..., N, bytes of a row) uint8."""
        rows = [self._bytes(part).view(*part.shape[:-1], -1) for part in parts]
        return self._moved(name, rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2))

    def _numbers(self, name: str, parts: Parts) -> Tensor:
        """Return what a tensor stands for, in the dtype that it is stored in; of blocks in float32."""
        axis, found = joined_axis(name, len(parts[0].shape)), []
        for part in parts:
            data = self._bytes(part)
            if part.blocks is None:
                found.append(data.view(_DTYPES[part.format]).view(part.shape))
            else:
                found.append(dequantize(data.view(prod(part.shape[:-1]), -1), part.blocks).view(part.shape))
        return self._moved(name, found[0] if len(found) == 1 else torch.cat(found, dim=axis))

    def _bytes(self, tensor: GgufTensor) -> Tensor:
        """Return the bytes of a tensor; nothing is read yet."""
        return torch.frombuffer(
            self._maps[tensor.path], dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.offset
        )

    def _moved(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a matrix, or the numbers of its bias, in transformers' order."""
        heads = MOVED.get(name.split(".")[-2]) if self._architecture.has_moved_rows else None
        if heads is None:
            return rows
        pairs = rows.view(getattr(self._config, heads), -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _let_go(self, path: Path) -> None:
        self._maps[path].madvise(mmap.MADV_DONTNEED)
        with reading(path), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    with reading(path), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that could be written
