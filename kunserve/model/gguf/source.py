"""GGUF: the weights of a file as a `WeightSource`. Blocks are copied as they are where a device stores them so."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import check_shape, expected_shapes, shorten
from kunserve.model.config import ModelConfig
from kunserve.model.files import reading
from kunserve.model.gguf.file import GgufFile, GgufTensor
from kunserve.model.gguf.shape import hf_tensors
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
        self._paths = file.paths
        self._tensors = hf_tensors(file)
        shapes = expected_shapes(config)
        if missing := [name for name in shapes if name not in self._tensors]:
            raise ConfigError(f"{file.paths[0]} lacks {len(missing)} of {len(shapes)} tensors: {shorten(missing)}")
        if unused := sorted(self._tensors.keys() - shapes.keys()):  # answers would be wrong without them
            raise ConfigError(
                f"{file.paths[0]} has {len(unused)} tensors that {config.family} is not run with: {shorten(unused)}"
            )
        for name, shape in shapes.items():
            check_shape(name, self._tensors[name].shape, shape, str(self._tensors[name].path))
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
        tensor = self._tensors.get(matrix)
        if tensor is None:
            raise ConfigError(f"the file has no tensor {name}")
        rows, planes = self._moved(matrix, self._rows(tensor)), self._config.formats.of(matrix)
        if name != matrix or (isinstance(planes, Planes) and out.dtype is torch.uint8):
            assert isinstance(planes, Planes) and tensor.blocks is not None
            codes, scale, offset = numbers_of(rows, tensor.blocks)
            try:
                found = codes_plane(codes, planes) if name == matrix else scales_plane(scale, offset, planes)
            except ConfigError as error:
                raise ConfigError(f"{matrix} in {tensor.path} {error.message}") from None
            check_shape(name, tuple(found.shape), tuple(out.shape), str(tensor.path))
            out.copy_(found)
        elif out.dtype is torch.uint8:
            check_shape(name, tuple(rows.shape), tuple(out.shape), str(tensor.path))
            out.copy_(rows)
        else:
            values = rows.view(_DTYPES[tensor.format]) if tensor.blocks is None else dequantize(rows, tensor.blocks)
            check_shape(name, tensor.shape, tuple(out.shape), str(tensor.path))
            out.copy_(values.view(tensor.shape))
        del rows
        if not self._keeps_pages:
            self._let_go(tensor.path)

    def _rows(self, tensor: GgufTensor) -> Tensor:
        """Return the bytes of a tensor, a row of it in each row; nothing is read yet."""
        data = torch.frombuffer(
            self._maps[tensor.path], dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.offset
        )
        return data.view(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)

    def _moved(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a matrix in transformers' order."""
        heads = MOVED.get(name.split(".")[-2]) if self._config.family == "llama" else None
        if heads is None:
            return rows
        pairs = rows.view(getattr(self._config, heads), -1, 2, rows.shape[1])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _let_go(self, path: Path) -> None:
        self._maps[path].madvise(mmap.MADV_DONTNEED)
        with reading(path), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    with reading(path), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that could be written
