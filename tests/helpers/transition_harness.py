"""An engine on tiny virtual devices whose invariants are asserted at every step, and random regroupings of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from e2e.engines import running_engine
from hooks import around_copies
from on_gpus import TOLERANCE, are_replaced, placed
from tiny_models import VOCAB_SIZE
from torch import Tensor

from kunserve.engine.batch import Microbatch
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.launch.launch import Served
from kunserve.engine.regroup.control import OverloadControl
from kunserve.engine.regroup.reconfigure import Reconfigure
from kunserve.engine.regroup.transition import Transition
from kunserve.engine.request import Output, Request
from kunserve.errors import ConflictError, DeviceError, InvalidRequestError, KunServeError
from kunserve.gpu.watched import Silence, WatchedDevice
from kunserve.sampling import FinishReason, SamplingParams

T = TypeVar("T")

BLOCK_SIZE = 4
CHUNK_BLOCKS = 32  # of one layer of the tiny model, in a chunk of 32 KiB
PATIENCE = 20  # so many times as long as the deadline
TINY: dict[str, Any] = {
    "dtype": "float32",
    "chunk_bytes": 1 << 15,
    "block_size": BLOCK_SIZE,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "is_pinned": True,
}


@dataclass(slots=True)
class Answer:
    """All that one request was answered."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish: tuple[FinishReason, int | str | None] | None = None
    error: KunServeError | None = None

    def add(self, output: Output) -> None:
        """Add a delta; none may follow the last."""
        assert self.finish is None
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish = output.finish_reason, output.stop_reason

    def assert_same(self, other: Answer) -> None:
        """Everything is the same to the last bit: no result of a CPU device depends on its batch."""
        assert (self.token_ids, self.text, self.finish) == (other.token_ids, other.text, other.finish)
        assert self.error is other.error is None
        if are_replaced():
            for mine, its in ((self.logprobs, other.logprobs), (self.prompt_logprobs, other.prompt_logprobs)):
                assert [one.token_id for one in mine] == [one.token_id for one in its]
                assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in its], abs=TOLERANCE)
            return
        assert (self.logprobs, self.prompt_logprobs) == (other.logprobs, other.prompt_logprobs)


class Checked:
    """A served tiny model. `engine.check()` runs whenever a microbatch came back or a request ended."""

    def __init__(self, served: Served) -> None:
        self.engine: Engine = served.engine
        self.control: OverloadControl = served.control
        self.machine = served.machine
        self.reconfigure: Reconfigure = served.control.reconfigure
        self.steps = Counter[int]()  # by length of chain
        self.outcomes = Counter[tuple[str, str, str | None]]()  # kind, outcome, how KV was exchanged
        self._failure: AssertionError | None = None
        self._progress = self.engine.signals.progress
        self.engine.signals.progress = self._check_and_progress  # type: ignore[method-assign]
        self._commit = self.engine.scheduler.commit
        self.engine.scheduler.commit = self._count_and_commit  # type: ignore[method-assign]

    def _count_and_commit(self, group: Group, batch: Microbatch) -> list[Request]:
        self.steps[len(group.stages)] += 1
        return self._commit(group, batch)

    def _check_and_progress(self, group_id: int | None = None) -> None:
        try:
            self.check()
        except AssertionError as error:
            self._failure = self._failure or error
        self._progress(group_id)

    def check(self) -> None:
        """Invariants 1 to 3, and that every request is in one place."""
        self.engine.check()
        waiting = [*self.engine.scheduler.waiting, *self.engine.scheduler.swapped.ready]
        running = [request for group in self.engine.groups for request in group.running]
        assert len({id(request) for request in waiting + running}) == len(waiting + running)
        assert all(request.group_id is None and not request.block_tables for request in waiting)
        live = {live.request.request_id for live in self.engine.live.values()}
        assert live == {r.request_id for r in waiting + running if r.finish_reason is None}

    async def answer(self, request: Request) -> Answer:
        """Submit a request and read it to its end."""
        answer = Answer()
        try:
            async for output in self.engine.submit(request):
                answer.add(output)
        except KunServeError as error:
            assert answer.finish is None
            answer.error = error
        return answer

    async def answer_all(self, requests: Sequence[Request]) -> list[Answer]:
        """All at once."""
        return await asyncio.gather(*map(self.answer, requests))

    async def commits(self, number: int) -> None:
        """Wait for so many steps."""
        for _ in range(number):
            await self.engine.signals.next_commit()

    async def settled(self) -> list[Transition]:
        """Wait until no transition is under way; return those that ended, which are counted, since the last call."""
        while tasks := self.control.tasks:
            await asyncio.wait(set(tasks))
        ended = list(self.reconfigure.transitions.remembered)
        for transition in ended:
            mode = transition.exchange_mode or ("by_request" if transition.exchange_bytes else None)
            self.outcomes[transition.kind, transition.outcome, mode] += 1
        self.reconfigure.transitions.remembered.clear()
        return ended

    async def undo_drops(self) -> None:
        """Restore, step by step, until the groups are as launched. Nothing may be running."""
        await self.settled()
        await self.until_no_step_runs()
        while any(group.lineage and group.lineage.merged_from for group in self.engine.groups):
            await self.control.restore()
            await self.settled()
        self.assert_idle()

    async def until_no_step_runs(self) -> None:
        """Wait for steps that were planned before it was known that nobody needs them."""
        while any(group.num_in_flight for group in self.engine.groups):
            await self.engine.signals.next_commit()

    async def rebuilt(self) -> None:
        """Wait until no transition is under way, and nothing is left of a group with a lost device."""
        while self.control.tasks or any(group.is_lost for group in self.engine.groups):
            assert self.engine.is_running, "the engine has stopped: nobody replaces what is lost"
            await asyncio.wait({*self.control.tasks, asyncio.ensure_future(asyncio.sleep(0.01))})
        await self.until_no_step_runs()

    def assert_idle(self, *, check_chunks: bool = True) -> None:
        """No request is anywhere, every block is free; with `check_chunks`, every chunk is where it belongs, too."""
        self.assert_no_failure()
        self.check()
        assert not self.engine.live and not self.engine.scheduler.waiting and self.engine.num_running == 0
        for group in self.engine.groups:
            assert group.is_admitting and not group.is_paused and group.num_in_flight == 0
            for stage in group.stages:
                mapped = self.engine.memories[stage.device].layout
                if not check_chunks:
                    continue
                assert mapped == self.reconfigure.remap.of_stage(stage.view)
                pool, kv = stage.pool, self.engine.memories[stage.device].kv
                assert self.engine.fleet.num_used(stage.device) == 0 and pool.limit == pool.num_blocks == kv.num_blocks(
                    stage.first_layer
                )

    def assert_no_failure(self) -> None:
        """No check has failed so far; else its own traceback."""
        if self._failure is not None:
            raise self._failure

    def num_outcomes(self, kind: str, outcome: str, mode: str | None = None) -> int:
        """Transitions that ended so; with `mode`, those that exchanged KV so."""
        return sum(n for (k, o, m), n in self.outcomes.items() if (k, o) == (kind, outcome) and mode in (None, m))


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy, in host memory, of what is on a device that has no work."""
    return tensor.cpu().clone()


async def next_round() -> None:
    """Let the event loop go round once. The threads of devices, which a busy loop would starve, come to their turn."""
    time.sleep(0.0001)
    await asyncio.sleep(0)


@asynccontextmanager
async def checked_engine(folder: Path, devices: str, num_blocks: int, **settings: Any) -> AsyncIterator[Checked]:
    """A running engine of the tiny model with about `num_blocks` blocks of KV on each device."""
    devices, settings = placed(devices, TINY | {"num_blocks_override": num_blocks} | settings)
    async with running_engine(folder, devices, **settings) as served:
        yield Checked(served)


# --- requests ---------------------------------------------------------------------------------------------------------


def make_requests(number: int, seed: int = 0, longest_prompt: int = 24, most_tokens: int = 12) -> list[Request]:
    """Mixed lengths; greedy and seeded sampling with everything that shapes a distribution; logprobs now and then."""
    rng = random.Random(seed)
    requests = []
    for i in range(number):
        prompt = rng.choices(range(3, VOCAB_SIZE), k=rng.randrange(1, longest_prompt))
        params = SamplingParams(
            max_tokens=rng.randrange(1, most_tokens),
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            seed=i,
            presence_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            ignore_eos=rng.random() < 0.8,
            num_logprobs=rng.choice([None, 0, 3]),
        )
        requests.append(Request(f"r{i}", prompt, params))
    return requests


def again(requests: Sequence[Request]) -> list[Request]:
    """The same requests, not run yet."""
    return [Request(r.request_id, list(r.prompt_token_ids), r.params) for r in requests]


def with_stop_strings(requests: Sequence[Request], answers: Sequence[Answer]) -> list[Request]:
    """The same requests; every third stops at a string that its answer holds."""
    stopping = again(requests)
    for request, answer in list(zip(stopping, answers, strict=True))[::3]:
        middle = len(answer.text) // 2
        if piece := answer.text[middle : middle + 2].strip("\N{REPLACEMENT CHARACTER}"):
            request.params = replace(request.params, stop=(piece,))
    return stopping


# --- random regrouping ------------------------------------------------------------------------------------------------


async def regroup_forever(checked: Checked, rng: random.Random) -> None:
    """Drop, re-drop, restore, cancel a restore, ask for a drop meanwhile: at random steps, until cancelled."""
    control = checked.control
    while True:
        await checked.commits(rng.randrange(1, 5))
        # Not now: for instance because live requests do not fit without the drop. A group with a device that is
        # overdue, as any may be on a busy machine, counts as none.
        with suppress(ConflictError, InvalidRequestError):
            if rng.random() < 0.5 and len(checked.engine.groups) > 1:
                two = [group.group_id for group in rng.sample(checked.engine.groups, 2)]
                asked = two if rng.random() < 0.3 else None  # None: the smallest, so 2 + 2 becomes 4
                await control.drop(asked, is_forced=True)
            elif rng.random() < 0.5:
                await control.restore()
            else:
                restore = asyncio.create_task(control.restore())
                try:
                    await checked.commits(rng.randrange(0, 4))
                    if rng.random() < 0.3:
                        with suppress(ConflictError):
                            await control.drop(is_forced=True)
                    checked.reconfigure.cancel_restore()
                    await restore
                finally:
                    restore.cancel()


async def regroup_in_order(checked: Checked, rng: random.Random) -> None:
    """All groups become one, two by two (2 + 2 to 4 with four devices), a restore is cancelled, and all come apart.

    At random steps, until cancelled. A drop that would hold less than before is refused: then it is left out.
    """
    control, engine = checked.control, checked.engine
    while True:
        drop = partial(control.drop, is_forced=True)
        for verb in [drop] * (len(engine.memories) - 1) + [control.restore] * len(engine.memories):
            await checked.commits(rng.randrange(1, 4))
            with suppress(ConflictError):
                transition = asyncio.create_task(verb())
                if verb == control.restore and rng.random() < 0.3:
                    await checked.commits(1)
                    checked.reconfigure.cancel_restore()
                await transition
            await checked.settled()


async def answer_while(
    checked: Checked, requests: Sequence[Request], disturb: Callable[[], Awaitable[None]]
) -> list[Answer]:
    """Answers to all of them, at once, while `disturb` runs."""
    disturbing = asyncio.ensure_future(disturb())
    answers = await checked.answer_all(requests)
    disturbing.cancel()
    with suppress(asyncio.CancelledError):
        await disturbing
    return answers


# --- failures ---------------------------------------------------------------------------------------------------------


class Failures:
    """Makes calls of transitions to devices fail: memory operations, and work that is not a step of a model.

    Every other time it is not an error that we know.
    """

    def __init__(self, engine: Engine) -> None:
        self.calls: list[tuple[str, str]] = []  # device, what was called
        self.failed: list[tuple[str, str]] = []
        self.fail_at: int | None = None  # the call of this number
        self.rate = 0.0  # of all calls, at random
        self._rng = random.Random(0)
        self._num_failures = 0
        for memory in engine.memories:
            device: Any = memory.device.inner
            device.map = partial(self._call, device.name, "map", device.map)
            device.unmap = partial(self._call, device.name, "unmap", device.unmap)
            device.run = partial(self._run, device.name, "run", device.run)
            around_copies(device, partial(self._copy, device.name))

    def begin(self, rate: float, rng: random.Random) -> None:
        """Fail at random from now on; at a rate of 0 not at all."""
        self.rate, self._rng = rate, rng

    def arm(self, fail_at: int | None) -> None:
        """Count calls from zero, and let the one of this number fail."""
        self.calls, self.failed, self.fail_at = [], [], fail_at

    def _count(self, device: str, name: str) -> None:
        self.calls.append((device, name))
        if len(self.calls) - 1 == self.fail_at or (self.rate and self._rng.random() < self.rate):
            self.failed.append((device, name))
            self._num_failures += 1
            raise OSError("broken") if self._num_failures % 2 else DeviceError(f"{device} refused to {name}")

    def _call(self, device: str, name: str, call: Callable[..., T], *arguments: Any) -> T:
        self._count(device, name)
        return call(*arguments)

    async def _copy(self, device: str, copy: Callable[[], Awaitable[T]]) -> T:
        self._count(device, "run_copy")
        return await copy()

    async def _run(self, device: str, name: str, run: Callable[..., Awaitable[T]], work: Callable[[], T]) -> T:
        if "run_" not in getattr(getattr(work, "func", None), "__name__", ""):  # run_stage, run_last_stage, run_timed
            self._count(device, name)
        return await run(work)


@contextmanager
def patient_with_sound_devices(is_silent: Callable[[Any], bool]) -> Iterator[None]:
    """Count the silence of devices more slowly than it is, but of those that are silent on purpose.

    Where much else runs on the machine, a device that does its work may answer late, too. `is_silent` is asked about
    the device that is watched.
    """
    tick = WatchedDevice.tick

    def slow_tick(device: WatchedDevice, elapsed_s: float) -> Silence:
        return tick(device, elapsed_s if is_silent(device.inner) else elapsed_s / PATIENCE)

    WatchedDevice.tick = slow_tick  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        WatchedDevice.tick = tick  # type: ignore[method-assign]
