"""Items of earlier responses, out of the store: those that a response goes on with, and single ones it refers to."""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson

from kunserve.api.wire.context import Api
from kunserve.api.wire.fields import show
from kunserve.api.wire.response_store import Stored
from kunserve.errors import InvalidRequestError, NotFoundError


async def items_before(api: Api, keeper: str, values: dict[str, Any]) -> list[Any]:
    """Return the items of the response that a body goes on with; InvalidRequestError if it is not stored."""
    previous = values.get("previous_response_id")
    if previous is None:
        return []
    stored = await _load(api, previous, keeper)
    if stored is None:
        text = f"`previous_response_id` {previous[:100]} {_lack(api)}; send all items as `input`."
        raise InvalidRequestError(text, param="previous_response_id")
    return await api.on_thread(lambda: _items(stored))


def references_of(given: str | list[dict[str, Any]]) -> dict[int, str]:
    """Return the places of an input that only refer to items, and the ids of these."""
    if isinstance(given, str):
        return {}
    return {index: str(item.get("id")) for index, item in enumerate(given) if _is_reference(item)}


def _is_reference(item: dict[str, Any]) -> bool:
    """Return whether an item only refers to a stored one; clients may leave the type of a reference out."""
    kind, bare = item.get("type"), item.get("role") is None and item.get("content") is None
    return kind == "item_reference" or (kind is None and bare and item.get("id") is not None)


async def with_referred_items(api: Api, keeper: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a body in which items stand where it only referred to them; NotFoundError for one that is not stored."""
    references = references_of(values["input"])
    if not references:
        return values
    given, outputs = list(values["input"]), dict[str, dict[Any, Any]]()
    for index, item_id in references.items():
        response_id = f"resp_{item_id.partition('_')[2].rpartition('_')[0]}"  # as `ResponseParts.item` names items
        if response_id not in outputs:
            stored = await _load(api, response_id, keeper)
            outputs[response_id] = {} if stored is None else await api.on_thread(partial(_by_id, stored))
        if item_id not in outputs[response_id]:
            text = f"`input[{index}]` refers to {show(item_id)}, which {_lack(api)}; send the item itself."
            raise NotFoundError(text, param=f"input[{index}]")
        given[index] = outputs[response_id][item_id]
    return {**values, "input": given}


async def _load(api: Api, response_id: str, keeper: str) -> Stored | None:
    return await api.responses.load(response_id, keeper) if api.responses.is_on else None


def _items(stored: Stored) -> list[Any]:
    items: list[Any] = orjson.loads(stored.items)
    return items


def _by_id(stored: Stored) -> dict[Any, Any]:
    return {item["id"]: item for item in _items(stored)[stored.num_input_items :]}


def _lack(api: Api) -> str:
    return "is not (or no longer) stored" if api.responses.is_on else "cannot be: this server stores none"
