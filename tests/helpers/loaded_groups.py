"""Two groups in the middle of their requests: where every exchange begins, and the same one in every run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any

from transition_harness import Answer, Checked, checked_engine

from kunserve.engine.request import Request


def two_devices(
    folder: Path, num_blocks: int, max_model_len: int = 128, **settings: Any
) -> AbstractAsyncContextManager[Checked]:
    """An engine that computes all prompts in a few steps: the first is far from its end when the last begins."""
    settings |= {"max_model_len": max_model_len, "max_num_batched_tokens": 512}
    return checked_engine(folder, "cpu:2", num_blocks, **settings)


async def asked(checked: Checked, requests: Sequence[Request]) -> asyncio.Task[list[Answer]]:
    """Ask for all of them, now."""
    task = asyncio.create_task(checked.answer_all(requests))
    while not checked.engine.live.keys() >= {request.request_id for request in requests}:
        await asyncio.sleep(0)
    return task


async def loaded(
    checked: Checked, requests: Sequence[Request], num_last: int | None = None
) -> asyncio.Future[list[Answer]]:
    """Answers to all of them, each of which has its first token: `num_last` (or half) on the second group."""
    num_first = len(requests) - (len(requests) // 2 if num_last is None else num_last)
    first, last = checked.engine.groups
    answers = []
    with ExitStack() as pauses:
        for group, other, some in (first, last, requests[:num_first]), (last, first, requests[num_first:]):
            checked.engine.fleet.set_admitting(group, True)
            checked.engine.fleet.set_admitting(other, False)
            answers.append(await asked(checked, some))
            while not all(request.num_output_tokens for request in some):
                await checked.commits(1)
            pauses.enter_context(checked.reconfigure.boundary.paused([group]))  # it waits for the other
    for group in (first, last):
        checked.engine.fleet.set_admitting(group, True)
    checked.engine.signals.wake()
    assert [len(group.running) for group in (first, last)] == [num_first, len(requests) - num_first]
    return asyncio.ensure_future(_joined(*answers))


async def _joined(first: Awaitable[list[Answer]], last: Awaitable[list[Answer]]) -> list[Answer]:
    return await first + await last


def assert_same(answers: Sequence[Answer], its: Sequence[Answer]) -> None:
    for answer, other in zip(answers, its, strict=True):
        answer.assert_same(other)
