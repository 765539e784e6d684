"""Stop in the middle of many bodies: the server's memory stays within its bound, and others are served meanwhile.

    python -m kunserve.server smollm2-135m --port 8200 --max-body-memory 256MiB &
    python scripts/check/stopped_bodies.py http://127.0.0.1:8200 --pid $!

2,000 connections each announce 8 MiB, send `--sent-mib` of them as fast as they are taken, and stop; whoever is
answered stays connected. Meanwhile others ask for completions, one with a short body after another and one with a
large body after another, on new connections. Both processes need as many open files as there are connections
(`ulimit -n`). Ends with one JSON line; sizes in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from flood import resident_bytes

MIB = 1 << 20
PIECE = b" " * (64 << 10)


@dataclass(slots=True)
class Others:
    """Answers to clients that finish what they begin: (status, seconds)."""

    answers: list[tuple[str, float]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        slowest = max((seconds for _, seconds in self.answers), default=0.0)
        return {"by_status": dict(Counter(status for status, _ in self.answers)), "slowest_s": round(slowest, 2)}


def head_of(host: str, num_bytes: int, key: str | None) -> bytes:
    """Return the head of a completion with a body of so many bytes."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    return f"{head}Content-Length: {num_bytes}\r\n\r\n".encode()


def status_of(answer: asyncio.Task[bytes]) -> str:
    """Return what an answer's head says; "none" if there is none yet."""
    if not answer.done():
        return "none"
    fields = answer.result().lower().split(b"\r\n")
    has_retry = any(line.startswith(b"retry-after: ") for line in fields)
    return fields[0][9:12].decode() + (" with Retry-After" if has_retry else "")


async def stop_in_the_middle(
    host: str, port: int, head: bytes, num_bytes: int, statuses: list[str], is_over: asyncio.Event
) -> None:
    """Send so many bytes of a body, and nothing more; note how it was answered, and stay."""
    place = len(statuses)
    statuses.append("connecting")
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        statuses[place] = type(error).__name__
        return
    answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    statuses[place] = "sending"
    try:
        writer.write(head)
        for _ in range(num_bytes // len(PIECE)):
            if answer.done():
                break
            writer.write(PIECE)
            await writer.drain()
        statuses[place] = "none"
        over = asyncio.create_task(is_over.wait())
        await asyncio.wait([answer, over], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        statuses[place] = status_of(answer)
        await is_over.wait()
    except (OSError, asyncio.IncompleteReadError) as error:
        is_answered = answer.done() and answer.exception() is None  # before the connection was cut
        statuses[place] = status_of(answer) if is_answered else type(error).__name__
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        writer.close()


async def ask_again_and_again(host: str, port: int, message: bytes, others: Others) -> None:
    """Send one whole request after another, each on a connection of its own."""
    while True:
        started_s = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(message)
            status = (await reader.readuntil(b"\r\n\r\n"))[9:12].decode()
            writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
        others.answers.append((status, time.perf_counter() - started_s))
        await asyncio.sleep(0.2)


async def ask_until_told(connection: Connection, host: str, port: int, messages: Sequence[bytes]) -> None:
    """Ask each message again and again; send what came of them when anything comes through the pipe."""
    everyone = [Others() for _ in messages]
    asking = [
        asyncio.create_task(ask_again_and_again(host, port, *pair)) for pair in zip(messages, everyone, strict=True)
    ]
    while not connection.poll():
        await asyncio.sleep(0.05)
    for task in asking:
        task.cancel()
    connection.send([others.report() for others in everyone])


def others_main(connection: Connection, host: str, port: int, messages: Sequence[bytes]) -> None:
    """Run in a process of its own, so that its clients do not wait for those who stop."""
    asyncio.run(ask_until_told(connection, host, port, messages))


async def watch(pid: int, seen: list[int]) -> None:
    while True:
        seen.append(resident_bytes(pid))
        await asyncio.sleep(0.02)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    url = urlsplit(args.url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    body = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True}
    small = json.dumps(body).encode()
    large = small + b" " * (args.large_kib << 10)
    mine, theirs = Pipe()
    messages = [head_of(host, len(one), args.key) + one for one in (small, large)]
    others = Process(target=others_main, args=(theirs, host, port, messages))
    others.start()
    await asyncio.sleep(args.seconds_before)
    before, seen = resident_bytes(args.pid), list[int]()
    watching = asyncio.create_task(watch(args.pid, seen))
    statuses, is_over = list[str](), asyncio.Event()
    head, num_bytes = head_of(host, args.body_mib * MIB, args.key), int(args.sent_mib * MIB)
    started_s = time.perf_counter()
    stopped = [
        asyncio.create_task(stop_in_the_middle(host, port, head, num_bytes, statuses, is_over))
        for _ in range(args.connections)
    ]
    await asyncio.sleep(0)
    while any(status in ("connecting", "sending") for status in statuses):
        await asyncio.sleep(0.05)
    sent_s = time.perf_counter() - started_s
    await asyncio.sleep(args.seconds)
    by_status, held = dict(Counter(statuses)), resident_bytes(args.pid)
    is_over.set()
    await asyncio.gather(*stopped)
    await asyncio.sleep(2.0)
    watching.cancel()
    mine.send("enough")
    small_report, large_report = await asyncio.to_thread(mine.recv)
    others.join()
    return {
        "connections": args.connections,
        "sent_mib_each": args.sent_mib,
        "sending_s": round(sent_s, 1),
        "stopped_by_status": by_status,
        "resident_before": before // MIB,
        "resident_most": max(seen) // MIB,
        "resident_at_the_end": held // MIB,
        "resident_after": resident_bytes(args.pid) // MIB,
        "small_bodies_of_others": small_report,
        "large_bodies_of_others": large_report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--body-mib", type=int, default=8, help="what each connection announces")
    parser.add_argument("--sent-mib", type=float, default=7.0, help="what it sends of that")
    parser.add_argument("--large-kib", type=int, default=512, help="the larger of the other clients' bodies")
    parser.add_argument("--seconds-before", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="for which all stay after the last has stopped")
    parser.add_argument("--key")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(asyncio.run(measure(args))))


if __name__ == "__main__":
    main()
