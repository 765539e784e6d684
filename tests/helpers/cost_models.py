"""Constants for tests: round numbers, of the order of a virtual CPU device's."""

from __future__ import annotations

from kunserve.planner.cost import CostModel

COST = CostModel(
    pair_s=1e-8,
    key_s=1e-7,
    token_s=1e-4,
    chunk_s=1e-5,
    load_s=1e-3,
    embed_token_s=1e-6,
    head_row_s=1e-3,
    head_load_s=6e-3,
    stage_s=2e-3,
    sample_s=1e-4,
)
