"""What the file of every client stands on: where the server is, and flows that are run and told, one line for each."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

MARK = "FLOW "  # begins a line of a child's stdout that is a result; clients print there too
MAX_PROBLEM_CHARS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is, and what its model is called. It asks for no key; clients want to send one."""

    url: str
    model: str
    key: str = "unused"

    @property
    def openai_url(self) -> str:
        """Return what clients of OpenAI's API call the base URL."""
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one flow; `problem` is None where it passes."""

    client: str
    version: str
    flow: str
    problem: str | None = None


Flow = Callable[[Target], Any]


def run(client: str, *flows: Flow, package: str = "") -> None:
    """Run the flows of a client against the server of the command line, and print a `Result` for each.

    `package`: what its distribution is called, where that is not the client's name.
    """
    target, of_client = Target(*sys.argv[1:]), version(package or client)
    for flow in flows:
        result = Result(client, of_client, flow.__name__.replace("_", " "), _problem(flow, target))
        print(MARK + json.dumps(asdict(result)), flush=True)


def _problem(flow: Flow, target: Target) -> str | None:
    try:
        outcome = flow(target)
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        return f"{type(error).__name__}: {text}"[:MAX_PROBLEM_CHARS]
    return None
