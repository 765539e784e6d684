"""What every route shares: the server below it, and the few tools to reach it."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from aiohttp import web

from kunserve.api.admission import Admission
from kunserve.api.backend import ApiSettings, Backend, ModelInfo, Template, TextTokenizer
from kunserve.api.structured import Grammars
from kunserve.errors import InvalidRequestError, PayloadTooLargeError, UnprocessableError
from kunserve.metrics import Metrics

T = TypeVar("T")

REQUEST_ID = web.RequestKey("request_id", str)
_REQUEST_ID_HEADER = "X-Request-ID"
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Api:
    """One server's routes and what they stand on; `request.app[API]`."""

    backend: Backend
    tokenizer: TextTokenizer
    chat_template: Template | None
    model: ModelInfo
    metrics: Metrics
    settings: ApiSettings
    threads: ThreadPoolExecutor  # for the text that would hold up the event loop
    admission: Admission
    grammars: Grammars | None
    serials: Iterator[int]  # tell apart requests of clients that chose the same id

    async def offload(self, num_chars: int, work: Callable[[], T]) -> T:
        """Result of `work` on so much text: here if it is short, else on a thread."""
        if num_chars <= self.settings.inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


API = web.AppKey("api", Api)


def new_request_id(request: web.Request) -> str:
    """The client's X-Request-ID if it is one printable word, else a new id."""
    given = request.headers.get(_REQUEST_ID_HEADER, "")
    return given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex


def choose_request_id(request: web.Request, from_body: str | None) -> str:
    """The id of this request; an id in the body counts unless the header has one."""
    if from_body and _REQUEST_ID_HEADER not in request.headers and _USABLE_ID.fullmatch(from_body):
        request[REQUEST_ID] = from_body
    return request[REQUEST_ID]


async def echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Give every answer the id of its request (an aiohttp on_response_prepare signal)."""
    response.headers[_REQUEST_ID_HEADER] = request.get(REQUEST_ID, "")


async def read_json(request: web.Request, settings: ApiSettings) -> dict[str, Any]:
    """The JSON object in the body. 413 beyond the bound, 400 if it is no JSON or does not come in time."""
    too_large = PayloadTooLargeError(f"The body is larger than {settings.max_body_bytes} bytes.")
    if (request.content_length or 0) > settings.max_body_bytes:
        raise too_large  # before the first byte is read
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidRequestError("Compressed bodies are not supported.")
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await request.read()
    except TimeoutError:
        raise InvalidRequestError(f"The body took longer than {settings.body_timeout_s:g} s.") from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError:
        raise InvalidRequestError("The body is not what its headers say.") from None
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UnprocessableError("The body must be a JSON object.")
    return values


def json_response(value: object) -> web.Response:
    """An answer in JSON."""
    body = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(body=body, content_type="application/json")
