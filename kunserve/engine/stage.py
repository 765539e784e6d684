"""What a worker does for one stage of one microbatch: layers, and at the end of the chain the next tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kunserve.engine.group import Stage
from kunserve.engine.microbatch import StepInputs
from kunserve.engine.sampler import SampledToken, SamplingRow, sample
from kunserve.model.decoder import Decoder


def run_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> Tensor:
    """Run the layers of the stage at `position` in its chain. Shapes as in `Decoder.forward`. Blocking."""
    return decoder.forward(stage.first_layer, stage.last_layer, x, inputs.attention(position), inputs.sampled_rows)


def run_last_stage(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> list[SampledToken]:
    """Run the stage at the end of a chain and sample one token per sampled row. Blocking."""
    logits = run_stage(decoder, stage, position, inputs, x)
    return sample(logits, inputs.sampling) if inputs.sampling else []


def run_last_layers(decoder: Decoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor) -> Tensor:
    """Run the stage at the end of a chain without the head: hidden states (R, H) of the sampled rows. Blocking."""
    x = decoder.hidden(stage.first_layer, stage.last_layer, x, inputs.attention(position))
    return x[inputs.sampled_rows]


def run_head(decoder: Decoder, x: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Sample one token for each of some rows of `run_last_layers`: hidden states (R, H). Blocking."""
    return sample(decoder.logits(x), rows)
