"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import thread_time
from typing import TypeVar

from torch import Tensor

from kunserve.compute.decoder import Decoder
from kunserve.compute.sampler import SampledToken, SamplingRow, sample
from kunserve.engine.group import Stage
from kunserve.engine.step.microbatch import StepInputs, fill_sampling, fill_token_ids

T = TypeVar("T")

SCORED_ROWS = 64  # of which logits are made at a time, where a prompt's tokens are scored: there may be thousands


def run_stage(
    decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None, *, with_head: bool = True
) -> Tensor:
    """Run the layers of the stage at `position` in its chain: x is None for the first. Blocking.

    Shapes as in `Decoder.forward`. The first stage puts in the tokens that were not known when it was planned.
    """
    x = _token_ids(inputs) if x is None else x
    batch, rows = inputs.attention(position), inputs.sampled_rows
    return decoder.forward(stage.first_layer, stage.last_layer, x, batch, rows, with_head=with_head)


def run_last_stage(
    decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None
) -> list[SampledToken]:
    """Run the stage at the end of a chain, sample one token per sampled row, and hand them on. Blocking."""
    tokens = run_head(decoder, run_last_layers(decoder, stage, position, inputs, x), inputs, slice(None))
    # On this thread: the next microbatch, queued behind, reads them; told by the event loop, it would wait for that.
    inputs.sampled.set_result([token.token_id for token in tokens])
    return tokens


def run_last_stage_sharing(
    decoder: Decoder,
    stage: Stage,
    position: int,
    inputs: StepInputs,
    x: Tensor | None,
    own: slice,
    hidden: Future[Tensor],
) -> list[SampledToken]:
    """Run as `run_last_stage`, but sample only some rows: hidden states (R, H) go to whoever has the others.

    One item of the queue: between two, the layers of the next microbatch could come, and the samples of this one, which
    its first stage waits for, would be late by as much. Blocking.
    """
    try:
        hidden.set_result(x := run_last_layers(decoder, stage, position, inputs, x))
    except BaseException:
        hidden.cancel()  # else the other end would wait for them for ever
        raise
    return run_head(decoder, x, inputs, own)


def run_last_layers(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None) -> Tensor:
    """Run the stage at the end of a chain without the head: hidden states (R, H) of the sampled rows. Blocking."""
    return run_stage(decoder, stage, position, inputs, x, with_head=False)


def run_head(decoder: Decoder, x: Tensor, inputs: StepInputs, which: slice) -> list[SampledToken]:
    """Sample one token for each of some rows of `run_last_layers`: all hidden states (R, H). Blocking."""
    x, rows = x[which], inputs.sampling[which]
    if not rows:
        return []
    filled = rows if inputs.depends_on is None else fill_sampling(rows, inputs.previous_tokens())
    return sample_in_slices(decoder, x, filled) if has_scored_rows(rows) else sample(decoder.logits(x), filled)


def run_timed(work: Callable[[], T], stage_s: list[float], position: int) -> T:
    """Do one of these, and add the CPU time of this thread, a device's, to that of a stage.

    What else runs on the thread's core, and waiting for a grammar, is no work of the device.
    """
    started = thread_time()
    result = work()
    stage_s[position] += thread_time() - started
    return result


def has_scored_rows(rows: Sequence[SamplingRow]) -> bool:
    """Tell whether tokens of a prompt are scored: then `sample_in_slices` bounds the memory that logits take."""
    return any(row.given is not None for row in rows)


def sample_in_slices(decoder: Decoder, x: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Sample one token per row of hidden states after the last layer (R, H), SCORED_ROWS at a time. Blocking."""
    parts = [slice(start, start + SCORED_ROWS) for start in range(0, len(rows), SCORED_ROWS)]
    return [token for part in parts for token in sample(decoder.logits(x[part]), rows[part])]


def _token_ids(inputs: StepInputs) -> Tensor:
    return inputs.token_ids if inputs.depends_on is None else fill_token_ids(inputs.token_ids, inputs.previous_tokens())
