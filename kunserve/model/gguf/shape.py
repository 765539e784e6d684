"""GGUF: the model that a file's metadata describe, as the `config.json` that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig
from kunserve.model.config_fields import show
from kunserve.model.family.families import family_of
from kunserve.model.gguf.architectures import ARCHITECTURES, Architecture
from kunserve.model.gguf.fields import Fields
from kunserve.model.gguf.file import GgufFile
from kunserve.model.gguf.names import Parts, parts_of
from kunserve.model.gguf.rope import read_rope_scaling
from kunserve.model.hf_config import parse_hf_config
from kunserve.model.layout import without_uneven
from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.formats import Formats

# Tokens that end a turn or a text, whatever the file names as its one end token, and whatever kind it says they are.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
    *("<|return|>", "<|call|>"),
)
CONTROL_ENDS = ("</s>", "<eos>", "<｜end▁of▁sentence｜>")  # that end a text where they are no text themselves
HARMONY = ("<|return|>", "<|call|>")  # gpt-oss ends with these: its <|end|> stands between a thought and its answer
CONTROL = 3  # a type of tokens
SENTENCE_PIECE_EOS = 2  # where a file with such a tokenizer names none


def architecture_of(file: GgufFile) -> Architecture:
    """Return the architecture of a file. ConfigError for one that is not served."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        served = ", ".join(ARCHITECTURES)
        raise ConfigError(f"architecture {show(name)} is not served from GGUF files, only {served}")
    return ARCHITECTURES[name]


def gguf_config(file: GgufFile) -> ModelConfig:
    """Return the model's shape, with the blocks of its matrices. ConfigError for one that is not run, or not whole."""
    try:
        architecture = architecture_of(file)
        config = parse_hf_config(hf_values(file))
        if architecture.has_whole_norms:
            config = replace(config, norm_offset=0.0)
        parts = parts_of(file, config, architecture.layer_names)
        return replace(config, formats=Formats(without_uneven(config, _blocks(parts))))
    except ConfigError as error:
        raise ConfigError(f"{file.paths[0]}: {error.message}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # values of another kind than they are known
        raise ConfigError(f"{file.paths[0]}: its metadata is damaged ({error})") from None


def hf_values(file: GgufFile) -> dict[str, Any]:
    """Return the `config.json` of the model that a file was made from. ConfigError for one that is not run."""
    architecture, metadata = architecture_of(file), file.metadata
    fields = Fields(file, metadata["general.architecture"])
    hidden, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    head_dim = fields.whole("attention.key_length", hidden // max(1, heads))
    if (size := fields.whole("attention.value_length", head_dim)) != head_dim:
        raise ConfigError(f"attention.value_length {size} is not attention.key_length {head_dim}: not supported")
    theta, rotated = fields.number("rope.freq_base", 10000.0), fields.whole("rope.dimension_count", head_dim)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    vocab_size = file.tensors["token_embd.weight"].shape[0] if fields.has("token_embd.weight") else len(tokens)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    values: dict[str, Any] = {
        "architectures": [architecture.hf],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": fields.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": read_rope_scaling(fields, theta, rotated),
        "tie_word_embeddings": not fields.has("output.weight"),
        "bos_token_id": None if type(bos) is int and not 0 <= bos < vocab_size else bos,  # see tokenizer._special_ids
        "eos_token_id": list(_ends(metadata, vocab_size)) or None,
    }
    if rotated != head_dim:
        if architecture.has_moved_rows:  # rows are moved within whole heads
            raise ConfigError(f"rope.dimension_count {rotated} is not the head's size {head_dim}: not supported")
        values["partial_rotary_factor"] = rotated / head_dim
    for reader in architecture.readers:
        values |= reader(fields, values)
    fields.refuse_unread()
    return values | {"model_type": family_of(values).name}  # by which transformers finds the class


def _blocks(parts: Mapping[str, Parts]) -> dict[str, Blocks]:
    """Return the blocks that each matrix is stored in, but for those whose parts differ and those of numbers."""
    found = dict[str, Blocks]()
    for name, of_one in parts.items():
        (blocks, *others) = {part.blocks for part in of_one}
        if blocks is not None and not others and len(of_one[0].shape) > 1:
            found[name] = blocks
    return found


def _ends(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Return the tokens that end an answer: first the file's own. Names may be more than there are rows for."""
    names = ("eos", "eot", "eom")
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    if ids[0] is None and metadata.get("tokenizer.ggml.model") == "llama":
        ids[0] = SENTENCE_PIECE_EOS
    tokens, types = metadata.get("tokenizer.ggml.tokens") or [], metadata.get("tokenizer.ggml.token_type") or []
    known = {token: i for i, token in enumerate(tokens[:vocab_size])}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")  # SmolLM2 uses up one of them for it
    ids += [known[token] for token in ENDS if token in known and known[token] != unknown]
    ids += [i for token in CONTROL_ENDS if (i := known.get(token)) is not None and types[i : i + 1] == [CONTROL]]
    between = known["<|end|>"] if known.keys() >= {"<|end|>", *HARMONY} else None
    return tuple(dict.fromkeys(i for i in ids if i is not None and i != between))
