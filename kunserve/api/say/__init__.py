"""From the engine's outputs to answers: choices, deltas, reasoning and tool calls taken apart."""
