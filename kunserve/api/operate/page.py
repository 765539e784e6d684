"""GET / and /page/NAME: the page that shows the server, from files of the package. No build step, no outside host."""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

from kunserve.api.wire.page_headers import PAGE_HEADERS
from kunserve.errors import NotFoundError

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def page_files() -> dict[str, str]:
    """Return text of every file of the page, by name."""
    folder = files("kunserve") / "page"
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if _type(file.name)}


def _type(name: str) -> str | None:
    return _TYPES.get(name.rpartition(".")[2])


PAGE = web.AppKey("page", dict[str, str])


async def show_page(request: web.Request) -> web.Response:
    """Answer with the page itself, or one of its files."""
    return page_response(request.app[PAGE], request.match_info.get("name", "index.html"))


def page_response(files: dict[str, str], name: str) -> web.Response:
    """Return the answer that holds one of the page's files. NotFoundError if there is no such file."""
    if (text := files.get(name)) is None:
        raise NotFoundError(f"The page has no file `{name[:100]}`.")
    return web.Response(text=text, content_type=_type(name), charset="utf-8", headers=PAGE_HEADERS)
