"""Answers that a structure allows, written by a model that takes any of the bytes that may follow."""

from __future__ import annotations

import random
from typing import Any

from llguidance import LLTokenizer
from structures import EOS, VOCABULARY

from kunserve.grammar.source import compile_matcher
from kunserve.grammar.vocabulary import read_vocabulary

_ENDS = (EOS, *b'"}]')
_PLAIN = frozenset(range(ord(" "), 127))
_MAX_BYTES = 20_000


def byte_vocabulary() -> LLTokenizer:
    """Token i is byte i."""
    return read_vocabulary(VOCABULARY.tokenizer_json(), VOCABULARY.size, VOCABULARY.eos_token_ids)


def compiled(vocabulary: LLTokenizer, kind: str, value: str) -> Any:
    """A matcher at the beginning of a structure."""
    return compile_matcher(vocabulary, kind, value)[0]


def allows(matcher: Any, text: str) -> bool:
    """Whether `text` may be the whole answer."""
    place = matcher.deep_copy()
    data = text.encode()
    return bool(place.try_consume_tokens(list(data)) == len(data) and place.is_accepting())


def answer(matcher: Any, rng: random.Random) -> str:
    """One answer. It likes to end what it has begun, the more the longer it is."""
    place, data = matcher.deep_copy(), bytearray()
    while not place.is_stopped():
        mask = int.from_bytes(place.compute_bitmask(), "little")
        allowed = [token_id for token_id in (*range(256), EOS) if mask >> token_id & 1]
        ends = [token_id for token_id in _ENDS if token_id in allowed]
        plain = [token_id for token_id in allowed if token_id in _PLAIN]
        if ends and (rng.random() < 0.3 or len(data) > 300):
            token_id = ends[0]
        else:
            token_id = rng.choice(plain if plain and rng.random() < 0.95 else allowed)
        assert place.consume_token(token_id), place.get_error()
        if token_id != EOS:
            data.append(token_id)
        assert len(data) < _MAX_BYTES, data[:200]
    return data.decode()
