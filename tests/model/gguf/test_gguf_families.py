"""GGUF files of every architecture that is served: they become the very model that they were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import architecture_of, write_tiny_gguf

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.config import ModelConfig
from kunserve.model.gguf.architectures import ARCHITECTURES
from kunserve.model.gguf.fields import NEUTRAL
from kunserve.model.gguf.file import GgufFile, read_gguf
from kunserve.model.gguf.rope import LLAMA3_SCALINGS
from kunserve.model.gguf.shape import gguf_config, hf_values
from kunserve.model.gguf.source import GgufSource
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import expected_shapes
from kunserve.model.quant.blocks import GGML_BLOCKS
from kunserve.model.quant.dequantize import dequantize
from kunserve.model.quant.formats import NO_BLOCKS

# Every layer has experts, and scores are scaled by the head's size: so it is in all that llama.cpp's converter takes.
MOE: dict[str, Any] = {"mlp_only_layers": [], "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {},
    "llama-yarn": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2-yarn": {},
    "qwen3": {},
    "qwen3-tied": {},
    "qwen2-moe": MOE,
    "qwen3-moe": MOE,
    "deepseek": {},
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {},
    "phi3-longrope": {},
    "phi3-window": {},
    "olmo2": {},
    "olmoe": {},
    "granite": {"mlp_bias": False, "attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 4, "no_rope_layers": None, "num_hidden_layers": 4},
    "gpt-oss": {},
}
MORE: dict[str, dict[str, Any]] = {"gemma3": {"attention.sliding_window_pattern": 3}}  # metadata
# A GGUF file says neither which class a Llama had, nor that an unused window was there.
SAME: dict[str, dict[str, Any]] = {"mistral": {"family": "llama"}}


def write(variant: str, folder: Path, kind: Kind = Kind.F32, **overrides: Any) -> Path:
    """Write a tiny model of a variant, and its reference."""
    return write_tiny_gguf(folder, kind, variant, metadata=MORE.get(variant), **VARIANTS[variant] | overrides)


def reference_of(variant: str, folder: Path) -> ModelConfig:
    """The model that transformers has, as GGUF files can say it."""
    config = load_hf_config(folder / "reference")
    if ARCHITECTURES[architecture_of(variant)].has_whole_norms:
        config = replace(config, norm_offset=0.0)
    return replace(config, **SAME.get(variant, {}))


def test_every_architecture_is_tried() -> None:
    assert {architecture_of(variant) for variant in VARIANTS} == ARCHITECTURES.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_the_one_that_the_file_was_made_from(variant: str, tmp_path: Path) -> None:
    file = read_gguf(write(variant, tmp_path))
    config, reference = gguf_config(file), reference_of(variant, tmp_path)
    assert config == reference and config.formats == NO_BLOCKS
    assert hf_values(file)["model_type"] == config.family  # transformers finds the class by it
    added = load_hf_config(tmp_path / "reference").norm_offset - config.norm_offset
    ours, theirs = GgufSource(file, config), SafetensorsSource(tmp_path / "reference", config)
    for name, shape in expected_shapes(config).items():
        found, wanted = torch.empty(shape), torch.empty(shape)
        ours.copy_into(name, found)
        theirs.copy_into(name, wanted)
        assert torch.equal(found, wanted + added if name.endswith("norm.weight") else wanted), name


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe", "gemma3", "phi3", "granite", "gpt-oss"])
def test_blocks_stay_as_they_are(variant: str, tmp_path: Path) -> None:
    """Of parts of tensors and of those that are put together, too."""
    file = read_gguf(
        write(variant, tmp_path, Kind.Q8_0, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    )
    config = gguf_config(file)
    source, num_kept = GgufSource(file, config), 0
    for name, shape in expected_shapes(config).items():
        if (blocks := config.formats.of(name)) is None:
            continue
        assert blocks is GGML_BLOCKS["Q8_0"]
        stored = torch.empty((*shape[:-1], shape[-1] // 32 * 34), dtype=torch.uint8)
        numbers = torch.empty(shape)
        source.copy_into(name, stored)
        source.copy_into(name, numbers)
        assert torch.equal(dequantize(stored.flatten(0, -2), blocks).view(shape), numbers), name
        num_kept += 1
    assert num_kept > 3 * config.num_layers


def test_experts_that_are_not_stored_alike_are_kept_as_numbers(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, Kind.Q8_0, "qwen3-moe", {"ffn_up_exps": Kind.Q4_0}, **MOE)
    config = gguf_config(read_gguf(path))
    kept = {name.rsplit(".", 2)[1] for name in config.formats.by_name if ".experts." in name}
    assert kept == {"down_proj"}
    GgufSource(read_gguf(path), config)


def change_of(file: GgufFile, change: dict[str, Any]) -> GgufFile:
    """Return a file with other metadata of its architecture; None: it does not have them."""
    prefix = file.metadata["general.architecture"]
    changed = {**file.metadata, **{f"{prefix}.{name}": value for name, value in change.items()}}
    return replace(file, metadata={name: value for name, value in changed.items() if value is not None})


def fused(file: GgufFile, path: Path) -> GgufFile:
    """Write a file's model with q, k and v of each layer as one tensor, and gate and up of its experts."""
    tensors = {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(file.paths[0]).tensors}
    for layer in range(3):
        for parts, whole, axis in [
            ("attn_q attn_k attn_v", "attn_qkv", 0),
            ("ffn_gate_exps ffn_up_exps", "ffn_gate_up_exps", 1),
        ]:
            of_one = [tensors.pop(f"blk.{layer}.{part}.weight") for part in parts.split()]
            tensors[f"blk.{layer}.{whole}.weight"] = np.concatenate(of_one, axis)
    writer = gguf.GGUFWriter(path, "none")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return replace(read_gguf(path), metadata=file.metadata)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe"])
def test_tensors_that_a_converter_put_together_are_taken_apart(variant: str, tmp_path: Path) -> None:
    apart = read_gguf(write(variant, tmp_path))
    together = fused(apart, tmp_path / "fused.gguf")
    config = gguf_config(apart)
    assert gguf_config(together) == config
    ours, theirs = GgufSource(together, config), GgufSource(apart, config)
    for name, shape in expected_shapes(config).items():
        found, wanted = torch.empty(shape), torch.empty(shape)
        ours.copy_into(name, found)
        theirs.copy_into(name, wanted)
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("attention.head_count_kv", 1, r"attn_qkv\.weight"),
        ("expert_feed_forward_length", 16, r"ffn_(gate_up|down)_exps\.weight"),
    ],
)
def test_parts_of_another_size_are_refused(field: str, value: int, tensor: str, tmp_path: Path) -> None:
    """What is left over of a tensor would be of the next part."""
    together = fused(read_gguf(write("qwen3-moe", tmp_path)), tmp_path / "fused.gguf")
    assert gguf_config(together).num_kv_heads == 2
    with pytest.raises(ConfigError, match=rf"tensor blk\.0\.{tensor} has shape"):
        gguf_config(change_of(together, {field: value}))


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_answers_and_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path, family="qwen2"))
    config = gguf_config(file)
    for value in (None, 0, NEUTRAL[name]):
        assert gguf_config(replace(file, metadata={**file.metadata, f"qwen2.{name}": value})) == config
    with pytest.raises(
        ConfigError, match=rf"metadata qwen2\.{name}: 7 is not supported: take the model in safetensors"
    ):
        gguf_config(replace(file, metadata={**file.metadata, f"qwen2.{name}": 7}))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path, family="qwen2"))
    with pytest.raises(ConfigError, match=r"attention\.causal: False is not supported: it is no decoder"):
        gguf_config(replace(file, metadata={**file.metadata, "qwen2.attention.causal": False}))


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path, metadata={"attention.sliding_window": 48}))
    config = gguf_config(file)
    assert (config.family, config.window, config.windowed_layers) == ("mistral", 48, (0, 1, 2))


def test_flags_say_which_layers_have_the_window(tmp_path: Path) -> None:
    file = read_gguf(write("gemma3", tmp_path))
    metadata = {**file.metadata, "gemma3.attention.sliding_window_pattern": [True, False, False]}
    assert gguf_config(replace(file, metadata=metadata)).windowed_layers == (0,)


def test_a_file_with_fewer_experts_than_it_says_is_refused(tmp_path: Path) -> None:
    file = read_gguf(write("mixtral", tmp_path))
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.ffn_gate_(inp|exps)\.weight has shape \[8, .*\]"):
        gguf_config(replace(file, metadata={**file.metadata, "llama.expert_count": 9}))


@pytest.mark.parametrize("variant", ["mixtral", "gpt-oss", "phi3-longrope", "gemma3", "deepseek"])
def test_bits_that_flip_in_a_header_end_in_one_line(variant: str, tmp_path: Path) -> None:
    path = write(variant, tmp_path)
    whole, generator, messages = path.read_bytes(), torch.Generator().manual_seed(5), list[str]()
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    for _ in range(150):
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (header, 8))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            file = read_gguf(path)
            GgufSource(file, gguf_config(file))
        except ConfigError as error:
            messages.append(error.message)
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message or str(path) not in message]


def test_rows_of_another_number_are_refused(tmp_path: Path) -> None:
    file = read_gguf(write("phi3", tmp_path))
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.\w+\.weight has shape \[\d+, \d+\], not \[\d+, \d+\]"):
        gguf_config(replace(file, metadata={**file.metadata, "phi3.feed_forward_length": 80}))


def ends_of(file: GgufFile, names: list[str], kind: int = 3, **more: Any) -> list[str]:
    """Return which tokens end an answer, of a file whose tokens 10, 11 ... have these names."""
    tokens, kinds = [*file.metadata["tokenizer.ggml.tokens"]], [*file.metadata["tokenizer.ggml.token_type"]]
    tokens[10 : 10 + len(names)], kinds[10 : 10 + len(names)] = names, [kind] * len(names)
    metadata = {**file.metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, **more}
    return [tokens[i] for i in gguf_config(replace(file, metadata=metadata)).eos_token_ids]


def test_the_end_of_a_thought_is_not_the_end_of_an_answer_of_gpt_oss(tmp_path: Path) -> None:
    file = read_gguf(write("gpt-oss", tmp_path))
    names = ["<|end|>", "<|return|>", "<|call|>"]
    assert ends_of(file, names, **{"tokenizer.ggml.eos_token_id": 11}) == ["<|return|>", "<|call|>"]
    assert ends_of(file, names, **{"tokenizer.ggml.eot_token_id": 10})[1:] == ["<|return|>", "<|call|>"]
    assert ends_of(file, ["<|end|>"])[1:] == ["<|end|>"]  # as of Phi-3


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_tokens_that_end_a_turn_do_so_whatever_kind_a_file_says_they_are(kind: int, tmp_path: Path) -> None:
    file = read_gguf(write("llama", tmp_path))
    assert ends_of(file, ["<|im_end|>"], kind)[1:] == ["<|im_end|>"]


def test_what_may_be_a_text_ends_an_answer_only_as_a_control_token(tmp_path: Path) -> None:
    """As `</s>`, which stands in HTML."""
    file = read_gguf(write("llama", tmp_path))
    assert ends_of(file, ["</s>", "<eos>"], 3)[1:] == ["</s>", "<eos>"]
    assert not ends_of(file, ["</s>", "<eos>"], 1)[1:]


def test_a_sentence_piece_tokenizer_ends_with_its_usual_token_if_a_file_names_none(tmp_path: Path) -> None:
    file = read_gguf(write("llama", tmp_path))
    metadata = {name: value for name, value in file.metadata.items() if name != "tokenizer.ggml.eos_token_id"}
    metadata["tokenizer.ggml.tokens"] = ["<|begin|>", "a", "b", *file.metadata["tokenizer.ggml.tokens"][3:]]
    assert gguf_config(replace(file, metadata=metadata)).eos_token_ids == ()
    metadata["tokenizer.ggml.model"] = "llama"
    assert gguf_config(replace(file, metadata=metadata)).eos_token_ids == (2,)


def test_an_end_that_the_model_has_no_row_for_is_none(tmp_path: Path) -> None:
    """Ollama's files of Gemma 3 have more tokens than rows."""
    file = read_gguf(write("llama", tmp_path))
    more = {"tokens": "<|im_end|>", "token_type": 3}
    longer = {f"tokenizer.ggml.{name}": [*file.metadata[f"tokenizer.ggml.{name}"], last] for name, last in more.items()}
    assert gguf_config(replace(file, metadata={**file.metadata, **longer})) == gguf_config(file)


@pytest.mark.parametrize("given", [None, 500000.0])
def test_gemma_3_of_ollama_rotates_as_that_of_llama_cpp(given: float | None, tmp_path: Path) -> None:
    file = read_gguf(write("gemma3", tmp_path))
    theirs = {"rope.freq_base": None, "rope.freq_base_swa": None, "rope.global.freq_base": given}
    config = gguf_config(change_of(file, theirs | {"rope.local.freq_base": given and 2e4}))
    assert (config.rope_theta, config.local_rope_theta) == (given or 1e6, 2e4 if given else 1e4)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.beta_fast": 64.0}),
        ("gemma2", {"rope.freq_base_swa": 20000.0}),
        ("qwen3", {"rope.dimension_sections": [8, 4, 4, 0]}),
        ("granite", {"rope.scaling.finetuned": False}),
    ],
)
def test_what_is_said_of_rotation_and_not_read_is_refused(variant: str, change: dict[str, Any], tmp_path: Path) -> None:
    file, original = read_gguf(write(variant, tmp_path)), {"rope.scaling.original_context_length": 512}
    with pytest.raises(ConfigError, match=rf"metadata \w+\.{[*change][-1]}: .* is not supported: take the model in"):
        gguf_config(change_of(file, original | change))


def test_what_is_said_of_rotation_without_effect_is_served(tmp_path: Path) -> None:
    file = read_gguf(write("gpt-oss", tmp_path))
    same = {"rope.freq_base_swa": file.metadata["gpt-oss.rope.freq_base"], "rope.scaling.finetuned": True}
    assert gguf_config(change_of(file, same)) == gguf_config(file)


def test_gpt_oss_without_a_scaling_has_none(tmp_path: Path) -> None:
    file = read_gguf(write("gpt-oss", tmp_path))
    assert gguf_config(change_of(file, {"rope.scaling.type": "none"})).rope_scaling is None


def test_factors_of_rotation_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    file = read_gguf(write("phi3-longrope", tmp_path))
    with pytest.raises(ConfigError, match=r"rope\.scaling\.factor 4 together with tensor rope_factors_long\.weight"):
        gguf_config(change_of(file, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}))


@pytest.mark.parametrize("shape", [(0,), (16,)])
def test_factors_for_other_heads_are_refused(shape: tuple[int], tmp_path: Path) -> None:
    """Of a model with heads of 64 and one of 32 they differ in number only."""
    rope = {"rope_theta": 500000.0, **LLAMA3_SCALINGS[0]}
    path = write_tiny_gguf(tmp_path, family="llama3", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    file = read_gguf(path)
    assert gguf_config(file).rope_scaling is not None
    factors = replace(file.tensors["rope_freqs.weight"], shape=shape)
    with pytest.raises(ConfigError, match=rf"tensor rope_freqs\.weight has {shape[0]} numbers for 32 pairs"):
        gguf_config(replace(file, tensors={**file.tensors, "rope_freqs.weight": factors}))
