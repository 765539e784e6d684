from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_gguf import write_tiny_gguf
from tiny_models import CHAT_TEMPLATE

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.gguf_convert import GgufTensor, convert_gguf, dequantize, hf_name, read_gguf
from kunserve.model.hf_config import load_hf_config


def test_a_converted_model_is_the_one_it_was_made_from(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    lines: list[str] = []
    config = convert_gguf(bytearray(path.read_bytes()), tmp_path / "made", lines.append)
    assert lines

    assert load_hf_config(tmp_path / "made") == config == load_hf_config(tmp_path / "reference")
    SafetensorsSource(tmp_path / "made", config)
    made = load_file(tmp_path / "made" / "model.safetensors")
    reference = load_file(tmp_path / "reference" / "model.safetensors")
    assert made.keys() == reference.keys()
    assert all(torch.equal(made[name], reference[name]) for name in made)


def test_the_tokenizer_splits_digits(tmp_path: Path) -> None:
    convert_gguf(bytearray(write_tiny_gguf(tmp_path).read_bytes()), tmp_path / "made")
    made, reference = Tokenizer(tmp_path / "made"), Tokenizer(tmp_path / "reference")
    assert made.chat_template == CHAT_TEMPLATE
    assert made.special_tokens == reference.special_tokens
    assert made.special_ids == reference.special_ids
    text = "<|start|>the other dog: é 🙂<|end|>"
    assert made.encode(text) == reference.encode(text)
    assert made.decode(made.encode(text), skip_special_tokens=False) == text
    texts = [made.token_text(i) for i in made.encode("the  12")]
    assert texts[-2:] == ["1", "2"]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q4_1, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_dequantized_values_equal_the_gguf_packages(kind: Kind, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, kind)
    ours = {tensor.name: tensor for tensor in read_gguf(bytearray(path.read_bytes())).tensors}
    theirs = gguf.GGUFReader(path).tensors
    assert len(ours) == len(theirs) == 3 * 9 + 2
    for tensor in theirs:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(dequantize(ours[tensor.name]), values), tensor.name


@pytest.mark.parametrize("num_bytes", [0, 3, 10, 100, 5000, -100])
def test_a_cut_file_is_damaged(num_bytes: int, tmp_path: Path) -> None:
    buffer = bytearray(write_tiny_gguf(tmp_path).read_bytes())[:num_bytes]
    with pytest.raises(ConfigError, match="damaged GGUF file"):
        convert_gguf(buffer, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [(b"smollm", b"qwen22", "tokenizer"), (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", "'mamba'")],
)
def test_other_models_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    buffer = write_tiny_gguf(tmp_path).read_bytes().replace(old, new)
    with pytest.raises(ConfigError, match=message):
        convert_gguf(bytearray(buffer), tmp_path / "made")


def test_unknown_tensors_and_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blk\.0\.ssm"):
        hf_name("blk.0.ssm.weight")
    with pytest.raises(ConfigError, match="Q8_1"):
        dequantize(GgufTensor("x", (32,), Kind.Q8_1, torch.zeros(36, dtype=torch.uint8)))
