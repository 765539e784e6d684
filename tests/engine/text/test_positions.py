"""Where tokens begin in their text, whatever pieces characters are cut into."""

from __future__ import annotations

import itertools
import random

import pytest
from seeds import seeds

from kunserve.engine.text.positions import Positions

LETTERS = ("a", " ", "é", "界", "😀", "👩‍👩‍👧", "\ufffd", "\n", "ß")


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(len(data)))})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def take_all(positions: Positions, tokens: list[bytes]) -> list[int]:
    return [positions.take(token) for token in tokens]


@pytest.mark.parametrize("seed", seeds(200))
def test_a_token_begins_where_its_character_does(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(LETTERS, k=20))
    tokens, num_bytes = cut(text.encode(), rng), 0
    positions = Positions()
    for token, begin in zip(tokens, take_all(positions, tokens), strict=True):
        assert begin == len(text.encode()[:num_bytes].decode(errors="ignore"))
        num_bytes += len(token)
    assert positions.num_chars == len(text)


@pytest.mark.parametrize("seed", seeds(200))
def test_what_is_no_text_counts_as_it_is_shown(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [bytes(rng.choices((0x61, 0xE7, 0x95, 0x8C, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC0), k=3)) for _ in range(8)]
    shown, positions = b"".join([*tokens, b"!"]).decode(errors="replace"), Positions()
    begins = take_all(positions, tokens)
    assert shown[positions.take(b"!")] == "!" == shown[-1]
    assert begins == sorted(begins)
    for token, begin in zip(tokens, begins, strict=True):
        if token[:1] == b"a":
            assert shown[begin] == "a"


def test_a_token_without_text_begins_where_the_next_one_does() -> None:
    assert take_all(Positions(), [b"a", b"", b"b", b""]) == [0, 1, 1, 2]


def test_a_prompt_may_end_inside_a_character() -> None:
    assert take_all(Positions([b"x", "é".encode()[:1]]), ["é".encode()[1:], b"b"]) == [0, 1]


def test_the_tokenizers_own_blank_is_no_text() -> None:
    assert take_all(Positions(strips_space=True), [b" ", b"a", b" b"]) == [0, 0, 1]
    assert take_all(Positions([b"x"], strips_space=True), [b" a", b"b"]) == [0, 2]
