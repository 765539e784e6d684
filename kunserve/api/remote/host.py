"""The engine's end of a worker: what the worker asks is done by the same parts that routes in this process use."""

from __future__ import annotations

import asyncio
import socket
from array import array
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, cast

import structlog

from kunserve.api.remote import messages as m
from kunserve.api.remote.link import Link
from kunserve.api.wire.admission import Admission, LocalReservation
from kunserve.api.wire.context import Api
from kunserve.api.wire.errors import internal_error
from kunserve.api.wire.grammars import Begun, Kind, Structure
from kunserve.api.wire.response_store import Stored
from kunserve.engine.request import Output, Request
from kunserve.engine.text.stream import Sink
from kunserve.errors import KunServeError

log = structlog.get_logger()


class _Remote(Sink):
    """One request of a worker, as the engine sees it."""

    __slots__ = ("_has_begun", "_host", "_is_plain", "_number", "request")

    wants_text: ClassVar[bool] = False

    def __init__(self, host: Host, number: int, request: Request) -> None:
        self._host, self._number, self.request, self._has_begun = host, number, request, False
        # Of the others nothing may overtake what is more than a token.
        self._is_plain = request.params.num_logprobs is None and request.params.num_prompt_logprobs is None

    def put(self, output: Output) -> None:
        """See `Sink.put`."""
        host = self._host
        if not self._has_begun:
            self._has_begun = True
            host.began.append((self._number, self.request.num_cached_tokens))
        if self._is_plain and output.finish_reason is None:
            host.numbers.append(self._number)
            host.token_ids.append(output.token_ids[0])
        else:
            token_id = output.token_ids[0] if output.token_ids else None
            logprobs = output.logprobs[0] if output.logprobs else None
            end = output.finish_reason
            host.deltas.append(m.Delta(self._number, token_id, logprobs, output.prompt_logprobs, end))
            if end is not None:
                host.ended(self._number)
        host.link.send_soon()

    def put_token(self, text: str, token_id: int) -> None:
        """See `Sink.put_token`."""
        if not (self._has_begun and self._is_plain):
            self.put(Output(text, (token_id,)))
            return
        host = self._host
        host.numbers.append(self._number)
        host.token_ids.append(token_id)
        if len(host.numbers) == 1:  # else it is to be sent already
            host.link.send_soon()

    def fail(self, error: KunServeError) -> None:
        """See `Sink.fail`."""
        self._host.deltas.append(m.Delta(self._number, problem=m.Problem.of(error)))
        self._host.ended(self._number)
        self._host.link.send_soon()


class Host:
    """One worker, from its connection to its end: then nothing of it is left in the engine, however it ended."""

    def __init__(
        self, api: Api, admission: Admission, body_bytes: Callable[[int], None], ready: Callable[[], None]
    ) -> None:
        """Make what `open` connects; `api` and `admission` are those of the engine's process.

        `body_bytes` is told what the worker holds of bodies, whenever that changes; `ready` is called once.
        """
        self._api, self._admission, self._body_bytes = api, admission, body_bytes
        self._ready, self.lost = ready, asyncio.Event()
        self.num_lost = 0  # requests that had not ended when the worker was lost
        self.began: list[tuple[int, int]] = []  # of the step that is to be sent, as `messages.Step` has it
        self.numbers, self.token_ids, self.deltas = array("I"), array("I"), list[m.Delta]()
        self.link = Link[m.ToWorker, m.FromWorker](list[m.FromWorker], self._take, self._step, self._end)
        self._requests: dict[int, Request] = {}
        self._reservations: dict[int, LocalReservation] = {}
        self._structures: dict[int, Begun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers = self._make_handlers()

    def _make_handlers(self) -> dict[type, Callable[[Any], None]]:
        metrics = self._api.metrics
        return {
            m.Ready: lambda message: self._ready(),
            m.Check: self._check,
            m.Reserve: self._reserve,
            m.Leave: self._leave,
            m.Submit: self._submit,
            m.Abort: self._abort,
            m.Compile: lambda message: self._answer_later(message.call, self._compile(message)),
            m.Replay: lambda message: self._answer_later(message.call, self._replay(message)),
            m.Forget: lambda message: self._forget(message.structure),
            m.Rejected: lambda message: metrics.rejection(message.reason),
            m.Asked: lambda message: metrics.choices_asked(message.n),
            m.Bodies: lambda message: self._body_bytes(message.num_bytes),
            m.Put: self._put,
            m.Load: lambda message: self._answer_later(message.call, self._load(message)),
            m.Delete: lambda message: self._answer_later(message.call, self._delete(message)),
        }

    async def open(self, connection: socket.socket) -> None:
        """Begin to do what the worker at the other end asks."""
        await self.link.open(connection)

    def ended(self, number: int) -> None:
        """Forget a request that has ended."""
        self._requests.pop(number, None)

    def stop(self) -> None:
        """Tell the worker to end, behind all that it was told before."""
        self.link.send(m.Stop())

    def _take(self, message: m.FromWorker) -> None:
        self._handlers[type(message)](message)

    def _step(self) -> m.Step | None:
        if not (self.numbers or self.deltas or self.began):
            return None
        step = m.Step(self.began, self.numbers.tobytes(), self.token_ids.tobytes(), self.deltas)
        self.began, self.numbers, self.token_ids, self.deltas = [], array("I"), array("I"), []
        return step

    def _end(self) -> None:
        """Free all that the worker held."""
        self.num_lost = len(self._requests)
        for task in self._tasks:
            task.cancel()
        for reservation in self._reservations.values():
            reservation.leave(reservation.num_reqs)
        self._reservations.clear()
        for request in list(self._requests.values()):  # who ends is taken out
            self._api.departures.run(partial(self._api.backend.abort, request.request_id))
        for structure in list(self._structures):
            self._forget(structure)
        self._body_bytes(0)
        self.lost.set()

    # --- answers ------------------------------------------------------------------------------------------------

    def _answer(self, call: int, work: Callable[[], object]) -> None:
        try:
            self.link.send(m.Reply(call, work()))
        except KunServeError as error:
            self.link.send(m.Reply(call, problem=m.Problem.of(error)))

    def _answer_later(self, call: int, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer_when_done(call, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_when_done(self, call: int, work: Coroutine[Any, Any, object]) -> None:
        try:
            reply = m.Reply(call, await work)
        except KunServeError as error:
            reply = m.Reply(call, problem=m.Problem.of(error))
        except Exception:
            log.exception("a worker's call failed")
            reply = m.Reply(call, problem=m.Problem.of(internal_error()))
        self.link.send(reply)

    # --- the queue ----------------------------------------------------------------------------------------------

    def _check(self, message: m.Check) -> None:
        asked = (message.owner, message.num_reqs, message.num_tokens)
        self._answer(message.call, lambda: self._admission.check_now(*asked))

    def _reserve(self, message: m.Reserve) -> None:
        def reserve() -> None:
            asked = (message.owner, message.num_reqs, message.num_tokens)
            self._reservations[message.reservation] = self._admission.reserve(*asked)

        self._answer(message.call, reserve)

    def _leave(self, message: m.Leave) -> None:
        if (reservation := self._reservations.get(message.reservation)) is not None:  # else it was refused
            reservation.leave(min(message.num_reqs, reservation.num_reqs))
            if reservation.num_reqs == 0:
                del self._reservations[message.reservation]

    def _submit(self, message: m.Submit) -> None:
        try:
            request = self._request_of(message)
            self._requests[message.number] = request
            self._api.backend.submit_to(request, _Remote(self, message.number, request))
        except Exception as error:
            self.ended(message.number)
            if not isinstance(error, KunServeError):
                log.exception("a worker's request failed")
            known = error if isinstance(error, KunServeError) else internal_error()
            self.link.send(m.Taken(message.number, m.Problem.of(known)))
        else:
            self.link.send(m.Taken(message.number))

    def _request_of(self, message: m.Submit) -> Request:
        constraint = None if message.structure is None else self._structures[message.structure].copy()
        request = Request(
            message.request_id,
            m.unpacked(message.prompt).tolist(),
            message.params,
            priority=message.priority,
            owner=message.owner,
            constraint=constraint,
            cache_salt=message.cache_salt,
        )
        request.token_ids += m.unpacked(message.generated)
        request.num_cached_tokens, request.is_continued = message.num_cached_tokens, message.is_continued
        return request

    def _abort(self, message: m.Abort) -> None:
        if (request := self._requests.pop(message.number, None)) is not None:
            self._api.backend.abort(request.request_id, message.reason)

    # --- structures ---------------------------------------------------------------------------------------------

    async def _compile(self, message: m.Compile) -> None:
        grammars = self._api.grammars
        assert grammars is not None  # a worker's server has them
        structure = Structure(cast(Kind, message.kind), message.value, message.param)
        self._structures[message.structure] = await grammars.compile(structure, message.reasons, message.owner)

    async def _replay(self, message: m.Replay) -> bool:
        constraint = self._structures[message.structure].copy()
        self._structures[message.end] = constraint
        for token_id in m.unpacked(message.generated):
            constraint.accept(token_id)
        await constraint.decided()  # for all of them: waiting for each would take seconds
        if constraint.error is not None:
            raise constraint.error
        return constraint.is_finished

    def _forget(self, structure: int) -> None:
        if (constraint := self._structures.pop(structure, None)) is not None:
            constraint.close()

    # --- stored responses ---------------------------------------------------------------------------------------

    def _put(self, message: m.Put) -> None:
        stored = Stored(message.response, message.items, message.num_input_items)
        self._api.responses.put(message.response_id, message.owner, stored)

    async def _load(self, message: m.Load) -> tuple[bytes, bytes, int] | None:
        await asyncio.sleep(0)  # what another worker stores was sent before its client could ask for it here
        stored = await self._api.responses.load(message.response_id, message.owner)
        return None if stored is None else (stored.response, stored.items, stored.num_input_items)

    async def _delete(self, message: m.Delete) -> bool:
        await asyncio.sleep(0)  # as for `_load`
        return await self._api.responses.delete(message.response_id, message.owner)
