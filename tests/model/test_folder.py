"""Folders that people give by mistake: what they hold is named, and what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.card import check_model, resolve_model
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.folder import has_all_files, weight_files
from kunserve.model.hf_config import load_hf_config


def refusal(name: str, load_format: str = "auto") -> str:
    """The one line that both say: who judges the name, and who loads it."""
    with pytest.raises(ConfigError) as judged:
        check_model(name, load_format)
    with pytest.raises(ConfigError) as resolved:
        resolve_model(name, load_format=load_format)
    assert judged.value.message == resolved.value.message and "\n" not in judged.value.message
    return judged.value.message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("llama", tmp_path)


@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_of_gguf_files(folder: Path, has_config: bool) -> None:
    (folder / "model.safetensors").rename(folder / "tiny-Q4_K_M.gguf")
    (folder / "tiny-Q8_0.GGUF").touch()
    if not has_config:
        (folder / "config.json").unlink()
    message = refusal(str(folder))
    assert message.startswith(f"{folder} holds GGUF files (tiny-Q4_K_M.gguf and 1 more): GGUF is not served. Take")


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    assert "tiny.gguf is a file; GGUF is not served. Take" in refusal(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_of_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert f"{folder} holds pickled weights ({name}), which are not read: a pickle can run any code." in refusal(
        str(folder)
    )
    check_model(str(folder), "dummy")  # needs none of them


def test_shards_without_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    message = refusal(str(folder))
    assert "holds model-00001-of-00002.safetensors, but neither" in message and "not complete" in message


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"cannot read {tmp_path / 'config.json'}: No such file or directory"


@pytest.mark.parametrize("damage", ["cut", "header", "garbage", "empty"])
def test_a_damaged_file_says_so(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "cut": content[:-100],
        "header": (1 << 60).to_bytes(8, "little") + content[8:],
        "garbage": content[:8] + b"x" * 64 + content[72:],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(
        ConfigError, match="the file is damaged or its download is not complete; fetch it again"
    ) as caught:
        SafetensorsSource(folder, load_hf_config(folder))
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_whether_all_files_are_there(folder: Path) -> None:
    assert has_all_files(folder) and weight_files(folder) == [folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert not has_all_files(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert not has_all_files(folder)
    (folder / "b.safetensors").touch()
    assert has_all_files(folder) and len(weight_files(folder)) == 2
