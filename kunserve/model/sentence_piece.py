"""Model files: SentencePiece's tokenizers, which a checkpoint has as `tokenizer.model` and GGUF as metadata.

Both become a tokenizer of the one library that everything above knows. SentencePiece joins the two pieces whose union
has the best score; the library has a list of pairs instead, which is made here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.files import reading
from kunserve.model.folder import SENTENCE_PIECE_FILES, needs_packages

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type; 6: a byte
JOINED = (NORMAL, USER_DEFINED, UNUSED)  # pieces that a text is put together from


def bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    unknown: int | None,
    joined: Collection[str] | None = None,
    *,
    has_bytes: bool = True,
) -> Tokenizer:
    """Return a BPE whose merges are those that SentencePiece finds by the pieces' scores, best first.

    unknown: the piece for what is no other; joined: the pieces that others may become a part of (None: all);
    has_bytes: whether what is no piece is written as its bytes.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    joined = vocab if joined is None else joined
    merges = []
    for piece in joined:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in joined and right in joined]
        merges += [(-scores[vocab[piece]], vocab[left], vocab[right], left, right) for left, right in pairs]
    merges.sort()
    return Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )


def set_spaces(
    tokenizer: Tokenizer, before: Sequence[normalizers.Normalizer] = (), *, begins: bool, is_legacy: bool = True
) -> None:
    """Let a tokenizer mark spaces as SentencePiece does, after `before`; `begins`: and begin each text with one.

    is_legacy: also what follows a token that is found before a text is cut. SentencePiece itself does not, but models
    were trained so (transformers' `legacy`).
    """
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if begins and is_legacy:
        marks.insert(0, normalizers.Prepend(SPACE))
    elif begins:
        marks = []
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.normalizer = normalizers.Sequence([*before, *marks])
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def add_around(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Let a tokenizer begin and end each text with a token; with None nothing is added there."""
    around = {name: token for name, token in (("bos", bos), ("eos", eos)) if token is not None}
    if around:
        text = " ".join(name for name in ("bos", "$A", "eos") if name in around or name == "$A")
        tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=list(around.items()))


def sentence_piece_file(folder: Path) -> Path | None:
    """Return the SentencePiece model of a folder; None if it has none."""
    with reading(folder):
        return next((folder / name for name in SENTENCE_PIECE_FILES if (folder / name).exists()), None)


def read_sentence_piece(
    path: Path, settings: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer of a `tokenizer.model`, and its special tokens by transformers' names ("bos_token").

    settings: of the `tokenizer_config.json` beside it: what is added around a text, which tokens were added to the
    model's. named: its special tokens, which go before what the model says itself. Raises ConfigError, also where
    what reads the file is not installed.
    """
    model = _parse(path)
    try:
        tokenizer = _core(model, is_legacy=settings.get("legacy") is not False)
        _add_tokens(tokenizer, model, _added_tokens(path.parent, settings))
        special = {**_special(model), **named}
        ends = {name: tokenizer.token_to_id(text) for name, text in special.items()}
        bos = ends.get("bos_token") if settings.get("add_bos_token", True) else None
        add_around(tokenizer, bos, ends.get("eos_token") if settings.get("add_eos_token", False) else None)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path}: {show(str(error))}") from None
    return tokenizer, special


def _parse(path: Path) -> Any:
    """Return the message that a file holds: ModelProto of sentencepiece_model.proto."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        raise ConfigError(needs_packages(path)) from None
    model = proto.ModelProto()
    with reading(path):
        data = path.read_bytes()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's own, which is not to be imported where it is not needed
        raise ConfigError(f"{path} is no SentencePiece model") from None
    if not model.pieces:
        raise ConfigError(f"{path} is no SentencePiece model: it has no pieces")
    return model


def _core(model: Any, *, is_legacy: bool) -> Tokenizer:
    """Return what cuts a text as a model says, without tokens that are found before it is cut."""
    pieces, scores = [piece.piece for piece in model.pieces], [piece.score for piece in model.pieces]
    trained, normal = model.trainer_spec, model.normalizer_spec
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)
    if trained.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        raise ConfigError("a tokenizer that marks spaces otherwise than before words is not supported")
    if trained.model_type == BPE:
        joined = {piece.piece for piece in model.pieces if piece.type in JOINED}
        tokenizer = bpe(pieces, scores, unknown, joined, has_bytes=trained.byte_fallback)
    elif trained.model_type == UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unknown, trained.byte_fallback))
    else:
        raise ConfigError("a tokenizer of whole words or characters is not supported, only unigram and BPE")
    before: list[normalizers.Normalizer] = []
    if normal.precompiled_charsmap:
        before.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    set_spaces(tokenizer, before, begins=normal.add_dummy_prefix, is_legacy=is_legacy)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, model: Any, added: Iterable[tuple[int, AddedToken]]) -> None:
    """Let a tokenizer find control tokens, the model's own ones and added ones before a text is cut."""
    control = [piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    # One that holds marked spaces is found only in a text whose spaces are marked. That the library does with what
    # comes out of its own normalizer, which must not put a space in front of it then: else merges, of which its
    # are the first, have to make it.
    found = [token for token in defined if SPACE not in token or not model.normalizer_spec.add_dummy_prefix]
    tokenizer.add_tokens([AddedToken(token, normalized=SPACE in token) for token in found])
    for i, token in added:
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise ConfigError(f"the added token {show(token.content)} cannot have the id {i}")


def _special(model: Any) -> dict[str, str]:
    """Return the special tokens that a model names, by transformers' names for them."""
    trained = model.trainer_spec
    ids = {"bos_token": trained.bos_id, "eos_token": trained.eos_id, "unk_token": trained.unk_id}
    return {name: model.pieces[i].piece for name, i in ids.items() if 0 <= i < len(model.pieces)}


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return the tokens that were added to a model's, by id: transformers keeps them in one of two places."""
    named = settings.get("added_tokens_decoder")
    old = folder / "added_tokens.json"
    try:
        if isinstance(named, dict):
            return sorted((int(i), _added(dict(token))) for i, token in named.items())
        if old.exists():
            with reading(old):
                ids = json.loads(old.read_text(encoding="utf-8"))
            return sorted((int(i), _added({"content": text, "special": True})) for text, i in ids.items())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the added tokens cannot be read: {show(str(error))}") from None
    return []


def _added(token: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")}
    return AddedToken(str(token["content"]), normalized=bool(token.get("normalized", False)), **flags)
