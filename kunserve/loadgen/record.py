"""Record what KunServe's feed says while the load runs, as lines for `kunserve replay`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import aiohttp

from kunserve.command.server_url import connection_reason


@asynccontextmanager
async def recording(url: str, headers: dict[str, str], path: Path) -> AsyncIterator[None]:
    """Write the feed of `url` to `path` until the block is left. Raises ValueError at once if there is no feed."""
    timeout = aiohttp.ClientTimeout(total=None, connect=10)
    async with contextlib.AsyncExitStack() as stack:
        try:
            session = await stack.enter_async_context(aiohttp.ClientSession(headers=headers, timeout=timeout))
            response = await stack.enter_async_context(session.get(f"{url}/kunserve/events"))
        except (aiohttp.ClientError, OSError) as error:
            raise ValueError(f"cannot record {url}: {connection_reason(error)}") from None
        if response.status != 200:
            raise ValueError(f"cannot record {url}: /kunserve/events answers HTTP {response.status}")
        task = asyncio.create_task(_write(response, path))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _write(response: aiohttp.ClientResponse, path: Path) -> None:
    """Write a JSON object for each event: seconds since the response began, the event's name, its data as they came."""
    started_s = perf_counter()
    name = ""
    with path.open("w", encoding="utf-8", buffering=1) as file:  # by lines: a run that is interrupted keeps what it saw
        try:
            async for line in response.content:
                text = line.decode().rstrip()
                if text.startswith("event: "):
                    name = text.removeprefix("event: ")
                elif text.startswith("data: "):
                    at_s = round(perf_counter() - started_s, 3)
                    data = text.removeprefix("data: ")
                    file.write(f'{{"at_s": {at_s}, "event": {json.dumps(name)}, "data": {data}}}\n')
        except (aiohttp.ClientError, OSError) as error:
            print(f"the recording ends here: {connection_reason(error)}", file=sys.stderr)
