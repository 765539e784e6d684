"""The messages between a worker and the engine's process: lists of them cross the socket, in MessagePack.

Numbers name a worker's requests, reservations and structures; the worker chooses them, and never one twice. A message
with a `call` is answered by one `Reply` with the same. Token ids are packed: uint32 in the machine's order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from kunserve import errors
from kunserve.errors import KunServeError
from kunserve.sampling import FinishReason, SamplingParams, TokenLogprobs


def packed(token_ids: Sequence[int]) -> bytes:
    """Return token ids as the bytes that cross."""
    return array("I", token_ids).tobytes()


def unpacked(data: bytes) -> array[int]:
    """Return token ids that have crossed."""
    token_ids = array("I")
    token_ids.frombytes(data)
    return token_ids


class Problem(Struct, array_like=True, frozen=True):
    """An error that a client is told, as it crosses."""

    kind: str  # a class of `kunserve.errors`
    message: str
    param: str | None
    retry_after_s: int | None

    @classmethod
    def of(cls, error: KunServeError) -> Problem:
        """Return the message that says this error."""
        return cls(type(error).__name__, error.message, error.param, error.retry_after_s)

    @property
    def error(self) -> KunServeError:
        """Return the error that the message says."""
        kind: type[KunServeError] = getattr(errors, self.kind, KunServeError)
        return kind(self.message, param=self.param, retry_after_s=self.retry_after_s)


# --- from a worker --------------------------------------------------------------------------------------------------


class Ready(Struct, array_like=True, tag=1):
    """Says that the worker takes connections."""


class Check(Struct, array_like=True, tag=2):
    """Asks whether there is room in the queue (`Door.check`)."""

    call: int
    owner: str
    num_reqs: int
    num_tokens: int


class Reserve(Struct, array_like=True, tag=3):
    """Asks for room in the queue, and names it by a number (`Door.accepted`)."""

    call: int
    reservation: int
    owner: str
    num_reqs: int
    num_tokens: int


class Leave(Struct, array_like=True, tag=4):
    """Gives back the room of so many requests of a reservation."""

    reservation: int
    num_reqs: int


class Submit(Struct, array_like=True, tag=5):
    """Queues a request. Answered by `Taken`, then by the tokens of `Step`."""

    number: int
    request_id: str
    prompt: bytes
    params: SamplingParams
    priority: int
    owner: str
    cache_salt: str
    structure: int | None
    generated: bytes  # tokens that another server has generated: this one goes on behind them
    num_cached_tokens: int  # of the prompt, in the prefix cache of the other server
    is_continued: bool


class Abort(Struct, array_like=True, tag=6):
    """Ends a request: its client has left, or its text has come to a stop string."""

    number: int
    reason: FinishReason


class Compile(Struct, array_like=True, tag=7):
    """Compiles a structure, and keeps the position at its beginning under a number."""

    call: int
    structure: int
    kind: str
    value: str
    param: str
    reasons: bool
    owner: str


class Replay(Struct, array_like=True, tag=8):
    """Follows a structure through tokens from a kept position, and keeps the one at their end. Answered: is it over."""

    call: int
    structure: int
    end: int  # the number of the position behind the tokens
    generated: bytes


class Forget(Struct, array_like=True, tag=9):
    """Forgets a position of a structure: nobody begins there any more."""

    structure: int


class Rejected(Struct, array_like=True, tag=10):
    """Counts a request that the worker has turned away (`Counters.rejection`)."""

    reason: str


class Asked(Struct, array_like=True, tag=11):
    """Counts how many choices of a prompt are asked for (`Counters.choices_asked`)."""

    n: int


class Bodies(Struct, array_like=True, tag=12):
    """Says how many bytes of bodies the worker holds now."""

    num_bytes: int


class Put(Struct, array_like=True, tag=13):
    """Stores a response."""

    response_id: str
    owner: str
    response: bytes
    items: bytes
    num_input_items: int


class Load(Struct, array_like=True, tag=14):
    """Asks for a stored response. Answered by None, or by the last three fields of its `Put`."""

    call: int
    response_id: str
    owner: str


class Delete(Struct, array_like=True, tag=15):
    """Deletes a stored response. Answered by whether there was one."""

    call: int
    response_id: str
    owner: str


FromWorker: TypeAlias = (
    Ready
    | Check
    | Reserve
    | Leave
    | Submit
    | Abort
    | Compile
    | Replay
    | Forget
    | Rejected
    | Asked
    | Bodies
    | Put
    | Load
    | Delete
)


# --- to a worker ----------------------------------------------------------------------------------------------------


class Reply(Struct, array_like=True, tag=1):
    """Answers a message that has a `call`."""

    call: int
    value: Any = None
    problem: Problem | None = None


class Taken(Struct, array_like=True, tag=2):
    """Says that a request is queued, or why it was refused."""

    number: int
    problem: Problem | None = None


class Delta(Struct, array_like=True):
    """Tells what a step brought to one request beside a plain token: likelihoods, its end, or an error."""

    number: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    problem: Problem | None = None


class Step(Struct, array_like=True, tag=3):
    """Tells what came of all requests of a worker since the last `Step`. To be read in the order of the fields."""

    began: list[tuple[int, int]]  # requests that have been admitted: number, and cached tokens of the prompt
    numbers: bytes  # of requests that got a plain token, packed as token ids are
    token_ids: bytes  # one for each of these
    deltas: list[Delta]


class Stop(Struct, array_like=True, tag=4):
    """Tells the worker to take no more connections, to end those that there are, and to exit."""


ToWorker: TypeAlias = Reply | Taken | Step | Stop
