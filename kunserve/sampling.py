"""How tokens are chosen, and what is told of them: values that the API, the engine and the sampler share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

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
    """How tokens are chosen and when to stop. Values are already validated (api/ask/protocol.py)."""

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


class SampledToken(NamedTuple):
    """The token chosen for a row, and its log-probabilities if the request asked for them; or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: BaseException | None = None  # then token_id is 0: an id like any, for the microbatch that runs ahead
