"""Tokens per second of a Mixtral-shaped model beside the dense model with the same active parameters, on one core.

    python scripts/bench/bench_moe.py [--rounds 5] [--tokens 48]

Both have random weights, about 500 MB and 150 MB in float32, and run in this process, without HTTP, by turns. One
stream reads as many bytes of weights of each; of 16 at once nearly all experts are read for a step. Shown are medians
of rounds: the speed of a shared core varies. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.request import Request
from kunserve.sampling import SamplingParams

NUM_EXPERTS, NUM_CHOSEN, INNER, PROMPT_TOKENS = 8, 2, 1792, 16
CARD = """
name = "{name}"
description = "random"
licence = "none"
[config]
family = "{family}"
vocab_size = 8000
hidden_size = 512
intermediate_size = {inner}
num_layers = 5
num_heads = 8
num_kv_heads = 2
head_dim = 64
max_position_embeddings = 2048
tie_embeddings = true
"""
EXPERTS = f"""
[config.experts]
num_experts = {NUM_EXPERTS}
num_per_token = {NUM_CHOSEN}
intermediate_size = {INNER}
style = "mixtral"
"""
CARDS = {
    "dense": CARD.format(name="dense", family="llama", inner=NUM_CHOSEN * INNER),
    "moe": CARD.format(name="moe", family="mixtral", inner=INNER) + EXPERTS,
}


async def read(engine: Engine, serial: int, num_tokens: int) -> float:
    """Read a request to its end; return seconds from its first token to its last."""
    prompt = [1 + (7 * i + 31 * serial) % 7000 for i in range(PROMPT_TOKENS)]
    params = SamplingParams(num_tokens, temperature=0, ignore_eos=True)
    times = [
        time.perf_counter()
        async for output in engine.submit(Request(f"r{serial}", prompt, params))
        for _ in output.token_ids
    ]
    return times[-1] - times[0]


async def tokens_per_s(engine: Engine, serial: int, num_streams: int, num_tokens: int) -> float:
    """Return how many tokens streams that begin together get in a second, after their first."""
    streams = (read(engine, serial + i, num_tokens) for i in range(num_streams))
    return num_streams * (num_tokens - 1) / max(await asyncio.gather(*streams))


async def started(name: str, stack: AsyncExitStack) -> Served:
    """Start one of CARDS on a device of its own; `stack` ends it."""
    blocks = {"num_blocks_override": 256, "is_pinned": True, "enable_prefix_caching": False}
    config = EngineConfig(name, devices=parse_devices("cpu:1"), load_format="dummy", **blocks)  # type: ignore[arg-type]
    served = await launch(config, "bench", lambda text, share: None)
    stack.push_async_callback(served.close)
    await served.engine.start()
    stack.push_async_callback(served.engine.stop)
    return served


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, both models by turns."""
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for n in args.streams for name in CARDS}
    async with AsyncExitStack() as stack:
        models = {name: await started(name, stack) for name in CARDS}
        held = {name: served.engine.memories[0].weights for name, served in models.items()}
        sizes = {name: sum(map(w.num_tensor_bytes, w.present)) // 10**6 for name, w in held.items()}
        for i in range(args.rounds + 1):
            for place, ((name, num), speeds) in enumerate(found.items()):
                serial = 100 * (len(found) * i + place)
                speed = await tokens_per_s(models[name].engine, serial, num, args.tokens if i else 4)
                if i:  # the first warms up
                    speeds.append(speed)
    medians = {f"{name}_{num}": round(median(values), 1) for (name, num), values in found.items()}
    ratios = {
        f"ratio_{num}": round(median(a / b for a, b in zip(found["moe", num], found["dense", num], strict=True)), 3)
        for num in args.streams
    }
    return {"rounds": args.rounds, "weight_mb": sizes, **medians, **ratios}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of one stream in a round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="how many at once, each by itself")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KUNSERVE_CONFIG"] = folder
        (Path(folder) / "models").mkdir()
        for name, card in CARDS.items():
            (Path(folder) / "models" / f"{name}.toml").write_text(card, encoding="utf-8")
        result = asyncio.run(run(args))
    for num in args.streams:
        print(f"{num:3} at once: {result[f'moe_{num}']} tokens/s, dense {result[f'dense_{num}']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
