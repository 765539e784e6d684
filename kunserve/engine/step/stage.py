"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    tokens = _run_head(decoder, run_last_layers(decoder, stage, position, inputs, x), inputs)
    # On this thread: the next microbatch, queued behind, reads them; told by the event loop, it would wait for that.
    inputs.sampled.set_result([token.token_id for token in tokens])
    return tokens


def run_last_layers(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None) -> Tensor:
    """Run the stage at the end of a chain without the head: hidden states (R, H) of the sampled rows. Blocking."""
    return run_stage(decoder, stage, position, inputs, x, with_head=False)


def filled_rows(inputs: StepInputs, which: slice = slice(None)) -> Sequence[SamplingRow]:
    """Return what decides tokens of sampled rows, with those that the previous microbatch has sampled."""
    rows = inputs.sampling[which]
    return rows if inputs.depends_on is None or not rows else fill_sampling(rows, inputs.previous_tokens())


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


def _run_head(decoder: Decoder, x: Tensor, inputs: StepInputs) -> list[SampledToken]:
    """Sample one token for each row of `run_last_layers`: hidden states (R, H)."""
    if not inputs.sampling:
        return []
    rows = filled_rows(inputs)
    return sample_in_slices(decoder, x, rows) if has_scored_rows(rows) else sample(decoder.logits(x), rows)


def _token_ids(inputs: StepInputs) -> Tensor:
    return inputs.token_ids if inputs.depends_on is None else fill_token_ids(inputs.token_ids, inputs.previous_tokens())
