"""What the server answers while its model loads: 503 to clients and probes, the page and its progress to a browser."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from kunserve.api.operate.page import page_files, page_response
from kunserve.api.wire import anthropic_errors
from kunserve.api.wire.errors import error_response, openai_error
from kunserve.errors import OverloadedError

LOADING = OverloadedError("The server is loading its model.", retry_after_s=5)
PROGRESS_PATH = "/kunserve/loading"

Newest = Callable[[], tuple[str, float]]  # what is being done, and the share of it that is done


def loading_handler(newest: Newest) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Return a handler of every request until the model is loaded.

    The page is answered 503 as well, with itself as the body: a balancer that probes `/` must send nothing here yet.
    No key is asked for: neither the page nor its progress says anything of requests. Each answer ends its connection:
    one that was taken in the last moment would else be answered so for as long as its client keeps it.
    """
    files = page_files()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = said(request)
        response.force_close()
        return response

    def said(request: web.BaseRequest) -> web.Response:
        path = request.path if request.method in ("GET", "HEAD") else ""
        if path == "/":
            response = page_response(files, "index.html")
            response.set_status(LOADING.status)
            response.headers["Retry-After"] = str(LOADING.retry_after_s)
            return response
        if (name := path.removeprefix("/page/")) in files and name != path:
            return page_response(files, name)
        if path == PROGRESS_PATH:
            text, share = newest()
            body = orjson.dumps({"text": text, "share": round(share, 4)})
            headers = {"Cache-Control": "no-store"}
            return web.Response(body=body, content_type="application/json", headers=headers)
        is_anthropic = anthropic_errors.is_ours(request)
        return error_response(LOADING, anthropic_errors.error_json(LOADING) if is_anthropic else openai_error(LOADING))

    return answer
