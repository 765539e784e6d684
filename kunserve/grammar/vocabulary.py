"""In the fork server: a model's vocabulary as the library takes it, in which the text of a special token is just text.

Where a structure leaves no choice, the library asks the tokenizer how to write what must come. A tokenizer on its own
finds `<|im_end|>` in a text and answers with the special token, which the structure does not allow: the request would
end with an error, and where it did not, the answer would lack the text, for special tokens are not shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from llguidance import LLTokenizer


def read_vocabulary(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Return the library's tokenizer; `vocab_size` is the model's, which may have rows without a token."""
    plain = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    words = _Words(plain, tokenizer_json)
    return LLTokenizer(words, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


class _Words:
    """A tokenizer in the shape of the library's `TokenizerWrapper`: special tokens that a text spells are text."""

    is_tokenizer_wrapper = True

    def __init__(self, plain: LLTokenizer, tokenizer_json: str) -> None:
        self.eos_token_id, self.bos_token_id = plain.eos_token, None
        ids = range(plain.vocab_size)
        self.tokens = [plain.decode_bytes([token_id]) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if plain.is_special_token(token_id)]
        self._core = tokenizers.Tokenizer.from_str(_without_first_blank(tokenizer_json))
        self._core.encode_special_tokens = True

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the token ids of a text."""
        if isinstance(text, bytes):  # the library tries whether it may give bytes
            raise TypeError("a text must be a string")
        return self._core.encode(text, add_special_tokens=False).ids


def _without_first_blank(tokenizer_json: str) -> str:
    """Return a tokenizer that puts no blank before a text: what must come is nearly never the beginning of one."""
    described: dict[str, Any] = json.loads(tokenizer_json)
    normalizer, pre_tokenizer = described.get("normalizer"), described.get("pre_tokenizer")
    if normalizer is not None:
        parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        kept = [part for part in parts if part["type"] != "Prepend"]
        described["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    if pre_tokenizer is not None:
        for part in pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
    return json.dumps(described)
