"""A request as the engine sees it: token ids and sampling parameters in, `Output` deltas out."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kunserve.engine.blocks.block_table import BlockTable
from kunserve.errors import KunServeError
from kunserve.sampling import FinishReason, SamplingParams, TokenLogprobs, TokenMask


class Output(NamedTuple):
    """What came since the last one. Deltas: text that is final, the tokens, their logprobs if asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token, if asked for


class Constraint(Protocol):
    """What a request's next token may be, by a grammar (engine/text/constraint.py). Used on the event loop only."""

    def mask(self, num_accepted: int) -> TokenMask:
        """Return which tokens may come after so many: as many as `accept` was given, or one more.

        If it is one more, the mask waits for that token, too.
        """

    def accept(self, token_id: int) -> None:
        """Begin to take the token that was chosen: `decided` says when it is known what comes of it."""

    async def decided(self) -> None:
        """Return when `error` and `is_finished` are known for all accepted tokens: after a bounded time."""

    def release(self) -> None:
        """Let who waits for the mask after the next token go on: that token does not come now."""

    def close(self) -> None:
        """Let whoever waits go on, with any token: nothing will be accepted any more."""

    @property
    def error(self) -> KunServeError | None:
        """Return EngineError if a token cannot follow, InvalidRequestError if finding out takes too long; else None."""

    @property
    def is_finished(self) -> bool:
        """Return whether nothing may follow."""


class Trace(Protocol):
    """The receiver of what becomes of a request, if it is traced (observe/tracer.py)."""

    ids: Mapping[str, str]  # by which lines of the log name it

    def event(self, name: str, **attributes: str | int) -> None:
        """Note that something happens to it now."""

    def end(self, request: Request, now_s: float) -> None:
        """Note that it has ended, at `now_s` on the engine's clock."""


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
    owner: str = ""  # whose it is, where several share the server (engine/schedule/waiting.py)
    constraint: Constraint | None = None
    cache_salt: str = ""  # its prefix is shared with requests of the same salt only
    trace: Trace | None = None

    token_ids: list[int] = field(init=False)  # prompt, then everything generated
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_counted_tokens: int = 0  # of the prompt, that metrics have counted as computed: a preemption leaves it
    num_sampling: int = 0  # microbatches in flight that will bring a token
    max_num_tokens: int = sys.maxsize  # it ends when it has so many; set by the engine
    is_continued: bool = False  # another engine has begun it: it came with tokens generated there
    group_id: int | None = None  # while admitted
    table: BlockTable = field(default_factory=BlockTable)  # what it holds in its group
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    num_cached_tokens: int = 0  # that it found in the prefix cache when it was admitted first, in whichever engine
    admitted_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_in_flight: int = 0  # microbatches that carry it now
    is_moving: bool = False  # its KV is being exchanged: not schedulable
    has_failed: bool = False  # in a step: not schedulable, it starts over once no microbatch carries it
    num_failures: int = 0  # steps that failed with it alone, since it came further
    num_killed: int = 0  # devices that did not survive a step with it, since it came further
    suspect_until: int = 0  # it is suspected until so many tokens are computed (engine/survive/retries.py)
    is_hurried: bool = False  # its KV went with a device: until its next token, others that run give way
    avoids: int | None = None  # id of the group in which a step with it failed last
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # as far as they are known
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    def note(self, event: str, **attributes: str | int) -> None:
        """Tell its trace, if it has one, that something happens to it."""
        if self.trace is not None:
            self.trace.event(event, **attributes)

    @property
    def trace_ids(self) -> Mapping[str, str]:
        """Return the fields by which lines of the log name its trace; none if it has no trace."""
        return {} if self.trace is None else self.trace.ids

    @property
    def is_suspect(self) -> bool:
        """Tell whether the next step that it joins may fail because of it: it goes alone."""
        return self.num_scheduled_tokens < self.suspect_until

    @property
    def goes_first(self) -> bool:
        """Return whether others wait for it in turns: it goes alone, or has waited long enough."""
        return (self.is_hurried and not self.num_sampling) or self.num_scheduled_tokens < self.suspect_until

    @property
    def is_over_here(self) -> bool:
        """Return whether what a step brings to it is of no use: it has ended, or starts over."""
        return self.finish_reason is not None or self.has_failed

    @property
    def num_tokens(self) -> int:
        """Return how many tokens it has: prompt and generated."""
        return len(self.token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Return how many tokens it has, with those that are being sampled."""
        return len(self.token_ids) + self.num_sampling

    @property
    def num_blocks(self) -> int:
        """Return how many logical blocks it holds in its group: as many on each device of the chain."""
        return len(self.table.blocks)

    @property
    def num_places(self) -> int:
        """Return how many blocks its tokens have been given, with those that it has let go behind a window."""
        return self.table.num_places

    @property
    def num_own_blocks(self) -> int:
        """Return how many of its blocks no other request holds: they come free when it leaves."""
        return sum(block.num_refs == 1 for block in self.table.blocks)

    @property
    def block_tables(self) -> list[array[int]]:
        """Return the ids of its blocks on each stage of its group."""
        return list(self.table.ids.values())

    @property
    def num_prompt_tokens(self) -> int:
        """Return the number of tokens the client sent."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Return the number of tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Return the tokens generated so far."""
        return self.token_ids[len(self.prompt_token_ids) :]
