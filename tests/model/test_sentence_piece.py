"""Tokenizers that are SentencePiece models alone: ids, bytes and special tokens as SentencePiece itself has them."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.model.folder import check_tokenizer_file

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "Wörter",
    "日本語",
    "it's",
    "3.14",
    "def f(x):",
]
ODD = ["  ", "\n", "\t", "🙂", "é", "", " x", "x ", "ﬁ", "<0x0A>", "▁", "<|u|>"]


def trained(folder: Path, **options: Any) -> Any:
    """Train a small model into `folder`; returns SentencePiece's own processor of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    rng, model = random.Random(0), io.BytesIO()
    lines = (" ".join(rng.choices(WORDS, k=8)) for _ in range(300))
    defaults = {"vocab_size": 340, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **defaults | options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["<|u|>", "▁▁"],
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma": LLAMA | {"add_dummy_prefix": False, "split_digits": True},
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_its_own(kind: str, tmp_path: Path) -> None:
    theirs = trained(tmp_path, **KINDS[kind])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    tokenizer, rng = Tokenizer(tmp_path), random.Random(1)
    assert tokenizer.vocab_size == theirs.get_piece_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    for _ in range(300):
        text = rng.choice(WORDS) + "".join(rng.choices(WORDS + ODD + [" "] * 9, k=rng.randrange(1, 9)))
        ids = theirs.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if "byte_fallback" in KINDS[kind]:
            shown = b"".join(map(tokenizer.token_bytes, ids)).decode()
            assert tokenizer.decode(ids) == (shown.removeprefix(" ") if tokenizer.strips_space else shown)


def test_what_stands_beside_it_counts(tmp_path: Path) -> None:
    theirs = trained(tmp_path, **LLAMA)
    size = theirs.get_piece_size()
    plain = Tokenizer(tmp_path).encode("dog", add_special_tokens=False)
    assert Tokenizer(tmp_path).encode("dog") == [theirs.bos_id(), *plain]
    assert Tokenizer(tmp_path).encode("<s>dog", add_special_tokens=False) == [theirs.bos_id(), *plain]  # "▁dog"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size + 1, "<|start|>": size}))
    settings = {"add_bos_token": False, "add_eos_token": True, "eos_token": "<|end|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("T")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("dog") == [*plain, size + 1]
    assert tokenizer.encode("<|start|>", add_special_tokens=False) == [size]
    assert (tokenizer.special_tokens["eos_token"], tokenizer.special_tokens["bos_token"]) == ("<|end|>", "<s>")
    assert tokenizer.chat_template == "T"
    added = {"added_tokens_decoder": {str(size + 7): {"content": "<|far|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    with pytest.raises(ConfigError, match=rf"added token '<\|far\|>' cannot have the id {size + 7}"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"", b"\x00" * 40])
def test_other_files_of_that_name_are_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.model is no SentencePiece model"):
        Tokenizer(tmp_path)


def test_models_of_words_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, model_type="char")
    with pytest.raises(ConfigError, match="only unigram and BPE"):
        Tokenizer(tmp_path)


def test_what_to_install_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    message = r"has tokenizer\.model, but no tokenizer\.json: to read it needs pip install 'kunserve\[sentencepiece\]'"
    with pytest.raises(ConfigError, match=message):
        Tokenizer(tmp_path)
    monkeypatch.setattr("kunserve.model.folder.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer_file(tmp_path)
