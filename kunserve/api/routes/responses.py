"""POST /v1/responses: OpenAI's newer API over the same chat; what is stored of it is in stored_responses.py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from kunserve.api.ask.declared.check import read as read_declared
from kunserve.api.ask.declared.responses import Response
from kunserve.api.ask.prompts import tokenize_chat
from kunserve.api.ask.protocol import ChatCall, chat_call
from kunserve.api.ask.responses import chat_of, input_items
from kunserve.api.routes.conversation import answer_chat
from kunserve.api.routes.earlier_items import items_before, references_of, with_referred_items
from kunserve.api.routes.response_format import ResponseFormat
from kunserve.api.wire.access import created_s, keeper_of
from kunserve.api.wire.body import read_body, read_call
from kunserve.api.wire.context import API, Api, choose_request_id, json_response
from kunserve.api.wire.naming import FieldNames
from kunserve.api.wire.response_store import Stored


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A body of /v1/responses that has been read."""

    values: dict[str, Any]
    chat: ChatCall
    names: FieldNames
    items: bytes  # of the responses that it goes on with, and its own: a list in JSON
    num_items: int


async def _read(request: web.Request, api: Api, *, generates: bool) -> ResponseCall:
    """Read a body, and the items of the responses that it goes on with, which are in the store."""

    def read(values: dict[str, Any], before: list[Any]) -> ResponseCall:
        chat, names = chat_of(read_declared(values, Response, api.model.sampling), before)
        with names.told():
            call = chat_call(chat, chat.messages, api.model, api.tokenizer.vocab_size)
        items = [*before, *input_items(values)] if _keeps(api, values) else []
        return ResponseCall(values, call, names, orjson.dumps(items), len(items))

    def read_alone(values: dict[str, Any]) -> ResponseCall | dict[str, Any]:
        asked = read_declared(values, Response, api.model.sampling)
        needs_store = asked.previous_response_id is not None or references_of(asked.input)
        return values if needs_store else read(values, [])

    found = await (read_call if generates else read_body)(request, api, read_alone)
    if isinstance(found, ResponseCall):
        return found
    keeper = keeper_of(request)
    values, before = await with_referred_items(api, keeper, found), await items_before(api, keeper, found)
    return await api.on_thread(lambda: read(values, before))


async def responses(request: web.Request) -> web.StreamResponse:
    """Answer POST /v1/responses."""
    api = request.app[API]
    asked = await _read(request, api, generates=True)
    answer_id = f"resp_{choose_request_id(request, asked.chat.generation.request_id)}"
    loop = asyncio.get_running_loop()
    store = partial(_store, api, loop, answer_id, keeper_of(request), asked) if _keeps(api, asked.values) else None
    generation = asked.chat.generation
    writer = ResponseFormat(answer_id, created_s(request), generation, asked.values, asked.names, api.tokenizer, store)
    with asked.names.told():
        return await answer_chat(request, api, asked.chat, writer, answer_id)


def _keeps(api: Api, values: dict[str, Any]) -> bool:
    return api.responses.is_on and values.get("store") is not False


def _store(
    api: Api,
    loop: asyncio.AbstractEventLoop,
    response_id: str,
    owner: str,
    asked: ResponseCall,
    response: dict[str, Any],
) -> None:
    """Store a response, from any thread: before the loop does anything else, and so before its client has it."""
    given, output = asked.items[:-1], orjson.dumps(response["output"])[1:]
    items = given + (b"," if len(output) > 1 and asked.num_items else b"") + output
    stored = Stored(orjson.dumps(response), items, asked.num_items)
    loop.call_soon_threadsafe(api.responses.put, response_id, owner, stored)


async def count_input_tokens(request: web.Request) -> web.Response:
    """Answer POST /v1/responses/input_tokens."""
    api = request.app[API]
    asked = await _read(request, api, generates=False)
    with asked.names.told():
        num_tokens = len((await tokenize_chat(api, asked.chat)).ids)
    return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})
