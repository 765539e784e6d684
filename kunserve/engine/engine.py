"""The engine: requests in, tokens out. It reads top to bottom: the loop schedules and launches, a step comes back.

One task schedules all groups, and sleeps until something happens to a request, a microbatch or memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch
from kunserve.engine.dispatch import Dispatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.hooks import KvMover
from kunserve.engine.operators import Operated
from kunserve.engine.request import Output, Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.schedule.waiting import Waiting
from kunserve.engine.serving_limits import ServingLimits, overlong
from kunserve.engine.signals import Signals, loop_time
from kunserve.engine.step.executor import Executor
from kunserve.engine.step.own_steps import OwnSteps
from kunserve.engine.step.publish import Publisher
from kunserve.engine.step.results import Results, judge
from kunserve.engine.survive.health import Health
from kunserve.engine.survive.retries import Retries
from kunserve.engine.text.live import Live, replay
from kunserve.engine.text.stream import OutputStream, Sink
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.engine.view import View
from kunserve.errors import EngineError, InvalidRequestError, KunServeError, OverloadedError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.queue import gather_all
from kunserve.model.config import ModelConfig
from kunserve.observe.metrics import EngineStats, Metrics
from kunserve.sampling import FinishReason

log = structlog.get_logger()

LAST_STEP_S = 3.0  # for the devices' last step when the server stops, before they are given up


class Engine(Operated):
    """Owns every request from `submit` to its last output. Where their KV is, the fleet knows."""

    def __init__(
        self,
        model: ModelConfig,
        limits: ServingLimits,
        fleet: Fleet,
        scheduler: Scheduler,
        memories: Sequence[DeviceMemory],
        executor: Executor,
        signals: Signals,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        seed: int = 0,
    ) -> None:
        self.model, self.limits, self.fleet, self.scheduler = model, limits, fleet, scheduler
        self._most_tokens = sys.maxsize  # of one request, that a group can hold: see `limit_tokens`
        self.memories, self.executor, self.signals = memories, executor, signals
        self.tokenizer, self.metrics = tokenizer, metrics
        self.mover: KvMover | None = None
        self.own_steps: OwnSteps | None = None
        self._is_accepting = self._has_ended = False
        self.live: dict[str, Live] = {}  # requests that are not done, by id
        self._random = random.Random(seed)
        self._num_in_flight = 0  # microbatches
        self._tasks: asyncio.TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None
        self._drained: asyncio.Event | None = None  # while draining
        self._last_step_s = 0.0
        self._dispatch = Dispatch(fleet, scheduler, signals)
        self.device_health = Health(
            fleet, memories, executor, signals, metrics, scheduler.lookahead, limits.device_timeout_s
        )
        self.view = View(model, fleet, scheduler, memories, self.device_health)
        self._retries = Retries(fleet, scheduler, self.device_health, metrics)
        self.publisher = Publisher(fleet, metrics, self.live, model.eos_token_ids, self._finish, self._fail_alone)

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin serving."""
        self._main = asyncio.create_task(self._run(), name="engine")
        self._last_step_s = loop_time()
        self._is_accepting = True

    async def stop(self, drain_s: float = 0.0, last_step_s: float = LAST_STEP_S) -> None:
        """Refuse what is new, let what is accepted finish for `drain_s`, end the rest with an error, and stop.

        Devices that do not end their last step in `last_step_s` are given up.
        """
        self._is_accepting = False
        if self.live and drain_s > 0:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._drained.wait()
        for live in list(self.live.values()):
            self._fail(live, OverloadedError("the server is stopping", retry_after_s=5))
        giving_up = asyncio.create_task(self.device_health.give_up_hanging(last_step_s))
        try:
            if self.control is not None:
                await self.control.stop()
            if self.mover is not None:
                await self.mover.stop()
            if self._main is not None:
                self._main.cancel()
                await asyncio.wait([self._main])
                self._main = None
            for memory in self.memories:  # work that no step waits for may hang, too, and hold up the end
                await memory.device.at_rest()
        finally:
            giving_up.cancel()

    async def wait(self) -> None:
        """Return when the engine has stopped, for whatever reason."""
        if self._main is not None:
            await asyncio.wait([self._main])

    def halt(self) -> None:
        """Stop at once: nothing can be served any more. All requests end with an error."""
        if self._main is not None:
            self._main.cancel()

    async def close(self) -> None:
        """End all devices' threads and release their memory. The engine has stopped."""
        await gather_all(asyncio.to_thread(memory.device.close) for memory in self.memories)

    @property
    def is_running(self) -> bool:
        """Return whether the loop is alive."""
        return self._main is not None and not (self._has_ended or self._main.done())

    @property
    def is_ready(self) -> bool:
        """Return whether new requests are taken."""
        return self._is_accepting and self.is_running

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> OutputStream:
        """Queue a request; the stream ends with exactly one final output or error. Raises as `submit_to`."""
        stream = OutputStream()
        self.submit_to(request, stream)
        return stream

    def submit_to(self, request: Request, sink: Sink) -> None:
        """Queue a request; its outputs go to `sink`, as they come.

        Raises OverloadedError if the queue is full or the server stops, InvalidRequestError if it can never fit.
        """
        if not self.is_ready:
            raise OverloadedError("the server is stopping", retry_after_s=5)
        if len(self.scheduler.waiting) >= self.limits.max_num_queued_reqs:
            self.metrics.rejection("queue_full")
            raise OverloadedError(f"{len(self.scheduler.waiting)} requests are waiting already", retry_after_s=1)
        if request.request_id in self.live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        self.limits.check(request)
        if request.num_tokens >= self._most_tokens:
            raise overlong(self._most_tokens)
        request.arrival_s = loop_time()
        request.seed = self._random.getrandbits(63) if request.params.seed is None else request.params.seed
        self.live[request.request_id] = Live.of(request, sink, self.tokenizer)
        self.scheduler.waiting.append(request)
        self.signals.wake_for_queue()

    async def replay(self, request: Request, token_ids: Sequence[int]) -> Output:
        """Bring a request that is not submitted yet to where an engine like this one has left it. See `live.replay`."""
        self.limits.check(request)
        return await replay(request, token_ids, self.tokenizer, self.model.eos_token_ids)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request whose client left: its blocks are free once its running step is done. Idempotent."""
        if (live := self.live.get(request_id)) is not None:
            self._finish(live, reason)
            self.signals.wake()

    def limit_tokens(self, most_tokens: int) -> None:
        """Note that no group holds more than so many tokens of one request. Whoever grows beyond that ends with a 503.

        Whoever asks for more than that may still end before.
        """
        self._most_tokens = most_tokens
        self.signals.wake()

    # --- the loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    while True:
                        self._end_overlong()
                        changed = self._dispatch.take_changed()
                        if self.control is not None:
                            self.control.observe(changed)
                        for group, batch in self._dispatch.batches(changed):
                            self._launch(group, batch)
                        if self.mover is not None:
                            self.mover.observe()
                        self._report_preemptions()
                        await self.signals.woken()
                finally:  # before what is in flight ends: it may wait for a token that nobody will accept any more
                    self._has_ended = True
                    for live in list(self.live.values()):
                        self._fail(live, EngineError("the engine has stopped"))
        except* Exception:  # a bug of ours: nothing can be served any more, and everybody has to know
            log.exception("engine stopped")

    def _launch(self, group: Group, batch: Microbatch) -> None:
        assert self._tasks is not None
        now = loop_time()
        if self.is_idle_since_last_step:
            self._last_step_s = now
        self._num_in_flight += 1
        for span in batch.others:  # who decodes was admitted before
            if span.request.admitted_s is None:
                span.request.admitted_s = now
                if self.fleet.prefixes is not None and not span.request.is_continued:
                    self.metrics.prefix_cache(span.request.num_prompt_tokens, span.request.num_cached_tokens)
        inputs = self.executor.inputs(group, batch, self.model.eos_token_ids)
        stage_s = None if self.own_steps is None else self.own_steps.place(group, batch)
        self._tasks.create_task(self._step(group, batch, self.executor.execute(group, inputs, stage_s), stage_s))

    # --- a step -------------------------------------------------------------------------------------------------

    async def _step(
        self,
        group: Group,
        batch: Microbatch,
        execution: Coroutine[Any, Any, list[SampledToken]],
        stage_s: list[float] | None,
    ) -> None:
        """Take a microbatch from its launch to its published tokens: forward, judge, commit, publish."""
        started, results, failure = loop_time(), Results(), None
        try:
            try:
                results = Results.of(batch, await execution)
            except Exception as error:  # whatever went wrong on the device, the server goes on
                failure = error
            while group.in_flight[0] is not batch:  # it took a shorter way through the last stage
                await self.signals.next_commit(group)
            if failure is None:
                await judge(results.others)
        except asyncio.CancelledError:  # the engine has stopped: nobody shall wait for this microbatch
            group.in_flight.remove(batch)
            self.signals.progress()
            raise
        finally:
            self._num_in_flight -= 1
        self._commit(group, batch)
        if failure is None:
            self.publisher.publish(group, batch, results)
            self._retries.came_back(group, batch)
            step_s = group.returned(started, loop_time())
            if self.mover is not None:
                self.mover.stepped(group, step_s)
            if stage_s is not None:
                self._learn(group, batch, stage_s)
        else:
            for request, why in self._retries.failed(group, batch, failure):
                self._fail(self.live[request.request_id], why)
        self._last_step_s = loop_time()
        self._dispatch.came_back(group)
        self.signals.progress(group.group_id)
        self.signals.wake(group)

    def _learn(self, group: Group, batch: Microbatch, stage_s: Sequence[float]) -> None:
        """Let what a step took correct the cost model, now and then."""
        assert self._tasks is not None and self.own_steps is not None
        if self.own_steps.keep(group, batch, stage_s):
            self._tasks.create_task(self.own_steps.fit())

    def _commit(self, group: Group, batch: Microbatch) -> None:
        """Account for a microbatch that has passed its chain, and release requests that ended meanwhile."""
        for request in self.scheduler.commit(group, batch):
            self._release(request)

    # --- endings ------------------------------------------------------------------------------------------------

    def _finish(self, live: Live, reason: FinishReason, output: Output | None = None) -> None:
        """Send a request's one final output; its blocks are free as soon as no device works on them."""
        live.stream.put((output or Output())._replace(finish_reason=reason))
        self._end(live, reason)

    def _fail(self, live: Live, error: KunServeError) -> None:
        live.stream.fail(error)
        self._end(live, FinishReason.ERROR)

    def _fail_alone(self, live: Live, error: BaseException) -> None:
        """End a request because of what went wrong in the work for it alone; its neighbours go on."""
        request_id, known = live.request.request_id, error if isinstance(error, KunServeError) else None
        if known is None:
            log.error("request failed in a step", request=request_id, exc_info=error)
        elif known.status >= 500:
            log.error("request failed in a step", request=request_id, error=known.message)
        self._fail(live, known or EngineError(f"a step failed: {error!r}"))

    def _end(self, live: Live, reason: FinishReason) -> None:
        request, group_id = live.request, live.request.group_id
        request.finish_reason = reason
        del self.live[request.request_id]
        live.close(now := loop_time())
        self.metrics.request_finished(request, now)
        if self.control is not None:
            self.control.finished(request)
        self._release(request)
        if self.mover is not None:
            self.mover.finished(request)
        self.signals.progress(group_id)
        if self._drained is not None and not self.live:
            self._drained.set()

    def _release(self, request: Request) -> None:
        """Free a finished request's blocks, unless a device still works on them: then its last commit does."""
        if request.group_id is None:
            self.scheduler.remove(request)
        elif request.num_in_flight == 0 and not request.is_moving:
            self.fleet.release(request)

    # --- views --------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[Group]:
        """Return all groups that there are now."""
        return self.fleet.groups

    @property
    def epoch(self) -> int:
        """Return how often the grouping has changed."""
        return self.fleet.epoch

    @property
    def num_running(self) -> int:
        """Return the number of requests bound to a group."""
        return self.fleet.num_running

    @property
    def is_idle_since_last_step(self) -> bool:
        """Return whether nothing is in flight."""
        return self._num_in_flight == 0

    def degraded(self) -> str | None:
        """Return which devices do not do their work, in words; None if all do."""
        return self.device_health.degraded()

    def health(self) -> str | None:
        """Say what is wrong with the engine; None if it does its work."""
        if not self.is_running:
            return "the engine has stopped"
        silent_s = loop_time() - self._last_step_s
        if self.live and silent_s > self.limits.stall_s:
            return f"no step has finished for {silent_s:.0f} s although {len(self.live)} requests are not done"
        return None

    def waiting(self, owner: str | None = None) -> Waiting:
        """Return how much is queued, of all or of one owner."""
        return self.scheduler.waiting_of(owner)

    def stats(self) -> EngineStats:
        """Return the figures that metrics show."""
        return self.view.stats(self.control.demand_over_undropped() if self.control is not None else 0.0)

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        """Return what `/kunserve/state` shows, with the last `num_transitions` or all that are remembered."""
        return {**self.view.state(), **(self.control.state(num_transitions) if self.control is not None else {})}

    def check(self) -> None:
        """Assert the invariants of memory and grouping."""
        self.view.check()

    def _end_overlong(self) -> None:
        """End requests at the head of the queue that no group can hold any more: else they would block it for ever."""
        least = self.scheduler.policy.least_tokens
        while (head := self.scheduler.head) is not None and least(head) > self._most_tokens:
            self._fail(self.live[head.request_id], overlong(self._most_tokens))

    def _report_preemptions(self) -> None:
        preempted = self.scheduler.take_preempted()
        for r, num_tokens in preempted:
            self.metrics.preemption()
            log.info("preempted", request=r.request_id, times=r.num_preemptions, lost_tokens=num_tokens, **r.trace_ids)
        if preempted:  # blocks are free, perhaps without any microbatch on its way
            self.signals.progress()
            self.signals.wake()
