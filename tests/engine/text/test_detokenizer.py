import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizer import sentence_piece_core
from tiny_models import save_tiny_tokenizer

from kunserve.engine.text.detokenizer import Detokenizer
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.sampling import SamplingParams


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("byte_level")
    save_tiny_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("sentence_piece")
    sentence_piece_core().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def _make(tokenizer: Tokenizer, *stop: str, prompt: tuple[int, ...] = (), **params: bool | int) -> Detokenizer:
    return Detokenizer(tokenizer, SamplingParams(max_tokens=99, stop=stop, **params), prompt)  # type: ignore[arg-type]


def _run(detokenizer: Detokenizer, ids: list[int]) -> str:
    """All text of `ids`, as the engine would get it."""
    text = ""
    for token_id in ids:
        text += detokenizer.push(token_id)
        if detokenizer.stopped is not None:
            return text
    return text + detokenizer.flush()


@given(text=st.text())
@example(text="你好, 🙂🏳️‍🌈 e\u0301 \ufffd")
def test_pieces_make_the_full_text(byte_level: Tokenizer, sentence_piece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentence_piece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert _run(_make(tokenizer), ids) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 330), max_size=30), skip=st.booleans())
def test_any_tokens_make_what_a_full_decode_makes(byte_level: Tokenizer, ids: list[int], skip: bool) -> None:
    """Invalid UTF-8, special and unknown tokens included."""
    expected = byte_level.decode(ids, skip_special_tokens=skip)
    assert _run(_make(byte_level, skip_special_tokens=skip), ids) == expected


def test_half_a_character_is_held_back(byte_level: Tokenizer) -> None:
    detokenizer = _make(byte_level)
    ids = byte_level.encode("🙂")
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "🙂"]
    assert detokenizer.flush() == ""
    detokenizer = _make(byte_level)
    assert [detokenizer.push(i) for i in ids[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_character_may_begin_in_the_prompt(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🙂")
    detokenizer = _make(byte_level, prompt=(*byte_level.encode("dog"), *ids[:2]))
    assert [detokenizer.push(i) for i in ids[2:]] == ["", "🙂"]


def test_the_space_after_a_prompt_stays(sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode("hello", add_special_tokens=False)
    assert _run(_make(sentence_piece), ids) == "hello"
    assert _run(_make(sentence_piece, prompt=(0,)), ids) == "hello"
    assert _run(_make(sentence_piece, prompt=tuple(ids)), ids) == " hello"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("four",), "one two three", None),
        ("one two three", ("wo th",), "one t", "wo th"),
        ("aaab", ("aab",), "a", "aab"),
        ("ababac", ("abac",), "ab", "abac"),
        ("xabcd", ("abcd", "bc"), "xa", "bc"),
        ("xabc", ("bc", "abc"), "x", "abc"),
        ("one\n\nUser: hi", ("\n\nUser:", "\n\nBot:"), "one", "\n\nUser:"),
        ("ends with tw", ("two",), "ends with tw", None),
        ("é 🙂 then", ("🙂",), "é ", "🙂"),
        ("stop", ("stop",), "", "stop"),
        ("text", ("",), "text", None),
    ],
)
def test_stop_strings(
    byte_level: Tokenizer, text: str, stop: tuple[str, ...], expected: str, stopped: str | None
) -> None:
    ids = byte_level.encode(text)
    detokenizer = _make(byte_level, *stop)
    assert _run(detokenizer, ids) == expected
    assert detokenizer.stopped == stopped
    included = _make(byte_level, *stop, include_stop_str_in_output=True)
    assert _run(included, ids) == expected + (stopped or "")


def test_only_what_may_become_a_stop_string_is_held(byte_level: Tokenizer) -> None:
    detokenizer = _make(byte_level, "abc")
    pieces = [detokenizer.push(i) for char in "xabxab" for i in byte_level.encode(char)]
    assert pieces == ["x", "", "", "abx", "", ""]
    assert detokenizer.flush() == "ab"
    assert detokenizer.flush() == ""


def test_nothing_comes_after_a_stop(byte_level: Tokenizer) -> None:
    detokenizer = _make(byte_level, "b")
    assert [detokenizer.push(i) for i in byte_level.encode("abb")] == ["a", "", ""]
    assert detokenizer.flush() == ""
    assert detokenizer.stopped == "b"


def test_min_tokens_pass_unchecked(byte_level: Tokenizer) -> None:
    ids = [i for char in "ab.b.b" for i in byte_level.encode(char)]
    assert _run(_make(byte_level, "b", min_tokens=2), ids) == "a"
    assert _run(_make(byte_level, "b", min_tokens=3), ids) == "ab."
    assert _run(_make(byte_level, "b.", min_tokens=3), ids) == "ab."  # the first match began too early
    assert _run(_make(byte_level, "b", min_tokens=7), ids) == "ab.b.b"


def _until_first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The slow oracle: look at every beginning of the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab🙂", max_size=40),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=6), min_size=1, max_size=4),
    include=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stop_strings_never_leak_whatever_the_tokens(
    byte_level: Tokenizer, text: str, stops: list[str], include: bool, seed: int
) -> None:
    rng, ids, rest = random.Random(seed), list[int](), text
    while rest:  # cut the text at random places, so that tokens and stop strings overlap in all ways
        count = rng.randint(1, 5)
        ids += byte_level.encode(rest[:count])
        rest = rest[count:]
    detokenizer = _make(byte_level, *stops, include_stop_str_in_output=include)
    expected, stopped = _until_first_stop(text, stops, include)
    assert _run(detokenizer, ids) == expected
    assert detokenizer.stopped == stopped
    if not include:
        assert not any(stop in expected for stop in stops)
