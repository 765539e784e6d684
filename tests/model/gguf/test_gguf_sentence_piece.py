"""GGUF's SentencePiece vocabularies: ids are those of SentencePiece itself, and of transformers' Gemma."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.model.gguf.tokenizer import save_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "Wörter", "日本語", "it's", "3.14", "def f(x):"]
ODD = ["  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "🙂", "é", " x", "x ", "ﬁ", "<h1>", "</h1>", "<0x0A>", "[PAD7]"]
OWN = ["\n", "\n\n", "▁▁", "▁▁▁", "<h1>", "</h1>"]  # as of Gemma


def trained(**options: Any) -> Any:
    """Train a small model with bytes; returns SentencePiece's processor of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng, model = random.Random(0), io.BytesIO()
    lines = (" ".join(rng.choices(WORDS, k=8)) for _ in range(300))
    defaults = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **defaults | options)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def converted(theirs: Any, own: list[str]) -> dict[str, Any]:
    """Return what llama.cpp's converter writes; `own`: tokens that are found before a text is cut."""
    tokens, scores, types = [], [], []
    for i in range(theirs.get_piece_size()):
        piece = theirs.id_to_piece(i)
        kinds = {UNKNOWN: theirs.is_unknown(i), CONTROL: theirs.is_control(i), BYTE: theirs.is_byte(i)}
        kind = next((kind for kind, is_it in kinds.items() if is_it), NORMAL)
        tokens.append(piece.replace("▁", " ") if piece in own else piece)
        scores.append(-1000.0 if piece in own else theirs.get_score(i))
        types.append(USER_DEFINED if piece in own else kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, f"[PAD{len(tokens)}]"],
        "tokenizer.ggml.scores": [*scores, -10000.0],
        "tokenizer.ggml.token_type": [*types, UNUSED],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_bos_token": False,
    }


def made(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    save_tokenizer(metadata, 512, (2,), folder)
    return Tokenizer(folder)


def texts(odd: list[str]) -> list[str]:
    rng = random.Random(1)
    parts = [*WORDS, *odd, *[" "] * 9]
    return ["".join(rng.choices(parts, k=rng.randrange(1, 10))) for _ in range(400)]


@pytest.mark.parametrize("marked", [False, True])
def test_ids_of_gemma(marked: bool, tmp_path: Path) -> None:
    """Its own tokens are runs of newlines and spaces, and tags. Old converters left the marks in those of spaces."""
    theirs = trained(user_defined_symbols=OWN, add_dummy_prefix=False)
    metadata = converted(theirs, OWN) | {"tokenizer.ggml.add_space_prefix": False}
    if marked:
        spaces = {"  ": "▁▁", "   ": "▁▁▁"}
        metadata["tokenizer.ggml.tokens"] = [spaces.get(token, token) for token in metadata["tokenizer.ggml.tokens"]]
    tokenizer = made(metadata, tmp_path / "made")
    for text in texts(ODD):
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode() == text


@pytest.mark.parametrize("scores", [True, False])
def test_ids_of_llama(scores: bool, tmp_path: Path) -> None:
    """Also where a converter had no scores and wrote the same for all."""
    theirs = trained()
    metadata = converted(theirs, [])
    if not scores:
        metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    tokenizer = made(metadata, tmp_path / "made")
    for text in texts(ODD):
        assert tokenizer.encode(text) == theirs.encode(text), text


def test_ids_of_gemma_4(tmp_path: Path) -> None:
    """With merges in the file instead of scores."""
    import transformers

    theirs = trained(add_dummy_prefix=False)
    metadata = converted(theirs, [])
    tokens = metadata["tokenizer.ggml.tokens"]
    known = {token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == NORMAL}
    known.add("\n\n")
    tokens, types = [*tokens, "\n", "\n\n"], [*metadata["tokenizer.ggml.token_type"], NORMAL, NORMAL]
    merges = [("\n", "\n"), *((a, b) for token in tokens for a, b in halves(token) if {token, a, b} <= known)]
    metadata |= {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.add_bos_token": False,  # it begins texts all the same
    }
    vocab = {token: i for i, token in enumerate(tokens)}
    reference = transformers.GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        mask_token=None,
    )
    tokenizer = made(metadata, tmp_path / "made")
    by_words = made(metadata | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gemma4"}, tmp_path / "words")
    found = set[int]()
    for text in texts([part for part in ODD if part != "[PAD7]"]):
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == by_words.encode(text) == [theirs.bos_id(), *ids], text
        assert tokenizer.decode(ids) == text
        found.update(ids)
    assert {vocab["\n\n"], vocab["▁the"], vocab["<0xF0>"]} <= found


def halves(token: str) -> list[tuple[str, str]]:
    return [(token[:cut], token[cut:]) for cut in range(1, len(token))]
