"""GGUF files: what is read of them, and what is said of those that are not right."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_gguf import gguf_names, write_tiny_gguf
from tiny_models import CHAT_TEMPLATE

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.model.card import check_model, find_config, resolve_model
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.config import RopeScaling
from kunserve.model.gguf import prepare
from kunserve.model.gguf.file import read_gguf
from kunserve.model.gguf.prepare import convert_gguf
from kunserve.model.gguf.shape import gguf_config
from kunserve.model.gguf.source import GgufSource
from kunserve.model.hf_config import load_hf_config, parse_hf_config, to_hf_config
from kunserve.model.layout import weight_units
from kunserve.model.quant.blocks import GGML_BLOCKS
from kunserve.model.quant.formats import NO_BLOCKS
from kunserve.model.quant.linear import StoredRows


def open_source(path: Path, cache: Path) -> GgufSource:
    """Do with a file what a launch does."""
    files = resolve_model(str(path), cache_dir=cache)
    assert files.gguf is not None
    return GgufSource(files.gguf, files.config)


def test_a_converted_model_is_the_one_it_was_made_from(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    lines: list[str] = []
    config = convert_gguf(path, tmp_path / "made", lines.append)
    assert lines

    assert load_hf_config(tmp_path / "made") == config == load_hf_config(tmp_path / "reference")
    SafetensorsSource(tmp_path / "made", config)
    made = load_file(tmp_path / "made" / "model.safetensors")
    reference = load_file(tmp_path / "reference" / "model.safetensors")
    assert made.keys() == reference.keys()
    assert all(torch.equal(made[name], reference[name]) for name in made)


def test_the_tokenizer_splits_digits(tmp_path: Path) -> None:
    convert_gguf(write_tiny_gguf(tmp_path), tmp_path / "made")
    made, reference = Tokenizer(tmp_path / "made"), Tokenizer(tmp_path / "reference")
    assert made.chat_template == CHAT_TEMPLATE
    assert made.special_tokens == reference.special_tokens
    assert made.special_ids == reference.special_ids
    text = "<|start|>the other dog: é 🙂<|end|>"
    assert made.encode(text) == reference.encode(text)
    assert made.decode(made.encode(text), skip_special_tokens=False) == text
    texts = [made.token_text(i) for i in made.encode("the  12")]
    assert texts[-2:] == ["1", "2"]


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3", "qwen3-tied"])
def test_every_family_is_read_back(family: str, tmp_path: Path) -> None:
    family, _, tied = family.partition("-")
    overrides: dict[str, Any] = {"intermediate_size": 96, "tie_word_embeddings": bool(tied) or family == "llama3"}
    if family == "llama3":
        overrides |= {"rope_parameters": {**LLAMA31, "rope_theta": 500000.0}, "max_position_embeddings": 131072}
    path = write_tiny_gguf(tmp_path, family=family, **overrides)
    config, reference = gguf_config(read_gguf(path)), load_hf_config(tmp_path / "reference")
    assert config == reference and config.formats == NO_BLOCKS
    source, expected = GgufSource(read_gguf(path), config), SafetensorsSource(tmp_path / "reference", config)
    for unit in weight_units(config, "float32"):
        for spec in unit.tensors:
            ours, theirs = torch.empty(spec.shape), torch.empty(spec.shape)
            source.copy_into(spec.name, ours)
            expected.copy_into(spec.name, theirs)
            assert torch.equal(ours, theirs), spec.name


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ALL = [Kind[name] for name in GGML_BLOCKS]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("keeps_pages", [True, False])
def test_blocks_are_copied_as_they_are_and_dequantized_as_ggml_does(
    kind: Kind, keeps_pages: bool, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path, kind, family="qwen2", tie_word_embeddings=True)
    file = read_gguf(path)
    config = gguf_config(file)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    source, names = GgufSource(file, config, keeps_pages=keeps_pages), gguf_names("qwen2", config.num_layers)
    assert (source.num_bytes == path.stat().st_size) == keeps_pages
    for unit in weight_units(config, "float32"):
        for spec in unit.tensors:
            name = (
                f"{names.get_name(spec.name.removesuffix('.weight').removesuffix('.bias'))}.{spec.name.split('.')[-1]}"
            )
            expected = torch.from_numpy(gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type).copy())
            numbers = torch.empty(spec.shape)
            source.copy_into(spec.name, numbers)
            assert torch.equal(numbers, expected), spec.name
            if len(spec.shape) == 2:
                assert spec.blocks is GGML_BLOCKS[kind.name] and spec.dtype == "uint8"
                stored = torch.empty(spec.stored_shape, dtype=torch.uint8)
                source.copy_into(spec.name, stored)
                assert torch.equal(
                    stored.flatten(), torch.from_numpy(theirs[name].data.copy()).view(torch.uint8).flatten()
                )
                assert torch.equal(StoredRows(stored, spec.blocks).dense(), expected)


def test_the_rows_of_a_llamas_q_and_k_are_moved_in_blocks_too(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path, Kind.Q4_1))
    config = gguf_config(file)
    source = GgufSource(file, config)
    for spec in weight_units(config, "float32")[1].tensors:
        if "q_proj" in spec.name or "k_proj" in spec.name:
            stored, numbers = torch.empty(spec.stored_shape, dtype=torch.uint8), torch.empty(spec.shape)
            source.copy_into(spec.name, stored)
            source.copy_into(spec.name, numbers)
            assert torch.equal(StoredRows(stored, spec.blocks).dense(), numbers)
            original = load_file(tmp_path / "reference" / "model.safetensors")[spec.name]
            assert (numbers - original).abs().max() < 0.1


def test_a_model_in_several_files_and_a_folder_of_it(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "one", num_files=3)
    (tmp_path / "one" / "mmproj.txt").touch()
    for name in (path, path.with_name("tiny-00002-of-00003.gguf"), path.parent):
        files = resolve_model(str(name), cache_dir=tmp_path / "cache")
        assert files.gguf is not None and len(files.gguf.paths) == 3 and files.name == "tiny"
        assert files.config == load_hf_config(tmp_path / "one" / "reference") == find_config(str(name))
        assert files.folder is not None and Tokenizer(files.folder).encode("the dog")
        GgufSource(files.gguf, files.config)
    assert len(list((tmp_path / "cache" / "gguf").glob("tiny*"))) == 1  # made once
    path.with_name("tiny-00003-of-00003.gguf").unlink()
    with pytest.raises(
        ConfigError, match=r"lacks tiny-00003-of-00003.gguf of the 3 files of the model; fetch the rest"
    ):
        check_model(str(path.parent))
    path.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ConfigError, match="it is one of 3 files of a model"):
        check_model(str(tmp_path / "renamed.gguf"))


def test_a_changed_file_is_prepared_anew(tmp_path: Path) -> None:
    folders = []
    for family in ("qwen2", "qwen3"):
        path = write_tiny_gguf(tmp_path / "model", family=family)
        folders.append(resolve_model(str(path), cache_dir=tmp_path / "cache").folder)
    assert folders[0] != folders[1]


@pytest.mark.parametrize("num_bytes", [0, 3, 10, 100, 5000, -100])
def test_a_cut_file_is_damaged(num_bytes: int, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError) as error:
        check_model(str(path))
    message = error.value.message
    assert message.startswith(
        f"cannot read {path}: the file is damaged or its download is not complete; fetch it again ("
    )
    assert "\n" not in message and (num_bytes != -100 or "tensor " in message)


def test_bits_that_flip_in_a_header_end_in_one_line(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    for _ in range(150):
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (6000, 8))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with suppress(ConfigError):
            check_model(str(path))
            continue  # for instance a bit of a token's text
        with pytest.raises(ConfigError) as error:
            check_model(str(path))
        assert "\n" not in error.value.message and str(path) in error.value.message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"smollm", b"qwen22", "words as of 'qwen22'"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "tokenizer 'bert'"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", "architecture 'mamba'"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", r"lacks 1 of its model's tensors: blk\.0\.attn_q\.weight"),
        (b"blk.0.attn_q.weight", b"blk.0.attn\nq.weight", r"a tensor's name is 'blk\.0\.attn\\nq\.weight'"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_q.wei\nht", r"a tensor's name is 'blk\.0\.attn_q\.wei\\nht'"),
        (b"\x03\0\0\0\0\0\0\0the", b"\x03\0\0\0\0\0\0\0t\xffe", r"metadata tokenizer\.ggml\.tokens: 't\\udcffe'"),
        (b"blk.0.attn_q.weight", b"blk.7.attn_q.weight", r"lacks 1 of its model's tensors: blk\.0\.attn_q\.weight"),
    ],
)
def test_other_models_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        open_source(path, tmp_path / "cache")
    assert str(path) in error.value.message and "\n" not in error.value.message
    assert not list((tmp_path / "cache").rglob("*.json")) or "lacks" in message


def test_whatever_a_tokenizers_library_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Exception("one\ntwo")

    monkeypatch.setattr(prepare, "save_tokenizer", fail)
    path = write_tiny_gguf(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{path}: its tokenizer cannot be built: 'one\\ntwo': take another"):
        open_source(path, tmp_path / "cache")


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.IQ4_NL, Kind.TQ1_0])
def test_other_formats_are_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor("blk.1.ffn_up.weight", torch.zeros(2, num_bytes, dtype=torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=rf"tensor blk\.1\.ffn_up\.weight has the format {kind.name}, .* served are"):
        read_gguf(path)


def test_another_scaling_of_positions_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, family="llama3", head_dim=16)  # its original context is no published one
    with pytest.raises(ConfigError, match=r"tensor rope_freqs\.weight scales positions in another way"):
        gguf_config(read_gguf(path))


ROPE = "llama.rope."


@pytest.mark.parametrize(
    ("said", "scaling"),
    [
        ({}, None),
        ({"scale_linear": 4.0}, RopeScaling(4.0, kind="linear")),
        ({"scaling.factor": 4}, RopeScaling(4.0, kind="linear")),
        ({"scaling.type": "linear", "scaling.factor": 2.200000047683716}, RopeScaling(2.2, kind="linear")),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 0.0, "scale_linear": 4.0}, None),
    ],
)
def test_a_scaling_of_positions_is_linear_unless_the_metadata_say_otherwise(
    said: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path
) -> None:
    """As llama.cpp reads it."""
    file = read_gguf(write_tiny_gguf(tmp_path))
    metadata = {**file.metadata, **{ROPE + name: value for name, value in said.items()}}
    config = gguf_config(replace(file, metadata=metadata))
    assert config.rope_scaling == scaling
    assert parse_hf_config(to_hf_config(config)) == config


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"scaling.type": "dynamic", "scaling.factor": 4.0},
            "rope.scaling.type: 'dynamic' is not supported, only linear and yarn: take the model in safetensors",
        ),
        ({"scaling.type": ["linear"]}, r"rope.scaling.type: \['linear'\] is not supported"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "metadata lack llama.rope.scaling.original_context_length"),
        ({"scaling.factor": "4"}, "rope.scaling.factor: expected a number"),
        ({"scaling.factor": -4.0}, "field factor: expected a positive number"),
        ({"scaling.factor": float("nan")}, "field factor: expected a positive number"),
        ({"scaling.attn_factor": 1.5}, "rope.scaling.attn_factor: 1.5 is not supported"),
    ],
)
def test_other_scalings_of_positions_are_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path))
    metadata = {**file.metadata, **{ROPE + name: value for name, value in said.items()}}
    with pytest.raises(ConfigError, match=message) as error:
        gguf_config(replace(file, metadata=metadata))
    assert "\n" not in error.value.message


def test_two_scalings_of_positions_are_refused(tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_parameters": {**LLAMA31, "rope_theta": 500000.0}, "max_position_embeddings": 131072}
    file = read_gguf(write_tiny_gguf(tmp_path, family="llama3", **rope))
    assert gguf_config(file).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    with pytest.raises(ConfigError, match=r"rope\.scaling\.factor 4 together with tensor rope_freqs\.weight"):
        gguf_config(replace(file, metadata={**file.metadata, "llama.rope.scaling.factor": 4.0}))


def move(path: Path, name: str, num_bytes: int) -> None:
    """Let a file say that a tensor begins so many bytes later."""
    content, field = bytearray(path.read_bytes()), name.encode()
    place = content.index(struct.pack("<Q", len(field)) + field) + 8 + len(field)
    (num_dims,) = struct.unpack_from("<I", content, place)
    place += 4 + 8 * num_dims + 4
    (offset,) = struct.unpack_from("<Q", content, place)
    struct.pack_into("<Q", content, place, offset + num_bytes)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (-32, r"tensor blk\.1\.ffn_down\.weight begins at byte \d+, within tensor blk\.1\.[a-z_]+\.weight"),
        (32, r"begins at byte \d+, within tensor blk\.1\.ffn_down\.weight"),
        (4, r"tensor blk\.1\.ffn_down\.weight begins at byte \d+, not at a multiple of 32"),
    ],
)
def test_a_tensor_that_lies_in_another_is_damaged(num_bytes: int, message: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    move(path, "blk.1.ffn_down.weight", num_bytes)
    with pytest.raises(ConfigError, match=rf"cannot read .*fetch it again \(.*{message}") as error:
        read_gguf(path)
    assert "\n" not in error.value.message


def test_tensors_may_lie_in_any_order_with_room_between_them(tmp_path: Path) -> None:
    path, name = write_tiny_gguf(tmp_path), "blk.1.ffn_down.weight"
    tensor, end = read_gguf(path).tensors[name], path.stat().st_size
    content = path.read_bytes()
    data = content[tensor.offset :][: tensor.num_bytes]
    gap = -(end - tensor.offset) % 32 + 64
    path.write_bytes(content[: tensor.offset] + b"\xff" * len(data) + content[tensor.offset + len(data) :])
    path.write_bytes(path.read_bytes() + b"\xff" * gap + data)
    move(path, name, end + gap - tensor.offset)
    config = gguf_config(read_gguf(path))
    out, hf = torch.empty(64, 64), "model.layers.1.mlp.down_proj.weight"
    GgufSource(read_gguf(path), config).copy_into(hf, out)
    assert torch.equal(out, load_file(tmp_path / "reference" / "model.safetensors")[hf])


def test_a_tensor_that_is_there_twice_is_damaged(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.attn_q\.weight is in tiny\.gguf, too"):
        read_gguf(path)


def test_a_tensor_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    """Else answers are wrong, as of a Llama with biases."""
    path = write_tiny_gguf(tmp_path)
    config = replace(gguf_config(read_gguf(path)), num_layers=2)
    with pytest.raises(ConfigError, match=r"tiny.gguf: the file has tensors that llama does not \(9\): blk\.2\."):
        GgufSource(read_gguf(path), config)


@pytest.mark.parametrize("alignment", [0, [32]])
def test_an_alignment_that_is_none_is_damaged(alignment: object, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if isinstance(alignment, list):
        writer.add_array("general.alignment", alignment)
    else:
        writer.add_uint32("general.alignment", alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"cannot read .*odd\.gguf") as error:
        read_gguf(path)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_a_big_endian_machine_is_refused_as_such(version: int, tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", version, 0, 0))
    with pytest.raises(ConfigError, match=r"big\.gguf: it is of a big-endian machine: take the little-endian file"):
        read_gguf(path)


def test_metadata_of_another_kind_is_damaged(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path))
    for tokens in (5, [["a"]]):
        with pytest.raises(ConfigError, match="its metadata is damaged"):
            gguf_config(replace(file, metadata={**file.metadata, "tokenizer.ggml.tokens": tokens}))


def test_a_first_token_beyond_the_vocabulary_is_none(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path))
    beyond = {f"tokenizer.ggml.{name}_token_id": 4294967295 for name in ("bos", "padding")}
    assert gguf_config(replace(file, metadata={**file.metadata, **beyond})).bos_token_id is None
    with pytest.raises(ConfigError, match="field bos_token_id: '0' is none of"):
        gguf_config(replace(file, metadata={**file.metadata, "tokenizer.ggml.bos_token_id": "0"}))


def test_a_folder_of_several_models_names_them(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path)
    path.with_name("other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(
        ConfigError, match=r"holds 2 GGUF models \(other.gguf, tiny.gguf\): give --model the file of one"
    ):
        check_model(str(tmp_path))


def test_the_metadata_say_how_long_and_where_texts_end(tmp_path: Path) -> None:
    config = gguf_config(read_gguf(write_tiny_gguf(tmp_path, Kind.Q8_0)))
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (0, (2,), 512)
    assert replace(config, formats=NO_BLOCKS) == load_hf_config(tmp_path / "reference")
