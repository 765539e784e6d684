"""Weights read from their files each time: the same bits as mapped ones, and no pages of the files stay."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model import disk_source
from kunserve.model.checkpoint import DummySource, SafetensorsSource, save_checkpoint
from kunserve.model.config import ModelConfig
from kunserve.model.disk_source import DiskSource
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import expected_shapes
from kunserve.sizes import ceil_div

CONFIG = ModelConfig("llama", 500, 64, 96, 2, 4, 2, 16, 256)
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of CONFIG, written to the disk."""
    save_tensors(tmp_path, CONFIG)
    return tmp_path


def save_tensors(folder: Path, config: ModelConfig) -> None:
    source, tensors = DummySource(config), {}
    for name, shape in expected_shapes(config).items():
        tensors[name] = torch.empty(shape)
        source.copy_into(name, tensors[name])
    save_checkpoint(folder, config, tensors)
    with (folder / FILE).open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be let go


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_as_mapped(
    family: str, saved: torch.dtype, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_source, "SLICE_BYTES", 4096)  # tensors are larger, and none is a whole number of slices
    config = load_hf_config(make_tiny_model(family, tmp_path, dtype=saved))
    mapped, on_disk = SafetensorsSource(tmp_path, config), DiskSource(tmp_path, config)
    for name, shape in expected_shapes(config).items():
        expected, out = torch.empty(shape, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        mapped.copy_into(name, expected)
        on_disk.copy_into(name, out)
        assert torch.equal(out, expected), name


def test_several_threads_read_at_once(folder: Path) -> None:
    mapped, on_disk = SafetensorsSource(folder, CONFIG), DiskSource(folder, CONFIG)

    def is_same(name: str) -> bool:
        out, expected = (torch.empty(expected_shapes(CONFIG)[name]) for _ in range(2))
        on_disk.copy_into(name, out)
        mapped.copy_into(name, expected)
        return torch.equal(out, expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_same, list(expected_shapes(CONFIG)) * 5))


def test_nothing_stays_open_or_mapped(folder: Path) -> None:
    source = DiskSource(folder, CONFIG)
    for name, shape in expected_shapes(CONFIG).items():
        source.copy_into(name, torch.empty(shape))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in os.listdir("/proc/self/fd") if str(folder) in _target(fd)]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # the one that listed them
        return ""


def test_no_page_of_the_file_stays_in_the_cache(tmp_path: Path) -> None:
    config = ModelConfig("llama", 40_000, 64, 96, 2, 4, 2, 16, 256)  # 20 MiB
    save_tensors(tmp_path, config)
    if not _can_be_let_go(tmp_path / "other"):
        pytest.skip("this file system keeps its files in memory")
    path = tmp_path / FILE
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be let go
    assert _resident_pages(path) > 4000
    source = DiskSource(tmp_path, config)
    for name, shape in expected_shapes(config).items():
        source.copy_into(name, torch.empty(shape))
    for _ in range(600):  # what a busy machine was still reading ahead, or held, goes with the next tensor
        if _resident_pages(path) == 0:
            break
        time.sleep(0.1)
        source.copy_into("model.norm.weight", torch.empty(64))
    assert _resident_pages(path) == 0


def _can_be_let_go(path: Path) -> bool:
    with path.open("wb+", buffering=0) as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _resident_pages(path) == 0


def _resident_pages(path: Path) -> int:
    """Pages of a file that are in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        flags = (ctypes.c_ubyte * ceil_div(len(mapped), mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), flags) == 0
        return sum(flag & 1 for flag in flags)


def test_what_cannot_be_read_is_said_in_one_line(folder: Path) -> None:
    source = DiskSource(folder, CONFIG)
    with pytest.raises(ConfigError, match=r"no tensor model\.nothing"):
        source.copy_into("model.nothing", torch.empty(1))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[64\] in .*, not \[64, 1\]"):
        source.copy_into("model.norm.weight", torch.empty(64, 1))
    out = torch.empty(500, 64)
    os.truncate(folder / FILE, 1000)
    with pytest.raises(ConfigError, match=r"cannot read lm_head\.weight from .*: the file is shorter than its header"):
        source.copy_into("lm_head.weight", out)
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match=r"cannot read lm_head\.weight from .*No such file"):
        source.copy_into("lm_head.weight", out)


def test_a_folder_that_lacks_tensors_is_refused_when_opened(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks \d+ of \d+ tensors"):
        DiskSource(folder, ModelConfig("llama", 500, 64, 96, 3, 4, 2, 16, 256))
