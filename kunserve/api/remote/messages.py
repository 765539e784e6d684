"""What a worker and the engine's process say to each other: lists of these, in MessagePack.

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
    """Return token ids as they cross."""
    return array("I", token_ids).tobytes()


def unpacked(data: bytes) -> array[int]:
    """Return token ids that have crossed."""
    token_ids = array("I")
    token_ids.frombytes(data)
    return token_ids


class Problem(Struct, array_like=True, frozen=True):
    """An error that is answered to a client."""

    kind: str  # a class of `kunserve.errors`
    message: str
    param: str | None
    retry_after_s: int | None

    @classmethod
    def of(cls, error: KunServeError) -> Problem:
        """Return an error as it crosses."""
        return cls(type(error).__name__, error.message, error.param, error.retry_after_s)

    @property
    def error(self) -> KunServeError:
        """Return the same error on this side."""
        kind: type[KunServeError] = getattr(errors, self.kind, KunServeError)
        return kind(self.message, param=self.param, retry_after_s=self.retry_after_s)


# --- from a worker --------------------------------------------------------------------------------------------------


class Ready(Struct, array_like=True, tag=1):
    """The worker takes connections."""


class Check(Struct, array_like=True, tag=2):
    """Is there room in the queue? (`Door.check`)."""

    call: int
    owner: str
    num_reqs: int
    num_tokens: int


class Reserve(Struct, array_like=True, tag=3):
    """Hold places in the queue, under a number (`Door.accepted`)."""

    call: int
    reservation: int
    owner: str
    num_reqs: int
    num_tokens: int


class Leave(Struct, array_like=True, tag=4):
    """Hold so many of these places no longer."""

    reservation: int
    num_reqs: int


class Submit(Struct, array_like=True, tag=5):
    """Queue a request; answered by `Taken`, then by what comes of it."""

    number: int
    request_id: str
    prompt: bytes
    params: SamplingParams
    priority: int
    owner: str
    cache_salt: str
    structure: int | None
    generated: bytes  # by another server: it goes on behind that
    num_cached_tokens: int  # that the other server found
    is_continued: bool


class Abort(Struct, array_like=True, tag=6):
    """A request is over: its client has left, or its text ends with a stop string."""

    number: int
    reason: FinishReason


class Compile(Struct, array_like=True, tag=7):
    """Compile a structure, and keep its beginning under a number."""

    call: int
    structure: int
    kind: str
    value: str
    param: str
    reasons: bool
    owner: str


class Replay(Struct, array_like=True, tag=8):
    """Follow a structure through tokens, and keep where that ends under another number; answered by `is_finished`."""

    call: int
    structure: int
    end: int
    generated: bytes


class Forget(Struct, array_like=True, tag=9):
    """Nobody begins at this position of a structure any more."""

    structure: int


class Rejected(Struct, array_like=True, tag=10):
    """Count a request that the worker has turned away (`Counters.rejection`)."""

    reason: str


class Asked(Struct, array_like=True, tag=11):
    """Count the `n` of a prompt (`Counters.choices_asked`)."""

    n: int


class Bodies(Struct, array_like=True, tag=12):
    """The worker holds so many bytes of bodies now."""

    num_bytes: int


class Put(Struct, array_like=True, tag=13):
    """Store a response."""

    response_id: str
    owner: str
    response: bytes
    items: bytes
    num_input_items: int


class Load(Struct, array_like=True, tag=14):
    """Ask for a stored response: None, or the last three fields of `Put`."""

    call: int
    response_id: str
    owner: str


class Delete(Struct, array_like=True, tag=15):
    """Forget a stored response; answered by whether there was one."""

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
    """The answer to a call."""

    call: int
    value: Any = None
    problem: Problem | None = None


class Taken(Struct, array_like=True, tag=2):
    """A request is queued, or it was refused."""

    number: int
    problem: Problem | None = None


class Delta(Struct, array_like=True):
    """What a step brought to a request if it is more than a token; without a token, how it has ended."""

    number: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    problem: Problem | None = None


class Step(Struct, array_like=True, tag=3):
    """What came of all requests of a worker since the last one: first who begins, then tokens, then the rest."""

    began: list[tuple[int, int]]  # numbers, and how many tokens of their prompts were cached
    numbers: bytes  # packed as token ids are
    token_ids: bytes  # of these
    deltas: list[Delta]


class Stop(Struct, array_like=True, tag=4):
    """Take no more connections, end those that there are, and end."""


ToWorker: TypeAlias = Reply | Taken | Step | Stop
