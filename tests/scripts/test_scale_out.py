"""What is made of a burst over replicas; `make scale-out` runs one, with Ray."""

from __future__ import annotations

import argparse
import asyncio
from array import array
from typing import Any

import pytest
import ray_scaled_down
from ray_replicas import Job, Said
from scale_out import DEMAND, DROPS, FINISHED, Look, Watch, lines, report, row

from kunserve.loadgen.client import Recording, Stream
from kunserve.loadgen.workload import Job as Load


def stream_at(sent_s: float, ttft_s: float | None) -> Stream:
    stream = Stream(Load(sent_s, 1, 2), "", "completed" if ttft_s else "failed", sent_s=sent_s)
    if ttft_s is not None:
        stream.token_s = array("d", [sent_s + ttft_s])
    return stream


def test_requests_are_told_apart_by_what_had_happened_when_they_were_sent() -> None:
    looks = [
        Look(0.0, 2, 2, [{DEMAND: 0.1}, {DEMAND: 0.2}]),
        Look(12.0, 2, 2, [{DEMAND: 0.9}, {DEMAND: 0.9}]),
        Look(20.0, 3, 2, [{DEMAND: 1.4, DROPS: 1.0}, {DEMAND: 1.0}]),
        Look(30.0, 3, 3, [{DEMAND: 0.5, DROPS: 1.0, FINISHED: 4.0}, {FINISHED: 3.0}, {FINISHED: 1.0}]),
    ]
    sent = [(1.0, 0.1), (11.0, 0.2), (19.0, 3.0), (25.0, None), (31.0, 0.3), (51.0, 0.1)]
    recording = Recording([stream_at(*each) for each in sent], [], elapsed_s=60.0)
    args = argparse.Namespace(before=10.0, burst=40.0, after=10.0, replicas=2, slo=1.0)
    told = report(args, recording, Watch("tiny-0", looks=looks))
    assert (told["gauge_over_target_s"], told["asked_s"], told["ready_s"], told["drops"]) == (12.0, 20.0, 30.0, 1.0)
    assert [values["requests"] for values in told["rows"].values()] == [1, 2, 1, 1, 1]
    assert [values["attainment"] for values in told["rows"].values()] == [1.0, 0.5, 0.0, 1.0, 1.0]
    assert told["all"] == row(recording.streams, 1.0) and told["all"]["not_done"] == 1
    text = "\n".join(lines("drop", told, 1.0))
    assert "asked for at 20.0 s and ready at 30.0 s; 1 drops" in text and "| all | 6 | 0.2 | 2.892 | 66.7 % |" in text
    never = report(args, recording, Watch("tiny-0", looks=looks[:2]))
    assert never["asked_s"] is None and "asked for never" in lines("drop", never, 1.0)[0]


async def test_streams_are_kept_running_until_a_replica_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, most, running = iter([1, 1, 2]), 0, 0

    async def say(session: Any, url: str, job: Job) -> Said:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        if job.body["prompt"].startswith("3 "):
            raise RuntimeError("lost")
        return Said("said", "length", 5, True)

    async def number() -> int:
        return next(numbers)

    monkeypatch.setattr(ray_scaled_down, "stream", say)
    monkeypatch.setattr(ray_scaled_down, "num_replicas", number)
    monkeypatch.setattr(ray_scaled_down, "LOOK_EVERY_S", 0.01)
    done: list[tuple[Job, Said | BaseException]] = []
    await ray_scaled_down.keep("", 3, ray_scaled_down.jobs_of(5), done, lambda number: number > 1)
    assert (most, running) == (3, 0) and len(done) > 4
    assert [str(said) for _, said in done if isinstance(said, RuntimeError)] == ["lost"]
