"""The prompt at the beginning of an answer, and where tokens stand in the text of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.api.wire.backend import TextTokenizer
from kunserve.engine.request import Request
from kunserve.engine.text.detokenizer import PROMPT_TAIL
from kunserve.engine.text.positions import Positions


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text, and where each of its tokens begins in it, if asked for."""

    text: str
    offsets: tuple[int, ...] = ()


def echo_of(tokenizer: TextTokenizer, ids: Sequence[int], text: str | None, wants_offsets: bool) -> Echo:
    """Return the echo of a prompt of `ids`. `text`: what the client sent, None if it sent the ids.

    Ids are shown as they were sent, special tokens included. Of a text, special tokens that the tokenizer has added
    are not part.
    """
    if not wants_offsets:
        return Echo(tokenizer.decode(ids, skip_special_tokens=False) if text is None else text)
    positions, offsets, shown = Positions(strips_space=tokenizer.strips_space), [], []
    for token_id in ids:
        data = tokenizer.shown_bytes(token_id, skip_special_tokens=False)
        if text is not None and not tokenizer.shown_bytes(token_id):
            name = data.decode(errors="replace")
            data = data if text.startswith(name, positions.num_chars) else b""
        offsets.append(positions.take(data))
        shown.append(data)
    whole = b"".join(shown)
    whole = whole.removeprefix(b" ") if tokenizer.strips_space else whole
    # A tokenizer may have another way to write the text (one character for a letter and its accent): offsets are those
    # of what the tokens say, so that is what is shown.
    return Echo(whole.decode(errors="replace"), tuple(offsets))


def positions_of_answer(tokenizer: TextTokenizer, request: Request) -> Positions:
    """Return where the tokens of an answer will begin, counted from where the prompt ends."""
    skips = request.params.skip_special_tokens
    before = [tokenizer.shown_bytes(token_id, skips) for token_id in request.prompt_token_ids[-PROMPT_TAIL:]]
    return Positions(before, tokenizer.strips_space)
