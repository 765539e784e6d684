"""A worker's end: the engine as routes of clients see it. Tokens become text here, by the same code as anywhere."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from kunserve.api.remote import messages as m
from kunserve.api.remote.link import Link
from kunserve.api.remote.structures import RemoteConstraint
from kunserve.api.wire.backend import Counters, Generator
from kunserve.engine.request import Output, Request
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.text.live import Live, replay
from kunserve.engine.text.stream import Sink
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import EngineError, KunServeError
from kunserve.sampling import FinishReason, SampledToken

log = structlog.get_logger()


class Guest(Generator, Counters):
    """The engine in another process."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        limits: ServingLimits,
        stop: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """Talk to nobody yet. `stop` is called when the worker shall end, `lost` when there is no engine any more."""
        self._tokenizer, self._eos_token_ids, self._limits, self._stop = tokenizer, eos_token_ids, limits, stop
        self._link = Link[m.FromWorker, m.ToWorker](list[m.ToWorker], self._take, self._last, lost)
        self._numbers = itertools.count(1)
        self._live: dict[int, Live] = {}
        self._by_id: dict[str, int] = {}
        self._taken: dict[int, asyncio.Future[KunServeError | None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._body_bytes = self._told_body_bytes = 0

    async def open(self, connection: socket.socket) -> None:
        """Begin to talk to the engine's process."""
        await self._link.open(connection)

    def new_number(self) -> int:
        """Return a number that nothing of this worker's has."""
        return next(self._numbers)

    def send(self, message: m.FromWorker) -> None:
        """Tell the engine's process something."""
        self._link.send(message)

    def flush(self) -> None:
        """Send what was to be sent soon."""
        self._link.send_now()

    async def ask(self, make: Callable[[int], m.FromWorker]) -> Any:
        """Return the answer to a call, which `make` makes of its number; raises the error that it is answered with."""
        call = self.new_number()
        answer = self._calls[call] = asyncio.get_running_loop().create_future()
        self._link.send(make(call))
        try:
            reply: m.Reply = await answer
        finally:
            del self._calls[call]
        if reply.problem is not None:
            raise reply.problem.error
        return reply.value

    # --- requests -----------------------------------------------------------------------------------------------

    def submit_to(self, request: Request, sink: Sink) -> asyncio.Future[KunServeError | None]:
        """See `Generator`."""
        self._limits.check(request)
        number, constraint = self.new_number(), request.constraint
        self._live[number] = Live.of(request, sink, self._tokenizer)
        self._by_id[request.request_id] = number
        self._link.send(
            m.Submit(
                number,
                request.request_id,
                m.packed(request.prompt_token_ids),
                request.params,
                request.priority,
                request.owner,
                request.cache_salt,
                constraint.position.number if isinstance(constraint, RemoteConstraint) else None,
                m.packed(request.output_token_ids),
                request.num_cached_tokens,
                request.is_continued,
            )
        )
        self._taken[number] = asyncio.get_running_loop().create_future()
        return self._taken[number]

    async def replay(self, request: Request, token_ids: Sequence[int]) -> Output:
        """See `Generator`. What the request's structure says of the tokens, the engine's process finds out."""
        self._limits.check(request)
        return await replay(request, token_ids, self._tokenizer, self._eos_token_ids)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """See `Generator`."""
        if (number := self._by_id.get(request_id)) is not None:
            self._forget(number)
            self._link.send(m.Abort(number, reason))

    # --- counters -----------------------------------------------------------------------------------------------

    def rejection(self, reason: str) -> None:
        """See `Counters`."""
        self._link.send(m.Rejected(reason))

    def choices_asked(self, n: int) -> None:
        """See `Counters`."""
        self._link.send(m.Asked(n))

    def body_bytes(self, num_bytes: int) -> None:
        """See `Counters`."""
        self._body_bytes = num_bytes
        self._link.send_soon()

    def _last(self) -> m.Bodies | None:
        if self._body_bytes == self._told_body_bytes:
            return None
        self._told_body_bytes = self._body_bytes
        return m.Bodies(self._body_bytes)

    # --- what comes ---------------------------------------------------------------------------------------------

    def _take(self, message: m.ToWorker) -> None:
        if isinstance(message, m.Step):
            self._step(message)
        elif isinstance(message, m.Taken):
            taken = self._taken.pop(message.number, None)
            if message.problem is not None:
                self._forget(message.number)
            if taken is not None and not taken.done():
                taken.set_result(None if message.problem is None else message.problem.error)
        elif isinstance(message, m.Reply):
            answer = self._calls.get(message.call)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            self._stop()

    def _step(self, step: m.Step) -> None:
        """Give each request what came of it; those that are over here already get nothing."""
        lives = self._live
        for number, num_cached_tokens in step.began:
            if (live := lives.get(number)) is not None:
                live.request.num_cached_tokens = num_cached_tokens
        for number, token_id in zip(m.unpacked(step.numbers), m.unpacked(step.token_ids), strict=True):
            if (live := lives.get(number)) is None:
                continue
            try:
                text = live.say(token_id, self._eos_token_ids) if live.is_simple else None
            except Exception as error:
                self._fail(live, error)
                continue
            if text is None:
                self._put(number, live, SampledToken(token_id), None)
            else:
                live.stream.put_token(text, token_id)
        for delta in step.deltas:
            if (live := lives.get(delta.number)) is not None:
                self._put_delta(live, delta)

    def _put_delta(self, live: Live, delta: m.Delta) -> None:
        if delta.problem is not None or delta.token_id is None:  # it has ended without a token
            self._forget(delta.number)
            if delta.problem is not None:
                live.stream.fail(delta.problem.error)
            else:
                live.stream.put(Output(finish_reason=delta.finish_reason))
            return
        live.request.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is FinishReason.STOP and isinstance(live.request.constraint, RemoteConstraint):
            live.request.constraint.is_finished = True  # unless it is a token that ends it: then that counts
        self._put(delta.number, live, SampledToken(delta.token_id, delta.logprobs), delta.finish_reason)

    def _put(self, number: int, live: Live, token: SampledToken, end: FinishReason | None) -> None:
        """Say what a token says; `end`: why the engine has ended the request with it, if it has."""
        try:
            output = live.take(token, self._eos_token_ids)
        except Exception as error:
            self._fail(live, error)
            return
        if output.finish_reason is None and end is None:
            live.stream.put(output)
            return
        if end is None:  # a stop string, of which the engine knows nothing
            self.abort(live.request.request_id, output.finish_reason or FinishReason.STOP)
        self._forget(number)
        live.stream.put(output if output.finish_reason is not None else output._replace(finish_reason=end))

    def _fail(self, live: Live, error: Exception) -> None:
        """End a request whose token could not be said; the others go on."""
        log.error("request failed in a step", request=live.request.request_id, exc_info=error)
        self.abort(live.request.request_id, FinishReason.ERROR)
        live.stream.fail(EngineError(f"a step failed: {error!r}"))

    def _forget(self, number: int) -> None:
        if (live := self._live.pop(number, None)) is not None:
            self._by_id.pop(live.request.request_id, None)
