"""Folders that people give by mistake: what they hold is named, and what to do instead."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.card import check_model, resolve_model
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.folder import has_all_files, weight_files
from kunserve.model.hf_config import load_hf_config
from kunserve.model.safetensors_header import DAMAGED


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
    if not has_config:
        (folder / "config.json").unlink()
    assert "tiny-Q4_K_M.gguf: the file is damaged" in refusal(str(folder))  # it is taken for what it says that it is
    (folder / "tiny-Q8_0.GGUF").touch()
    message = refusal(str(folder))
    assert message.startswith(f"{folder} holds 2 GGUF models (tiny-Q4_K_M.gguf, tiny-Q8_0.GGUF): give --model")


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    assert "tiny.gguf: the file is damaged or its download is not complete; fetch it again (it is empty)" in refusal(
        str(tmp_path / "tiny.gguf")
    )


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
    assert refusal(str(tmp_path)) == (
        f"{tmp_path} is empty: a model's folder has config.json, tokenizer.json and model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", "but neither .*: rename it to model.safetensors if it is the whole model"),
        ("consolidated.safetensors", "but neither .* in Hugging Face's format .consolidated files are not."),
        (
            "adapter_model.safetensors",
            "is an adapter .it holds adapter_model.safetensors., and adapters are not served",
        ),
        ("adapter_model.bin", "is an adapter .* merge it into its model"),
        ("training_args.bin", "has neither .* the only weights that are read; it holds training_args.bin$"),
        ("optimizer.pt", "has neither .* the only weights that are read; it holds optimizer.pt$"),
        ("onnx/model.onnx", "has neither .*; it holds onnx/$"),
        ("gguf/tiny.gguf", "has neither .*; it holds gguf/$"),
        ("flax_model.msgpack", "has neither .*; it holds flax_model.msgpack$"),
        ("README.md", "has neither .*; it holds README.md$"),
        (
            "a\nb.safetensors",
            "has neither .*; it holds config.json, generation_config.json, tokenizer.json, tokenizer_config.json$",
        ),
    ],
)
def test_what_a_folder_holds_in_place_of_weights_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    assert re.match(f"{re.escape(str(folder))} .*{message}", refusal(str(folder)))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
def test_a_link_to_a_file_that_is_gone_is_called_so(folder: Path, name: str) -> None:
    (folder / ("model.safetensors" if name.startswith("model.") else name)).unlink()
    (folder / name).symlink_to("../blobs/0123")
    gone = "it is a link to a file that is gone (../blobs/0123); fetch the model again"
    assert refusal(str(folder)) == f"cannot read {folder / name}: {gone}"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, "has no tokenizer.json (tokenizers of another format are not supported)"),
        (
            "tekken.json",
            "has tekken.json, but no tokenizer.json (tokenizers of another format are not supported); ",
        ),
    ],
)
def test_a_model_without_a_tokenizer_that_is_read(
    folder: Path, other: str | None, message: str, load_format: str
) -> None:
    (folder / "tokenizer.json").unlink()
    if other is not None:
        (folder / other).touch()
    assert refusal(str(folder), load_format).startswith(f"{folder} {message}")


def split_in_shards(folder: Path, num_shards: int = 3) -> list[Path]:
    """Share the tensors of `model.safetensors` out among shards with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for i in range(num_shards):
        part = dict(tensors[i::num_shards])
        files.append(folder / f"model-{i + 1:05}-of-{num_shards:05}.safetensors")
        save_file(part, files[-1])
        weight_map |= dict.fromkeys(part, files[-1].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_weights_are_judged_without_the_libraries_that_load_them(folder: Path) -> None:
    split_in_shards(folder)
    script = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'safetensors', 'tokenizers', 'huggingface_hub'))  # None: no import\n"
        "from kunserve.model.card import check_model\n"
        f"check_model({str(folder)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shards_that_are_missing_are_counted(folder: Path) -> None:
    shards = split_in_shards(folder)
    check_model(str(folder))
    shards[1].unlink()
    assert refusal(str(folder)) == (
        f"{folder} lacks 1 of the 3 files that model.safetensors.index.json names ({shards[1].name}): "
        "its download is not complete; fetch the rest"
    )
    shards[0].unlink()
    assert f"lacks 2 of the 3 files that model.safetensors.index.json names ({shards[0].name} and 1 more)" in refusal(
        str(folder)
    )


def test_a_shard_that_leads_nowhere_or_is_cut_is_named(folder: Path) -> None:
    shards = split_in_shards(folder)
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    assert refusal(str(folder)).startswith(f"cannot read {shards[2]}: {DAMAGED} (it has ")
    shards[2].unlink()
    shards[2].symlink_to("gone")
    assert refusal(str(folder)).startswith(f"cannot read {shards[2]}: it is a link to a file that is gone (gone)")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "^cannot read .*index.json: "),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": {}}', "index.json has no weight_map"),
        ('{"weight_map": ["x"]}', "index.json has no weight_map"),
        ('{"weight_map": {"x": 5}}', "weight_map names 5, which is no safetensors file of this folder"),
        ('{"weight_map": {"x": "../x"}}', "weight_map names '../x', which is no safetensors file of this folder"),
        ('{"weight_map": {"x": ""}}', "weight_map names '', which is no safetensors file of this folder"),
        ('{"weight_map": {"x": "a\\nb"}}', r"weight_map names 'a\\nb', which is no safetensors file of this folder"),
    ],
)
def test_a_broken_index_is_named(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert re.search(message, refusal(str(folder)))


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "header", "garbage", "half", "few", "empty", "no offsets", "a list", "nested"]
)
def test_a_damaged_file_says_so(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "cut": content[:-100],
        "header": (1 << 60).to_bytes(8, "little") + content[8:],
        "garbage": content[:8] + b"x" * 64 + content[72:],
        "longer": content + b"x",
        "half": content[: len(content) // 2],
        "few": content[:8],
        "empty": b"",
        "no offsets": with_header(b'{"x": {"dtype": "F32", "shape": [1]}}'),
        "a list": with_header(b"[]"),
        "nested": with_header(b'{"x":' * 100_000),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(
        ConfigError, match="the file is damaged or its download is not complete; fetch it again"
    ) as caught:
        SafetensorsSource(folder, load_hf_config(folder))
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    assert refusal(str(folder)).startswith(f"cannot read {path}: {DAMAGED} (")


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def test_whether_all_files_are_there(folder: Path) -> None:
    assert has_all_files(folder) and weight_files(folder) == [folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert not has_all_files(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert not has_all_files(folder)
    (folder / "b.safetensors").touch()
    assert has_all_files(folder) and len(weight_files(folder)) == 2
