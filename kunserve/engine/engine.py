"""The engine: requests in, tokens out. Its loop reads top to bottom: schedule, forward, commit, publish.

One task owns all groups and the queue; nothing else schedules. It sleeps until something happened: a request came or
left, a microbatch came back, memory changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from kunserve.engine.batch import Microbatch, count_prompt_tokens, scored_positions
from kunserve.engine.detokenizer import Detokenizer
from kunserve.engine.executor import Executor
from kunserve.engine.group import Group
from kunserve.engine.hooks import Control, Mover
from kunserve.engine.request import Constraint, FinishReason, Output, Request, TokenLogprobs
from kunserve.engine.sampler import SampledToken
from kunserve.engine.scheduler import Scheduler
from kunserve.engine.stop import finish_of
from kunserve.engine.stream import OutputStream, Sink
from kunserve.engine.tokenizer import Tokenizer
from kunserve.engine.view import check_engine, engine_state, engine_stats, weight_bytes
from kunserve.engine.waiting import Waiting
from kunserve.errors import DeviceLostError, EngineError, InvalidRequestError, KunServeError, OverloadedError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.metrics import EngineStats, Metrics
from kunserve.model.config import ModelConfig
from kunserve.policies import OverloadPolicy

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What a request may ask for, and how long the queue may get."""

    max_model_len: int
    max_num_queued_reqs: int
    stall_s: float = 60.0  # work to do and no step finished for so long: not healthy


@dataclass(slots=True)
class _Live:
    """A request's way out: its stream, and the text it is turned into."""

    request: Request
    stream: Sink
    detokenizer: Detokenizer | None
    last_token_s: float = 0.0


class Engine:
    """Owns the groups, the queue and every request from `submit` to its last output."""

    def __init__(
        self,
        model: ModelConfig,
        limits: ServingLimits,
        scheduler: Scheduler,
        groups: Sequence[Group],
        memories: Sequence[DeviceMemory],
        executor: Executor,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        seed: int = 0,
    ) -> None:
        self.model, self.limits, self.scheduler = model, limits, scheduler
        self.groups, self.memories, self.executor = list(groups), memories, executor
        self.pools = {stage.device: stage.pool for group in groups for stage in group.stages}  # by device
        self.tokenizer, self.metrics = tokenizer, metrics
        self.control: Control | None = None
        self.mover: Mover | None = None
        self.overload_policy: OverloadPolicy | None = None  # as the flag names it: for views
        self.no_drop: str | None = None  # why no weights are ever dropped by themselves: for views
        self.epoch = 0
        self._is_accepting = self._has_ended = False
        self._live: dict[str, _Live] = {}
        self.launched_weight_bytes = weight_bytes(memories)
        self._random = random.Random(seed)
        self._wake = asyncio.Event()
        self._progress: dict[int | None, asyncio.Event] = {}  # that somebody waits for: by group id, None: of any
        self._num_in_flight = 0  # microbatches
        self._tasks: asyncio.TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None
        self._drained: asyncio.Event | None = None  # while draining
        self._last_step_s = 0.0
        self._group_of: dict[int, Group] = {}  # by id; filled as asked
        # With many groups nobody may look at all of them in every step: only at those that something happened to.
        self._changed: dict[int, Group] | None = None  # since they were scheduled last, by id; None: all
        self._free: dict[int, Group] = {}  # that have a slot for a microbatch, by id

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin serving."""
        self._main = asyncio.create_task(self._run(), name="engine")
        self._last_step_s = self.now()
        self._is_accepting = True

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse what is new, let what is accepted finish for `drain_s`, end the rest with an error, and stop."""
        self._is_accepting = False
        if self._live and drain_s > 0:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_s)
        for live in list(self._live.values()):
            self._fail(live, OverloadedError("the server is stopping", retry_after_s=5))
        if self.control is not None:
            await self.control.stop()
        if self.mover is not None:
            await self.mover.stop()
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait([self._main])
            self._main = None

    async def wait(self) -> None:
        """Return when the engine has stopped, for whatever reason."""
        if self._main is not None:
            await asyncio.wait([self._main])

    def halt(self) -> None:
        """Stop at once, because devices are not what groups need any more. All requests end with an error."""
        if self._main is not None:
            self._main.cancel()

    async def close(self) -> None:
        """End all devices' threads and release their memory. The engine has stopped."""
        for memory in self.memories:
            await asyncio.to_thread(memory.device.close)

    @property
    def is_running(self) -> bool:
        """Whether the loop is alive."""
        return self._main is not None and not (self._has_ended or self._main.done())

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
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
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if not 0 < request.num_prompt_tokens < self.limits.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; between 1 and {self.limits.max_model_len - 1} "
                "can be served",
                param="prompt",
            )
        request.arrival_s = self.now()
        request.max_num_tokens = min(request.num_prompt_tokens + request.params.max_tokens, self.limits.max_model_len)
        seed = request.params.seed
        request.seed = self._random.getrandbits(63) if seed is None else seed
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, request.params, request.prompt_token_ids)
        live = _Live(request, sink, detokenizer)
        self._live[request.request_id] = live
        self.scheduler.waiting.append(request)
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """The client left: free its blocks, at the latest when its running step is done. Idempotent."""
        if (live := self._live.get(request_id)) is not None:
            self._finish(live, FinishReason.ABORT)
            self.wake()

    def wake(self, group: Group | None = None) -> None:
        """Something changed: look for work in a group, or everywhere."""
        if group is None:
            self._changed = None
        elif self._changed is not None:
            self._changed[group.group_id] = group
        self._wake.set()

    @contextlib.contextmanager
    def paused(self, groups: Sequence[Group]) -> Iterator[None]:
        """Schedule nothing for these groups inside; a group goes on when the last who paused it has left."""
        for group in groups:
            group.num_pauses += 1
        try:
            yield
        finally:
            for group in groups:
                group.num_pauses -= 1
            self.wake()

    async def quiesce(self, groups: Sequence[Group]) -> None:
        """Return when none of the microbatches of these groups, which are paused, is in flight.

        Nor is any copy that a policy asked for: their blocks may then be moved.
        """
        assert all(group.is_paused for group in groups)
        for group in groups:
            while group.num_in_flight:
                await self.next_commit(group)
        while self.mover is not None and self.mover.is_busy(groups):
            await self.next_commit()

    async def next_commit(self, group: Group | None = None) -> None:
        """Return when a microbatch came back, a request ended, or `progress` was called: for that group, or for any."""
        await self._progress.setdefault(group.group_id if group else None, asyncio.Event()).wait()

    def progress(self, group_id: int | None = None) -> None:
        """Let everybody who waits for `next_commit` look again: of one group, or of all."""
        for waited_for in [*self._progress] if group_id is None else (group_id, None):
            if (event := self._progress.pop(waited_for, None)) is not None:
                event.set()

    # --- operators ----------------------------------------------------------------------------------------------

    async def drop(self, group_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Merge these groups, or the two smallest; the transition's state once its epoch is committed.

        Raises InvalidRequestError for groups that are not there, ConflictError if it cannot be now.
        """
        assert self.control is not None
        return await self.control.drop(group_ids)

    async def restore(self, group_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Split these groups, or the largest, once; as `drop`. A restore that a burst cancelled says so."""
        assert self.control is not None
        return await self.control.restore(group_ids)

    # --- the loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    while True:
                        self._wake.clear()
                        self._schedule()
                        await self._wake.wait()
                finally:  # before what is in flight ends: it may wait for a token that nobody will accept any more
                    self._has_ended = True
                    for live in list(self._live.values()):
                        self._fail(live, EngineError("the engine has stopped"))
        except* Exception:  # a bug of ours: nothing can be served any more, and everybody has to know
            log.exception("engine stopped")

    def _schedule(self) -> None:
        """Give every chain as many microbatches as it has stages, and one to go on with while results are looked at."""
        changed = self._take_changed()
        if self.control is not None:
            self.control.observe(changed)
        candidates, progress = dict.fromkeys(changed), True
        while progress:  # an admission to one group may make another the least loaded
            progress = False
            # Whoever is busy does not compete for the queue: its head would wait for the end of a step.
            free = [group for group in self._free.values() if not group.is_paused] if self.scheduler.num_waiting else []
            for group in free or list(candidates):
                if group.is_paused or not self._has_slot(group):
                    continue
                if not ((group.running and group in candidates) or self.scheduler.can_admit(group)):
                    continue
                batch = self.scheduler.schedule(group, free, self.epoch)
                if batch is not None:
                    progress = True
                    self._launch(group, batch)
                    candidates[group] = None  # it may have room for more
        if self.mover is not None:
            self.mover.observe()
        self._report_preemptions()

    def _take_changed(self) -> list[Group]:
        """The groups that something happened to since the last call."""
        if self._changed is None:
            self._free = {group.group_id: group for group in self.groups if self._has_slot(group)}
            changed = list(self.groups)
        else:
            changed = list(self._changed.values())
        self._changed = {}
        return changed

    def _has_slot(self, group: Group) -> bool:
        """Whether its chain takes one more microbatch."""
        return group.num_in_flight < len(group.stages) + self.scheduler.limits.num_ahead

    def _launch(self, group: Group, batch: Microbatch) -> None:
        assert self._tasks is not None
        now = self.now()
        if self.is_idle_since_last_step:
            self._last_step_s = now
        self._num_in_flight += 1
        for span in batch.spans:
            if span.request.admitted_s is None:
                span.request.admitted_s = now
        if not self._has_slot(group):
            self._free.pop(group.group_id, None)
        inputs = self.executor.inputs(group, batch, self.model.eos_token_ids)
        self._tasks.create_task(self._forward(group, batch, self.executor.execute(group, inputs)))

    async def _forward(self, group: Group, batch: Microbatch, execution: Any) -> None:
        started, tokens, failure = self.now(), list[SampledToken](), None
        faults: dict[str, BaseException] = {}
        try:
            try:
                tokens = await execution
            except Exception as error:  # whatever went wrong on the device ends these requests, not the server
                failure = error
            while group.in_flight[0] is not batch:  # it took a shorter way through the last stage
                await self.next_commit(group)
            if failure is None:
                faults = await _take_tokens(batch, tokens)
        except asyncio.CancelledError:  # the engine has stopped: nobody shall wait for this microbatch
            group.in_flight.remove(batch)
            self.progress()
            raise
        finally:
            self._num_in_flight -= 1
        if failure is not None:
            log.error("step failed", group=group.group_id, requests=len(batch.spans), exc_info=failure)
            self._commit_failure(group, batch, failure)
            if isinstance(failure, DeviceLostError):
                self.halt()
        else:
            self._commit(group, batch, tokens, faults)
            if self.mover is not None:
                self.mover.stepped(group, self._seconds_since(started, group))
        self._last_step_s = self.now()
        self._free[group.group_id] = group
        self.progress(group.group_id)
        self.wake(group)

    def _seconds_since(self, launched: float, group: Group) -> float:
        """How long the microbatch that comes back now was computed: not while it waited for those before it."""
        now, before = self.now(), group.returned_s
        begun = max(launched, before[0]) if len(before) == len(group.stages) else launched
        before.append(now)
        del before[: -len(group.stages)]
        return now - begun

    def _commit(
        self, group: Group, batch: Microbatch, tokens: list[SampledToken], faults: Mapping[str, BaseException]
    ) -> None:
        """Account for a microbatch that has passed its chain, and publish its tokens.

        `faults`: what the grammars of requests have raised, by request id.
        """
        self.scheduler.commit(group, batch)
        self._release_ended(batch)
        self.metrics.step(batch.num_tokens)
        self.metrics.prompt_tokens(count_prompt_tokens(batch))
        if group.on_first_commit is not None:
            group.on_first_commit()
            group.on_first_commit = None
        sampled, now, num_generated = iter(tokens), self.now(), 0
        for span in batch.spans:
            request, _, _, samples, _ = span
            error = faults.get(request.request_id)
            for position in scored_positions(span):
                given = next(sampled)
                error = error or given.error
                if given.logprobs and position == len(request.prompt_logprobs):  # else it was computed before
                    request.prompt_logprobs.append(given.logprobs)
            token = next(sampled) if samples else None
            if request.finish_reason is not None:
                continue
            error = error or (token.error if token is not None else None)
            if error is not None:
                self._fail_alone(self._live[request.request_id], error)
            elif token is not None:
                num_generated += 1
                self._publish(self._live[request.request_id], token, now)
        self.metrics.generation_tokens(num_generated)

    def _commit_failure(self, group: Group, batch: Microbatch, error: Exception) -> None:
        self.scheduler.commit(group, batch)
        self._release_ended(batch)
        message = error.message if isinstance(error, KunServeError) else f"a step failed: {error!r}"
        for span in batch.spans:
            if span.request.finish_reason is None:
                self._fail(self._live[span.request.request_id], EngineError(message))

    def _release_ended(self, batch: Microbatch) -> None:
        """Of a microbatch that came back: who ended meanwhile has waited for that."""
        for span in batch.spans:
            if span.request.finish_reason is not None:
                self._release(span.request)

    def _publish(self, live: _Live, token: SampledToken, now: float) -> None:
        """Append a token to its request and send what it says; finish the request if it is the last."""
        try:
            output = self._output_of(live, token, now)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in a grammar's Rust code is no Exception
            self._fail_alone(live, error)
            return
        if output.finish_reason is None:
            live.stream.put(output)
        else:
            self._finish(live, output.finish_reason, output)

    def _output_of(self, live: _Live, token: SampledToken, now: float) -> Output:
        """Append a token to its request; what it says, and whether it is the last. Raises what this request's own
        grammar, tokenizer or stop strings raise.
        """
        request = live.request
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        request.token_ids.append(token.token_id)
        if request.first_token_s is None:
            request.first_token_s, prompt_logprobs = now, tuple(request.prompt_logprobs)
            self.metrics.first_token(request, now)
        else:
            self.metrics.inter_token(now - live.last_token_s)
        live.last_token_s = now
        is_complete = False
        if request.constraint is not None:
            if (wrong := request.constraint.error) is not None:
                raise wrong
            is_complete = request.constraint.is_finished
        reason: FinishReason | None
        stop: int | str | None
        reason, stop = finish_of(request, self.model.eos_token_ids) or (None, None)
        text = ""
        if live.detokenizer is not None:
            if reason is not FinishReason.STOP:
                text = live.detokenizer.push(token.token_id)
            if live.detokenizer.stopped is not None:
                reason, stop = FinishReason.STOP, live.detokenizer.stopped
            elif reason is not None or is_complete:
                text += live.detokenizer.flush()
        if reason is None and is_complete:
            reason = FinishReason.STOP
        logprobs = (token.logprobs,) if token.logprobs else ()
        return Output(text, (token.token_id,), logprobs, reason, stop, prompt_logprobs)

    # --- endings ------------------------------------------------------------------------------------------------

    def _finish(self, live: _Live, reason: FinishReason, output: Output | None = None) -> None:
        """Exactly one final output, and the blocks are free as soon as no device works on them."""
        live.stream.put((output or Output())._replace(finish_reason=reason))
        self._end(live, reason)

    def _fail(self, live: _Live, error: KunServeError) -> None:
        live.stream.fail(error)
        self._end(live, FinishReason.ERROR)

    def _fail_alone(self, live: _Live, error: BaseException) -> None:
        """End a request because of what went wrong in the work for it alone; its neighbours go on."""
        request_id, known = live.request.request_id, error if isinstance(error, KunServeError) else None
        if known is None:
            log.error("request failed in a step", request=request_id, exc_info=error)
        elif known.status >= 500:
            log.error("request failed in a step", request=request_id, error=known.message)
        self._fail(live, known or EngineError(f"a step failed: {error!r}"))

    def _end(self, live: _Live, reason: FinishReason) -> None:
        request, group_id = live.request, live.request.group_id
        request.finish_reason = reason
        del self._live[request.request_id]
        if request.constraint is not None:
            self._close(request.constraint)
        self.metrics.request_finished(request, self.now())
        if self.control is not None:
            self.control.finished(request)
        self._release(request)
        if self.mover is not None:
            self.mover.finished(request)
        self.progress(group_id)
        if self._drained is not None and not self._live:
            self._drained.set()

    @staticmethod
    def _close(constraint: Constraint) -> None:
        try:
            constraint.close()
        except Exception:  # the request has ended, and its blocks have to be free
            log.exception("a grammar did not close")

    def _release(self, request: Request) -> None:
        """Free a finished request's blocks, unless a device still works on them: then its last commit does."""
        if request.group_id is None:
            self.scheduler.remove(request)
        elif request.num_in_flight == 0 and not request.is_moving:
            self.group(request.group_id).release(request)

    # --- views --------------------------------------------------------------------------------------------------

    def group(self, group_id: int) -> Group:
        """The live group of that id."""
        if group_id not in self._group_of:  # the grouping is new
            self._group_of = {group.group_id: group for group in self.groups}
        return self._group_of[group_id]

    @property
    def num_running(self) -> int:
        """Requests bound to a group."""
        return sum(len(g.running) for g in self.groups)

    @property
    def is_idle_since_last_step(self) -> bool:
        """Whether nothing is in flight."""
        return self._num_in_flight == 0

    def health(self) -> str | None:
        """None if the engine does its work; else what is wrong."""
        if not self.is_running:
            return "the engine has stopped"
        silent_s = self.now() - self._last_step_s
        if self._live and silent_s > self.limits.stall_s:
            return f"no step has finished for {silent_s:.0f} s although {len(self._live)} requests are not done"
        return None

    def waiting(self, owner: str | None = None) -> Waiting:
        """How much is queued, of all or of one owner."""
        queue = self.scheduler.waiting
        if owner is not None:
            return queue.waiting_of(owner)
        return Waiting(self.scheduler.num_waiting, queue.num_tokens)

    def stats(self) -> EngineStats:
        """The figures that metrics show."""
        return engine_stats(self)

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        """What `/kunserve/state` shows, with the last `num_transitions` or all that are remembered."""
        return engine_state(self, num_transitions)

    def check(self) -> None:
        """Assert the invariants of memory and grouping (design, section 4)."""
        check_engine(self)

    def _report_preemptions(self) -> None:
        preempted = self.scheduler.take_preempted()
        for request, num_tokens in preempted:
            self.metrics.preemption()
            log.info("preempted", request=request.request_id, times=request.num_preemptions, lost_tokens=num_tokens)
        if preempted:  # blocks are free, perhaps without any microbatch on its way
            self.progress()
            self.wake()

    @staticmethod
    def now() -> float:
        """The engine's clock, in seconds: the event loop's."""
        return asyncio.get_running_loop().time()


async def _take_tokens(batch: Microbatch, tokens: Sequence[SampledToken]) -> dict[str, BaseException]:
    """Give the tokens of a microbatch to the grammars of its requests, all at once; return when all have judged them.

    That is in another process: meanwhile the loop runs, and requests may end. Returns what a grammar has raised, by
    request id.
    """
    if all(span.request.constraint is None for span in batch.spans):  # nearly always
        return {}
    sampled, faults, constraints = iter(tokens), dict[str, BaseException](), dict[str, Constraint]()
    for span in batch.spans:
        for _ in scored_positions(span):
            next(sampled)
        token = next(sampled) if span.samples else None
        request = span.request
        if token is None or token.error is not None or request.constraint is None or request.finish_reason is not None:
            continue
        constraints[request.request_id] = request.constraint
        try:
            request.constraint.accept(token.token_id)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in a grammar's Rust code is no Exception
            faults[request.request_id] = error
    for request_id in constraints.keys() - faults.keys():
        try:
            await constraints[request_id].settled()
        except Exception as error:
            faults[request_id] = error
    return faults
