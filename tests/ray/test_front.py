"""The front before servers that die: no client learns of it, whatever it asked for and wherever its answer broke."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp.test_utils import TestClient
from api_fakes import CharTokenizer, Client, FakeEngine, PlainServer, make_app
from front_client import ask

from kunserve.api.wire.backend import ApiSettings
from kunserve.engine.request import Output, Request
from kunserve.ray.broken import Passed, num_choices_of
from kunserve.ray.front import MOST_ATTEMPTS, Front, ReplicaGoneError
from kunserve.ray.prefixes import LOAD_OF_ALL, PIECE, Prefixes, keys_of, ranked
from kunserve.ray.scaling import wanted
from kunserve.ray.upstream import Head, Headers
from kunserve.sampling import FinishReason

ANSWER = "what is said"
ASK = {"prompt": "hi", "max_tokens": 40}


def go_on(request: Request) -> list[Output]:
    """The rest of ANSWER, a character in each output."""
    rest = ANSWER[request.num_output_tokens :]
    return [Output(c, (ord(c),), (), FinishReason.STOP if i == len(rest) - 1 else None) for i, c in enumerate(rest)]


@dataclass
class MortalReplicas:
    """Answers of a real application; each breaks off after the bytes that `lives` has for it, the last do not."""

    client: Client
    lives: list[int]
    asked: list[tuple[str, Any]] = field(default_factory=list)
    seeds: set[str] = field(default_factory=set)

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncGenerator[Head | bytes, None]:
        self.asked.append((path, orjson.loads(body) if body else None))
        told = [(name.decode(), value.decode()) for name, value in headers]
        self.seeds |= {value for name, value in told if name == "X-KunServe-Seed"}
        life = self.lives.pop(0) if self.lives else None
        if life == 0:
            raise ReplicaGoneError("dead before it began")
        async with self.client.request(method, path, headers=told, data=body) as response:
            yield response.status, [(name.lower(), value) for name, value in response.raw_headers]
            whole = await response.read()
        for start in range(0, len(whole), 7):  # cut anywhere
            if life is not None and start >= life:
                raise ReplicaGoneError("dead")
            yield whole[start : start + 7]


@asynccontextmanager
async def front_of(*lives: int) -> AsyncIterator[tuple[Front, MortalReplicas, FakeEngine]]:
    engine = FakeEngine(go_on)
    engine.eos_token_ids = (ord(ANSWER[-1]),)
    app = make_app(engine, ApiSettings(front_keys=("key",)), tokenizer=CharTokenizer())
    async with TestClient(PlainServer(app)) as client:
        replicas = MortalReplicas(client, list(lives))
        yield Front({"tiny": replicas}, "key"), replicas, engine


async def test_a_stream_survives_wherever_its_replicas_die(monkeypatch: Any) -> None:
    monkeypatch.setattr("kunserve.ray.front.FIRST_PAUSE_S", 0.0)
    body = {**ASK, "stream": True}
    async with front_of() as (front, replicas, _):
        whole = await ask(front, "/v1/completions", body)
        assert whole.status == 200 and b"kunserve" not in whole.body and whole.body.endswith(b"[DONE]\n\n")
        num_bytes = len(whole.body) * 2  # with marks
    for life in range(0, num_bytes, 61):
        async with front_of(life, life // 2) as (front, replicas, _):
            told = await ask(front, "/v1/completions", body)
            texts = [orjson.loads(event[6:])["choices"][0]["text"] for event in told.body.split(b"\n\n")[:-2]]
            assert (told.status, "".join(texts), len(replicas.seeds)) == (200, ANSWER, 1)
            assert told.body.count(b'"finish_reason":"stop"') == told.body.count(b"[DONE]") == 1
            resumed = [asked["token_ids"] for path, asked in replicas.asked if path == "/kunserve/resume"]
            assert front.num_resumed == len(resumed)
            assert all(bytes(ids).decode() == ANSWER[: len(ids)] for [ids] in resumed)


async def test_what_nobody_has_seen_is_asked_again_unless_that_does_harm(monkeypatch: Any) -> None:
    monkeypatch.setattr("kunserve.ray.front.FIRST_PAUSE_S", 0.0)
    async with front_of(0, 9) as (front, replicas, _):
        told = await ask(front, "/v1/completions", ASK)
        assert orjson.loads(told.body)["choices"][0]["finish_reason"] == "stop"
        assert [path for path, _ in replicas.asked] == ["/v1/completions"] * 3
    async with front_of(0) as (front, replicas, _):
        told = await ask(front, "/kunserve/drop", {})
        assert (told.status, len(replicas.asked)) == (503, 1)


async def test_an_answer_that_nobody_can_finish_ends_with_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr("kunserve.ray.front.FIRST_PAUSE_S", 0.0)
    async with front_of(500, *[0] * MOST_ATTEMPTS) as (front, replicas, _):
        told = await ask(front, "/v1/completions", {**ASK, "stream": True})
        assert told.status == 200 and b'"code":503' in told.body and told.body.endswith(b"data: [DONE]\n\n")
        assert len(replicas.asked) == 1 + MOST_ATTEMPTS - 1


async def test_a_client_that_leaves_ends_the_work_for_it() -> None:
    async with front_of() as (front, _, engine):
        engine.script = lambda request: [asyncio.Event()]
        stay = asyncio.Event()
        asking = asyncio.create_task(ask(front, "/v1/completions", {**ASK, "stream": True}, stay=stay))
        request_id = await engine.submitted.get()
        stay.set()
        await asking
        assert await engine.aborted.get() == request_id


def test_a_mark_is_found_however_bytes_are_cut() -> None:
    said = b'data: ": kunserve {1}\\n\\n"\n\n'  # no mark: it begins no line
    stream = said + b': kunserve {"choice":0,"token_ids":[1,2],"cached":3}\n\ndata: b\n\n'
    for cut in range(len(stream)):
        passed = Passed()
        assert passed.take(stream[:cut]) + passed.take(stream[cut:]) == said
        asked = orjson.loads(passed.resumption("/v1/completions", {}, 2))
        assert (asked["token_ids"], asked["num_cached_tokens"]) == ([[1, 2], []], [3, 0])
        assert passed.end() == b"data: b\n\n"
    assert [num_choices_of(body) for body in ({}, {"n": 3}, {"prompt": ["a", "b"], "n": 2}, {"prompt": [1]})] == [
        1,
        3,
        4,
        1,
    ]


def test_a_body_goes_where_its_beginning_is_unless_that_replica_is_busy() -> None:
    prefixes, body = Prefixes(), bytes(range(256)) * 4
    prefixes.went(keys_of(body), "a")
    shares = prefixes.shares(keys_of(body + b"x" * 4 * PIECE))
    assert shares == {"a": 0.5} and not prefixes.shares(keys_of(b"y" + body)) and not keys_of(b"short")
    assert ranked({"b": 0, "a": LOAD_OF_ALL / 2 - 1}, shares) == ["a", "b"]
    assert ranked({"b": 0, "a": LOAD_OF_ALL / 2 + 1}, shares) == ["b", "a"]


def test_replicas_come_before_their_undropped_memory_is_full_and_go_when_fewer_would_do() -> None:
    assert [wanted(demands, 2, 2) for demands in ([0.7, 0.8], [0.9, 0.8], [2.4, 1.0], [0.1, 0.1])] == [2, 3, 5, 1]
    assert wanted([0.33, 0.33], 2, 2) == 1 and wanted([0.36, 0.36], 2, 2) == 2  # not to and fro
    assert wanted([], 3, 4) == 4 and wanted([1.0], 2, 2) == 3  # one that does not answer is taken to be as the others
    assert wanted([1.1, 1.1], 2, 3) == 3  # one that starts has no demand of its own: no fourth for its sake
