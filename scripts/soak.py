"""Soak a server of a tiny model: `scripts/soak.py --minutes 30 --seed N`. Random load, faults and operators at once.

Every answer is compared with that of an undisturbed server, and after each round nothing may be left of it: no
request, no block, no chunk. Prints what happened as JSON; the exit status tells whether all of it was right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path

import structlog
import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS / "fakes")]

from soaking import soak  # noqa: E402  tests/helpers
from tiny_models import make_tiny_model  # noqa: E402

MIB = 1 << 20


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", default="cpu:3")
    parser.add_argument("--pairs", action="store_true", help="devices that hold the weights only two by two")
    parser.add_argument("--verbose", action="store_true", help="show the server's log")
    arguments = parser.parse_args()
    level = logging.INFO if arguments.verbose else logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder), dtype=torch.float64, num_hidden_layers=6, hidden_size=32)
        found = asyncio.run(
            soak(model, arguments.minutes * 60, arguments.seed, arguments.devices, are_pairs=arguments.pairs)
        )
    rss = found.rss_bytes
    print(
        json.dumps(
            {
                "minutes": arguments.minutes,
                "seed": arguments.seed,
                "devices": arguments.devices,
                **found.counts,
                "rss_mib": [n // MIB for n in (rss[0], rss[len(rss) // 2], rss[-1])],
            }
        )
    )


if __name__ == "__main__":
    main()
