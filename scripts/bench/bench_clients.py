#!/usr/bin/env python3
"""Run the benchmark clients that users run (vllm bench serve, aiperf, guidellm) against a server: no request may fail.

    python scripts/bench/bench_clients.py smollm2-135m --venv vllm=/tmp/vllm --venv aiperf=/tmp/aiperf  # starts one
    python scripts/bench/bench_clients.py http://127.0.0.1:8000 --tokenizer FOLDER --install /tmp/clients

Each client lives in a virtual environment of its own, which `--venv` names or `--install` makes (1 to 3 GB; with torch
for CPUs: set pip's index for it). A client that has none is left out. Prints a table, and one JSON line at the end.
Exits with 1 if a client did not run to its end, or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from own_server import get_json, running_server
from rich.console import Console
from rich.table import Table

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 64, 16
TIMEOUT_S = 400.0  # of one client; they take a minute to start
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the tokenizer's folder is enough
REQUIREMENTS = {"aiperf": ("aiperf==0.13.0",), "guidellm": ("torch", "guidellm==0.8.1")}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client says about its run; None for what it did not come to say."""

    completed: int = 0
    failed: int = 0
    ttft_ms: float | None = None  # median
    tok_s: float | None = None  # of output
    problem: str | None = None  # why it did not run to its end


@dataclass(frozen=True, slots=True)
class Target:
    """The server as clients are told of it."""

    url: str
    model: str
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class Client:
    """How to run one client in a folder, and how to read what it leaves there."""

    program: str  # in `bin` of the environment of the same name
    arguments: Callable[[Target], str]
    result: str  # glob of the file
    read: Callable[[Mapping[str, Any]], Outcome]
    num_requests: int
    environment: Mapping[str, str]


def _vllm(backend: str, path: str) -> Callable[[Target], str]:
    return lambda target: (
        f"bench serve --backend {backend} --base-url {target.url} --endpoint {path} --model {target.model}"
        f" --tokenizer {shlex.quote(str(target.tokenizer))} --dataset-name random"
        f" --random-input-len {NUM_PROMPT_TOKENS} --random-output-len {NUM_OUTPUT_TOKENS} --num-prompts 30"
        " --request-rate 10 --ignore-eos --save-result --result-filename result.json"
    )


def _aiperf(target: Target) -> str:
    return (
        f"profile --model {target.model} --url {target.url} --endpoint-type chat --streaming"
        f" --tokenizer {shlex.quote(str(target.tokenizer))} --synthetic-input-tokens-mean {NUM_PROMPT_TOKENS}"
        f" --output-tokens-mean {NUM_OUTPUT_TOKENS} --extra-inputs ignore_eos:true --request-count 30 --concurrency 8"
        " --ui none"
    )


def _guidellm(target: Target) -> str:
    return (
        f"run --backend kind=openai_http,target={target.url},model={target.model}"
        f" --tokenizer kind=hf_auto,model={shlex.quote(str(target.tokenizer))}"
        f" --data kind=synthetic_text,prompt_tokens={NUM_PROMPT_TOKENS},output_tokens={NUM_OUTPUT_TOKENS}"
        " --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=20"
        " --output kind=json,path=result.json --disable-progress"
    )


def read_vllm(result: Mapping[str, Any]) -> Outcome:
    """Read what `vllm bench serve --save-result` wrote."""
    return Outcome(result["completed"], result["failed"], result["median_ttft_ms"], result["output_throughput"])


def read_aiperf(result: Mapping[str, Any]) -> Outcome:
    """Read aiperf's `profile_export_aiperf.json`; requests that failed stand in its summary of errors."""
    failed = sum(int(error["count"]) for error in result["error_summary"])
    completed = int(result["request_count"]["avg"]) if "request_count" in result else 0
    problem = "it was cancelled" if result["was_cancelled"] else None
    if not completed:
        return Outcome(0, failed, problem=problem)
    ttft_ms, tok_s = result["time_to_first_token"]["p50"], result["output_token_throughput"]["avg"]
    return Outcome(completed, failed, ttft_ms, tok_s, problem)


def read_guidellm(result: Mapping[str, Any]) -> Outcome:
    """Read guidellm's report with one benchmark."""
    [benchmark] = result["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    ttft_ms = metrics["time_to_first_token_ms"]["successful"]["median"]
    times = benchmark["scheduler_metrics"]
    seconds = times["request_end_time"] - times["request_start_time"]
    tok_s = metrics["output_token_count"]["successful"]["total_sum"] / seconds
    return Outcome(totals["successful"], totals["errored"] + totals["incomplete"], ttft_ms, tok_s)


CLIENTS = {
    "vllm completions": Client("vllm", _vllm("openai", "/v1/completions"), "result.json", read_vllm, 30, OFFLINE),
    "vllm chat": Client("vllm", _vllm("openai-chat", "/v1/chat/completions"), "result.json", read_vllm, 30, OFFLINE),
    "aiperf": Client(
        "aiperf", _aiperf, "artifacts/*/profile_export_aiperf.json", read_aiperf, 30, {}
    ),  # offline it finds no folder
    "guidellm": Client("guidellm", _guidellm, "result.json", read_guidellm, 20, OFFLINE),
}


def run_client(client: Client, venv: Path, target: Target, folder: Path) -> Outcome:
    """Run it to its end and read its result; whatever goes wrong is a problem of the outcome."""
    command = [str(venv / "bin" / client.program), *shlex.split(client.arguments(target))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**ENVIRONMENT, **client.environment}
    log = folder / "log"
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(problem=f"no end after {TIMEOUT_S:g} s")
        except OSError as error:
            return Outcome(problem=str(error))
    found = list(folder.glob(client.result))
    if code or len(found) != 1:
        return Outcome(problem=f"exit code {code}, {len(found)} results: {log.read_text(errors='replace')[-600:]}")
    outcome = client.read(json.loads(found[0].read_text(encoding="utf-8")))
    if outcome.problem is None and outcome.completed + outcome.failed < client.num_requests:
        return replace(outcome, problem=f"only {outcome.completed} requests were made")
    return outcome


def install(folder: Path) -> dict[str, Path]:
    """Make environments of the clients that PyPI has; those that are there stay as they are."""
    venvs = {}
    for name, requirements in REQUIREMENTS.items():
        venvs[name] = folder / name
        if not (venvs[name] / "bin" / name).exists():
            subprocess.run([sys.executable, "-m", "venv", str(venvs[name])], check=True)
            for requirement in requirements:  # torch first: the client must not bring one of its own
                subprocess.run([str(venvs[name] / "bin" / "pip"), "install", "--quiet", requirement], check=True)
    return venvs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="URL of a running server, or a model to serve")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the served model's)")
    parser.add_argument("--venv", action="append", default=[], type=_venv, metavar="CLIENT=FOLDER", help="where it is")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make environments of aiperf and guidellm here")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--flags", default="", help="of the server that is started")
    return parser.parse_args(arguments)


def _venv(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in {client.program for client in CLIENTS.values()} or not folder:
        raise argparse.ArgumentTypeError(f"not CLIENT=FOLDER: {text}")
    return name, Path(folder).resolve()


async def measure(args: argparse.Namespace) -> dict[str, Outcome]:
    """Run one client after the other; return their outcomes by name."""
    venvs = (install(args.install.resolve()) if args.install else {}) | dict(args.venv)
    async with AsyncExitStack() as stack:
        url = args.target.rstrip("/")
        if not url.startswith("http"):
            url = (await stack.enter_async_context(running_server(args.target, *shlex.split(args.flags)))).url
        card = (await get_json(f"{url}/v1/models"))["data"][0]
        target = Target(url, card["id"], args.tokenizer or _tokenizer_of(card["root"]))
        outcomes = {}
        for name, client in CLIENTS.items():
            if client.program in venvs and args.only in name:
                with tempfile.TemporaryDirectory() as folder:
                    run = asyncio.to_thread(run_client, client, venvs[client.program], target, Path(folder))
                    outcomes[name] = await run
        return outcomes


def _tokenizer_of(model: str) -> Path:
    from kunserve.model.card import resolve_model

    folder = resolve_model(model).folder
    assert folder is not None, "only dummy weights have no folder"
    return folder


def show(outcomes: Mapping[str, Outcome]) -> None:
    """Print a table for people."""
    table = Table("client", "requests", "failed", "TTFT p50", "tok/s", "problem")
    for name, outcome in outcomes.items():
        ttft = "" if outcome.ttft_ms is None else f"{outcome.ttft_ms:.0f} ms"
        tok_s = "" if outcome.tok_s is None else f"{outcome.tok_s:.1f}"
        table.add_row(name, str(outcome.completed), str(outcome.failed), ttft, tok_s, outcome.problem or "")
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    outcomes = asyncio.run(measure(parse_arguments(arguments)))
    show(outcomes)
    is_ok = bool(outcomes) and not any(outcome.failed or outcome.problem for outcome in outcomes.values())
    print(json.dumps({"ok": is_ok, "clients": {name: asdict(outcome) for name, outcome in outcomes.items()}}))
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
