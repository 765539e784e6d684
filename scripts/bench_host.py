#!/usr/bin/env python3
"""Measure what the host itself costs per token: a server whose devices compute nothing, and clients that only read.

    python scripts/bench_host.py                                   # 1, 64, 256 streams on 1, 4, 8 devices
    python scripts/bench_host.py --streams 64 --devices 1 --ways engine,completions --seconds 10
    python scripts/bench_host.py --ways completions --devices 1 --workers 2         # HTTP and text elsewhere
    python scripts/bench_host.py --streams 64 --devices 1 --profile 25     # where the loop's time goes, by function

Everything is the server's own but the devices: each hands its work to a thread, which waits for `--step-ms` plus
`--row-us` for each stream of the server, and then knows the next tokens. So the loop is never short of time, and every
token is an event of its own. `engine` has no HTTP: outputs go to sinks that count them. Otherwise clients in other
processes read streams of that route.

Time is CPU time, by thread, so that what else runs on the machine counts little. `loop`: of the thread that serves;
`all`: of all threads of the engine's process; `workers`: of the process of each; `clients`: of the clients' processes.
The parts of a step are of the loop's thread; `rest` is what is left: HTTP, hand-offs to devices, asyncio. Prints a
table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import uvloop
from aiohttp import web
from benchhost.null_machine import NullMachine
from rich.console import Console
from rich.table import Table

from kunserve.api.app import create_app
from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.command.interpreter import set_up_interpreter
from kunserve.command.listen import take_connections
from kunserve.command.worker import Setup
from kunserve.command.workers import Workers
from kunserve.config import DeviceSpec, EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.launch.assemble import assemble
from kunserve.engine.request import Output, Request
from kunserve.engine.text.stream import Sink
from kunserve.engine.text.tokenizer import DUMMY_TEMPLATE, Tokenizer
from kunserve.errors import KunServeError
from kunserve.log import set_up_logging
from kunserve.model.card import resolve_model
from kunserve.model.config import ModelConfig
from kunserve.sampling import SamplingParams
from kunserve.sim.machine import NoWeights

MODEL = "smollm2-135m"  # for its sizes only
PROMPT = "Once upon a time"
NUM_LAYERS = 8  # as many as the longest chain has stages
MAX_MODEL_LEN = 16384  # tokens: no stream ends while it is measured
SETTLE_S = 1.0  # from the first token of the last stream to the first measurement
MAX_STREAMS = 1024
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

# A client as bare as can be: it reads, and counts events, until its stdin is closed.
CLIENT = """
import json, selectors, socket, sys, time
host, port = sys.argv[1].split(":")
path, body, num_streams = sys.argv[2], sys.argv[3].encode(), int(sys.argv[4])
fields = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", "", "")
head = "\\r\\n".join((f"POST {path} HTTP/1.1", *fields))
selector = selectors.DefaultSelector()
selector.register(sys.stdin, selectors.EVENT_READ)
for _ in range(num_streams):
    stream = socket.create_connection((host, int(port)))
    stream.sendall(head.encode() + body)
    selector.register(stream, selectors.EVENT_READ)
num_events, ended = 0, False
while not ended:
    for key, _ in selector.select():
        if key.fileobj is sys.stdin:
            ended = True
        else:
            data = key.fileobj.recv(1 << 16)
            num_events += data.count(b"data: ")
            if not data:
                selector.unregister(key.fileobj)
print(json.dumps({"events": num_events, "cpu_s": time.process_time()}))
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One measurement: so many streams, read in one way, on so many devices."""

    way: str  # "engine", or a key of PATHS
    num_streams: int
    num_devices: int
    is_chain: bool
    step_s: float
    seconds: float
    num_clients: int
    num_workers: int  # processes for HTTP and text; 0: they are in the engine's
    num_profiled: int  # functions of the loop's thread to name; 0: none, and figures that are not disturbed


class Unread(Sink):
    """The receiver of outputs where there is no HTTP."""

    def put(self, output: Output) -> None:
        """See `Sink.put`."""

    def put_token(self, text: str, token_id: int) -> None:
        """See `Sink.put_token`."""

    def fail(self, error: KunServeError) -> None:
        """See `Sink.fail`: the engine stops."""


@dataclass(slots=True)
class Spent:
    """What has been spent so far: seconds of CPU, steps and tokens."""

    loop_s: float
    all_s: float
    num_tokens: int
    num_steps: int
    parts_s: dict[str, float]

    def since(self, before: Spent) -> dict[str, Any]:
        """Return microseconds per token and per step, of the time since `before`."""
        num_tokens, num_steps = self.num_tokens - before.num_tokens, self.num_steps - before.num_steps
        loop_s, parts_s = (
            self.loop_s - before.loop_s,
            {part: seconds - before.parts_s[part] for part, seconds in self.parts_s.items()},
        )
        parts_s["rest"] = loop_s - sum(parts_s.values())

        def figures(seconds: float) -> dict[str, float]:
            per_token, per_step = seconds * 1e6 / max(1, num_tokens), seconds * 1e6 / max(1, num_steps)
            return {"us_per_token": round(per_token, 2), "us_per_step": round(per_step, 1)}

        return {
            "tokens": num_tokens,
            "steps": num_steps,
            "loop": figures(loop_s),
            "all": figures(self.all_s - before.all_s),
            "parts": {part: figures(seconds) for part, seconds in parts_s.items()},
        }


class Meter:
    """Times the parts of an engine's steps, on the thread that it serves on."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._num_steps, self._parts_s = engine, 0, dict[str, float]()
        for part, owner, name in (
            ("schedule", engine.scheduler, "schedule"),
            ("arrays", engine.executor, "inputs"),
            ("commit", engine, "_commit"),
            ("publish", engine.publisher, "publish"),
        ):
            self._parts_s[part] = 0.0
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started_s = time.thread_time()
            result = work(*args)
            self._parts_s[part] += time.thread_time() - started_s
            self._num_steps += part == "commit"
            return result

        return timed

    def read(self) -> Spent:
        """Return what has been spent; to be called on the loop's thread."""
        num_tokens = self._engine.metrics.num_generation_tokens
        return Spent(time.thread_time(), time.process_time(), num_tokens, self._num_steps, self._parts_s.copy())


async def serve(setting: Setting) -> dict[str, Any]:
    """Serve streams in this process, and return what they cost."""
    files = resolve_model(MODEL, load_format="dummy")
    model = replace(files.config, num_layers=NUM_LAYERS)
    machine = NullMachine(setting.num_devices, setting.step_s)
    config = EngineConfig(
        MODEL, DeviceSpec("cpu", tuple(range(setting.num_devices))), is_pinned=True,
        pipeline_parallel_size=setting.num_devices if setting.is_chain else 1, max_num_seqs=MAX_STREAMS,
        max_num_batched_tokens=2 * MAX_STREAMS,
    )  # fmt: skip
    tokenizer = Tokenizer.dummy(model.vocab_size, model.eos_token_ids)
    engine, _ = await assemble(machine, model, config, MODEL, MAX_MODEL_LEN, NoWeights, tokenizer)
    set_up_interpreter()
    meter = Meter(engine)
    await engine.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        workers = list[int]()
        if setting.way == "engine":
            submit(engine, tokenizer, setting.num_streams)
            clients = []
        else:
            app = make_app(engine, tokenizer)
            runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            listener = socket.create_server(("127.0.0.1", 0), backlog=MAX_STREAMS)
            stack.callback(listener.close)
            url = "{}:{}".format(*listener.getsockname())
            workers = await open_workers(stack, setting, engine, model, runner, listener)
            clients = [await open_client(stack, setting, url, i) for i in range(setting.num_clients)]
        while engine.num_running < setting.num_streams:
            await asyncio.sleep(0.05)
        await asyncio.sleep(SETTLE_S)
        before_s = cpu_of(workers)
        report = await measure(engine, meter, setting)
        workers_s = [after_s - s for after_s, s in zip(cpu_of(workers), before_s, strict=True)]
        num_tokens = engine.metrics.num_generation_tokens
        read = [json.loads((await client.communicate(b""))[0]) for client in clients]  # closes their stdin: they end
    await asyncio.to_thread(machine.close)
    if workers:
        report["workers_us_per_token"] = [round(s * 1e6 / report["tokens"], 2) for s in workers_s]
    if clients:
        report["tokens_per_event"] = round(num_tokens / sum(r["events"] for r in read), 2)
        report["clients_us_per_token"] = round(sum(r["cpu_s"] for r in read) * 1e6 / num_tokens, 2)
    return report


async def measure(engine: Engine, meter: Meter, setting: Setting) -> dict[str, Any]:
    """Return what the streams that run cost for so many seconds."""
    profile = cProfile.Profile(time.thread_time) if setting.num_profiled else None
    if profile is not None:
        profile.enable()
    before, started_s = meter.read(), time.monotonic()
    await asyncio.sleep(setting.seconds)
    spent, elapsed_s = meter.read().since(before), time.monotonic() - started_s
    if profile is not None:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(setting.num_profiled)
    return {"tokens_per_s": round(spent["tokens"] / elapsed_s), **spent}


def submit(engine: Engine, tokenizer: Tokenizer, num_streams: int) -> None:
    """Begin streams that nobody reads."""
    for number in range(num_streams):
        params = SamplingParams(MAX_MODEL_LEN - 64, temperature=0.0, ignore_eos=True)
        engine.submit_to(Request(f"{number}", tokenizer.encode(PROMPT), params), Unread())


def make_app(engine: Engine, tokenizer: Tokenizer) -> web.Application:
    """Return the API of an engine, as the server has it."""
    template = ChatTemplate(DUMMY_TEMPLATE)
    return create_app(engine, tokenizer, template, model_info(), engine.metrics, ApiSettings(logs_access=False))


def model_info() -> ModelInfo:
    """Return what the API says of the model."""
    return ModelInfo((MODEL,), MAX_MODEL_LEN, MODEL, 0)


async def open_workers(
    stack: AsyncExitStack,
    setting: Setting,
    engine: Engine,
    model: ModelConfig,
    runner: web.AppRunner,
    listener: socket.socket,
) -> list[int]:
    """Take connections, here or in workers, whose process ids are returned."""
    if not setting.num_workers:
        await take_connections(runner, listener, None)
        return []
    settings, eos = ApiSettings(logs_access=False), model.eos_token_ids
    setup = Setup(
        model_info(), settings, None, DUMMY_TEMPLATE, None, model.vocab_size, eos, eos, engine.limits, "warning", False
    )
    workers = Workers(setup, runner, listener.fileno(), setting.num_workers)
    stack.push_async_callback(workers.close)
    await workers.open()
    return workers.pids


def cpu_of(pids: Sequence[int]) -> list[float]:
    """Return the seconds of CPU that processes have used."""
    return [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]


async def open_client(stack: AsyncExitStack, setting: Setting, address: str, number: int) -> asyncio.subprocess.Process:
    """Start a process that reads its share of the streams until its stdin is closed."""
    num_streams = len(range(number, setting.num_streams, setting.num_clients))
    command = (sys.executable, "-S", "-c", CLIENT, address, PATHS[setting.way], body(setting.way), str(num_streams))
    client = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(_kill, client)
    return client


def _kill(client: asyncio.subprocess.Process) -> None:
    if client.returncode is None:
        client.kill()


def body(way: str) -> str:
    """Return what a client sends, as JSON."""
    asked = {"prompt": PROMPT} if way == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    most = {"max_tokens": MAX_MODEL_LEN - 64, "ignore_eos": True, "temperature": 0}
    return json.dumps({"model": MODEL, "stream": True, **most, **asked})


def run(setting: Setting) -> dict[str, Any]:
    """Measure in a process of its own, in which nothing is left of others."""
    command = (sys.executable, __file__, "--one", json.dumps(asdict(setting)))
    report: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return report


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    """Return the results as a table, in microseconds per token, of steps per step."""
    parts = list(dict.fromkeys(part for result in results for part in result["parts"]))
    names = [
        "way",
        "streams",
        "devices",
        "tokens/s",
        "loop",
        "all",
        "workers",
        "clients",
        "loop/step",
        *parts,
        "tokens/event",
    ]
    table = Table(*names, title="CPU time of the host, in us per token")
    for result in results:
        shown = [result["way"], result["num_streams"], result["num_devices"], result["tokens_per_s"]]
        shown += [result["loop"]["us_per_token"], result["all"]["us_per_token"]]
        shown += [" ".join(map(str, result.get("workers_us_per_token", ""))), result.get("clients_us_per_token", "")]
        shown += [result["loop"]["us_per_step"], *(result["parts"][part]["us_per_token"] for part in parts)]
        table.add_row(*map(str, [*shown, result.get("tokens_per_event", "")]))
    return table


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Return all that is to be measured."""
    return [
        Setting(
            way, streams, devices, args.chain, (args.step_ms * 1e3 + args.row_us * streams) / 1e6,
            args.seconds, min(args.clients, streams), args.workers, args.profile,
        )
        for way in args.ways.split(",")
        for devices in map(int, args.devices.split(","))
        for streams in map(int, args.streams.split(","))
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="engine,completions", help="of: engine, completions, chat; with commas")
    parser.add_argument("--streams", default="1,64,256", help="numbers with commas")
    parser.add_argument("--devices", default="1,4,8", help="numbers with commas")
    parser.add_argument("--chain", action="store_true", help="one chain of all devices, instead of a copy on each")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--step-ms", type=float, default=2.0, help="that a device takes for a step, and")
    parser.add_argument("--row-us", type=float, default=100.0, help="for each stream of the server")
    parser.add_argument("--clients", type=int, default=2, help="processes that read")
    parser.add_argument("--workers", type=int, default=0, help="processes for HTTP and text (--api-workers)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="name N functions; spoils the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_up_logging("warning", False)
    if args.one:
        print(json.dumps(uvloop.run(serve(Setting(**json.loads(args.one))))))
        return
    results = list[dict[str, Any]]()
    for setting in settings_of(args):
        results.append({**asdict(setting), **run(setting)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    Console(stderr=True, width=170).print(table_of(results))
    print(json.dumps({"bench": "host", "results": results}))


if __name__ == "__main__":
    main()
