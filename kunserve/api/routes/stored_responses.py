"""Responses that were stored: GET and DELETE /v1/responses/{id}, and the items that led to one."""

from __future__ import annotations

import orjson
from aiohttp import web

from kunserve.api.wire.access import keeper_of
from kunserve.api.wire.context import API, json_response
from kunserve.api.wire.fields import show
from kunserve.api.wire.response_store import Stored
from kunserve.errors import InvalidRequestError, NotFoundError

MAX_ITEMS = 100  # of one page


async def _load(request: web.Request) -> Stored:
    response_id = request.match_info["id"]
    stored = await request.app[API].responses.load(response_id, keeper_of(request))
    if stored is None:
        raise _unknown(response_id)
    return stored


def _unknown(response_id: str) -> NotFoundError:
    return NotFoundError(f"No response {show(response_id)} is stored (or no longer).", param="response_id")


async def show_response(request: web.Request) -> web.Response:
    """Answer GET /v1/responses/{id}."""
    if request.query.get("stream", "false") != "false":
        raise InvalidRequestError("`stream` is not supported: what is stored has ended.", param="stream")
    return json_response((await _load(request)).response)


async def delete_response(request: web.Request) -> web.Response:
    """Answer DELETE /v1/responses/{id}."""
    response_id = request.match_info["id"]
    if not await request.app[API].responses.delete(response_id, keeper_of(request)):
        raise _unknown(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def list_input_items(request: web.Request) -> web.Response:
    """Answer GET /v1/responses/{id}/input_items: the newest first unless `order=asc`, `limit` of them `after` one."""
    stored, query = await _load(request), request.query
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"`order` must be asc or desc, not {show(order)}.", param="order")
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_ITEMS):
        raise InvalidRequestError(f"`limit` must be between 1 and {MAX_ITEMS}, not {show(limit)}.", param="limit")
    items = (await request.app[API].on_thread(lambda: orjson.loads(stored.items)))[: stored.num_input_items]
    shown = [{"type": "message", "id": f"item_{index}", **item} for index, item in enumerate(items)]
    shown = shown if order == "asc" else shown[::-1]
    after = query.get("after")
    start = next((index + 1 for index, item in enumerate(shown) if item["id"] == after), 0)
    page = shown[start : start + int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_response({"object": "list", "data": page, **ends, "has_more": start + len(page) < len(shown)})
