"""A worker's answers are those of a server without workers, and it leaves nothing in the engine when it goes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import error_of, serving
from remote_fakes import TOKENIZER, TokenEngine, joined
from structures import VOCABULARY

from kunserve.api.remote.messages import Reserve
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.context import OPERATED
from kunserve.api.wire.grammars import Grammars
from kunserve.engine.request import Request
from kunserve.engine.schedule.waiting import Waiting
from kunserve.errors import EngineError, OverloadedError
from kunserve.sampling import FinishReason, SampledToken, TokenLogprobs

HI = [{"role": "user", "content": "hi"}]
KEYS = ApiSettings(api_keys=("k",), admin_keys=("admin",), max_body_bytes=4096)

Asked = tuple[str, str, Any, dict[str, str]]  # method, path, JSON or text, headers


def post(path: str, body: Any, **headers: str) -> Asked:
    return "POST", path, body, {"X-Request-ID": "r", "Authorization": "Bearer k", **headers}


def get(path: str, **headers: str) -> Asked:
    return "GET", path, None, {"X-Request-ID": "r", "Authorization": "Bearer k", **headers}


ADMIN = {"Authorization": "Bearer admin"}
COVERING: tuple[Asked, ...] = (
    post("/v1/completions", {"prompt": "x", "max_tokens": 9}),
    post("/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": True}),
    post("/v1/completions", {"prompt": ["x", [3, 4]], "max_tokens": 9, "n": 2, "logprobs": 1, "echo": True}),
    post("/v1/completions", {"prompt": "x", "n": 3, "stream": True, "logprobs": 1}),
    post("/v1/completions", {"prompt": "x", "prompt_logprobs": 1}),
    post("/v1/completions", {"prompt": "x", "stop": ["ll"]}),
    post("/v1/completions", {"prompt": "x", "stop": ["ll"], "include_stop_str_in_output": True, "stream": True}),
    post("/v1/completions", {"prompt": "x", "stop": "zz", "stream": True, "stream_options": {"include_usage": True}}),
    post("/v1/chat/completions", {"messages": HI}),
    post("/v1/chat/completions", {"messages": HI, "stream": True, "n": 2}),
    post("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 1}),
    post("/v1/chat/completions", {"messages": [{"role": "alien", "content": "hi"}]}),
    post("/v1/messages", {"messages": HI, "max_tokens": 9}),
    post("/v1/messages", {"messages": HI, "max_tokens": 9, "stream": True}),
    post("/v1/messages/count_tokens", {"messages": HI}),
    post("/v1/responses", {"input": "hi"}),
    post("/v1/responses", {"input": "hi", "stream": True}),
    post("/v1/responses", {"input": "hi", "previous_response_id": "resp_none"}),
    post("/tokenize", {"prompt": "hello"}),
    post("/detokenize", {"tokens": [104, 105]}),
    get("/v1/models"),
    get("/v1/models/none"),
    get("/tokenizer_info"),
    get("/health"),
    get("/ready"),
    get("/load"),
    get("/kunserve/state"),
    get("/kunserve/none"),
    get("/v1/completions"),
    ("HEAD", "/metrics", None, {"X-Request-ID": "r"}),
    ("OPTIONS", "/v1/completions", None, {"X-Request-ID": "r", "Access-Control-Request-Method": "POST"}),
    get("/kunserve/state", Origin="http://x"),
    post("/kunserve/drop", {}, **ADMIN),
    post("/kunserve/drop", {"groups": "x"}, **ADMIN),
    post("/kunserve/drop", {}),
    post("/kunserve/restore", {"groups": [1]}, **ADMIN),
    post("/kunserve/devices/0/remove", {"drain_s": 1}, **ADMIN),
    post("/kunserve/devices/7/add", {}, **ADMIN),
    post("/kunserve/burst", {"requests": 2, "rate": 100}, **ADMIN),
    post("/v1/completions", {"prompt": "x"}, Authorization="Bearer wrong"),
    get("/kunserve/state", Authorization="Bearer wrong"),
    post("/v1/completions", "{"),
    post("/v1/completions", []),
    post("/v1/completions", {"prompt": "x", "max_tokens": "many"}),
    post("/v1/completions", {"prompt": "x" * 100}),
    post("/v1/completions", {"prompt": "x" * 5000}),
    post("/v1/completions", {"prompt": "x"}, **{"Content-Encoding": "gzip"}),
)


def hello(request: Request, text: str = "hello") -> list[SampledToken]:
    """A text, with log-probabilities if they are asked for."""
    has_logprobs = request.params.num_logprobs is not None
    if request.params.num_prompt_logprobs is not None:
        request.prompt_logprobs = [TokenLogprobs(i, -0.3, ((8, -0.4),), 2) for i in request.prompt_token_ids[1:]]
    return [SampledToken(i, TokenLogprobs(i, -0.1, ((7, -0.2),)) if has_logprobs else None) for i in text.encode()]


def plain(text: str) -> str:
    """An answer without what is drawn, and without times."""
    text = re.sub(r'"(created|created_at|completed_at|seconds|now_s)":[0-9.]+', r'"\1":0', text)
    return re.sub(r"(msg|rs|fc|item|call)_[0-9a-zA-Z]+", r"\1", text)


async def told(request: Callable[..., Any], asked: Asked) -> tuple[int, str, dict[str, str]]:
    method, path, body, headers = asked
    form = {"data": body} if isinstance(body, str) else {"json": body} if body is not None else {}
    async with request(method, path, headers=headers, **form) as response:
        text = (await response.read()).decode()
        named = {name: value for name, value in response.headers.items() if name not in ("Date", "Content-Length")}
        return response.status, plain(text) if path != "/metrics" else "", named


@pytest.mark.parametrize("asked", COVERING, ids=lambda asked: f"{asked[0]} {asked[1]} {str(asked[2])[:60]}")
async def test_answers_are_the_same_as_without_workers(asked: Asked, tmp_path: Path) -> None:
    async with serving(TokenEngine(hello), KEYS, tokenizer=TOKENIZER) as client:
        expected = await told(client.request, asked)
    async with joined(TokenEngine(hello), tmp_path, KEYS) as server:
        worker = await server.worker()
        assert await told(worker.client.request, asked) == expected


async def test_a_stop_string_ends_the_request_in_the_engine(tmp_path: Path) -> None:
    engine = TokenEngine(lambda request: [*hello(request), asyncio.Event()])
    async with joined(engine, tmp_path) as server:
        worker = await server.worker()
        answer = await worker.client.post("/v1/completions", json={"prompt": "x", "stop": ["ell"]})
        [choice] = (await answer.json())["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("h", "stop", "ell")
        async with asyncio.timeout(30):
            await engine.aborted.get()
    assert engine.reasons == [FinishReason.STOP]


async def test_errors_of_the_engine_are_told(tmp_path: Path) -> None:
    engine = TokenEngine(lambda request: [*hello(request), EngineError("a step failed")])
    async with joined(engine, tmp_path) as server:
        worker = await server.worker()
        assert (await error_of(await worker.client.post("/v1/completions", json={"prompt": "x"})))["code"] == 500
        streamed = await worker.client.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert b"a step failed" in await streamed.read()
        engine.refusal = OverloadedError("full", retry_after_s=7)
        for stream in (False, True):  # before anything is told
            refused = await worker.client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert (await error_of(refused))["code"] == 503 and refused.headers["Retry-After"] == "7"


async def test_the_queue_is_one_for_all_workers(tmp_path: Path) -> None:
    engine = TokenEngine(lambda request: [asyncio.Event()])
    engine.waiting = lambda owner=None: Waiting(len(engine.requests))  # type: ignore[method-assign]
    async with joined(engine, tmp_path, ApiSettings(max_num_queued_reqs=2)) as server:
        one, two = await server.worker(), await server.worker()
        tasks = [asyncio.create_task(w.client.post("/v1/completions", json={"prompt": "x"})) for w in (one, two)]
        for _ in tasks:
            await engine.submitted.get()
        for worker in (one, two):
            refused = await worker.client.post("/v1/completions", json={"prompt": "x"})
            assert (await error_of(refused))["message"] == "The queue is full: 2 requests are waiting."
            assert refused.headers["Retry-After"] == "1"
        ids = [request.request_id for request in engine.requests]
        assert len(set(ids)) == 2
        assert b'reason="queue_full"} 2.0' in server.app[OPERATED].metrics.render()
        for task in tasks:
            task.cancel()
        assert sorted([await engine.aborted.get(), await engine.aborted.get()]) == sorted(ids)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_a_worker_that_is_lost_leaves_nothing(tmp_path: Path) -> None:
    engine = TokenEngine(lambda request: [*hello(request), asyncio.Event()])
    settings = ApiSettings(max_num_queued_reqs=5)
    async with joined(engine, tmp_path, settings, Grammars(VOCABULARY)) as server:
        lost, other = await server.worker(), await server.worker()
        body = {"prompt": "x", "stream": True}
        schema = {"structured_outputs": {"choice": ["he", "she"]}}
        mine = asyncio.create_task(lost.client.post("/v1/completions", json={**body, **schema}))
        theirs = await other.client.post("/v1/completions", json=body)
        await mine
        admission = server.app[OPERATED].admission
        await lost.guest.ask(lambda call: Reserve(call, 9999, "", 2, 2))
        lost.guest.body_bytes(5)
        await until(lambda: server.body_bytes == 5)
        with pytest.raises(OverloadedError):
            admission.check_now("", 1, 1)
        lost.host.link.close()
        await until(lost.host.lost.is_set)
        assert lost.host.num_lost == 1
        aborted = await engine.aborted.get()
        assert aborted == next(r.request_id for r in engine.requests if r.constraint is not None)
        assert server.body_bytes == 0
        admission.check_now("", 2, 1)
        assert engine.aborted.empty()
        assert b'"text":"h"' in await theirs.content.readany()
        theirs.close()
