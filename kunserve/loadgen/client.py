"""Send the jobs, time every chunk of every stream, and poll /metrics meanwhile: the load generator's second step."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeVar

import aiohttp
import orjson
from numpy.random import Generator

from kunserve.command.server_url import connection_reason
from kunserve.loadgen.metrics import MetricSeries, poll
from kunserve.loadgen.workload import Job, Span, stream_of
from kunserve.sim.traces import HASHED_TOKENS

T = TypeVar("T")

PROMPT_PURPOSE, SYSTEM_PURPOSE, HASHED_PURPOSE = 9, 10, 11  # streams of random numbers that prompts are drawn from
COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work number night point home water room mother area"
)
WORDS = tuple(COMMON_WORDS.split())

ROUTES = {"ids": "/v1/completions", "text": "/v1/completions", "chat": "/v1/chat/completions"}
Status = Literal["pending", "running", "completed", "cancelled", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Target:
    """The servers to ask, and how. The `urls` are asked in turn."""

    urls: tuple[str, ...]
    model: str
    prompt_mode: Literal["ids", "text", "chat"] = "ids"
    vocabulary: Span = Span(100, 20000)  # noqa: RUF009 (frozen)
    seed: int = 0
    timeout_s: float = 600.0
    concurrency: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """What became of one job; its times are seconds after the start of the run."""

    job: Job
    url: str
    status: Status = "pending"
    failure: str | None = None
    sent_s: float | None = None
    ended_s: float | None = None
    token_s: array[float] = field(default_factory=lambda: array("d"))  # arrival of each chunk that brought tokens
    num_prompt_tokens: int | None = None  # as the server counts
    num_output_tokens: int = 0  # as the server counts, else the number of chunks
    num_cached_tokens: int | None = None  # of the prompt, as the server counts
    text: str = ""  # of the answer, without thoughts and calls


@dataclass(slots=True)
class Recording:
    """What is seen of a run. It is filled as the run goes on, so that an interrupted one keeps what it saw."""

    streams: list[Stream]
    series: list[MetricSeries]
    elapsed_s: float = 0.0

    @classmethod
    def of(cls, jobs: Sequence[Job], urls: Sequence[str]) -> Recording:
        """Return the recording of a run that has not begun: the jobs, dealt to the URLs in turn."""
        numbers = [i if job.chat is None else job.chat for i, job in enumerate(jobs)]
        streams = [Stream(job, urls[number % len(urls)]) for number, job in zip(numbers, jobs, strict=True)]
        return cls(streams, [MetricSeries(url) for url in urls])


async def run(recording: Recording, target: Target) -> None:
    """Send every job of the recording at its time and wait for all answers; to be cancelled to stop early."""
    start_s = perf_counter()  # uvloop's own time stands still within an iteration and counts whole milliseconds

    def clock() -> float:
        return perf_counter() - start_s

    # A new connection per request: one that the server closes while it is being reused would look like a failure.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    slots = asyncio.Semaphore(target.concurrency or len(recording.streams) + 1)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=target.headers) as session:
        pollers = [asyncio.create_task(poll(session, series, clock)) for series in recording.series]
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(recording.streams):
                    if stream.job.turn:
                        continue  # it follows the one before it
                    if (delay_s := stream.job.at_s - clock()) > 0:
                        await asyncio.sleep(delay_s)
                    group.create_task(_send_chat(session, target, recording.streams, index, slots, clock))
        finally:
            recording.elapsed_s = clock()
            for poller in pollers:
                poller.cancel()
            await asyncio.gather(*pollers, return_exceptions=True)


async def first_model(url: str, headers: dict[str, str]) -> str:
    """Return the name of the first model that the server lists; raise ValueError when there is none."""
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            reason = await _reason(response) if response.status != 200 else "something else"
            answer = await response.read()
    except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
        raise ValueError(f"cannot reach {url}: {connection_reason(error)}") from error
    try:
        return str(orjson.loads(answer)["data"][0]["id"])
    except (LookupError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"no list of models at {url}/v1/models but {reason}: name one with --model") from error


def request_body(target: Target, job: Job, index: int, history: Sequence[dict[str, str]] = ()) -> bytes:
    """Return the JSON of one request; its prompt follows from the seed and the index, and its history from before."""
    rng = stream_of(target.seed, PROMPT_PURPOSE, index)
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": job.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.prompt_mode == "ids":
        span = target.vocabulary
        body["prompt"] = _draw(
            target, job, rng, lambda r, n: r.integers(span.low, span.high, n, endpoint=True).tolist()
        )
    else:  # a common word is one token in most vocabularies
        text = " ".join(_draw(target, job, rng, _words))
        is_chat = target.prompt_mode == "chat"
        body |= {"messages": [*history, {"role": "user", "content": text}]} if is_chat else {"prompt": text}
    return orjson.dumps(body | target.extra_body)


def _draw(target: Target, job: Job, rng: Generator, draw: Callable[[Generator, int], list[T]]) -> list[T]:
    """Draw a job's prompt: for equal hash ids of a trace the same, and what these do not cover from `rng`."""
    prompt: list[T] = []
    for hash_id in job.hash_ids:
        prompt += draw(stream_of(target.seed, HASHED_PURPOSE, hash_id), HASHED_TOKENS)
    prompt += draw(rng, max(0, job.num_prompt_tokens - len(prompt)))
    return prompt[: job.num_prompt_tokens]


def _words(rng: Generator, number: int) -> list[str]:
    return [WORDS[i] for i in rng.integers(len(WORDS), size=number)]


async def _send_chat(
    session: aiohttp.ClientSession,
    target: Target,
    streams: Sequence[Stream],
    first: int,
    slots: asyncio.Semaphore,
    clock: Callable[[], float],
) -> None:
    """Run a job, and all turns of its chat after it as long as they are answered."""
    job, history = streams[first].job, list[dict[str, str]]()
    if job.num_system_tokens:
        rng = stream_of(target.seed, SYSTEM_PURPOSE, job.system)
        history.append({"role": "system", "content": " ".join(_words(rng, job.num_system_tokens))})
    for index in range(first, len(streams)):
        stream = streams[index]
        if index > first and (job.chat is None or stream.job.chat != job.chat):
            return
        body = request_body(target, stream.job, index, history)
        await _send(session, target, stream, body, slots, clock)
        if stream.status != "completed":
            return
        messages = orjson.loads(body)["messages"] if target.prompt_mode == "chat" else []
        history = [*messages, {"role": "assistant", "content": stream.text}]


async def _send(
    session: aiohttp.ClientSession,
    target: Target,
    stream: Stream,
    body: bytes,
    slots: asyncio.Semaphore,
    clock: Callable[[], float],
) -> None:
    """Run one job to its end, whatever it is; only cancellation escapes."""
    async with slots:
        url = stream.url + ROUTES[target.prompt_mode]
        stream.status, stream.sent_s = "running", clock()
        try:
            async with (
                asyncio.timeout(target.timeout_s),
                session.post(url, data=body, headers={"Content-Type": "application/json"}) as response,
            ):
                stream.failure = (
                    await _read(response, stream, clock) if response.status == 200 else await _reason(response)
                )
        except TimeoutError:
            stream.failure = f"timeout: no end after {target.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            stream.failure = f"connection: {type(error).__name__}: {connection_reason(error)}"
        except asyncio.CancelledError:
            stream.status = "interrupted"
            raise
        finally:
            stream.ended_s = clock()
            stream.num_output_tokens = stream.num_output_tokens or len(stream.token_s)
            if stream.status == "running":
                stream.status = "failed" if stream.failure else "completed"


async def _read(response: aiohttp.ClientResponse, stream: Stream, clock: Callable[[], float]) -> str | None:
    """Follow a stream to its end; return why it failed, if it did."""
    finish_reason: str | None = None
    async for data in _events(response.content):
        if data == b"[DONE]":
            return None if finish_reason or stream.token_s else "ended without a token"
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            return f"malformed event: {data[:80]!r}"
        if error := event.get("error"):
            return f"error event: {error.get('message') if isinstance(error, dict) else error}"
        if usage := event.get("usage"):
            stream.num_prompt_tokens = usage.get("prompt_tokens")
            stream.num_output_tokens = usage.get("completion_tokens") or 0
            stream.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in event.get("choices") or ():
            finish_reason = choice.get("finish_reason") or finish_reason
            if _has_token(choice) or (finish_reason and not stream.token_s):
                stream.token_s.append(clock())
            stream.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if finish_reason in ("error", "abort"):
            return f"finish_reason {finish_reason}"
        if stream.job.cancel_after is not None and len(stream.token_s) >= stream.job.cancel_after:
            stream.status = "cancelled"
            response.close()
            return None
    return None if finish_reason else "ended early: no finish_reason and no [DONE]"


def _has_token(choice: dict[str, Any]) -> bool:
    """Tell whether a chunk brought a token: one may have no text of its own, a chat's first chunk brings none."""
    if (delta := choice.get("delta")) is not None:
        return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))
    return bool(choice.get("text")) or not choice.get("finish_reason")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the payloads of the `data:` lines of a server-sent event stream."""
    rest = b""
    async for received in content.iter_any():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _reason(response: aiohttp.ClientResponse) -> str:
    """Return `HTTP 503: message` for an error answer, whatever its shape; of a page for browsers only the status."""
    text = (await response.text(errors="replace"))[:2000]
    try:
        answer = orjson.loads(text)
        error = answer.get("error", answer)
        text = str(error.get("message") or error.get("detail") or error)
    except (orjson.JSONDecodeError, AttributeError):
        if text.lstrip().startswith("<"):
            text = response.reason or "a web page"
    return f"HTTP {response.status}: {' '.join(text.split())[:160]}"
