"""Weights read from their files, each time anew, for hosts that cannot keep them: no mapping, no pages in the cache."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.config import ModelConfig
from kunserve.model.family.stored import stored_form

SLICE_BYTES = 8 << 20  # read at a time: all of a tensor that is ever in host memory
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class _TensorLocation:
    """Bytes `[start, end)` of a file, which hold one tensor."""

    path: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class DiskSource:
    """A `WeightSource` over safetensors files that are open only while a tensor is read.

    Names, shapes and dtypes are checked when it is made; raises ConfigError as `SafetensorsSource` does.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        source = SafetensorsSource(folder, config)  # maps the files, and reads their headers only
        headers = {path: _locations(path) for path in set(source.files.values())}
        self._locations = {name: headers[path][source.stored_names[name]] for name, path in source.files.items()}

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out` (contiguous), casting to its dtype, slice by slice.

        Raises ConfigError on another shape or a read error.
        """
        location = self._locations.get(name)
        if location is None:
            raise ConfigError(f"the checkpoint has no tensor {name}")
        form = stored_form(name)
        if location.shape != (form.shape(tuple(out.shape)) if form else out.shape):
            raise ConfigError(f"{name} has shape {list(location.shape)} in {location.path}, not {list(out.shape)}")
        # What is not kept as it is read is in host memory whole for a moment.
        read = out if form is None else torch.empty(location.shape, dtype=location.dtype)
        try:
            with location.path.open("rb", buffering=0) as file:
                _read(file, location, read.view(-1))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # all of it: with what was read ahead
        except OSError as error:
            raise ConfigError(f"cannot read {name} from {location.path}: {error}") from None
        if form is not None:
            out.copy_(form.read(read))


def _read(file: BinaryIO, location: _TensorLocation, out: Tensor) -> None:
    """Read a tensor into `out` (flat)."""
    descriptor, item_bytes = file.fileno(), location.dtype.itemsize
    buffer = memoryview(bytearray(min(SLICE_BYTES, location.end - location.start)))
    for start in range(location.start, location.end, SLICE_BYTES):
        piece = buffer[: location.end - start]
        done = 0
        while done < len(piece):
            num_read = os.preadv(descriptor, [piece[done:]], start + done)
            if not num_read:
                raise OSError("the file is shorter than its header says")
            done += num_read
        first = (start - location.start) // item_bytes
        values = torch.frombuffer(piece, dtype=location.dtype)
        out[first : first + len(values)].copy_(values)  # has been copied when this returns: the buffer is used again


def _locations(path: Path) -> dict[str, _TensorLocation]:
    """Return where each tensor of a safetensors file lies: its header is JSON behind eight bytes of length."""
    try:
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    locations = {}
    for name, entry in header.items():
        if entry.get("dtype") in _DTYPES:  # neither metadata nor tensors that nobody reads
            start, end = (begin + offset for offset in entry["data_offsets"])
            locations[name] = _TensorLocation(path, start, end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return locations
