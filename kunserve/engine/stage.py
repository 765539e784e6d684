"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from torch import Tensor

from kunserve.engine.group import Stage
from kunserve.engine.microbatch import StepInputs, fill_sampling, fill_token_ids
from kunserve.engine.sampler import SampledToken, sample
from kunserve.model.decoder import Decoder


def run_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None) -> Tensor:
    """Run the layers of the stage at `position` in its chain. Shapes as in `Decoder.forward`. Blocking.

    `x` None: the first stage, of token ids; those that are not known yet are waited for.
    """
    if x is None:
        x = inputs.token_ids if inputs.ahead_of is None else fill_token_ids(inputs.token_ids, inputs.fed())
    return decoder.forward(stage.first_layer, stage.last_layer, x, inputs.attention(position), inputs.sampled_rows)


def run_last_stage(
    decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor | None
) -> list[SampledToken]:
    """Run the stage at the end of a chain, sample one token per sampled row, and hand them on. Blocking."""
    logits = run_stage(decoder, stage, position, inputs, x)
    rows = inputs.sampling if inputs.ahead_of is None else fill_sampling(inputs.sampling, inputs.fed())
    tokens = sample(logits, rows) if rows else []
    inputs.sampled.set_result([token.token_id for token in tokens])
    return tokens
