from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from api_fakes import STATS, CharTokenizer, FakeEngine, error_of, serving

from kunserve.api.admission import Admission, estimated_tokens
from kunserve.api.backend import ApiSettings
from kunserve.errors import InvalidRequestError, OverloadedError
from kunserve.metrics import EngineStats, Metrics

IDLE = replace(STATS, num_waiting=0)


def admission(stats: EngineStats = IDLE, max_reqs: int = 4, max_tokens: int = 100) -> tuple[Admission, Metrics]:
    metrics = Metrics("tiny", 64, lambda: stats)
    return Admission(lambda: stats, metrics, max_reqs, max_tokens), metrics


def test_what_is_accepted_counts_until_the_engine_has_it() -> None:
    door, metrics = admission()
    with door.accepted(3, 10), door.accepted(1, 10):
        with pytest.raises(OverloadedError, match="4 requests are waiting") as caught:
            door.check()
        assert caught.value.retry_after_s == 1
    door.check(4)
    assert b'vllm:admission_rejections_total{engine="0",model_name="tiny",reason="queue_full"} 1.0' in metrics.render()


def test_what_waits_in_the_engine_counts() -> None:
    door, _ = admission(replace(IDLE, num_waiting=3, num_waiting_tokens=90))
    door.check(1, 10)
    with pytest.raises(OverloadedError, match="tokens are waiting"):
        door.check(1, 11)
    with pytest.raises(OverloadedError):
        door.check(2, 1)


def test_an_empty_queue_takes_any_one_prompt() -> None:
    door, _ = admission()
    with door.accepted(1, 1000), pytest.raises(OverloadedError):
        door.check(1, 1)


def test_more_than_the_queue_ever_holds_can_never_succeed() -> None:
    door, _ = admission()
    with pytest.raises(InvalidRequestError) as caught:
        door.check(5)
    assert caught.value.param == "n"


def test_a_failure_gives_the_place_back() -> None:
    door, _ = admission()
    for _ in range(9):
        with pytest.raises(ValueError), door.accepted(4, 4):
            raise ValueError
    door.check(4)


def test_estimates() -> None:
    assert estimated_tokens([1, 2, 3]) == 3
    assert estimated_tokens("x" * 400) == 101
    assert estimated_tokens("") == 1


class StuckTokenizer(CharTokenizer):
    """Long text takes until `go`."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 10:
            self.began.set()
            assert self.go.wait(60)
        return super().encode(text[:4], add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


@pytest.mark.parametrize(
    ("url", "long", "short"),
    [
        ("/v1/completions", {"prompt": "x" * 9000}, {"prompt": "x"}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 9000}]},
            {"messages": [{"role": "user", "content": "x"}]},
        ),
    ],
)
async def test_prompts_that_are_being_tokenized_count(url: str, long: Any, short: Any) -> None:
    import asyncio

    tokenizer, engine = StuckTokenizer(), FakeEngine()
    settings = ApiSettings(max_num_queued_reqs=STATS.num_waiting + 1)
    async with serving(engine, settings, tokenizer=tokenizer) as client:
        first = asyncio.ensure_future(client.post(url, json=long))
        assert await asyncio.to_thread(tokenizer.began.wait, 60)
        refused = await client.post(url, json=short)
        assert (await error_of(refused))["code"] == 503
        assert refused.headers["Retry-After"] == "1"
        assert engine.requests == []
        tokenizer.go.set()
        assert (await first).status == 200
        assert (await client.post(url, json=short)).status == 200
