"""GGUF: metadata and tensors of a file, or of those a model is split into. Nothing is read that is not asked for.

The reader is our own: the `gguf` package reads each of 100,000 vocabulary strings into arrays of its own, which takes
ten times longer than all the rest, and needs numpy's time to import where only names are to be judged.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.files import reading
from kunserve.model.folder import gguf_parts
from kunserve.model.quant.blocks import GGML_BLOCKS, Blocks
from kunserve.sizes import ceil_div

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
FORMATS = {  # by ggml's numbers
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    28: "F64",
    30: "BF16",
    39: "MXFP4",
}
OTHER_FORMATS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}
ITEM_BYTES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2}
AGAIN = "the file is damaged or its download is not complete; fetch it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: where its bytes lie, and what they are."""

    name: str
    shape: tuple[int, ...]  # of the torch weight: (out, in)
    format: str  # ggml's name
    path: Path
    offset: int  # of its first byte in the file

    @property
    def blocks(self) -> Blocks | None:
        """Return the blocks that its rows are stored in; None if they are stored as numbers.

        Numbers of 16 bits count as blocks (see `GGML_BLOCKS`), but for rows that are no multiple of 32.
        """
        blocks = GGML_BLOCKS.get(self.format)
        return blocks if blocks and self.shape and self.shape[-1] % blocks.num_values == 0 else None

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that it takes."""
        count = prod(self.shape)
        if (blocks := self.blocks) is None:
            return count * ITEM_BYTES[self.format]
        return count // blocks.num_values * blocks.num_bytes

    def rows(self, first: int, end: int) -> GgufTensor:
        """Return a run of its rows, which lie next to each other; of three dimensions, of its matrices."""
        size = self.num_bytes // self.shape[0]
        return replace(self, shape=(end - first, *self.shape[1:]), offset=self.offset + first * size)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata of a model and its tensors by name, of all its files."""

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the headers of a GGUF file and of those that belong to it.

    ConfigError, one line with the file's name and the tensor's, if one is damaged, cut, missing or of unknown format.
    """
    paths = gguf_parts(path)
    if missing := [one.name for one in paths if not one.exists()]:
        raise ConfigError(f"{path.parent} lacks {missing[0]} of the {len(paths)} files of the model; fetch the rest")
    headers = [_read_one(one) for one in paths]
    tensors = dict[str, GgufTensor]()
    for tensor in (tensor for _, found in headers for tensor in found):
        if (first := tensors.setdefault(tensor.name, tensor)) is not tensor:
            raise ConfigError(f"cannot read {tensor.path}: {AGAIN} (tensor {tensor.name} is in {first.path.name}, too)")
    metadata = headers[0][0]
    if (count := metadata.get("split.count", 1)) not in (0, 1, len(paths)):
        raise ConfigError(
            f"{path}: it is one of {show(count)} files of a model: leave them their names, NAME-00001-of-..."
        )
    return GgufFile(paths, metadata, tensors)


TOO_DEEP = (RecursionError, MemoryError)  # what a damaged file asks for


def _read_one(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    with reading(path), path.open("rb") as file:
        if not path.stat().st_size:
            raise ConfigError(f"cannot read {path}: {AGAIN} (it is empty)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                metadata, tensors = _Reader(buffer, path).read()
            except (struct.error, LookupError, ValueError, TypeError, ArithmeticError, *TOO_DEEP) as error:
                raise ConfigError(f"cannot read {path}: {AGAIN} ({error})") from None
            for tensor in tensors:
                if tensor.offset + tensor.num_bytes > len(buffer):
                    end = tensor.offset + tensor.num_bytes
                    fault = f"tensor {tensor.name} ends at byte {end} of {len(buffer)}"
                    raise ConfigError(f"cannot read {path}: {AGAIN} ({fault})")
    return metadata, tensors


def _check_places(tensors: list[GgufTensor], start: int, alignment: int) -> None:
    """Raise ValueError, with a tensor's name, if one lies where none can or in another. Gaps and any order are fine."""
    before: GgufTensor | None = None
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if (tensor.offset - start) % alignment:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.offset}, not at a multiple of {alignment}")
        if before is not None and tensor.num_bytes and tensor.offset < before.offset + before.num_bytes:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.offset}, within tensor {before.name}")
        before = tensor if tensor.num_bytes else before


class _Reader:
    """A position in a file, moved by each read."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer, self._path = buffer, path
        self._offset = 0

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        if self._buffer[:4] != MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        self._offset = 4
        if (version := self._scalar(4)) not in VERSIONS:
            if version.to_bytes(4, "little").lstrip(b"\0") in (b"\2", b"\3"):
                raise ConfigError(
                    f"{self._path}: it is of a big-endian machine: take the little-endian file of the model"
                )
            raise ValueError(f"version {version}; 2 and 3 are known")
        num_tensors, num_fields = self._scalar(10), self._scalar(10)
        metadata = {self._string(): self._value(self._scalar(4)) for _ in range(num_fields)}
        headers = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment} bytes")
        start = ceil_div(self._offset, alignment) * alignment
        tensors = [GgufTensor(name, shape, format, self._path, start + at) for name, shape, format, at in headers]
        _check_places(tensors, start, alignment)
        return metadata, tensors

    def _scalar(self, kind: int) -> Any:
        code = SCALARS[kind]
        (value,) = struct.unpack_from(code, self._buffer, self._offset)
        self._offset += struct.calcsize(code)
        return value

    def _string(self) -> str:
        start = self._offset + 8
        (length,) = struct.unpack_from("<Q", self._buffer, self._offset)
        self._offset = start + length
        if self._offset > len(self._buffer):
            raise ValueError("a string ends beyond the file")
        return self._buffer[start : self._offset].decode(errors="surrogateescape")

    def _strings(self, count: int) -> list[str]:
        """Return the next `count` strings: as `_string`, for vocabularies, where calls would take most of the time."""
        buffer, end, strings = self._buffer, self._offset, list[str]()
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = end + 8
            end = start + unpack(buffer, end)[0]
            strings.append(buffer[start:end].decode(errors="surrogateescape"))
        if end > len(buffer):  # a slice beyond the file is only shorter
            raise ValueError("a string ends beyond the file")
        self._offset = end
        return strings

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(kind)
        item, count = self._scalar(4), self._scalar(10)
        if count > len(self._buffer):
            raise ValueError(f"an array of {count} values")
        if item == STRING:
            return self._strings(count)
        if item == ARRAY:
            return [self._value(item) for _ in range(count)]
        code = f"<{count}{SCALARS[item][1]}"
        values = list(struct.unpack_from(code, self._buffer, self._offset))
        self._offset += struct.calcsize(code)
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        name, num_dims = self._string(), self._scalar(4)
        if not name.isprintable():
            raise ValueError(f"a tensor's name is {show(name)}")
        if num_dims > 4:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(self._scalar(10) for _ in range(num_dims))[::-1]  # the fastest dimension comes first
        number, offset = self._scalar(4), self._scalar(10)
        if number not in FORMATS:
            other = OTHER_FORMATS.get(number, f"number {number}")
            served = ", ".join(sorted(FORMATS.values()))
            raise ConfigError(
                f"{self._path}: tensor {name} has the format {other}, which is not served; served are {served}: "
                "take the model in one of these"
            )
        format = FORMATS[number]
        if format not in ITEM_BYTES and (not shape or shape[-1] % GGML_BLOCKS[format].num_values):
            raise ValueError(f"the rows of tensor {name} are no whole blocks of {format}")
        return name, shape, format, offset
