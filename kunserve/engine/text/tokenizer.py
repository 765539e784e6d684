"""Request flow, between the API and the engine: text <-> token ids, over one tokenizer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kunserve.errors import ConfigError, InvalidRequestError
from kunserve.model.hf_config import read_json
from kunserve.model.sentence_piece import SPACE, read_sentence_piece, sentence_piece_file

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the devices' cores

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
SHORT_CHARS = 1000
LONG_TOKENS = 4096  # 1 ms


@dataclass(frozen=True, slots=True)
class TokenCoding:
    """How the vocabulary writes bytes: as GPT-2's visible characters (Llama 3, Qwen), or SentencePiece's way."""

    is_byte_level: bool
    has_byte_fallback: bool = False  # "<0x0A>" is a byte
    strips_space: bool = False  # the first space of a text is the tokenizer's own and not decoded


class Tokenizer:
    """A model's tokenizer, special tokens and chat template. Immutable; called from several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json`, else `tokenizer.model`, and their companions in a folder. Raises ConfigError."""
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.exists() else {}
        path = folder / "tokenizer.json"
        if path.exists():
            try:
                core = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise ConfigError(f"cannot read {path}: {error}") from None
        elif model := sentence_piece_file(folder):
            path = model
            core, special = read_sentence_piece(model, settings, _special_tokens(settings))
            settings |= special
        else:
            raise ConfigError(f"{folder} has no tokenizer.json (tokenizers of another format are not supported)")
        template = folder / "chat_template.jinja"
        if template.exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        try:
            self._set(core, settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from None

    @classmethod
    def dummy(cls, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """Make a tokenizer for dummy weights: ids 0..255 are bytes, every other id is a word that says its number."""
        alphabet = byte_alphabet()
        names = {byte: char for char, byte in alphabet.items()}
        vocab = {names[i] if i < 256 else f"{names[32]}t{i}": i for i in range(vocab_size)}
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special = [core.id_to_token(i) for i in eos_token_ids if 256 <= i < vocab_size]
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special if token])
        tokenizer = cls.__new__(cls)
        tokenizer._set(core, {"chat_template": DUMMY_TEMPLATE})
        return tokenizer

    def _set(self, core: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.coding = _token_coding(core)
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {}  # filled as tokens appear; at most the vocabulary
        self.whole: dict[int, str] = {}  # likewise: whole characters; no special tokens
        self.special_ids = frozenset(i for i, token in core.get_added_tokens_decoder().items() if token.special)
        self.special_tokens = _special_tokens(settings)
        self.chat_template = _chat_template(settings.get("chat_template"))

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, added ones included. A model's embedding may have more rows."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the token that begins a text."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the token that ends a text; models may have more (`ModelConfig.eos_token_ids`)."""
        return self._special_id("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written out in it count as such. InvalidRequestError."""
        try:
            if len(text) > SHORT_CHARS:  # only this one lets go of the GIL; it is faster, too
                return self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self._core.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequestError("the text is not valid Unicode (a lone surrogate)") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        if len(ids) <= LONG_TOKENS:
            return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids if skip_special_tokens else frozenset()  # the library would keep the GIL: in pieces
        parts = (ids[start : start + LONG_TOKENS] for start in range(0, len(ids), LONG_TOKENS))
        data = b"".join(b"".join([self.token_bytes(i) for i in part if i not in skipped]) for part in parts)
        return (data.removeprefix(b" ") if self.coding.strips_space else data).decode(errors="replace")

    def to_json(self) -> str:
        """Return the whole tokenizer, as in `tokenizer.json`."""
        return self._core.to_str()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it ("</think>"); None if there is no such token."""
        return self._core.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text, perhaps a part of a character; b"" for an unknown id."""
        if (found := self._bytes.get(token_id)) is None:
            found = self._bytes[token_id] = self._to_bytes(self._core.id_to_token(token_id) or "")
            if token_id not in self.special_ids:
                with suppress(UnicodeDecodeError):
                    self.whole[token_id] = found.decode()
        return found

    def token_text(self, token_id: int) -> str:
        """Return the text of one token on its own, special tokens included; half a character is U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def shown_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Return what a token adds to an answer's text: as `token_bytes`, nothing for a special one that is skipped."""
        return b"" if skip_special_tokens and token_id in self.special_ids else self.token_bytes(token_id)

    @property
    def strips_space(self) -> bool:
        """Return whether the first blank of a text is the tokenizer's own, and not part of it."""
        return self.coding.strips_space

    def _to_bytes(self, token: str) -> bytes:
        if self.coding.is_byte_level:
            try:
                return bytes(self._alphabet[char] for char in token)
            except KeyError:  # an added token: stored as plain text
                return token.encode()
        if self.coding.has_byte_fallback and BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        return token.replace(SPACE, " ").encode()

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._core.token_to_id(text)


def tokenizer_of(folder: Path | None, vocab_size: int, eos_token_ids: Sequence[int]) -> Tokenizer:
    """Return the tokenizer of a model's folder; of dummy weights, where there is none. Raises ConfigError."""
    return Tokenizer.dummy(vocab_size, eos_token_ids) if folder is None else Tokenizer(folder)


# A chat template for weights that say nothing anyway.
DUMMY_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's visible character for each of the 256 bytes, as character -> byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _token_coding(core: tokenizers.Tokenizer) -> TokenCoding:
    """Read it from the decoder's description. Raises ConfigError for a decoder we cannot follow byte by byte."""
    # The whole tokenizer as JSON would say it, too, but is megabytes. A decoder pickles as its JSON.
    decoder = {} if core.decoder is None else json.loads(core.decoder.__getstate__())
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    by_type = {str(part.get("type")): part for part in parts}
    kinds = set(by_type)
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return TokenCoding(is_byte_level=True)
    marks_space = "Metaspace" in kinds or by_type.get("Replace", {}).get("pattern") == {"String": SPACE}
    if not marks_space or not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise ConfigError(f"decoder {sorted(kinds)} is not supported, only byte-level and SentencePiece ones")
    strips = (
        by_type.get("Strip", {}).get("start", 0)
        or by_type.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    )
    return TokenCoding(is_byte_level=False, has_byte_fallback="ByteFallback" in kinds, strips_space=bool(strips))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a `tokenizer_config.json` names."""
    texts = {name: _token_text(settings.get(name)) for name in SPECIAL_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: object) -> str | None:
    """Return the text of a special token, which is written as text, or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _chat_template(template: object) -> str | None:
    """Return the template itself, or the one called "default" of a list of named ones."""
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
