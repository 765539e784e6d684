"""The URL of a server that a command talks to, and why there is no connection to it: for `loadgen` and `top`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def parse_server_url(text: str) -> str:
    """Return the base URL of a server, without an end of `/` or `/v1`; raise ValueError if no request can go there."""
    url = text.strip()
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"'{text}' does not start with http:// or https://")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # reading the port judges it
        host.encode("idna")  # as the look-up of the name does: it raises UnicodeError, which is no OSError
    except ValueError:
        raise ValueError(f"'{text}' is not a URL: write for instance http://127.0.0.1:8000") from None
    if not host or re.search(r"\s", url):
        raise ValueError(f"'{text}' names no host: write for instance http://127.0.0.1:8000")
    if parts.query or parts.fragment:
        raise ValueError(f"'{text}' must end before ? and #: paths are added to it")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def connection_reason(error: Exception) -> str:
    """Return why a connection failed, on one line; without aiohttp's "ssl:default", which plain http has as well."""
    return " ".join(re.sub(r" ssl:\w+", "", str(error)).split()) or type(error).__name__
