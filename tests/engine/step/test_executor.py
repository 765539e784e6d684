from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kunserve.compute.decoder import Decoder
from kunserve.compute.sampler import SamplingRow
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.group import Group, Stage
from kunserve.engine.step.executor import DeviceExecutor
from kunserve.engine.step.microbatch import StepInputs
from kunserve.engine.step.shared_head import SharedHead
from kunserve.gpu.device import Device
from kunserve.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


class Queue:
    """A device that remembers in which order it was asked. What is ready when it opens comes back all at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, StepInputs]] = []
        self.is_open = asyncio.Event()

    async def run(self, work: Callable[[], Any]) -> Any:
        function, args = work.func, work.args  # type: ignore[attr-defined]
        head = getattr(function, "__self__", None)
        inputs = head._inputs if isinstance(head, SharedHead) else next(a for a in args if isinstance(a, StepInputs))
        self.asked.append((function.__name__, inputs))
        await self.is_open.wait()
        return work()


class Rows:
    """A model whose next token is the row's hidden state."""

    def forward(self, first: int, last: int, x: Tensor, batch: Any, rows: Tensor, *, with_head: bool = True) -> Tensor:
        return x if last < 2 else x[rows]

    vocab_size = 100

    def multiply_head(self, x: Tensor, first: int, last: int, logits: Tensor) -> None:
        logits[:, first:last] = torch.nn.functional.one_hot(x.long(), 100)[:, first:last]

    def scaled(self, logits: Tensor) -> Tensor:
        return logits


def inputs_of(tokens: list[int], *, is_sampled: bool) -> StepInputs:
    number, none = len(tokens), torch.zeros(1, dtype=torch.int32)
    rows = tuple(SamplingRow(GREEDY, 0, (), (), ()) for _ in tokens) if is_sampled else ()
    sampled_rows = torch.arange(number) if is_sampled else torch.zeros(0, dtype=torch.int64)
    ids, table = torch.tensor(tokens, dtype=torch.int32), none[None]
    return StepInputs(ids, ids, none, none, (table, table), sampled_rows, rows, 16)


async def test_a_chain_that_shares_its_head_keeps_tokens_and_microbatches_in_order() -> None:
    """No microbatch overtakes another on a stage, whether it samples or not: its requests' KV would have holes."""
    devices = [Queue(), Queue()]
    chain = tuple(Stage(i, i, i + 1, BlockPool(1)) for i in range(2))
    group = Group(0, chain, 16)
    executor = DeviceExecutor(
        [cast(Device, device) for device in devices], [cast(Decoder, Rows())] * 2, shares_head=True
    )
    batches = [inputs_of([5, 6, 7], is_sampled=True), inputs_of([8], is_sampled=False)]
    batches += [inputs_of([9, 10], is_sampled=True), inputs_of([11], is_sampled=True)]
    running = [asyncio.create_task(executor.execute(group, inputs)) for inputs in batches]
    for device in devices:
        while len(device.asked) < len(batches):
            await asyncio.sleep(0)
        device.is_open.set()
    answers = await asyncio.gather(*running)
    assert [[token.token_id for token in answer] for answer in answers] == [[5, 6, 7], [], [9, 10], [11]]
    assert [inputs.sampled.result() for inputs in batches] == [[5, 6, 7], [], [9, 10], [11]]
    for device in devices:
        layers = [inputs for name, inputs in device.asked if name != "run_first"]
        assert list(map(id, layers)) == list(map(id, batches))
    assert {id(inputs) for name, inputs in devices[0].asked if name == "run_first"} == {
        id(inputs) for inputs in batches if inputs.sampling
    }
