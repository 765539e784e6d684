"""Estimate a decode step on an H100 part by part, as docs/design.md has it: `decode_estimate.py` prints the table.

Bytes are counted from the model's shape, places from what the compiler says of FlashInfer's kernel; speeds are assumed.
Nothing was measured.
"""

from __future__ import annotations

import torch
from markdown_tables import table

from kunserve.gpu.kv_memory import KVShape
from kunserve.model.card import load_card
from kunserve.model.layout import weight_units
from kunserve.sizes import ceil_div

MODEL, NUM_SEQS, CONTEXT = "llama-8b", 64, 1024
NUM_SMS, BYTES_PER_S = 132, 3.0e12  # of an H100; the speed of a large copy
PRODUCT_BYTES_PER_S = 2.42e12  # from 2.0, of the smallest matrix, to 2.7, of the head
REGISTERS = 178  # of a thread in FlashInfer's kernel (0.6.18), as ptxas says for sm_90a
TILES_PER_SM = 65_536 // (128 * 8 * ceil_div(REGISTERS, 8))  # of 128 threads; registers come by eights
ATTENTION_SHARE = 0.9  # of a copy's speed; others have published 0.97, for contexts of 16,384 tokens
SMALL_MS, GAPS_MS, ENDS_MS = 0.5, 0.15, 0.07


def lines() -> list[str]:
    """Return the lines of the table."""
    config = load_card(MODEL).config
    weights = sum(unit.num_bytes for unit in weight_units(config, "bfloat16") if unit.name != "embed")
    kv = KVShape.of(config, 1, torch.bfloat16).block_bytes * config.num_layers * CONTEXT * NUM_SEQS
    floor = (weights + kv) / BYTES_PER_S * 1e3
    products = weights / PRODUCT_BYTES_PER_S * 1e3
    tiles, places = NUM_SEQS * config.num_kv_heads, NUM_SMS * TILES_PER_SM
    rounds = tiles / places
    filled = rounds / ceil_div(tiles, places)
    attention = kv / BYTES_PER_S / (filled * ATTENTION_SHARE) * 1e3
    whole = products + attention + SMALL_MS + GAPS_MS + ENDS_MS
    rows = [
        ("floor", f"{floor:.1f}", f"{weights / 1e9:.1f} GB of weights, {kv / 1e9:.1f} GB of KV, at 3.0 TB/s"),
        ("matrix products", f"{products:.1f}", f"{config.num_layers} layers and the head, at 2.0 to 2.7 TB/s"),
        (
            "attention",
            f"{attention:.1f}",
            f"{tiles} tiles on {places} places are {rounds:.2f} rounds, at nine tenths of a copy's speed",
        ),
        (
            "small kernels",
            f"{SMALL_MS}",
            "norms that add the residual, rotation, activation, merging of split contexts",
        ),
        ("gaps between ten kernels of a layer", f"{GAPS_MS}", "most are launched before the one before has ended"),
        ("both ends", f"{ENDS_MS}", "three copies; embedding, head and choice of tokens in two graphs"),
        ("**all**", f"**{whole:.1f}**", f"**{whole / floor:.2f} times the floor**"),
    ]
    return table(("part of a step", "ms", "from"), rows)


if __name__ == "__main__":
    print("\n".join(lines()))
