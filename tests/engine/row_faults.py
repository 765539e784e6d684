"""Requests that fail for a reason of their own: every kind of work that is done for one row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from tiny_models import VOCAB_SIZE

from kunserve.engine.request import Request
from kunserve.errors import EngineError, InvalidRequestError, KunServeError
from kunserve.sampling import SamplingParams, TokenMask

BAD_TOKEN = 200  # whose embedding is NaN in `broken_model`
MAX_TOKENS = 12
GREEDY = SamplingParams(MAX_TOKENS, temperature=0.0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, seed=3)
PROMPT = [7, 8, 9, 10]


class Panic(BaseException):
    """What pyo3 raises when Rust code panics is no Exception either."""


class Grammar:
    """Allows everything, until `call` is called for the `at`-th time, which raises `error`."""

    def __init__(self, call: str, at: int, error: BaseException) -> None:
        self._call, self._at, self._error, self._num_calls = call, at, error, 0
        self._num_accepted, self._next = 0, list[Future[None]]()

    def _count(self, call: str) -> None:
        if call == self._call:
            self._num_calls += 1
            if self._num_calls > self._at:  # a row may be looked at twice: it stays broken
                raise self._error

    def mask(self, num_accepted: int) -> TokenMask:
        self._count("mask")
        waiting = Future[None]()
        if num_accepted > self._num_accepted:
            self._next.append(waiting)
        else:
            waiting.set_result(None)

        def wait() -> None:
            waiting.result(60)
            self._count("look")

        return wait

    def accept(self, token_id: int) -> None:
        self._count("accept")
        self._num_accepted += 1
        self._release()

    async def decided(self) -> None:
        self._count("decided")

    def release(self) -> None:
        self._release()

    def close(self) -> None:
        self._release()
        self._count("close")

    def _release(self) -> None:
        while self._next:
            self._next.pop().set_result(None)

    @property
    def error(self) -> KunServeError | None:
        self._count("error")
        return None

    @property
    def is_finished(self) -> bool:
        self._count("is_finished")
        return False


class Stop(str):
    """A stop string that never comes, and that can be compared with a few characters only."""

    num_compared = 0

    def __getitem__(self, index: Any) -> str:
        self.num_compared += isinstance(index, int)
        if self.num_compared > 9:
            raise RecursionError("the stop string")
        return super().__getitem__(index)


def constrained(call: str, at: int, error: BaseException) -> Callable[[], Request]:
    return lambda: Request("bad", PROMPT, DRAWN, constraint=Grammar(call, at, error))


def asking(params: SamplingParams, prompt: Sequence[int] = PROMPT) -> Callable[[], Request]:
    return lambda: Request("bad", list(prompt), params)


@dataclass(frozen=True, slots=True)
class Fault:
    """A request that fails, what it is told, and how many log lines have a traceback."""

    make: Callable[[], Request]
    message: str
    num_tracebacks: int = 1


UNUSABLE = "largest logit is not finite"
EVERY_LAYOUT = {
    "nothing is left to choose": Fault(
        asking(replace(DRAWN, min_tokens=9, stop_token_ids=frozenset(range(VOCAB_SIZE)))), UNUSABLE, 0
    ),
    "nothing is left to choose for a greedy row": Fault(
        asking(replace(GREEDY, min_tokens=9, stop_token_ids=frozenset(range(VOCAB_SIZE)))), UNUSABLE, 0
    ),
    "a bias without bound": Fault(asking(replace(GREEDY, logit_bias=((5, float("inf")),))), UNUSABLE, 0),
    "parameters of a wrong type": Fault(asking(replace(GREEDY, logit_bias=((5, "much"),))), "a step failed: "),  # type: ignore[arg-type]
    "logprobs that raise": Fault(asking(replace(DRAWN, num_logprobs=17)), "a step failed: ZeroDivisionError"),
    "prompt logprobs that raise": Fault(
        asking(replace(DRAWN, num_prompt_logprobs=17)), "a step failed: ZeroDivisionError"
    ),
    "a mask that raises": Fault(constrained("look", 0, ValueError("no mask")), "a step failed: .*no mask"),
    "a later mask that panics": Fault(constrained("look", 3, Panic("late")), "a step failed: .*late"),
    "a mask that is too much work": Fault(constrained("look", 2, InvalidRequestError("too complex")), "too complex", 0),
    "a mask that cannot be begun": Fault(constrained("mask", 2, RuntimeError("no thread")), "no thread"),
    "a token that is not accepted": Fault(constrained("accept", 2, EngineError("not allowed")), "not allowed", 0),
    "a token that makes the grammar panic": Fault(constrained("accept", 0, Panic("oh")), "a step failed: .*oh"),
    "a verdict that is not told": Fault(constrained("decided", 2, ValueError("no verdict")), "no verdict"),
    "a token that cannot follow": Fault(constrained("error", 1, EngineError("not allowed")), "not allowed", 0),
    "an end that raises": Fault(constrained("is_finished", 3, KeyError("end")), "a step failed: .*end"),
    "a stop string that raises": Fault(
        lambda: Request("bad", PROMPT, replace(DRAWN, stop=(Stop("\0\0\0"),))), "a step failed: .*the stop string"
    ),
}
NOT_A_NUMBER = {
    "NaN in the prompt": Fault(asking(DRAWN, [5, BAD_TOKEN, 6]), UNUSABLE, 0),
    "NaN in a prompt that is scored": Fault(
        asking(replace(GREEDY, num_prompt_logprobs=2), [5, 9, BAD_TOKEN, 6]), UNUSABLE, 0
    ),
    "NaN in a later token": Fault(asking(replace(GREEDY, allowed_token_ids=(BAD_TOKEN,))), UNUSABLE, 0),
}
