"""Model files, step 3: where tensors come from. Weights are copied out of a source into a device's ranges, by name."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig
from kunserve.model.config_fields import shorten
from kunserve.model.family.stored import stored_form, stored_name
from kunserve.model.files import reading
from kunserve.model.folder import INDEX_FILE, SINGLE_FILE, indexed_files
from kunserve.model.hf_config import to_hf_config
from kunserve.model.layout import expected_shapes
from kunserve.model.quant.pack import Codes, Mxfp4, Packed, fp8_of, take
from kunserve.model.quant.plane_codes import codes_plane, scales_plane
from kunserve.model.quant.planes import SCALES, Planes
from kunserve.model.quant.scheme import ENDINGS
from kunserve.model.safetensors_header import DAMAGED

DTYPE_CODES = ("F32", "F16", "BF16", "F64")  # safetensors' names of the dtypes we read

# As ModelOpt, compressed-tensors (before and since 0.9) and old checkpoints in FP8 call them.
KV_SCALES = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale", ".kv_scale")


class WeightSource(Protocol):
    """Reads weights by name. All devices of a process share one; `copy_into` may run in several threads at once."""

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`, as its spec stores it, on any device. Raises ConfigError naming both."""


def open_weights(folder: Path | None, config: ModelConfig, load_format: str, seed: int = 0) -> WeightSource:
    """Return the source that `--load-format` asks for: "auto" reads `folder`, "dummy" makes random weights."""
    scheme = config.formats.scheme
    source: WeightSource
    if load_format == "dummy":
        source = DummySource(config, seed)
    elif folder is None:
        raise ConfigError("there is no folder to read weights from")
    elif scheme is None or scheme.is_made:
        source = SafetensorsSource(folder, config)
    else:
        source = QuantizedSource(folder, config)
    return QuantizingSource(source, config) if scheme is not None and scheme.is_made else source


def kv_scales(folder: Path) -> list[str]:
    """Return the names of the scales of 8-bit KV that the files of `folder` bring."""
    return sorted(name for name in _tensor_files(folder) if name.endswith(KV_SCALES))


class SafetensorsSource:
    """Memory-mapped safetensors files: one `model.safetensors`, or shards with an index.

    The page cache is the one host copy of all weights. Names, shapes and dtypes are checked when it is opened;
    raises ConfigError that lists what is missing.
    """

    def __init__(self, folder: Path, config: ModelConfig, without: Collection[str] = ()) -> None:
        """Open the files of `folder`. without: names of tensors that others read."""
        shapes = {name: shape for name, shape in expected_shapes(config).items() if name not in without}
        files = _tensor_files(folder)
        self.stored_names = {name: stored_name(name, files) for name in shapes}  # what the files call each tensor
        if missing := [name for name in shapes if self.stored_names[name] not in files]:
            raise ConfigError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors: {shorten(missing)}")
        self._files = {name: files[stored] for name, stored in self.stored_names.items()}
        self._handles = {path: _open(path) for path in set(self._files.values())}
        for name, shape in shapes.items():
            self._check(name, shape)

    @property
    def files(self) -> Mapping[str, Path]:
        """Return the file of every tensor that the model needs."""
        return self._files

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of the mapped files: what the page cache holds of them at most."""
        return sum(path.stat().st_size for path in self._handles)

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`, casting to its dtype. Raises ConfigError on another shape or a read error."""
        path = self._files.get(name)
        if path is None:
            raise ConfigError(f"the checkpoint has no tensor {name}")
        try:
            # A view of the mapped file: nothing is read yet.
            tensor = self._handles[path].get_tensor(self.stored_names[name])
        except SafetensorError as error:
            raise ConfigError(f"cannot read {name} from {path}: {error}") from None
        if (form := stored_form(name)) is not None:
            tensor = form.read(tensor)
        check_shape(name, tuple(tensor.shape), tuple(out.shape), str(path))
        out.copy_(tensor)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        path = self._files[name]
        try:
            header = self._handles[path].get_slice(self.stored_names[name])
        except SafetensorError:
            raise ConfigError(f"{INDEX_FILE} says that {path} holds {name}, but it does not") from None
        if header.get_dtype() not in DTYPE_CODES:
            raise ConfigError(f"{name} in {path} is {header.get_dtype()}: only {', '.join(DTYPE_CODES)} are supported")
        form = stored_form(name)
        check_shape(name, tuple(header.get_shape()), form.shape(shape) if form else shape, str(path))


class PackedSource(ABC):
    """Matrices that are quantized become blocks, or numbers where that is asked for; `plain` has all other tensors."""

    def __init__(self, plain: WeightSource, config: ModelConfig) -> None:
        self._plain, self._formats, self._shapes = plain, config.formats, expected_shapes(config)
        self._scales: dict[str, Tensor] = {}  # of matrices whose codes were copied last: reading takes them apart too

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of the mapped files: what the page cache holds of them at most."""
        return int(getattr(self._plain, "num_bytes", 0))

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`: blocks or codes if it is uint8, else numbers, cast to its dtype.

        Raises ConfigError, with the tensor's name, if the file's has another shape or dtype.
        """
        matrix = name.removesuffix(SCALES)
        if matrix not in self._formats.quantized:
            self._plain.copy_into(name, out)
            return
        blocks, kept = self._formats.of(matrix), self._scales.pop(matrix, None) if name != matrix else None
        if kept is not None:
            out.copy_(kept)
            return
        packed = self._take(matrix)
        if isinstance(blocks, Planes) and (name != matrix or out.dtype is torch.uint8):
            assert isinstance(packed, Codes)
            scales = scales_plane(packed.scale, packed.offset, blocks)
            if name == matrix:
                self._scales[matrix] = scales
            out.copy_(codes_plane(packed.codes, blocks) if name == matrix else scales)
            return
        rows = packed.blocks(blocks) if blocks is not None and out.dtype is torch.uint8 else packed.numbers()
        out.copy_(rows.view(out.shape))

    @abstractmethod
    def _take(self, name: str) -> Packed:
        """Return a matrix as it is packed, its rows as a decoder reads them."""


class QuantizedSource(PackedSource):
    """A quantized checkpoint in safetensors. It is checked when it is opened; ConfigError says what is missing."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        scheme, quantized = config.formats.scheme, config.formats.quantized
        assert scheme is not None
        super().__init__(SafetensorsSource(folder, config, quantized), config)
        self._scheme, self._files = scheme, _tensor_files(folder)
        names = [name.removesuffix("weight") + ending for name in quantized for ending in ENDINGS[scheme.layout]]
        if missing := sorted(name for name in names if stored_name(name, self._files) not in self._files):
            raise ConfigError(f"{folder} lacks {len(missing)} of {len(names)} tensors: {shorten(missing)}")
        self._handles = {path: _open(path) for path in set(self._files.values())}

    @property
    def num_bytes(self) -> int:
        """See `PackedSource.num_bytes`."""
        return sum(path.stat().st_size for path in self._handles)

    def _take(self, name: str) -> Packed:
        prefix, form = name.removesuffix("weight"), stored_form(name)
        try:
            packed = take(self._scheme, lambda ending: self._find(prefix, ending), self._shapes[name])
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error.message}") from None
        if form is None or not isinstance(packed, Mxfp4):
            return packed
        return Mxfp4(form.rows(packed.pairs), form.rows(packed.scales))

    def _find(self, prefix: str, ending: str) -> Tensor | None:
        stored = stored_name(prefix + ending, self._files)
        if (path := self._files.get(stored)) is None:
            return None
        try:
            tensor: Tensor = self._handles[path].get_tensor(stored)
        except SafetensorError as error:
            raise ConfigError(f"{ending} cannot be read from {path}: {error}") from None
        return tensor


class QuantizingSource(PackedSource):
    """A checkpoint of numbers, whose matrices become FP8 as they are read."""

    def _take(self, name: str) -> Packed:
        numbers = torch.empty(self._shapes[name])
        self._plain.copy_into(name, numbers)
        try:
            return fp8_of(numbers.flatten(0, -2))
        except ConfigError as error:
            raise ConfigError(f"{name} {error.message}") from None


class DummySource:
    """Random weights of the right shape: the same for a seed and name, whatever the device, dtype or order.

    All tensors are cut, at places that depend on the name, out of one pool of normal numbers: drawing a fresh number
    for each of 70 G weights would take minutes. Norms are near 1 and biases are not 0, so that a forward pass that
    forgets one differs.
    """

    POOL_SIZE = 1_048_583  # a prime: no matrix has equal rows

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = expected_shapes(config)
        self._seed = seed
        self._pool = torch.randn(self.POOL_SIZE, generator=torch.Generator().manual_seed(seed))

    def copy_into(self, name: str, out: Tensor) -> None:
        """Fill `out` (contiguous) with the random values of `name`: std 0.02; norms 1 + 0.1 * normal."""
        if name not in self._shapes:
            raise ConfigError(f"the model has no tensor {name}")
        check_shape(name, self._shapes[name], tuple(out.shape), "the model's shape")
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little") % self.POOL_SIZE
        values = torch.roll(self._pool, -start)
        values = values * 0.1 + 1 if name.endswith("norm.weight") else values * 0.02
        flat = out.view(-1)
        for offset in range(0, flat.numel(), self.POOL_SIZE):
            piece = flat[offset : offset + self.POOL_SIZE]
            piece.copy_(values[: piece.numel()])


def save_checkpoint(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` (tensors contiguous, names as in Hugging Face) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(config), indent=2), encoding="utf-8")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of `folder` that holds each tensor."""
    single = folder / SINGLE_FILE
    return dict.fromkeys(_open(single).keys(), single) if single.exists() else indexed_files(folder)


def _open(path: Path) -> Any:
    try:
        with reading(path):
            path.open("rb").close()  # the library's own error for a file that is not there says the path once more
            return safe_open(path, framework="pt")  # unmapped with the last view of it
    except SafetensorError as error:
        raise ConfigError(f"cannot read {path}: {DAMAGED} ({error})") from None


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """Raise ConfigError if a tensor has another shape than the model wants."""
    if found != wanted:
        raise ConfigError(f"{name} has shape {list(found)} in {where}, not {list(wanted)}")
