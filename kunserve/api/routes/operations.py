"""Routes around generation: what is served, how it fares, and tokens to text and back."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from kunserve.api.ask.declared.chat import Tokenize
from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.faults import raise_missing
from kunserve.api.ask.declared.others import Detokenize
from kunserve.api.ask.prompts import tokenize, tokenize_chat
from kunserve.api.ask.protocol import ChatCall, chat_call, check_token_ids, read_model
from kunserve.api.routes.docs import docs_page
from kunserve.api.routes.openapi import openapi_document
from kunserve.api.wire import anthropic_errors
from kunserve.api.wire.backend import ModelInfo
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, OPERATED, json_response, long_list, long_text, to_json
from kunserve.api.wire.page_headers import PAGE_HEADERS
from kunserve.errors import NotFoundError, OverloadedError


async def health(request: web.Request) -> web.Response:
    """Answer GET /health and /ping: 200 while the engine makes progress, even if only some devices do their work."""
    backend = request.app[OPERATED].backend
    if (reason := backend.health()) is not None:
        raise OverloadedError(reason)
    if (reason := backend.degraded()) is not None:
        return json_response({"status": "degraded", "reason": reason})
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Answer GET /ready: 200 while new requests are welcome (not while loading or stopping)."""
    if not request.app[OPERATED].backend.is_ready:
        raise OverloadedError("The server is loading its model or stopping.")
    return await health(request)


async def metrics(request: web.Request) -> web.Response:
    """Answer GET and HEAD /metrics."""
    body = request.app[OPERATED].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def state(request: web.Request) -> web.Response:
    """Answer GET /kunserve/state: devices, groups, requests."""
    return json_response(request.app[OPERATED].backend.state())


async def show_version(request: web.Request) -> web.Response:
    """Answer GET /version."""
    return json_response({"version": version("kunserve")})


async def show_openapi(request: web.Request) -> web.Response:
    """Answer GET /openapi.json."""
    return json_response(openapi_document(version("kunserve")))


async def show_docs(request: web.Request) -> web.Response:
    """Answer GET /docs: the OpenAPI document as a page to read."""
    text = docs_page(openapi_document(version("kunserve")))
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=PAGE_HEADERS)


def _card(model: ModelInfo, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "kunserve",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [],
    }


def _anthropic_card(model: ModelInfo, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created}


async def list_models(request: web.Request) -> web.Response:
    """Answer GET /v1/models: one card for each name of the model, in Anthropic's format for its clients."""
    model = request.app[API].model
    if not anthropic_errors.is_ours(request):
        return json_response({"object": "list", "data": [_card(model, name) for name in model.served_names]})
    ends = {"first_id": model.served_names[0], "last_id": model.served_names[-1], "has_more": False}
    return json_response({"data": [_anthropic_card(model, name) for name in model.served_names], **ends})


async def show_model(request: web.Request) -> web.Response:
    """Answer GET /v1/models/{name}; names may have slashes."""
    model, name = request.app[API].model, request.match_info["name"].rstrip("/")
    if name not in model.served_names:
        raise NotFoundError(f"The model `{name[:200]}` does not exist.", param="model")
    card = _anthropic_card if anthropic_errors.is_ours(request) else _card
    return json_response(card(model, name))


async def show_load(request: web.Request) -> web.Response:
    """Answer GET /load: how many requests there are, waiting ones included, as vLLM counts them."""
    stats = request.app[OPERATED].backend.stats()
    return json_response({"server_load": stats.num_running + stats.num_waiting})


async def show_tokenizer(request: web.Request) -> web.Response:
    """Answer GET /tokenizer_info: what clients that make prompts themselves ask for."""
    api = request.app[API]
    if not api.model.tokenizer:
        raise NotFoundError("The model has no tokenizer.")
    known = {"model_max_length": api.model.max_model_len, "vocab_size": api.tokenizer.vocab_size}
    return json_response({"tokenizer_class": "PreTrainedTokenizerFast", **api.model.tokenizer, **known})


async def tokenize_text(request: web.Request) -> web.Response:
    """Answer POST /tokenize: {prompt} or {messages} to {count, max_model_len, tokens}."""
    api = request.app[API]

    def read_asked(values: dict[str, Any]) -> tuple[ChatCall | str, Tokenize]:
        asked = read(values, Tokenize, api.model.sampling)
        if asked.messages is not None:
            return chat_call(asked, asked.messages, api.model, api.tokenizer.vocab_size), asked
        read_model(asked.model, api.model)
        if asked.prompt is None:
            raise_missing("prompt")
        return asked.prompt, asked

    text, asked = await read_body(request, api, read_asked)
    if isinstance(text, ChatCall):
        tokens = (await tokenize_chat(api, text)).ids
    else:
        [tokens] = await tokenize(api, [text], asked.add_special_tokens is not False)

    def write() -> bytes:
        strings = long_list(list(map(api.tokenizer.token_text, tokens))) if asked.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": api.model.max_model_len, "tokens": long_list(tokens)}
        return to_json({**answer, "token_strs": strings})

    return json_response(await api.offload(len(tokens), write))


async def detokenize(request: web.Request) -> web.Response:
    """Answer POST /detokenize: {tokens} to {prompt}, special tokens included."""
    api = request.app[API]

    def read_tokens(values: dict[str, Any]) -> list[int]:
        asked = read(values, Detokenize)
        read_model(asked.model, api.model)
        check_token_ids(asked.tokens, api.tokenizer.vocab_size, "tokens")
        return asked.tokens

    tokens = await read_body(request, api, read_tokens)

    def write() -> bytes:
        return to_json({"prompt": long_text(api.tokenizer.decode(tokens, skip_special_tokens=False))})

    return json_response(await api.offload(len(tokens), write))
