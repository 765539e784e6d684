"""The text of a special token is text: a structure that spells one is followed to its end, with ordinary tokens."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.grammar.source import compile_matcher
from kunserve.grammar.vocabulary import read_vocabulary
from kunserve.model.card import resolve_model


def small_model() -> Tokenizer:
    files = resolve_model("smollm2-135m")
    assert files.folder is not None
    return Tokenizer(files.folder)


def sentence_piece() -> tokenizers.Tokenizer:
    """A tokenizer like Llama 2's: letters, "▁" before each text, and bytes for everything else."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw<>|_", "he", "▁he", "</"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("▁", "he")], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return core


def metaspace() -> tokenizers.Tokenizer:
    core = sentence_piece()
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    return core


MODELS: dict[str, tuple[Callable[[], str], int]] = {
    "byte level": (lambda: small_model().to_json(), 2),
    "sentence piece": (lambda: str(sentence_piece().to_str()), 1),
    "metaspace": (lambda: str(metaspace().to_str()), 1),
}


@pytest.fixture(scope="module", params=MODELS)
def vocabulary(request: pytest.FixtureRequest) -> LLTokenizer:
    text, eos = MODELS[request.param]
    size = tokenizers.Tokenizer.from_str(text()).get_vocab_size()
    return read_vocabulary(text(), size + 40, [eos])


def written(vocabulary: LLTokenizer, kind: str, value: str) -> tuple[bytes, list[int]]:
    """What a model writes that always takes the last token that is allowed, and the tokens."""
    matcher, mask = compile_matcher(vocabulary, kind, value)
    token_ids: list[int] = []
    while not matcher.is_stopped():
        token_id = int.from_bytes(mask, "little").bit_length() - 1
        assert matcher.consume_token(token_id), matcher.get_error()
        token_ids.append(token_id)
        if not matcher.is_stopped():
            mask = matcher.compute_bitmask()
    return vocabulary.decode_bytes(token_ids), token_ids


TEXTS = [
    "<s>",
    "</s>",
    "he </s> he",
    "<|im_end|>",
    "a <jupyter_code> b",
    "</s></s>",
    "<|endoftext|>",
    "<s><|im_start|>h",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_special_token_comes_out_of_ordinary_tokens(vocabulary: LLTokenizer, text: str) -> None:
    quoted = json.dumps(text)
    escaped = text.translate({ord(char): f"\\{char}" for char in "|"})
    for kind, value, expected in (
        ("choice", f"[{quoted}]", text),
        ("regex", escaped, text),
        ("grammar", f"start: {quoted}", text),
        ("json", json.dumps({"enum": [text]}), quoted),
        ("json", json.dumps({"properties": {text: {"const": 1}}, "required": [text], "type": "object"}), quoted),
    ):
        data, token_ids = written(vocabulary, kind, value)
        assert expected.encode() in data, (kind, data)
        ends = [token_id for token_id in token_ids if vocabulary.is_special_token(token_id)]
        assert ends in ([], [vocabulary.eos_token]) and (not ends or token_ids[-1] == vocabulary.eos_token)


def test_a_grammar_may_still_name_a_special_token(vocabulary: LLTokenizer) -> None:
    name = vocabulary.decode_bytes([1]).decode()
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(f'start: {name} "a"'), log_level=0)
    assert matcher.consume_token(1)


def test_the_vocabulary_is_the_model_s(vocabulary: LLTokenizer) -> None:
    assert vocabulary.is_special_token(vocabulary.vocab_size - 1)  # a row without a token: never text
    assert vocabulary.decode_bytes(vocabulary.tokenize_str(" he")) == b" he"
    assert vocabulary.decode_bytes(vocabulary.tokenize_str("he")) == b"he"
