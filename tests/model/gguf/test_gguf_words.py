"""How names of GGUF files cut a text: against published expressions in another engine, and the layouts of models."""

from __future__ import annotations

import random

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from kunserve.engine.text.tokenizer import byte_alphabet
from kunserve.model.gguf.words import DEFAULT, WORDS

ATOMS = [
    *("the", " The", "HELLO", "hEllo", "McDonald", "ofThe", "don't", "DON'T", "'ll", "'LL", "'S", "it’s"),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\u00a0", "\u3000", "\u0085"),
    *("1", "12", "1234", "12345678", "3.14", "1,000", "½", "²", "١٢٣", "Ⅷ"),
    *("é", "e\u0301", "Ü", "ß", "Ελλάδα", "Привет", "ДОМ", "日本語", "カタカナ", "한국어", "हिन्दी", "ไทย", "ǅ", "🙂"),
    *(
        "—",
        "…",
        "、",
        "。",
        "!",
        "...",
        "/",
        "/a/b",
        "{",
        "()",
        "<|",
        "|>",
        "_",
        "a_b",
        "+=",
        ".\n/",
        "$5",
        "€",
        "`",
        "~",
    ),
]
# As tiktoken and Meta publish them, for an engine with possessive quantifiers.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NEMO = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
EXPRESSIONS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "llama-bpe": CL100K,
    "smaug-bpe": CL100K,
    "dbrx": CL100K,
    "qwen2": CL100K.replace("{1,3}+", ""),
    "gpt-4o": O200K,
    "llama4": O200K,
    "tekken": NEMO,
}


def texts() -> list[str]:
    rng = random.Random(3)
    return ["".join(rng.choices(ATOMS, k=rng.randrange(1, 12))) for _ in range(400)]


def cut(pre_tokenizer: PreTokenizer, text: str) -> list[str]:
    """Return the words, whose bytes stand for themselves."""
    alphabet = byte_alphabet()
    words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    return [bytes(alphabet[char] for char in word).decode(errors="surrogateescape") for word in words]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_words_are_those_of_the_published_expression(name: str) -> None:
    regex = pytest.importorskip("regex")
    for text in texts():
        assert cut(WORDS[name].pre_tokenizer(), text) == regex.findall(EXPRESSIONS[name], text), ascii(text)


def split(*expressions: str) -> list[PreTokenizer]:
    return [Split(Regex(expression), "isolated") for expression in expressions]


BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = ByteLevel(add_prefix_space=False)
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The parts that models' own files have, where these are not expressions alone.
LAYOUTS: dict[str, list[PreTokenizer]] = {
    "olmo": [GPT2],
    "smollm": [Digits(individual_digits=True), GPT2],
    "refact": [Digits(individual_digits=True), GPT2],
    "command-r": [Digits(individual_digits=True), GPT2],
    "deepseek-coder": [*split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN), Digits(individual_digits=True), BYTES],
    "viking": [*split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), Digits(individual_digits=True), BYTES],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_words_are_those_of_the_layout(name: str) -> None:
    reference = pre_tokenizers.Sequence(LAYOUTS[name])
    for text in texts():
        assert cut(WORDS[name].pre_tokenizer(), text) == cut(reference, text), ascii(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-llm", ["Don", "'", "t", " go", "\n", "日本語", "abC", " ", "1", "2", "3", "4", "…", "  "]),
        ("deepseek-coder", ["Don", "'", "t", " go", "\n", "日本語", "abC", " ", "1", "2", "3", "4", "…", "  "]),
        ("deepseek-v3", ["Don", "'t", " go", "\n", "日本語", "abC", " ", "123", "4", "…", "  "]),
        ("qwen35", ["Don", "'t", " go", "\n", "日本語abC", " ", "1", "2", "3", "4", "…", "  "]),
        ("seed-coder", ["Don", "'t", " go", "\n", "日本語abC", " ", "1", "2", "3", "4", "…", "  "]),
        ("minicpm5", ["Don", "'t", " go", "\n", "日本語abC", " ", "123", "4", "…", "  "]),
        ("superbpe", ["Don't go\n日本語abC ", "1", "234", "…  "]),
        ("falcon", ["Don", "'", "t", " go", "\n", "日本語abC", " ", "123", "4", "…", "  "]),
        (DEFAULT, ["Don", "'", "t", " go", "\n", "日本語abC", " ", "123", "4", "…", "  "]),
    ],
)
def test_words_of_a_text(name: str, words: list[str]) -> None:
    assert cut(WORDS[name].pre_tokenizer(), "Don't go\n日本語abC 1234…  ") == words


def test_what_only_some_names_keep_together() -> None:
    for name, text, parts in (
        ("qwen2", "x!\n", ["x", "!\n"]),
        ("seed-coder", "x!\n", ["x", "!", "\n"]),
        ("falcon", "x!`", ["x", "!`"]),
        (DEFAULT, "x!`", ["x", "!", "`"]),
        (DEFAULT, "x 12", ["x", " ", "12"]),
        ("falcon", "x 12", ["x", " 12"]),
        ("deepseek-llm", "ª  ", ["ª", "  "]),
        ("deepseek-llm", "ª  x", ["ª", " ", " x"]),
    ):
        assert cut(WORDS[name].pre_tokenizer(), text) == parts, (name, text)


def test_marks_belong_to_letters_or_not() -> None:
    assert cut(WORDS["qwen35"].pre_tokenizer(), "re\u0301sume") == ["re\u0301sume"]
    assert cut(WORDS["qwen2"].pre_tokenizer(), "re\u0301sume") == ["re", "\u0301sume"]


def test_letters_are_those_of_alphabets_with_capitals() -> None:
    for text, parts in (("Ωжё", ["Ωжё"]), ("жªж", ["ж", "ª", "ж"]), ("жאж", ["ж", "א", "ж"])):
        assert cut(WORDS["deepseek-llm"].pre_tokenizer(), text) == parts
        assert cut(WORDS["deepseek-coder"].pre_tokenizer(), text) == [text]


def test_numbers_are_cut_from_the_end() -> None:
    for number, parts in (("7", ["7"]), ("1000", ["1", "000"]), ("1234567", ["1", "234", "567"])):
        assert cut(WORDS["superbpe"].pre_tokenizer(), f"a {number} b") == ["a ", *parts, " b"]
