"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from torch import Tensor

from kunserve.engine.group import Stage
from kunserve.engine.microbatch import StepInputs
from kunserve.engine.sampler import SampledToken, sample
from kunserve.model.decoder import Decoder


def run_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> Tensor:
    """Run the layers of the stage at `position` in its chain. Shapes as in `Decoder.forward`. Blocking."""
    return decoder.forward(stage.first_layer, stage.last_layer, x, inputs.attention(position), inputs.sampled_rows)


def run_last_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> list[SampledToken]:
    """Run the stage at the end of a chain and sample one token per sampled row. Blocking."""
    logits = run_stage(decoder, stage, position, inputs, x)
    return sample(logits, inputs.sampling) if inputs.sampling else []
