"""POST /kunserve/resume: a stream whose server is gone goes on here, as if nothing had happened; for fronts.

The body has the client's request as it came, and the tokens that its client has been told of. All else that decides an
answer is a function of these: they are replayed through stop strings, parsers and grammar without being told again,
and the engine goes on from there. The answer is the rest of the stream, marked as the first part was (`say/marks.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.others import Resume
from kunserve.api.ask.protocol import check_token_ids
from kunserve.api.routes import anthropic
from kunserve.api.routes.chat import chat_completions
from kunserve.api.routes.completions import completions
from kunserve.api.wire.access import check_front
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, RESUMED, Past, Resumed
from kunserve.errors import InvalidRequestError

# Not /v1/responses: its last event repeats the ids of all parts, which are drawn, and it may be stored.
RESUMABLE: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
    "/v1/completions": completions,
    "/v1/chat/completions": chat_completions,
    "/v1/messages": anthropic.messages,
}


async def resume(request: web.Request) -> web.StreamResponse:
    """Answer POST /kunserve/resume. It needs a front's key, and the API key of the client whose stream it is."""
    check_front(request)
    api = request.app[API]
    asked = await read_body(request, api, lambda values: read(values, Resume))
    if (handler := RESUMABLE.get(asked.path)) is None:
        text = f"`path` must be one of {', '.join(RESUMABLE)}: nothing else is resumed."
        raise InvalidRequestError(text, param="path")
    if asked.body.get("stream") is not True:
        text = "Only streams are resumed: of any other answer the client has seen nothing, so ask for it again."
        raise InvalidRequestError(text, param="body")
    if len(asked.token_ids) != len(asked.num_cached_tokens):
        text = "`token_ids` and `num_cached_tokens` must have an entry for each choice."
        raise InvalidRequestError(text, param="num_cached_tokens")
    for ids in asked.token_ids:
        if ids:
            check_token_ids(ids, api.model.vocab_size or api.tokenizer.vocab_size, "token_ids")
    request[RESUMED] = Resumed(asked.body, tuple(map(Past, asked.token_ids, asked.num_cached_tokens)))
    return await handler(request)
