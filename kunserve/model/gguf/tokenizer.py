"""GGUF: the tokenizer in a file's metadata, as the files that a Hugging Face folder has for it.

Three kinds: GPT-2's byte-level BPE, whose way of cutting a text into words has a name (`words.py`); SentencePiece's
BPE, which has scores; and Gemma 4's, the same with merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from tokenizers import AddedToken, Tokenizer, decoders, models

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.gguf.fields import OTHERWISE
from kunserve.model.gguf.words import DEFAULT, WORDS
from kunserve.model.sentence_piece import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    add_around,
    bpe,
    set_spaces,
)

log = structlog.get_logger()

OTHER = "take another GGUF file of the model"  # what to do about metadata that are not right

KINDS = "gpt2, llama and gemma4"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # where a file of that kind names none
TEMPLATE = "tokenizer.chat_template"
RAW = "gemma4"  # a kind, and words that are not written as bytes; a text begins with bos whatever the file says
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's tokens that leave the spaces after them alone


def save_tokenizer(metadata: Mapping[str, Any], context_length: int, eos_ids: tuple[int, ...], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (special tokens, chat template) and generation_config.json.

    ConfigError for a tokenizer that is not known.
    """
    tokens, types = _tokens(metadata)
    template = _chat_template(metadata)
    ids = _special_ids(metadata, len(tokens))
    tokenizer = _tokenizer(metadata, tokens, types, ids)
    _add_tokens(tokenizer, metadata, tokens, types, eos_ids)
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


def _get(metadata: Mapping[str, Any], name: str) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}")


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens and their types. ConfigError if they are not right.

    One that no text may become gets a space into its name: no text has one when the vocabulary is searched for it.
    """
    tokens, types = _texts(metadata, "tokens"), _get(metadata, "token_type")
    if not isinstance(types, list) or len(tokens) != len(types) or any(type(kind) is not int for kind in types):
        raise ConfigError(f"the metadata have no tokenizer.ggml.token_type, a number for each token: {OTHER}")
    tokens, types = list(tokens), list(types)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        # Converters name rows of the embedding that have no token so, and some give them the type of a token.
        if kind == UNUSED or not token or token == f"[PAD{i}]":
            tokens[i], types[i] = f"{token} {i}", UNUSED
        elif kind == USER_DEFINED and _get(metadata, "model") == "llama":
            tokens[i] = token.replace(SPACE, " ")  # found in the text as it is, where spaces are not marked
    return tokens, types


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the template; if some have names, a list of all, as a `tokenizer_config.json` has them."""
    found = {key: value for key, value in metadata.items() if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")}
    for key, value in found.items():
        _check_texts(key, [value])
    if found.keys() <= {TEMPLATE}:
        return found.get(TEMPLATE)
    names = {key: "default" if key == TEMPLATE else key.removeprefix(f"{TEMPLATE}.") for key in found}
    return [{"name": names[key], "template": template} for key, template in found.items()]


def _special_ids(metadata: Mapping[str, Any], num_tokens: int) -> dict[str, int | None]:
    """Return the special tokens that a file names.

    ConfigError for one that is none of its tokens; where texts do without it, it is left out, as llama.cpp does.
    """
    ids = dict[str, int | None]()
    for name, gguf in SPECIAL.items():
        i = _get(metadata, f"{gguf}_token_id")
        if i is None and _get(metadata, "model") == "llama":
            i = SENTENCE_PIECE_IDS.get(name)
        ids[name] = i
        if i is None or (type(i) is int and 0 <= i < num_tokens):
            continue
        if type(i) is not int or not (name == "pad" or (name == "bos" and not _adds_bos(metadata))):
            raise ConfigError(f"the metadata's {name} token is none of the {num_tokens} tokens: {OTHER}")
        log.warning("a special token is none of the tokens: it is not used", token=name, id=i, tokens=num_tokens)
        ids[name] = None
    for name, adds in (("bos", _adds_bos(metadata)), ("eos", _adds_eos(metadata))):
        if adds and ids[name] is None:
            raise ConfigError(f"the metadata name no {name} token, but texts are to have one: {OTHER}")
    return ids


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    kind, words = _get(metadata, "model"), _get(metadata, "pre")
    if RAW in (kind, words):
        return True
    by_words = isinstance(words, str) and words in WORDS and WORDS[words].adds_bos
    return bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or by_words))


def _adds_eos(metadata: Mapping[str, Any]) -> bool:
    return bool(_get(metadata, "add_eos_token"))


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of texts. ConfigError if there is none, or one of them is no text."""
    values = _get(metadata, name)
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


def _tokenizer(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> Tokenizer:
    """Return what cuts a text, without the tokens that are found before it is cut. ConfigError for another kind."""
    kind, words = _get(metadata, "model"), _get(metadata, "pre")
    match kind:
        case "gpt2" | "gemma4" if RAW in (kind, words):
            tokenizer = _raw(metadata, tokens, types, ids["unk"])
        case "gpt2" if isinstance(words, str) and words in WORDS:
            tokenizer = _byte_level(metadata, tokens, types, words)
        case "gpt2" if words is None:
            raise ConfigError(f"the metadata have no tokenizer.ggml.pre, by which words are cut: {OTHER}")
        case "gpt2":
            raise ConfigError(f"tokenizer gpt2 with words as of {show(words)} is not known: {OTHERWISE}")
        case "llama":
            tokenizer = _sentence_piece(metadata, tokens, types, ids["unk"])
        case _:
            raise ConfigError(f"tokenizer {show(kind)} is not served from GGUF files, only {KINDS}: {OTHERWISE}")
    add_around(tokenizer, ids["bos"] if _adds_bos(metadata) else None, ids["eos"] if _adds_eos(metadata) else None)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], name: str) -> Tokenizer:
    words = WORDS[name]
    if name == DEFAULT:
        log.warning("words are cut as llama.cpp does by default, which may not be as the model was trained")
    tokenizer = _merging(metadata, tokens, types, ignore_merges=words.takes_whole)
    tokenizer.pre_tokenizer, tokenizer.decoder = words.pre_tokenizer(), decoders.ByteLevel()
    if (normalizer := words.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def _raw(metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: int | None) -> Tokenizer:
    """Return a BPE of characters, with SentencePiece's marks for spaces and its way of writing bytes."""
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = _merging(metadata, tokens, types, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    set_spaces(tokenizer, begins=False)
    return tokenizer


def _merging(metadata: Mapping[str, Any], tokens: list[str], types: list[int], **options: Any) -> Tokenizer:
    """Return a BPE with the merges of a file, but for those of tokens that no text may become."""
    lines = _texts(metadata, "merges")  # without them texts would be cut into bytes
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if unused := {tokens[i].removesuffix(f" {i}") for i, kind in enumerate(types) if kind == UNUSED}:
        merges = [pair for pair in merges if unused.isdisjoint((*pair, "".join(pair)))]
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"the tokenizer cannot be built: {show(str(error))}: {OTHER}") from None


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: int | None) -> Tokenizer:
    """Return a BPE whose merges are those that SentencePiece finds by the tokens' scores, best first."""
    scores = _get(metadata, "scores")
    numbers = [score for score in scores if isinstance(score, int | float)] if isinstance(scores, list) else []
    if len(numbers) != len(tokens):
        raise ConfigError(f"the metadata have no tokenizer.ggml.scores, a number for each token: {OTHER}")
    known = {i: token for i, token in enumerate(tokens) if types[i] in (0, NORMAL, USER_DEFINED)}
    if len({numbers[i] for i in known}) == 1:
        # Converted without a `tokenizer.model`. Pieces are in the order of their scores, but for runs of spaces: last.
        numbers = [-float(i) if token.strip(SPACE) else -1e9 for i, token in enumerate(tokens)]
    tokenizer = bpe(tokens, numbers, unknown, set(known.values()))
    set_spaces(tokenizer, begins=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    return tokenizer


def _add_tokens(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], types: list[int], eos_ids: Sequence[int]
) -> None:
    """Let a tokenizer find control tokens and those that a model defines itself before a text is cut."""
    phi = _phi(metadata, tokens)
    special, defined = [], []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and i in eos_ids):
            special.append(AddedToken(token, normalized=False, special=True, **_strips(phi, token)))
        elif kind == USER_DEFINED:
            defined.append(AddedToken(token, normalized=False, **_strips(phi, token)))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(defined)


def _phi(metadata: Mapping[str, Any], tokens: list[str]) -> int | None:
    """Return which Phi a tokenizer is of, 3 or 4; None if of neither."""
    name = "".join(filter(str.isalnum, str(metadata.get("general.name")).lower()))
    if _get(metadata, "model") == "llama" and ("phi3" in name or metadata.get("general.architecture") == "phi3"):
        return 3
    return 4 if _get(metadata, "pre") == "dbrx" and "<|im_sep|>" in tokens else None


def _strips(phi: int | None, token: str) -> dict[str, bool]:
    """Return on which sides a token takes the spaces beside it with it, as those of Phi do: GGUF has no word for it."""
    if phi == 3:
        return {"rstrip": token not in PHI3_PLAIN}
    return {"lstrip": True, "rstrip": True} if phi == 4 and token.startswith("<|") else {}
