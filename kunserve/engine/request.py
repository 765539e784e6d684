"""A request as the engine sees it: token ids and sampling parameters in, `Output` deltas out."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from kunserve.engine.block_table import BlockTable
from kunserve.errors import KunServeError

if TYPE_CHECKING:  # command lines are judged without numpy
    import numpy as np
    from numpy.typing import NDArray

# Waits for the mask: bit i of its little-endian words (V / 32,) uint32 allows token i; None allows all.
TokenMask: TypeAlias = "Callable[[], NDArray[np.uint32] | None]"


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are the ones clients see."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Values are already validated (api/protocol.py)."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not come up
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    num_prompt_logprobs: int | None = None  # None: off; as num_logprobs, for the prompt's tokens from the second on
    num_logprobs: int | None = None  # None: off; n: the sampled token's and the n most likely


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
    rank: int | None = None  # of a prompt's token: 1 if it is the most likely one


class Output(NamedTuple):
    """What came since the last one. Deltas: text that is final, the tokens, their logprobs if asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token, if asked for


class Constraint(Protocol):
    """What a request's next token may be, by a grammar (engine/constraint.py). Used on the event loop only."""

    def mask(self, num_accepted: int) -> TokenMask:
        """Return which tokens may come after so many: as many as `accept` was given, or one more.

        If it is one more, the mask waits for that token, too.
        """

    def accept(self, token_id: int) -> None:
        """Begin to take the token that was chosen: `settled` says when it is known what comes of it."""

    async def settled(self) -> None:
        """Return when `error` and `is_finished` are known for all accepted tokens: after a bounded time."""

    def close(self) -> None:
        """Nothing will be accepted any more: whoever waits may go on, with any token."""

    @property
    def error(self) -> KunServeError | None:
        """EngineError if a token cannot follow, InvalidRequestError if finding out is too much work; else None."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. Owned by the engine from `submit` to its final `Output`.

    Counters (all in tokens): `num_computed_tokens <= num_scheduled_tokens <= num_expected_tokens`. Tokens up to
    `num_computed_tokens` have their KV in the blocks; those between computed and scheduled are in flight. Those between
    `num_tokens` and `num_expected_tokens` are being sampled.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float = 0.0  # on the engine's clock
    seed: int = 0  # always set by the engine: from params, or drawn
    priority: int = 0  # lower goes first
    owner: str = ""  # whose it is, where several share the server (engine/waiting.py)
    constraint: Constraint | None = None

    token_ids: list[int] = field(init=False)  # prompt, then everything generated
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_counted_tokens: int = 0  # of the prompt, that metrics have counted as computed: a preemption leaves it
    num_sampling: int = 0  # microbatches in flight that will bring a token
    max_num_tokens: int = sys.maxsize  # it ends when it has so many; set by the engine
    group_id: int | None = None  # while admitted
    table: BlockTable = field(default_factory=BlockTable)  # what it holds in its group
    admitted_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_in_flight: int = 0  # microbatches that carry it now
    is_moving: bool = False  # its KV is being exchanged: not schedulable
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # as far as they are known
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated."""
        return len(self.token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Prompt, generated, and those that are being sampled."""
        return len(self.token_ids) + self.num_sampling

    @property
    def num_blocks(self) -> int:
        """Logical blocks that it holds in its group: as many on each device of the chain."""
        return len(self.table.blocks)

    @property
    def block_tables(self) -> list[list[int]]:
        """Ids of its blocks on each stage of its group."""
        return list(self.table.ids.values())

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[len(self.prompt_token_ids) :]
