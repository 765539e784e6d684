"""What holds the event loop of a server up, and for how long: unusual but valid requests, one kind at a time.

    python scripts/check/loop_holds.py smollm2-135m [--only NAME]

The server runs in a child process, in which a watchdog looks where the event loop is whenever it has not come back for
`HOLD_S`. Other work on the machine holds it up as well: what counts is the CPU time of the loop.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from own_server import ServerProcess

HOLD_S = 0.02
# Where the loop is, by a thread that needs the GIL: while C code holds that, it comes late and sees what follows.
CHILD = """
import asyncio, sys, threading, time, traceback
import kunserve.server as server
import kunserve.command.serving as serving
log = open(sys.argv.pop(1), "a")
main, last = threading.get_ident(), [time.monotonic()]
def look():
    seen = 0.0
    while True:
        time.sleep(0.005)
        beat = last[0]
        if time.monotonic() - beat > {hold_s} + 0.005 and beat != seen:
            seen = beat
            stack = traceback.extract_stack(sys._current_frames()[main])
            frames = [frame for frame in stack if "/kunserve/" in frame.filename][::-1]
            names = [f"{{frame.filename.rsplit('/', 1)[1]}}:{{frame.lineno}} {{frame.name}}" for frame in frames[:2]]
            print("PLACE", " < ".join(names), file=log, flush=True)
async def watch(metrics):
    threading.Thread(target=look, daemon=True).start()
    while True:
        last[0] = begun = time.monotonic()
        own, whole = time.thread_time(), time.process_time()
        await asyncio.sleep(0.005)
        late_s = time.monotonic() - begun - 0.005
        metrics.loop_lag(max(0.0, late_s))
        if late_s > {hold_s}:
            own, whole = time.thread_time() - own, time.process_time() - whole
            print("HELD", round(late_s, 4), round(own, 4), round(whole, 4), file=log, flush=True)
serving._watch_loop = watch
server.main()
"""

Post = Callable[[str, Any], Any]


async def leave(post: Post, num: int, path: str, body: dict[str, Any]) -> list[str]:
    """Send requests, and let all clients go away in the same moment."""
    asked = [asyncio.ensure_future(post(path, orjson.dumps(body))) for _ in range(num)]
    await asyncio.sleep(2)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    return ["left"] * num


async def cases(post: Post, vocab_size: int, only: str) -> dict[str, Callable[[], Any]]:
    """Return what to send, by name. Bodies that are refused have been read and parsed as well."""
    ids = [(i * 7919) % vocab_size for i in range(1 << 20)]
    text = "The quick brown fox jumps over the lazy dog. " * 200_000
    tool = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
    chat = "/v1/chat/completions"
    one = [{"role": "user", "content": "Tell me a story."}]

    def many(num: int, path: str, body: dict[str, Any]) -> Callable[[], Any]:
        encoded = orjson.dumps(body)
        return lambda: asyncio.gather(*(post(path, encoded) for _ in range(num)))

    def completion(**body: Any) -> Callable[[], Any]:
        return many(1, "/v1/completions", {"max_tokens": 4, **body})

    table: dict[str, Callable[[], Any]] = {
        "ids 7 MiB": completion(prompt=ids),
        "ids 7 MiB truncated": completion(prompt=ids, truncate_prompt_tokens=64),
        "1024 prompts of ids": completion(prompt=[ids[i : i + 4] for i in range(1024)], max_tokens=1),
        "1024 prompts of text": completion(prompt=[text[:20]] * 1024, max_tokens=1),
        "text 8 MiB": completion(prompt=text[: 8 << 20][:-200]),
        "text 1 MiB": completion(prompt=text[: 1 << 20]),
        "text 8 kB": completion(prompt=text[:8000]),
        "empty lists 4 MiB": completion(prompt="x", junk=[[]] * (1 << 20)),
        "strings 4 MiB": completion(prompt="x", junk=["a"] * (1 << 20)),
        "40 at once": many(40, "/v1/completions", {"prompt": text[:1000], "max_tokens": 4}),
        "256 at once": many(256, "/v1/completions", {"prompt": text[:100], "max_tokens": 4}),
        "256 streams": many(256, "/v1/completions", {"prompt": "x", "max_tokens": 12, "stream": True}),
        "256 chats": many(256, chat, {"messages": one, "max_tokens": 6, "stream": True}),
        "256 logprobs": many(256, "/v1/completions", {"prompt": "x", "max_tokens": 6, "stream": True, "logprobs": 5}),
        "256 schemas": many(256, chat, {"messages": one, "max_tokens": 6, "response_format": {"type": "json_object"}}),
        "256 leave": lambda: leave(post, 256, chat, {"messages": one, "max_tokens": 200, "stream": True}),
        "n 128": completion(prompt=text[:200], n=128, max_tokens=4),
        "all biases": completion(prompt="x", logit_bias={str(i): 1 for i in range(vocab_size)}),
        "allowed ids": completion(prompt="x", allowed_token_ids=list(range(vocab_size))),
        "bad words": completion(prompt="x", bad_words=["word" * 60] * 64),
        "logprobs": completion(prompt=text[:200], max_tokens=30, n=16, logprobs=20),
        "prompt logprobs": completion(prompt=text[:8000], prompt_logprobs=20),
        "echo logprobs": completion(prompt=text[:8000], echo=True, logprobs=20),
        "10,000 messages": many(1, chat, {"messages": one * 10_000, "max_tokens": 2}),
        "200,000 messages": many(1, chat, {"messages": [{"role": "user", "content": "x"}] * 200_000}),
        "tools": many(1, chat, {"messages": one, "max_tokens": 4, "tools": [
            {"type": "function", "function": {"name": f"f{i}", "parameters": tool}} for i in range(100)]}),
        "schema": completion(prompt="x", structured_outputs={"json": tool}),
        "choice": completion(prompt="x", structured_outputs={"choice": [f"choice {i}" for i in range(4000)]}),
        "responses": many(40, "/v1/responses", {"input": text[:200], "max_output_tokens": 16, "stream": True}),
        "messages": many(40, "/v1/messages", {"messages": one, "max_tokens": 16, "stream": True}),
        "tokenize 8 MiB": many(1, "/tokenize", {"prompt": text[: 8 << 20][:-200]}),
        "tokenize 1 MiB": many(1, "/tokenize", {"prompt": text[: 1 << 20]}),
        "tokenize strings": many(1, "/tokenize", {"prompt": text[:400_000], "return_token_strs": True}),
        "detokenize 7 MiB": many(1, "/detokenize", {"tokens": ids}),
        "many errors": many(64, "/v1/completions", {"prompt": "x", "temperature": -1}),
    }  # fmt: skip
    return {name: case for name, case in table.items() if only in name}


def worst_of(log: str) -> tuple[list[list[float]], Counter[str]]:
    """Return holds as (seconds, CPU seconds of the loop, of all threads), the longest first, and where the loop was.

    A hold with little CPU time is the machine's; with little of the loop's but much of others' perhaps the GIL's.
    """
    lines = log.splitlines()
    places = Counter(line.removeprefix("PLACE ") for line in lines if line.startswith("PLACE"))
    held = [[float(number) for number in line.split()[1:]] for line in lines if line.startswith("HELD")]
    return sorted(held, key=lambda hold: -hold[1]), places


async def measure(url: str, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Send every case to the server at `url`, and return what the watchdog wrote meanwhile, by case."""
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers) as session:

        async def post(path: str, body: bytes) -> int:
            async with session.post(path, data=body) as response:
                await response.read()
                return response.status

        await post("/v1/completions", orjson.dumps({"prompt": "warm up", "structured_outputs": {"regex": "a+"}}))
        results: dict[str, Any] = {}
        for name, case in (await cases(post, args.vocab_size, args.only)).items():
            await asyncio.sleep(0.3)
            begin, started = log.stat().st_size, time.monotonic()
            statuses = Counter(await case())
            await asyncio.sleep(0.1)
            held, places = worst_of(log.read_bytes()[begin:].decode())
            seconds = time.monotonic() - started
            own = [hold for hold in held if hold[1] > HOLD_S]
            worst_ms = round(held[0][1] * 1e3) if held else 0
            results[name] = {"own_holds": len(own), "own_worst_ms": worst_ms, "places": dict(places.most_common(4))}
            shown = " ".join("/".join(f"{number * 1e3:.0f}" for number in hold) for hold in held[:3])
            print(f"{name:22} {seconds:6.2f} s {dict(statuses)} {len(own):3} own of {len(held):3} holds: {shown} ms")
            for place, count in places.most_common(4):
                print(f"{'':24}{count:3} {place}")
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, help="of the server that it starts (default: a free one)")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--log", type=Path, help="keep what the watchdog writes in this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder) / "holds"
        log.touch()
        command = (sys.executable, "-c", CHILD.format(hold_s=HOLD_S), str(log))
        flags = (args.model, "--disable-access-log", "--disable-log-stats", "--log-level", "warning")
        with ServerProcess(*flags, port=args.port, command=command) as server:
            results = asyncio.run(measure(server.url, args, log))
    worst = max(result["own_worst_ms"] for result in results.values())
    print(json.dumps({"hold_ms": HOLD_S * 1e3, "own_worst_ms": worst, "cases": results}))


if __name__ == "__main__":
    main()
