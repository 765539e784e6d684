"""Tokenizers from a GGUF file's metadata: against transformers' own, and against SentencePiece's rule, written out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog
from tiny_models import SPECIAL_TOKENS, save_tiny_tokenizer

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.model.gguf.tokenizer import save_tokenizer

TEXTS = [
    "the quick  brown\n\n fox's 1234567 dogs'll DON'T; x=3.14\t\r\n end ",
    "  leading and trailing  ",
    "Ünïcödé e\u0301 — 東京 🙂 ١٢٣",
    "a  5 x =  10\n\n1. foo\nline  \n 42",
    "",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def byte_level_metadata(folder: Path, pre: str) -> dict[str, Any]:
    save_tiny_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }


def made(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    save_tokenizer(metadata, 512, (2,), folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ("qwen2", "Qwen2Tokenizer"),
        ("gpt-2", "GPT2Tokenizer"),
        ("olmo", "GPTNeoXTokenizer"),
        ("mpt", "GPTNeoXTokenizer"),
    ],
)
def test_words_are_cut_as_transformers_cuts_them(pre: str, name: str, tmp_path: Path) -> None:
    import transformers

    metadata = byte_level_metadata(tmp_path / "tiny", pre)
    tokenizer = made(metadata, tmp_path / "made")
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    reference = getattr(transformers, name)(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text


def test_numbers_are_cut_as_each_name_says(tmp_path: Path) -> None:
    lengths = {}
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2"):
        metadata = byte_level_metadata(tmp_path / "tiny", pre) | {"tokenizer.ggml.add_bos_token": False}
        digits = ["12", "123", "1234"]
        tokens = [*metadata["tokenizer.ggml.tokens"], *digits]
        metadata |= {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *[NORMAL] * 3],
            "tokenizer.ggml.merges": [*metadata["tokenizer.ggml.merges"], "1 2", "12 3", "123 4"],
        }
        tokenizer = made(metadata, tmp_path / pre)
        lengths[pre] = [tokenizer.token_text(i) for i in tokenizer.encode("12345")]
    assert lengths == {
        "llama-bpe": ["123", "4", "5"],
        "qwen2": ["1", "2", "3", "4", "5"],
        "smollm": ["1", "2", "3", "4", "5"],
        "gpt-2": ["1234", "5"],
    }


@pytest.mark.parametrize(
    ("adds_bos", "adds_eos", "first", "last"), [(None, None, [0], []), (False, None, [], []), (True, True, [0], [2])]
)
def test_what_stands_around_a_text(
    adds_bos: bool | None, adds_eos: bool | None, first: list[int], last: list[int], tmp_path: Path
) -> None:
    metadata = byte_level_metadata(tmp_path / "tiny", "llama-bpe")  # which begins texts by default
    for name, value in (("bos", adds_bos), ("eos", adds_eos)):
        if value is not None:
            metadata[f"tokenizer.ggml.add_{name}_token"] = value
    tokenizer = made(metadata, tmp_path / "made")
    inner = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == [*first, *inner, *last]


@pytest.mark.parametrize(
    ("pre", "begins"), [("tekken", True), ("midm-2.0", True), ("smaug-bpe", False), ("dbrx", False), ("gpt-4o", False)]
)
def test_some_names_begin_a_text(pre: str, begins: bool, tmp_path: Path) -> None:
    """Unless the file says otherwise."""
    metadata = byte_level_metadata(tmp_path / "tiny", pre)
    assert (made(metadata, tmp_path / "made").encode("the")[0] == 0) == begins
    metadata["tokenizer.ggml.add_bos_token"] = not begins
    assert (made(metadata, tmp_path / "other").encode("the")[0] == 0) != begins


@pytest.mark.parametrize(
    ("pre", "whole"), [("tekken", True), ("gpt-4o", True), ("smaug-bpe", True), ("dbrx", False), ("qwen2", False)]
)
def test_some_names_take_a_word_whole(pre: str, whole: bool, tmp_path: Path) -> None:
    """Though merges do not lead to it."""
    metadata = byte_level_metadata(tmp_path / "tiny", pre) | {"tokenizer.ggml.add_bos_token": False}
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xyzzy"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    tokenizer = made(metadata, tmp_path / "made")
    assert (len(tokenizer.encode("xyzzy")) == 1) == whole


@pytest.mark.parametrize(
    ("pre", "composes"),
    [(name, True) for name in ("qwen2", "qwen35", "deepseek-r1-qwen", "olmo", "mpt", "command-r")]
    + [(name, False) for name in ("gpt-2", "smollm", "dbrx", "gpt-4o", "tekken", "deepseek-llm")],
)
def test_some_names_compose_characters(pre: str, composes: bool, tmp_path: Path) -> None:
    tokenizer = made(byte_level_metadata(tmp_path / "tiny", pre), tmp_path / "made")
    assert (tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")) == composes


PIECES = {
    "▁": -1.0,
    "▁the": -2.0,
    "th": -3.0,
    "he": -2.5,
    "▁t": -2.2,
    "the": -6.0,
    "▁cat": -4.0,
    "at": -5.0,
    "▁c": -4.5,
}


def sentence_piece_metadata(begins: bool) -> dict[str, Any]:
    letters = {letter: -10.0 - i for i, letter in enumerate("thecasmo.")}
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<mark>": USER_DEFINED}
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *data, *PIECES, *letters]
    kinds = [*special.values(), *[BYTE] * 256, *[NORMAL] * (len(PIECES) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * (4 + 256) + [*PIECES.values(), *letters.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": begins,
        "tokenizer.chat_template": "{{ messages }}",
    }


def by_the_rule(text: str, metadata: dict[str, Any], begins: bool) -> list[int]:
    """SentencePiece's BPE: of all neighbours that are a token together, those with the best score become one."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(("▁" if begins and text else "") + text.replace(" ", "▁"))
    while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        _, best = min(pairs)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("begins", [True, False])
def test_sentence_piece_merges_by_score(begins: bool, tmp_path: Path) -> None:
    metadata = sentence_piece_metadata(begins)
    tokenizer = made(metadata, tmp_path / "made")
    for text in ("the cat sat", "that  the", "these cats... chat", "Ümlaut\n 7", "hehehethethe", "", " "):
        inner = by_the_rule(text, metadata, begins)
        assert tokenizer.encode(text) == [1, *inner], text
        assert tokenizer.decode(inner) == text
    assert tokenizer.special_ids == {0, 1, 2} and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.strips_space == begins and tokenizer.token_id("<mark>") in tokenizer.encode("the<mark>cat")


def test_bytes_written_out_are_no_bytes(tmp_path: Path) -> None:
    parts = [*"<0xA>", "<0", "<0x", "<0x0", "<0x0A"]
    tokenizer = made(with_tokens(sentence_piece_metadata(False), dict.fromkeys(parts, NORMAL)), tmp_path / "made")
    ids = tokenizer.encode("<0x0A>", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == ["<0x0A", ">"]
    assert [tokenizer.token_text(i) for i in tokenizer.encode("\n", add_special_tokens=False)] == ["\n"]


@pytest.mark.parametrize("scores", [[-1e9, -1.0, -2.0, -3.0], [-1000.0] * 4])
def test_without_scores_runs_of_spaces_are_last(scores: list[float], tmp_path: Path) -> None:
    """As they are in Llama's own vocabulary, wherever they stand in it."""
    metadata, pieces = sentence_piece_metadata(False), ["▁▁", "▁t", "he", "▁the"]
    fixed = [(token, kind) for token, kind in zip(*columns(metadata), strict=True) if token not in PIECES]
    rest = -1000.0 if len(set(scores)) == 1 else -1e9
    metadata |= {
        "tokenizer.ggml.tokens": [*(token for token, _ in fixed), *pieces, "▁"],
        "tokenizer.ggml.token_type": [*(kind for _, kind in fixed), *[NORMAL] * 5],
        "tokenizer.ggml.scores": [*[rest] * len(fixed), *scores, rest],
    }
    tokenizer = made(metadata, tmp_path / "made")
    ids = tokenizer.encode("  the  ", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == [" ", " the", "  "]


@pytest.mark.parametrize("merges", [None, []])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_byte_level_bpe_without_merges_is_refused(pre: str, merges: object, tmp_path: Path) -> None:
    """Texts would be cut into bytes."""
    metadata = byte_level_metadata(tmp_path, pre) | {"tokenizer.ggml.merges": merges}
    with pytest.raises(ConfigError, match=r"have no tokenizer\.ggml\.merges, .*: take another GGUF file"):
        save_tokenizer(metadata, 512, (2,), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, r"have no tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"metadata tokenizer\.ggml\.tokens: 1 is no text"),
        ({"tokenizer.ggml.tokens": ["a", "\udcff\n"]}, r"metadata tokenizer\.ggml\.tokens: '\\udcff\\n' is no UTF-8"),
        ({"tokenizer.ggml.token_type": ["1"] * 278}, r"have no tokenizer\.ggml\.token_type"),
        ({"tokenizer.chat_template": 5}, r"metadata tokenizer\.chat_template: 5 is no text"),
        ({"tokenizer.chat_template": "\udcff"}, r"metadata tokenizer\.chat_template: '\\udcff' is no UTF-8"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "the metadata's eos token is none of the 278 tokens"),
        ({"tokenizer.ggml.scores": [1.0]}, r"have no tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.scores": ["1"] * 278}, r"have no tokenizer\.ggml\.scores"),
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer 't5' is not served from GGUF files.*: take the model in safetensors",
        ),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "bloom"}, "words as of 'bloom' is not known: take the"),
        ({"tokenizer.ggml.model": "gpt2"}, r"have no tokenizer\.ggml\.pre, by which words are cut: take another"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        save_tokenizer(sentence_piece_metadata(True) | change, 512, (2,), tmp_path)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("name", ["padding", "bos"])
@pytest.mark.parametrize("beyond", [4294967295, 5000])
def test_a_special_token_that_texts_do_without_may_be_none(name: str, beyond: int, tmp_path: Path) -> None:
    """As llama.cpp reads it, with a warning."""
    metadata = byte_level_metadata(tmp_path / "tiny", "smollm") | {f"tokenizer.ggml.{name}_token_id": beyond}
    with structlog.testing.capture_logs() as lines:
        tokenizer = made(metadata, tmp_path / "made")
    (line,) = lines
    assert (line["log_level"], line["token"], line["id"]) == ("warning", name.removesuffix("ding"), beyond)
    assert tokenizer.encode("the fox") == made(metadata, tmp_path / "again").encode("the fox")
    assert (tokenizer.bos_token_id is None) == (name == "bos")


@pytest.mark.parametrize("name", ["eos", "bos"])
def test_a_special_token_that_is_needed_must_be_one(name: str, tmp_path: Path) -> None:
    change = {f"tokenizer.ggml.{name}_token_id": 4294967295, "tokenizer.ggml.add_bos_token": True}
    with pytest.raises(ConfigError, match=rf"the metadata's {name} token is none of the 3\d+ tokens: take another"):
        save_tokenizer(byte_level_metadata(tmp_path, "smollm") | change, 512, (2,), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": 5}, r"have no tokenizer\.ggml\.merges"),
        ({"merges": [1, 2]}, r"metadata tokenizer\.ggml\.merges: 1 is no text"),
        ({"merges": ["t h", "\udcff x"]}, r"metadata tokenizer\.ggml\.merges: '\\udcff x' is no UTF-8"),
        ({"merges": ["t\nh x"]}, "the tokenizer cannot be built: "),
        ({"pre": ["smollm"]}, r"words as of \['smollm'\] is not known"),
        ({"model": ["gpt2"]}, r"tokenizer \['gpt2'\] is not served"),
    ],
)
def test_metadata_of_another_kind_end_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path, "smollm")
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(ConfigError, match=message) as error:
        save_tokenizer(metadata, 512, (2,), tmp_path)
    assert "\n" not in error.value.message


def with_tokens(metadata: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """Return metadata with more tokens, given with their types."""
    more = {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *tokens],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *tokens.values()],
    }
    if "tokenizer.ggml.scores" in metadata:
        more["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *[-1.5] * len(tokens)]
    return metadata | more


def columns(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    return metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]


@pytest.mark.parametrize("kind", [UNUSED, USER_DEFINED, UNKNOWN])
def test_rows_without_a_token_are_never_found(kind: int, tmp_path: Path) -> None:
    """Converters call them `[PAD` and their number, with types of all kinds."""
    for metadata in (byte_level_metadata(tmp_path / "tiny", "qwen2"), sentence_piece_metadata(False)):
        size = len(metadata["tokenizer.ggml.tokens"])
        name, other = f"[PAD{size}]", "[PAD7]"  # which is somebody's own
        tokenizer = made(with_tokens(metadata, {name: kind, other: USER_DEFINED}), tmp_path / "made")
        assert size not in tokenizer.encode(name) and size not in tokenizer.special_ids
        assert size + 1 in tokenizer.encode(f"the{other}")
        assert tokenizer.vocab_size == size + 2 and name in tokenizer.token_text(size)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_unused_tokens_are_never_found_by_merges(pre: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path / "tiny", pre) | {"tokenizer.ggml.add_bos_token": False}
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    (word,) = made(metadata, tmp_path / "before").encode(" the")
    types[word] = UNUSED
    tokenizer = made(metadata | {"tokenizer.ggml.token_type": types}, tmp_path / "made")
    ids = tokenizer.encode(" the")
    assert word not in ids and tokenizer.decode(ids) == " the" and tokens[word] == "Ġthe"


def test_unused_tokens_are_never_found_by_scores(tmp_path: Path) -> None:
    metadata = sentence_piece_metadata(True)
    word = metadata["tokenizer.ggml.tokens"].index("▁the")
    types = [UNUSED if i == word else kind for i, kind in enumerate(metadata["tokenizer.ggml.token_type"])]
    assert word in made(metadata, tmp_path / "before").encode("the")
    tokenizer = made(metadata | {"tokenizer.ggml.token_type": types}, tmp_path / "made")
    ids = tokenizer.encode("the the")
    assert word not in ids and tokenizer.decode(ids[1:]) == "the the"


def test_a_sentence_piece_file_may_leave_out_the_usual_ids(tmp_path: Path) -> None:
    metadata = sentence_piece_metadata(True)
    for name in ("bos", "eos", "unknown"):
        del metadata[f"tokenizer.ggml.{name}_token_id"]
    tokenizer = made(metadata | {"tokenizer.ggml.add_eos_token": True}, tmp_path / "made")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer.encode("cat")
    assert (ids[0], ids[-1]) == (1, 2)


def test_a_token_that_ends_answers_is_not_shown(tmp_path: Path) -> None:
    """Converters that read a vocabulary alone do not know that it is special."""
    metadata = with_tokens(sentence_piece_metadata(True), {"<|im_end|>": USER_DEFINED})
    size = len(metadata["tokenizer.ggml.tokens"])
    save_tokenizer(metadata, 512, (2, size - 1), tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert size - 1 in tokenizer.special_ids and tokenizer.token_id("<mark>") not in tokenizer.special_ids


@pytest.mark.parametrize(
    ("change", "after_it", "before_it"),
    [
        ({"general.architecture": "phi3"}, True, False),
        ({"general.architecture": "llama", "general.name": "My Phi-3.5 mini"}, True, False),
        ({"general.architecture": "llama", "general.name": "Llama"}, False, False),
    ],
)
def test_phi_3_takes_the_spaces_after_its_tokens(
    change: dict[str, str], after_it: bool, before_it: bool, tmp_path: Path
) -> None:
    metadata = with_tokens(sentence_piece_metadata(True), {"<|user|>": CONTROL, "<|endoftext|>": CONTROL}) | change
    tokenizer = made(metadata, tmp_path / "made")
    assert (tokenizer.encode("<|user|>\n cat") == tokenizer.encode("<|user|>cat")) == after_it
    assert (tokenizer.encode("cat <|user|>") == tokenizer.encode("cat<|user|>")) == before_it
    assert tokenizer.encode("<|endoftext|> cat") != tokenizer.encode("<|endoftext|>cat")


@pytest.mark.parametrize(("mark", "takes"), [("<|im_sep|>", True), ("<|im_other|>", False)])
def test_phi_4_takes_the_spaces_on_both_sides(mark: str, takes: bool, tmp_path: Path) -> None:
    metadata = with_tokens(byte_level_metadata(tmp_path / "tiny", "dbrx"), {mark: CONTROL, "<mark>": USER_DEFINED})
    tokenizer = made(metadata, tmp_path / "made")
    assert (tokenizer.encode(f"the \n{mark} fox") == tokenizer.encode(f"the{mark}fox")) == takes
    assert tokenizer.encode("the<mark> fox") != tokenizer.encode("the<mark>fox")


def test_templates_may_have_names(tmp_path: Path) -> None:
    metadata = sentence_piece_metadata(True) | {"tokenizer.chat_template.tool_use": "T"}
    assert made(metadata, tmp_path / "made").chat_template == "{{ messages }}"
    settings = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    names = [(item["name"], item["template"]) for item in settings["chat_template"]]
    assert sorted(names) == [("default", "{{ messages }}"), ("tool_use", "T")]
    del metadata["tokenizer.chat_template"]
    assert made(metadata, tmp_path / "other").chat_template is None  # as of a folder that has only others


def test_the_default_words_are_not_taken_silently(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        made(byte_level_metadata(tmp_path / "tiny", "default"), tmp_path / "made")
    (line,) = lines
    assert line["log_level"] == "warning" and "llama.cpp" in line["event"]


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_that_texts_are_to_have_must_be_named(name: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path, "qwen2") | {f"tokenizer.ggml.add_{name}_token": True}
    del metadata[f"tokenizer.ggml.{name}_token_id"]
    with pytest.raises(ConfigError, match=f"the metadata name no {name} token, but texts are to have one: take"):
        save_tokenizer(metadata, 512, (2,), tmp_path)
