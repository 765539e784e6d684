"""Replicas of two models behind Ray Serve, many streams, some cancelled, one replica killed: all must be right.

What is right, servers of the same weights say that nothing disturbs. Needs the extra `ray`: `make test-ray`. Ends
with one line of JSON, and with status 1 if a stream is wrong or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from own_server import ServerProcess, free_port

from kunserve.engine.text.tokenizer import Tokenizer

NAME, OTHER, APP = "tiny", "other", "kunserve"
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320, "head_dim": 16}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    **SHAPE,
}
CONFIG |= {"bos_token_id": 300, "eos_token_id": 301, "hidden_act": "silu", "tie_word_embeddings": False}
OTHER_SHAPE = {"num_hidden_layers": 2}  # says other things than the first
FLAGS = "--devices cpu:1 --load-format dummy --num-gpu-blocks-override 1024 --disable-access-log --served-model-name"
STREAM_S = 120.0
SCHEMA = {
    "type": "object",
    "properties": {"days": {"type": "integer"}, "why": {"enum": ["a", "b"]}},
    "required": ["why"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "days", "schema": SCHEMA}}


@dataclass(frozen=True, slots=True)
class Job:
    """One stream."""

    path: str
    body: dict[str, Any]
    at_s: float  # after the first
    leaves_after: int | None  # events


@dataclass(slots=True)
class Said:
    """What a stream has said."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None  # by its usage
    is_whole: bool = False
    num_events: int = 0


def make_model(folder: Path, **shape: int) -> str:
    """Write a tiny model without weights (they are random), with a tokenizer; returns its path."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.dummy(CONFIG["vocab_size"], (CONFIG["eos_token_id"],))
    (folder / "config.json").write_text(json.dumps(CONFIG | shape))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
    return str(folder)


def make_jobs(count: int, seconds: float, num_tokens: int, seed: int) -> list[Job]:
    """Return streams of several kinds, greedy and seeded; every third is left by its client, every seventh OTHER's."""
    chance, jobs = random.Random(seed), []
    for i in range(count):
        seeded = {"seed": i, "temperature": 1.0} if i % 4 else {"temperature": 0}
        body = {
            "model": OTHER if i % 7 == 6 else NAME,
            "stream": True,
            "stream_options": {"include_usage": True},
            **seeded,
        }
        prompt = "".join(chance.choices("abcdefgh ", k=chance.randrange(10, 80)))
        if i % 5 == 4:
            messages = [{"role": "user", "content": prompt}]
            body |= {"messages": messages, "max_tokens": num_tokens, "response_format": FORMAT}
        else:
            stop = {"stop": ["t7", "a"]} if i % 5 == 3 else {}
            body |= {"prompt": prompt, "max_tokens": chance.randrange(num_tokens // 2, num_tokens), **stop}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        jobs.append(Job(path, body, chance.uniform(0, seconds), chance.randrange(2, 9) if i % 3 == 2 else None))
    return jobs


async def stream(session: aiohttp.ClientSession, url: str, job: Job) -> Said:
    """Return what a stream says, as far as its client stays."""
    said = Said()
    async with session.post(url + job.path, json=job.body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if line == b"data: [DONE]\n":
                said.is_whole = True
            elif line.startswith(b"data: "):
                _take(said, json.loads(line[6:]))
            elif line != b"\n":
                raise RuntimeError(f"no client should see {line[:80]!r}")
            if said.num_events == job.leaves_after:
                break
    return said


def _take(said: Said, event: dict[str, Any]) -> None:
    said.num_events += 1
    if "error" in event:
        raise RuntimeError(event["error"]["message"])
    for choice in event["choices"]:
        said.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        said.finish_reason = choice["finish_reason"] or said.finish_reason
    said.num_tokens = (event.get("usage") or {}).get("completion_tokens", said.num_tokens)


async def run_jobs(
    urls: Mapping[str, str], jobs: Sequence[Job], disturb: asyncio.Task[None] | None = None
) -> list[Said | BaseException]:
    """Return what all streams say, each begun at its time; `urls`: by model."""

    async def run(job: Job) -> Said:
        await asyncio.sleep(job.at_s)
        async with asyncio.timeout(STREAM_S):
            return await stream(session, urls[job.body["model"]], job)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        results = await asyncio.gather(*map(run, jobs), return_exceptions=True)
    if disturb is not None:
        await disturb
    return results


def problem_of(job: Job, said: Said | BaseException, expected: Said | BaseException) -> str | None:
    """Return what is wrong with a stream; None if it is right."""
    assert isinstance(expected, Said), expected
    if isinstance(said, BaseException):
        return f"lost: {said!r}"
    if job.leaves_after is not None and not said.is_whole:
        return None if expected.text.startswith(said.text) else f"left, and wrong: {said.text!r}"
    whole = (said.text, said.finish_reason, said.num_tokens, said.is_whole)
    wanted = (expected.text, expected.finish_reason, expected.num_tokens, True)
    return None if whole == wanted else f"{whole} instead of {wanted}"


async def undisturbed(models: Mapping[str, str], jobs: Sequence[Job]) -> list[Said | BaseException]:
    """Return what servers of their own say to the jobs; `models`: folders by name."""
    calm = [Job(job.path, job.body, 0.0, None) for job in jobs]
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(ServerProcess(path, *f"{FLAGS} {name}".split())) for name, path in models.items()
        }
        return await run_jobs({name: server.url for name, server in servers.items()}, calm)


@contextmanager
def application(num_cpus: int, **arguments: Any) -> Iterator[str]:
    """Run an application (`kunserve.ray.application.Arguments`) until the block is left; yields its address.

    On a Ray of its own with so many CPUs, or on the one that RAY_ADDRESS names. Its processes have the priority of this
    one: by default Ray's own make room for all others (nice 15), and a server among them for its clients.
    """
    import ray
    from ray import serve

    from kunserve.ray import app

    os.environ.setdefault("RAY_worker_niceness", "0")
    port = free_port()
    own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": num_cpus, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="warning", **own)
    try:
        serve.start(http_options={"port": port, "host": "127.0.0.1"})
        serve.run(app(arguments), name=APP)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def kill_one(deployment: str, after_s: float, victims: list[int]) -> None:
    """Kill a replica while its streams run: its process, and so its server."""
    from ray import serve

    await asyncio.sleep(after_s)
    pids = await serve.get_deployment_handle(deployment, APP).pids.remote()
    os.kill(pids[0], signal.SIGKILL)
    victims += pids


async def check(args: argparse.Namespace, models: Mapping[str, str]) -> dict[str, Any]:
    """Run everything; returns the figures. `models`: folders by name."""
    from ray import serve

    jobs = make_jobs(args.streams, args.seconds, args.tokens, args.seed)
    expected = await undisturbed(models, jobs)
    asked = [
        {"model": path, "flags": f"{FLAGS} {name}", "replicas": args.replicas if name == NAME else 1}
        for name, path in models.items()
    ]
    with application(2 * args.replicas + 4, models=asked) as url:
        victims: list[int] = []
        killing = asyncio.create_task(kill_one(f"{NAME}-0", args.seconds / 2, victims))
        started = time.monotonic()
        told = await run_jobs(dict.fromkeys(models, url), jobs, killing)
        seconds = time.monotonic() - started
        counts = await serve.get_deployment_handle("front", APP).counts.remote()
        async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
            listed = [model["id"] for model in (await response.json())["data"]]
    problems = [problem_of(*each) for each in zip(jobs, told, expected, strict=True)]
    for problem in filter(None, problems):
        print(problem[:500], file=sys.stderr)
    num_left = sum(isinstance(said, Said) and not said.is_whole for said in told)
    figures = {"streams": len(jobs), "left": num_left, "killed": victims, "seconds": round(seconds, 1)}
    return {**figures, **counts, "models": listed, "wrong": sum(problem is not None for problem in problems)}


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="in which streams begin; the half of it: the kill")
    parser.add_argument("--tokens", type=int, default=300, help="most of one answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {
            NAME: make_model(Path(folder) / NAME),
            OTHER: make_model(Path(folder) / OTHER, **OTHER_SHAPE),
        }
        figures = asyncio.run(check(args, models))
    print(json.dumps(figures))
    is_right = figures["wrong"] == 0 and figures["models"] == list(models)
    sys.exit(not is_right or figures["resumed"] == 0)  # none resumed: the kill has disturbed nothing


if __name__ == "__main__":
    main()
