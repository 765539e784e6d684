"""Marks in the streams of fronts: which tokens are in what came before, so that another server can go on from there.

A mark is a comment of server-sent events, and the front takes it out. What stands before a mark is whole: a front that
has passed on all up to a mark, and nothing after it, has told its client of exactly the tokens of the marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import orjson

from kunserve.api.say.answers import AnswerWriter, Choice
from kunserve.api.wire.access import Front
from kunserve.api.wire.context import Past
from kunserve.api.wire.fields import INT64_MAX
from kunserve.engine.request import Output
from kunserve.errors import InvalidRequestError, KunServeError

MARK = b": kunserve "


class Marked:
    """Writes as another `AnswerWriter` does, with a mark behind all that an output of the engine makes."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer, self.call = writer, writer.call
        self.opening, self.ending, self.answer_json = writer.opening, writer.ending, writer.answer_json

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """See `AnswerWriter`. There is a mark even where there is no event: what is known is not computed again."""
        return self._writer.chunk(choice, output) + _mark(choice, output)

    def error(self, error: KunServeError) -> bytes:
        """See `AnswerWriter`. A front may let another server go on instead of passing the error on."""
        return self._writer.error(error) + MARK + orjson.dumps({"error": error.status}) + b"\n\n"


def _mark(choice: Choice, output: Output) -> bytes:
    said = {"choice": choice.index, "token_ids": output.token_ids, "cached": choice.request.num_cached_tokens}
    return MARK + orjson.dumps(said) + b"\n\n"


def seed_choices(choices: Sequence[Choice], front: Front) -> None:
    """Give choices whose client gave no seed those that the front says, so that they are the same on any server."""
    for choice in choices:
        params = choice.request.params
        if params.seed is None and front.seed is not None:
            choice.request.params = replace(params, seed=(front.seed + choice.index) & INT64_MAX)


def check_past(choices: Sequence[Choice], past: Sequence[Past]) -> None:
    """Raise InvalidRequestError unless there is a past for each choice."""
    if len(past) != len(choices):
        text = f"`token_ids` has entries for {len(past)} choices; the request asks for {len(choices)}."
        raise InvalidRequestError(text, param="token_ids")
