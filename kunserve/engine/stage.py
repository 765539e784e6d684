"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from torch import Tensor

from kunserve.engine.group import Stage
from kunserve.engine.microbatch import StepInputs, fill_sampling, fill_token_ids
from kunserve.engine.sampler import SampledToken, sample
from kunserve.model.decoder import Decoder


def run_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None) -> Tensor:
    """Run the layers of the stage at `position` in its chain: x is None for the first. Blocking.

    Shapes as in `Decoder.forward`. The first stage puts in the tokens that were not known when it was planned.
    """
    x = _token_ids(inputs) if x is None else x
    return decoder.forward(stage.first_layer, stage.last_layer, x, inputs.attention(position), inputs.sampled_rows)


def run_last_stage(
    decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None
) -> list[SampledToken]:
    """Run the stage at the end of a chain, sample one token per sampled row, and hand them on. Blocking."""
    tokens = _sample(run_stage(decoder, stage, position, inputs, x), inputs, slice(None))
    inputs.sampled.set_result([token.token_id for token in tokens])
    return tokens


def run_last_layers(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> Tensor:
    """Run the stage at the end of a chain without the head: hidden states (R, H) of the sampled rows. Blocking."""
    x = decoder.hidden(stage.first_layer, stage.last_layer, x, inputs.attention(position))
    return x[inputs.sampled_rows]


def run_head(decoder: Decoder, x: Tensor, inputs: StepInputs, rows: slice) -> list[SampledToken]:
    """Sample one token for each of some rows of `run_last_layers`: all hidden states (R, H). Blocking."""
    return _sample(decoder.logits(x[rows]), inputs, rows)


def _token_ids(inputs: StepInputs) -> Tensor:
    return inputs.token_ids if inputs.ahead_of is None else fill_token_ids(inputs.token_ids, inputs.fed())


def _sample(logits: Tensor, inputs: StepInputs, which: slice) -> list[SampledToken]:
    rows = inputs.sampling[which]
    if not rows:
        return []
    return sample(logits, rows if inputs.ahead_of is None else fill_sampling(rows, inputs.fed()))
