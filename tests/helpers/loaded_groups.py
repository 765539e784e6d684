"""Groups in the middle of their requests: where every exchange begins, and the same one in every run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from itertools import accumulate
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
    """Answers to all of them, each of which has its first token: as many on each group, or `num_last` on the second."""
    groups = list(checked.engine.groups)
    each, rest = divmod(len(requests), len(groups))
    numbers = [each + (i < rest) for i in range(len(groups))]
    if num_last is not None:
        numbers = [len(requests) - num_last, num_last]
    ends, answers = list(accumulate(numbers)), list[Awaitable[list[Answer]]]()
    with ExitStack() as pauses:
        for group, number, end in zip(groups, numbers, ends, strict=True):
            some = requests[end - number : end]
            for other in groups:
                checked.engine.fleet.set_admitting(other, other is group)
            answers.append(await asked(checked, some))
            while not all(request.num_output_tokens for request in some):
                await checked.commits(1)
            pauses.enter_context(checked.reconfigure.boundary.paused([group]))  # it waits for the others
    for group in groups:
        checked.engine.fleet.set_admitting(group, True)
    checked.engine.signals.wake()
    assert [len(group.running) for group in groups] == numbers
    return asyncio.ensure_future(_joined(answers))


async def _joined(answers: Sequence[Awaitable[list[Answer]]]) -> list[Answer]:
    return [answer for of_group in answers for answer in await of_group]


def assert_same(answers: Sequence[Answer], its: Sequence[Answer]) -> None:
    for answer, other in zip(answers, its, strict=True):
        answer.assert_same(other)
