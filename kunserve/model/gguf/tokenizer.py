"""GGUF: the tokenizer in a file's metadata, as the files that a Hugging Face folder has for it.

Two kinds: GPT-2's byte-level BPE, whose way of cutting a text into words has a name, and SentencePiece's BPE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.gguf.shape import CONTROL, UNKNOWN, USER_DEFINED
from kunserve.model.sentence_piece import add_around, bpe, set_spaces

log = structlog.get_logger()

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
EACH_DIGIT = r"\p{N}"
# What a name of llama.cpp stands for: texts are cut by each expression in turn.
WORDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-v2-de", "jina-v2-es"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (EACH_DIGIT, GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (QWEN2,)),
}
TAKES_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is that token, whatever merges say
COMPOSES = ("qwen2", "deepseek-r1-qwen")  # characters are composed (NFC) first
OTHER = "take another GGUF file of the model"  # what to do about metadata that are not right
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def save_tokenizer(metadata: Mapping[str, Any], context_length: int, eos_ids: tuple[int, ...], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (special tokens, chat template) and generation_config.json.

    ConfigError for a tokenizer that is not known.
    """
    tokens, types = _texts(metadata, "tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(tokens) != len(types) or any(type(kind) is not int for kind in types):
        raise ConfigError(f"the metadata have no tokenizer.ggml.token_type, a number for each token: {OTHER}")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        _check_texts("tokenizer.chat_template", [template])
    ids = _special_ids(metadata, len(tokens))
    tokenizer = _tokenizer(metadata, tokens, ids)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    }
    generation = {"bos_token_id": ids["bos"], "eos_token_id": list(eos_ids) or None, "pad_token_id": ids["pad"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")


def _special_ids(metadata: Mapping[str, Any], num_tokens: int) -> dict[str, int | None]:
    """Return the special tokens that a file names.

    ConfigError for one that is none of its tokens; where texts do without it, it is left out, as llama.cpp does.
    """
    ids = dict[str, int | None]()
    for name, gguf in SPECIAL.items():
        ids[name] = i = metadata.get(f"tokenizer.ggml.{gguf}_token_id")
        if i is None or (type(i) is int and 0 <= i < num_tokens):
            continue
        if type(i) is not int or not (name == "pad" or (name == "bos" and not _adds_bos(metadata))):
            raise ConfigError(f"the metadata's {name} token is none of the {num_tokens} tokens: {OTHER}")
        log.warning("a special token is none of the tokens: it is not used", token=name, id=i, tokens=num_tokens)
        ids[name] = None
    return ids


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    return bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in TAKES_WHOLE_WORDS))


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of texts. ConfigError if there is none, or one of them is no text."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"the metadata have no tokenizer.ggml.{name}, a list of texts: {OTHER}")
    _check_texts(f"tokenizer.ggml.{name}", values)
    return values


def _check_texts(field: str, values: list[Any]) -> None:
    """Raise ConfigError for the first value that is no text; bytes that are no UTF-8 have been read as surrogates."""
    if others := [value for value in values if not isinstance(value, str)]:
        raise ConfigError(f"metadata {field}: {show(others[0])} is no text: {OTHER}")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        bad = next(value for value in values if any("\ud800" <= char <= "\udfff" for char in value))
        raise ConfigError(f"metadata {field}: {show(bad)} is no UTF-8: {OTHER}") from None


def _tokenizer(metadata: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int | None]) -> Tokenizer:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    match kind:
        case "gpt2" if isinstance(pre, str) and pre in WORDS:
            tokenizer = _byte_level(metadata, tokens, pre)
        case "gpt2":
            raise ConfigError(f"tokenizer gpt2 with words as of {show(pre)} is not known; known are {', '.join(WORDS)}")
        case "llama":
            tokenizer = _sentence_piece(metadata, tokens, ids["unk"])
        case _:
            raise ConfigError(f"tokenizer {show(kind)} is not served from GGUF files, only gpt2 and llama")
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    add_around(tokenizer, ids["bos"] if _adds_bos(metadata) else None, ids["eos"] if adds_eos else None)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], pre: str) -> Tokenizer:
    lines = _texts(metadata, "merges")  # without them texts would be cut into bytes
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in TAKES_WHOLE_WORDS))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"the tokenizer cannot be built: {show(str(error))}: {OTHER}") from None
    cuts = [pre_tokenizers.Split(Regex(words), behavior="isolated") for words in WORDS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre in COMPOSES:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], unknown: int | None) -> Tokenizer:
    """Return a BPE whose merges are those that SentencePiece finds by the tokens' scores, best first."""
    scores = metadata.get("tokenizer.ggml.scores")
    numbers = [score for score in scores if isinstance(score, int | float)] if isinstance(scores, list) else []
    if len(numbers) != len(tokens):
        raise ConfigError(f"the metadata have no tokenizer.ggml.scores, a number for each token: {OTHER}")
    tokenizer = bpe(tokens, numbers, unknown)
    set_spaces(tokenizer, begins=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    return tokenizer
