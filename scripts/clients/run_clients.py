"""Run the documented flows of client libraries against a server: `make test-clients`.

    make test-clients                                    # all; makes their environments first, writes docs/clients.md
    python scripts/clients/run_clients.py --only dspy    # some, in the environments that are there

The server is one of its own, on the loopback interface, with the small model, a template that shows tools, and
temperature 0 where a client does not say. Each file of flows runs in a process and an environment of its own (libraries
want different versions of each other), with no way to any other network. A flow that fails, and a file that does not
get to its end, make the exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # own_server.py

from flows import MARK, Result
from own_server import running_server

FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parents[1] / ".clients"
MODEL = "smollm2-135m"
LIMIT_S = 900.0
SERVER_FLAGS = (
    *("--model", MODEL, "--devices", "cpu:2", "--device-memory", "730MiB", "--host", "127.0.0.1"),
    *("--tool-call-parser", "hermes", "--chat-template", str(FOLDER / "hermes.jinja")),
    *("--override-generation-config", '{"temperature": 0}'),
)
# The proxy is a port that nobody listens on: a client that reaches for another host learns so at once.
NOWHERE = "http://127.0.0.1:9"
QUIET = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}


@dataclass(frozen=True, slots=True)
class Client:
    """What runs the flows of a client: the words before the server's address."""

    name: str
    command: tuple[str, ...]


def _python(name: str, environment: str = "common") -> Client:
    python = ENVIRONMENTS / environment / "bin" / "python"
    return Client(name, (str(python), str(FOLDER / f"{name}_flows.py")))


CLIENTS = (
    _python("openai"),
    _python("anthropic"),
    _python("litellm"),
    _python("langchain"),
    _python("instructor", "instructor"),
    _python("pydantic_ai"),
    _python("openai_agents"),
    _python("dspy"),
    _python("llama_index", "llama_index"),
    _python("aider", "aider"),
    Client("ai_sdk", ("node", str(FOLDER / "ai_sdk" / "flows.mjs"))),
)


def run_client(client: Client, url: str, limit_s: float = LIMIT_S) -> list[Result]:
    """Run the flows of one client; what did not come to its end is a result, too, one that fails."""
    print(f"{client.name} ...", flush=True)
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", **QUIET}
        try:
            done = subprocess.run(
                [*client.command, url, MODEL],
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                timeout=limit_s,
                check=False,
            )
            printed, how = done.stdout, "" if done.returncode == 0 else f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed, how = (error.stdout or b"").decode(), f"not over after {limit_s:.0f} s"
        except OSError as error:
            printed, how = "", f"does not start: {error}"
    results = read_results(printed)
    if how or not results:
        results.append(Result(client.name, "", "all to the end", how or "told no result"))
    return results


def read_results(printed: str) -> list[Result]:
    """Return the results among the lines that a client printed."""
    lines = [line.removeprefix(MARK) for line in printed.splitlines() if line.startswith(MARK)]
    return [Result(**json.loads(line)) for line in lines]


def table(results: Sequence[Result]) -> str:
    """Return results as a table in Markdown, a row for each flow."""
    rows = ["| client | version | flow | result |", "| --- | --- | --- | --- |"]
    for result in results:
        outcome = "passes" if result.problem is None else f"**fails**: {result.problem.replace('|', chr(92) + '|')}"
        rows.append(f"| {result.client} | {result.version} | {result.flow} | {outcome} |")
    return "\n".join(rows) + "\n"


def page(results: Sequence[Result]) -> str:
    """Return the page of the documentation that shows them."""
    num_passed = sum(result.problem is None for result in results)
    return f"""# Client libraries

What `make test-clients` found: {num_passed} of {len(results)} flows pass. Each flow is the client's own documented way
to do a thing, against `kunserve serve {MODEL}`; `scripts/clients/` has the code, to copy from. Clients are told a base
URL and any key: `http://HOST:8000/v1` for OpenAI's API, `http://HOST:8000` for Anthropic's (the AI SDK wants `/v1`
there, too). Tools need a model whose template knows them, or `--chat-template` and `--tool-call-parser`, as here.

Where the model is free to call a tool or not, or to follow a schema that only the prompt tells, one as small as this
seldom does: those flows require the call, show an example, or give the model's words. Small models also go on calling
where several calls at once are allowed, so tools are used with parallel calls turned off.

{table(results)}"""


async def run_all(clients: Sequence[Client], url: str | None) -> list[Result]:
    """Run the flows of these clients, one after the other, against the server at `url` or one of their own."""
    if url is None:
        async with running_server(*SERVER_FLAGS) as server:
            return await run_all(clients, server.url)
    results = []
    for client in clients:
        results += await asyncio.to_thread(run_client, client, url)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="clients to run (default: all)")
    parser.add_argument("--url", help="of a server that runs already (default: start one)")
    parser.add_argument("--page", type=Path, help="file to write the results to, as a page of the documentation")
    args = parser.parse_args()
    results = asyncio.run(run_all([client for client in CLIENTS if client.name in args.only], args.url))
    print(table(results))
    if args.page:
        args.page.parent.mkdir(exist_ok=True)
        args.page.write_text(page(results), encoding="utf-8")
    problems = sum(result.problem is not None for result in results)
    print(f"{len(results) - problems} of {len(results)} flows pass")
    sys.exit(problems > 0)


if __name__ == "__main__":
    main()
