"""The head at both ends of a chain: each does half of the work, which is a product and sampling from its rows.

The product is divided by the vocabulary, not by rows: its matrix is read once for all rows, and half of them would read
all of it at either end. With 20 rows of SmolLM2 that took both ends 8.5 ms each, and halves of the vocabulary take 6.1
(one core, float32). A row is sampled where it is whole: by the first device, which begins when the microbatch that it
has meanwhile is done, and so finds the other part there. Where sampling takes longer than the product, the last device
multiplies alone, and samples some of the rows.
Tokens do not depend on any of this: an element of a product is the same whatever else is computed.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from time import thread_time

import torch
from torch import Tensor

from kunserve.averages import smooth
from kunserve.compute.decoder import Decoder
from kunserve.compute.sampler import SampledToken, sample
from kunserve.engine.group import Stage
from kunserve.engine.step.microbatch import StepInputs
from kunserve.engine.step.stage import filled_rows, run_last_layers

GRAIN = 64  # the vocabulary is divided at multiples of so many tokens: kernels compute tiles of them


@dataclass(slots=True)
class HeadBalance:
    """How long sampling takes in one chain, beside the product: from this follows who does what."""

    sampling_share: float = 0.0  # of the product's time; not bounded by 1

    def learn(self, product_s: float, sampling_s: float) -> None:
        """Follow what a microbatch took at both ends together."""
        if product_s > 0:
            self.sampling_share = smooth(self.sampling_share, sampling_s / product_s)

    def divide(self, vocab_size: int, num_rows: int) -> tuple[int, int]:
        """Return for how many tokens the last device multiplies, and how many rows it samples: with these half of all.

        It samples none unless it multiplies for all tokens.
        """
        half = (1 + self.sampling_share) / 2  # in products
        if half < 1:
            return min(vocab_size, max(1, round(half * vocab_size / GRAIN)) * GRAIN), 0
        return vocab_size, int(num_rows * (half - 1) / self.sampling_share)


class SharedHead:
    """The head of one microbatch. Each end runs its part on its device's thread."""

    def __init__(self, inputs: StepInputs, balance: HeadBalance, vocab_size: int) -> None:
        self._inputs, self._balance, self._vocab_size = inputs, balance, vocab_size
        # The last device multiplies for the tokens before this one, and samples so many rows.
        self._border, self._num_own = balance.divide(vocab_size, len(inputs.sampling))
        self._hidden = Future[Tensor]()  # (R, H) of the sampled rows after the last layer
        self.is_multiplied = Future[None]()  # by the last device
        self._logits: Tensor | None = None  # (R, V)
        self._has_first_multiplied = self._border == vocab_size
        # What the first device waits for. It is cancelled if the last stage fails.
        self.first_can_begin = self.is_multiplied if self._has_first_multiplied else self._hidden
        self._lock, self._token_ids = Lock(), [-1] * len(inputs.sampling)
        self._num_missing, self._product_s, self._sampling_s = len(inputs.sampling), 0.0, 0.0

    def run_last(self, decoder: Decoder, stage: Stage, position: int, x: Tensor) -> list[SampledToken]:
        """Run the last stage and its part of the head; return the tokens of its rows, the first ones. Blocking.

        One item of the queue: between two, the layers of the next microbatch could come, and the samples of this one,
        which its first stage waits for, would be late by as much.
        """
        try:
            hidden = run_last_layers(decoder, stage, position, self._inputs, x)
            self._logits = torch.empty(len(hidden), self._vocab_size, dtype=hidden.dtype)
            self._hidden.set_result(hidden)
            self._multiply(decoder, 0, self._border)
            self.is_multiplied.set_result(None)
        except BaseException:
            self._hidden.cancel()  # else the other end would wait for ever
            self.is_multiplied.cancel()
            raise
        return self._sample(decoder, slice(0, self._num_own))

    def run_first(self, decoder: Decoder) -> list[SampledToken] | None:
        """Run the first device's part once it can begin; return the tokens of the other rows. Blocking.

        None if the last device has not multiplied yet: then it is to be run again, which samples only. Waiting here,
        this device would not answer if the other one hangs, and both would be taken for lost.
        """
        if not self._has_first_multiplied:
            self._has_first_multiplied = True
            self._multiply(decoder, self._border, self._vocab_size)
        return self._sample(decoder, slice(self._num_own, None)) if self.is_multiplied.done() else None

    def learn(self) -> None:
        """Let the chain's next microbatches be divided by what this one took: both ends are done."""
        self._balance.learn(self._product_s, self._sampling_s)

    def _multiply(self, decoder: Decoder, first: int, last: int) -> None:
        started, logits = thread_time(), self._logits
        assert logits is not None
        decoder.multiply_head(self._hidden.result(), first, last, logits)
        with self._lock:
            self._product_s += thread_time() - started

    def _sample(self, decoder: Decoder, which: slice) -> list[SampledToken]:
        rows = filled_rows(self._inputs, which)
        if not rows or self.is_multiplied.cancelled():  # the step has failed
            return []
        started, logits = thread_time(), self._logits
        assert logits is not None
        tokens = sample(decoder.scaled(logits[which]), rows)
        with self._lock:
            self._sampling_s += thread_time() - started
            self._token_ids[which] = [token.token_id for token in tokens]
            self._num_missing -= len(tokens)
            if not self._num_missing:
                # On this thread: told by the event loop, the microbatch that reads them would wait for that.
                self._inputs.sampled.set_result(self._token_ids)
        return tokens
