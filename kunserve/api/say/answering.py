"""From tokenized prompts to the answer on the wire, in one piece or as a stream; the same for every endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from kunserve.api.ask.prompts import CALL_CHARS
from kunserve.api.ask.protocol import GenerationCall
from kunserve.api.say.answers import AnswerWriter, Choice
from kunserve.api.say.echo import Echo
from kunserve.api.say.generation import SLICE, Delivered, Deliveries, submitted
from kunserve.api.say.marks import Marked, check_past, seed_choices
from kunserve.api.say.reasoning import MessageParser
from kunserve.api.say.reasoning_tokens import ReasoningTokens
from kunserve.api.wire.access import front_of
from kunserve.api.wire.admission import Reservation
from kunserve.api.wire.context import RESUMED, Api, Past, begin_trace, json_response, to_json
from kunserve.api.wire.errors import internal_error
from kunserve.api.wire.sse import EventStream
from kunserve.engine.request import Output, Request
from kunserve.errors import KunServeError
from kunserve.sampling import SamplingParams

if TYPE_CHECKING:
    from kunserve.api.wire.grammars import Begun

log = structlog.get_logger()

LOGPROB_CHARS = 4  # a log-probability costs as much to write as so many characters to tokenize: 2 us


async def make_choices(
    api: Api,
    answer_id: str,
    call: GenerationCall,
    owner: str,
    prompts: Sequence[tuple[list[int], SamplingParams, Echo | None]],
    constraint: Begun | None = None,
    new_parser: Callable[[], MessageParser] | None = None,
    reasoning: ReasoningTokens | None = None,
) -> list[Choice]:
    """Return `n` sequences per prompt (ids, params, echo), each seeded apart; choice i belongs to prompt i // n.

    `reasoning`: what counts the tokens of it in one of them; None if none can come.
    """
    choices: list[Choice] = []
    priority, salt = call.priority if api.settings.uses_priority else 0, _cache_salt(api, call, owner)
    async for some in api.turns.slices(range(len(prompts) * call.n), SLICE):
        for index in some:
            (ids, params, echo), i = prompts[index // call.n], index % call.n
            if i == 0:
                api.metrics.choices_asked(call.n)
            elif params.seed is not None:
                params = replace(params, seed=(params.seed + i) & (2**63 - 1))
            request_id = f"{answer_id}-{next(api.serials)}"
            own = None if constraint is None else constraint.copy()
            request = Request(request_id, ids, params, priority=priority, owner=owner, constraint=own, cache_salt=salt)
            request.trace = begin_trace(call.n)
            choice = Choice(index, request, echo, new_parser() if new_parser else None)
            choice.reasoning = None if reasoning is None else reasoning.fresh()
            choices.append(choice)
    return choices


def _cache_salt(api: Api, call: GenerationCall, owner: str) -> str:
    """Return a salt with which only those find the prefix of a request who may: hits can be timed, and tell much."""
    is_apart = len(api.settings.api_keys) > 1 and not api.settings.shares_prefixes
    return f"{owner if is_apart else ''}\n{call.cache_salt}"


async def answer(
    request: web.Request, api: Api, writer: AnswerWriter, choices: Sequence[Choice], reservation: Reservation
) -> web.StreamResponse:
    """Generate and send an answer. Leaving early in any way (a client that goes cancels this) ends the generation."""
    if (front := front_of(request)) is not None:
        seed_choices(choices, front)
        writer = Marked(writer)
    if (resumed := request.get(RESUMED)) is None:
        return await _answer(request, api, writer, choices, choices, reservation)
    check_past(choices, resumed.past)
    try:
        running = await _replay(api, writer, choices, resumed.past)
        return await _answer(request, api, writer, choices, running, reservation)
    finally:
        for choice in choices:  # a grammar that has taken tokens is followed, even if its request never ran
            if choice.request.constraint is not None:
                choice.request.constraint.close()


async def _answer(
    request: web.Request,
    api: Api,
    writer: AnswerWriter,
    choices: Sequence[Choice],
    running: Sequence[Choice],
    reservation: Reservation,
) -> web.StreamResponse:
    """Send an answer, as `answer` does; choices that are `running` are generated, the others have ended."""
    async with submitted(api, reservation, [choice.request for choice in running]) as outputs:
        if writer.call.is_stream:
            return await _stream(request, api, writer, choices, running, outputs)
        outputs.take_now = partial(_keep, running)
        async for came in outputs:
            _keep(running, came)
    work = sum(_work(choice) + _work_of_prompt(choice) for choice in choices)
    return json_response(await api.offload(work, lambda: to_json(writer.answer_json(choices))))


async def _replay(api: Api, writer: AnswerWriter, choices: Sequence[Choice], past: Sequence[Past]) -> list[Choice]:
    """Bring choices, and what writes them, to where their tokens have left them elsewhere; return those that go on."""
    running = []
    for choice, before in zip(choices, past, strict=True):
        output = Output()
        if before.token_ids:
            choice.request.num_cached_tokens = before.num_cached_tokens
            output = await api.backend.replay(choice.request, before.token_ids)
            await _open(api, writer, choice, output)
            _write(writer, choice, output)  # the client has it
        if output.finish_reason is None:
            running.append(choice)
    return running


def _keep(choices: Sequence[Choice], came: Delivered) -> bool:
    """Keep outputs for an answer in one piece."""
    for index, output in came.items():
        choices[index].advance(output)
        choices[index].outputs.append(output)
    return True


def _work(choice: Choice) -> int:
    """Return how much text it takes to write what was generated, in characters to tokenize (`Api.offload`)."""
    num_logprobs = choice.request.params.num_logprobs
    parsing = choice.text_length if choice.parser is not None else 0
    return (
        CALL_CHARS + parsing + (0 if num_logprobs is None else choice.num_tokens * (1 + num_logprobs) * LOGPROB_CHARS)
    )


def _work_of_prompt(choice: Choice) -> int:
    """Return how much text the answer may say about the prompt, as `_work` does."""
    num_logprobs = choice.request.params.num_prompt_logprobs
    num_tokens = choice.request.num_prompt_tokens
    return 0 if num_logprobs is None else num_tokens * (1 + num_logprobs) * LOGPROB_CHARS


async def _stream(
    request: web.Request,
    api: Api,
    writer: AnswerWriter,
    choices: Sequence[Choice],
    running: Sequence[Choice],
    outputs: Deliveries,
) -> web.StreamResponse:
    events = EventStream(request, api.settings.write_timeout_s)
    try:
        await events.open()
        try:
            await _send_chunks(api, events, writer, running, outputs)
            await events.send(writer.ending(choices))
        except ConnectionError:
            raise
        except KunServeError as error:
            await events.send(writer.error(error))
        except Exception:
            log.exception("request failed", path=request.path)
            await events.send(writer.error(internal_error()))
        await events.close()
    except ConnectionError as error:
        log.info("stream cut", reason=str(error), request=choices[0].request.request_id)
    return events.response


async def _open(api: Api, writer: AnswerWriter, choice: Choice, output: Output) -> bytes:
    """Return what goes out before a choice's first delta."""
    choice.has_begun = True
    return await api.offload(_work_of_prompt(choice), partial(writer.opening, choice, output))


def _write(writer: AnswerWriter, choice: Choice, output: Output) -> bytes:
    """Return the events of a delta, perhaps none."""
    data = writer.chunk(choice, output)
    choice.advance(output)
    return data


async def _send_chunks(
    api: Api, events: EventStream, writer: AnswerWriter, running: Sequence[Choice], outputs: Deliveries
) -> None:
    """Send one event per delta and choice, all that came at once in one write; what opens a choice with its first.

    This task wakes only for what may take time: a choice's first, log-probabilities of several, whoever reads slowly.
    """
    has_logprobs = writer.call.params.num_logprobs is not None
    num_unopened = sum(not choice.has_begun for choice in running)

    def send_now(came: Delivered) -> bool:
        if num_unopened and not all(running[index].has_begun for index in came):
            return False
        if (has_logprobs and len(came) > 1) or not events.is_free:
            return False
        if len(came) == 1:  # as nearly always
            [(index, output)] = came.items()
            data = _write(writer, running[index], output)
        else:
            data = b"".join([_write(writer, running[index], output) for index, output in came.items()])
        if data:
            events.send_now(data)
        return True

    outputs.take_now = send_now
    async for came in outputs:
        for index, output in came.items():
            choice, data = running[index], b""
            if not choice.has_begun:
                num_unopened -= 1
                data = await _open(api, writer, choice, output)
            if data := data + _write(writer, choice, output):
                await events.send(data)
            if len(came) > 1:
                await api.deliveries.take()
