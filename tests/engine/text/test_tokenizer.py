import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_models import CHAT_TEMPLATE, VOCAB_SIZE, save_tiny_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Core

from kunserve.engine.text.tokenizer import Tokenizer, byte_alphabet
from kunserve.errors import ConfigError, InvalidRequestError


def sentence_piece_core() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: letters, "▁", and bytes for everything else."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw", "he", "▁he"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Core(models.BPE(vocab=vocab, merges=[("h", "e"), ("▁", "he")], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return core


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    return tmp_path


def _set(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_text_survives(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "the dog said: 你好 🙂\n\x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    ids = tokenizer.encode("<|start|>dog<|end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>dog<|end|>"
    assert tokenizer.token_text(1) == "<|start|>"


def test_special_tokens_may_be_objects_or_absent(folder: Path) -> None:
    _set(folder, bos_token={"content": "<|start|>", "special": True}, eos_token=None)
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, None)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).special_tokens == {}


def test_bos_is_added_unless_told_otherwise(folder: Path) -> None:
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    core.enable_truncation(4)
    core.enable_padding(length=4)
    core.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    plain = tokenizer.encode("quick quick quick", add_special_tokens=False)
    assert len(plain) > 4  # the checkpoint's truncation and padding are off
    assert tokenizer.encode("quick quick quick") == [0, *plain]


def test_the_chat_template_is_found_wherever_it_is(folder: Path) -> None:
    assert Tokenizer(folder).chat_template == CHAT_TEMPLATE
    _set(folder, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}])
    assert Tokenizer(folder).chat_template == "D"
    _set(folder)
    assert Tokenizer(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer(folder).chat_template == "J"


def test_half_characters_and_unknown_ids(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("é")
    assert [tokenizer.token_text(i) for i in ids] == ["\ufffd", "\ufffd"]
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([*ids, 10**6]) == "é"


def test_sentence_piece_bytes(tmp_path: Path) -> None:
    sentence_piece_core().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("hello é")
    assert tokenizer.decode(ids) == "hello é"
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " hello é"
    assert tokenizer.coding.strips_space


@pytest.mark.parametrize("skip", [False, True])
def test_many_tokens_make_the_same_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    """In pieces, as the library does at once: half characters, special and unknown tokens included."""
    byte_level = Tokenizer(folder)
    sentence_piece_core().save(str(tmp_path / "tokenizer.json"))
    sentence_piece = Tokenizer(tmp_path)
    rng = random.Random(5)
    texts = [
        (byte_level, [rng.randrange(VOCAB_SIZE + 9) for _ in range(200)]),
        (byte_level, byte_level.encode("the dog said: 你好 🙂\n" * 9)),
        (sentence_piece, sentence_piece.encode("hello wörld 🙂 " * 9)),
        (sentence_piece, [0, *sentence_piece.encode("he")]),
    ]
    expected = [tokenizer.decode(ids, skip) for tokenizer, ids in texts]
    for size in (1, 2, 7):
        monkeypatch.setattr("kunserve.engine.text.tokenizer.LONG_TOKENS", size)
        assert [tokenizer.decode(ids, skip) for tokenizer, ids in texts] == expected


def test_the_byte_alphabet_is_gpt2s() -> None:
    core = Core(models.BPE())
    core.decoder = decoders.ByteLevel()
    assert len(set(byte_alphabet().values())) == 256
    for char, byte in byte_alphabet().items():
        if byte < 128:
            assert core.decoder.decode([char]) == chr(byte)


def test_text_that_is_no_unicode_is_the_clients_error(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="Unicode"):
        Tokenizer(folder).encode("\ud800")


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer(tmp_path)
    core = Core(models.WordLevel({"a": 0}, unk_token="a"))
    core.decoder = decoders.WordPiece()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer(tmp_path)


def test_dummy_covers_the_vocabulary() -> None:
    tokenizer = Tokenizer.dummy(1000, eos_token_ids=(999,))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode(tokenizer.encode("hi 🙂")) == "hi 🙂"
    assert tokenizer.token_text(700) == " t700"
    assert tokenizer.decode([104, 999]) == "h"
    assert tokenizer.chat_template is not None
