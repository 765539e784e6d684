"""A scripted engine, tokenizer and template behind the real HTTP application on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import orjson
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from kunserve.api.app import create_app
from kunserve.api.wire.backend import ApiSettings, ModelInfo, Template, TextTokenizer
from kunserve.api.wire.grammars import Grammars
from kunserve.engine.request import Output, Request
from kunserve.engine.schedule.waiting import Waiting
from kunserve.engine.text.live import replay
from kunserve.engine.text.stream import Sink
from kunserve.errors import InvalidRequestError, KunServeError
from kunserve.observe.gauges import DeviceStats, EngineStats
from kunserve.observe.metrics import Metrics
from kunserve.sampling import FinishReason

if TYPE_CHECKING:
    from kunserve.observe.tracer import Tracer

MODEL = ModelInfo(served_names=("tiny", "org/tiny"), max_model_len=64, root="/models/tiny", created=1234)
BOS = 1
DEVICES = (DeviceStats("cpu:0", 6, 3, 1), DeviceStats("cpu:1", 0, 0, 0, state="lost"))
STATS = EngineStats(2, 3, num_blocks=40, num_used_blocks=10, block_size=16, devices=DEVICES)

Client = TestClient[web.Request, web.Application]


class Waited(Protocol):
    """What a script waits for: an event, for instance."""

    async def wait(self) -> object:
        """Return when it has happened."""


ROUNDS_OF_A_STEP = 10  # of the event loop: enough to send each output before the next comes

Script = Callable[[Request], Iterable[Output | BaseException | Waited]]


class CharTokenizer:
    """A token is an ASCII character; 1 begins a text."""

    vocab_size = 128

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [min(ord(c), 127) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i != BOS or not skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def shown_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        return b"" if skip_special_tokens and token_id == BOS else self.token_bytes(token_id)

    @property
    def strips_space(self) -> bool:
        return False


class BracketTemplate:
    """`[role:content]` for each message, and what else it was given."""

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        if any(message["role"] == "alien" for message in messages):
            raise InvalidRequestError("unknown role: alien", param="messages")
        text = "".join(f"[{m['role'][0]}:{m['content']}]" for m in messages)
        return text + "".join(map(str, kwargs.values())) + ">" * add_generation_prompt


BRACKETS = BracketTemplate()


def say(text: str, reason: FinishReason | None = FinishReason.LENGTH) -> list[Output]:
    """One output per character, the last with `reason`."""
    last = len(text) - 1
    return [Output(c, (ord(c),), (), reason if i == last else None) for i, c in enumerate(text)]


def usage_of(num_prompt_tokens: int, num_tokens: int) -> dict[str, Any]:
    """What OpenAI's clients are told of an answer without a cached prefix."""
    total = num_prompt_tokens + num_tokens
    usage: dict[str, Any] = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}
    return {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


class FakeEngine:
    """Gives each request what `script` says (an event: wait for it), then waits for ever."""

    def __init__(self, script: Script = lambda request: say("ok")) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.submitted: asyncio.Queue[str] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()
        self.refusal: KunServeError | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.is_ready = True
        self.illness: str | None = None
        self.infirmity: str | None = None
        self.eos_token_ids: tuple[int, ...] = ()  # that end what is replayed

    def submit_to(self, request: Request, sink: Sink) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.submitted.put_nowait(request.request_id)
        self._tasks[request.request_id] = asyncio.create_task(self._answer(request, sink))

    async def _answer(self, request: Request, sink: Sink) -> None:
        for item in self.script(request):
            for _ in range(ROUNDS_OF_A_STEP):
                await asyncio.sleep(0)
            if isinstance(item, BaseException):
                sink.fail(cast(KunServeError, item))
                return
            if isinstance(item, Output):
                sink.put(item)
            else:
                await item.wait()

    async def replay(self, request: Request, token_ids: Sequence[int]) -> Output:
        return await replay(request, token_ids, None, self.eos_token_ids)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.put_nowait(request_id)
        self._tasks[request_id].cancel()

    async def ended(self) -> None:
        """Return when nothing is on its way any more."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def stats(self) -> EngineStats:
        return STATS

    def waiting(self, owner: str | None = None) -> Waiting:
        return Waiting(STATS.num_waiting) if owner is None else Waiting()

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        return {"epoch": 0, "groups": [{"id": 0, "stages": [[0, 30]]}]}

    async def drop(self, group_ids: Sequence[int] | None, *, is_forced: bool = False) -> dict[str, Any]:
        return {"dropped": group_ids, "is_forced": is_forced}

    async def restore(self, group_ids: Sequence[int] | None) -> dict[str, Any]:
        return {"restored": group_ids}

    async def remove_device(self, index: int, drain_s: float) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        return {"removed": index, "drain_s": drain_s}

    async def add_device(self, index: int) -> dict[str, Any]:
        return {"added": index}

    def health(self) -> str | None:
        return self.illness

    def degraded(self) -> str | None:
        return self.infirmity


class PlainServer(TestServer):
    """As in production: an AppRunner without further arguments (aiohttp's own test server adds some)."""

    async def _make_runner(self, **kwargs: Any) -> web.AppRunner:
        return web.AppRunner(self.app, access_log=None)


def make_app(
    engine: FakeEngine,
    settings: ApiSettings | None = None,
    model: ModelInfo = MODEL,
    tokenizer: TextTokenizer | None = None,
    template: Template | None = BRACKETS,
    grammars: Grammars | None = None,
    tracer: Tracer | None = None,
) -> web.Application:
    """The application on `engine`."""
    metrics = Metrics(model.name, model.max_model_len, engine.stats)
    tokenizer = tokenizer or CharTokenizer()
    return create_app(engine, tokenizer, template, model, metrics, settings or ApiSettings(), grammars, tracer)


@asynccontextmanager
async def serving(
    engine: FakeEngine,
    settings: ApiSettings | None = None,
    model: ModelInfo = MODEL,
    tokenizer: TextTokenizer | None = None,
    template: Template | None = BRACKETS,
    grammars: Grammars | None = None,
) -> AsyncIterator[Client]:
    """A client of the application on `engine`."""
    app = make_app(engine, settings, model, tokenizer, template, grammars)
    async with TestClient(PlainServer(app)) as client:
        yield client


async def error_of(response: ClientResponse) -> dict[str, Any]:
    """The error object, after checking that it is shaped like OpenAI's."""
    assert response.content_type == "application/json"
    body = orjson.loads(await response.read())
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status
    return error


async def events_of(response: ClientResponse) -> list[Any]:
    """All events of a stream, JSON parsed; the end mark checked and left out."""
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    text = (await response.read()).decode()
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [orjson.loads(line.removeprefix("data: ")) for line in lines]
