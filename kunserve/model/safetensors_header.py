"""Model files: whether a safetensors file is whole, told from its header and its size. No weight is read for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kunserve.errors import ConfigError
from kunserve.model.files import reading

LENGTH_BYTES = 8  # the header's own length comes first, little-endian
HIGHEST_LENGTH = 100_000_000  # the library's own limit
DAMAGED = "the file is damaged or its download is not complete; fetch it again"


def check_whole(path: Path) -> None:
    """Raise ConfigError if a safetensors file is cut, too long or none at all."""
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        fault = f"{size} bytes hold no header" if size <= LENGTH_BYTES else None
        if fault is None and length > min(size - LENGTH_BYTES, HIGHEST_LENGTH):
            fault = f"{size} bytes hold no header of {length}"
        header = file.read(length) if fault is None else b""
    if fault is None:
        end = _data_bytes(header)
        if end is None:
            fault = "its header cannot be understood"
        elif LENGTH_BYTES + length + end != size:
            fault = f"it has {size} bytes, but must have {LENGTH_BYTES + length + end}"
    if fault is not None:
        raise ConfigError(f"cannot read {path}: {DAMAGED} ({fault})")


def _data_bytes(header: bytes) -> int | None:
    """Return where the last tensor ends, counted from the header's end; None for a header that is none."""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return None
