"""Cost of the CPU kernels for matrices in blocks, in steps of the core's own clock per 16 weights.

    python scripts/bench/kernels/bench_cpu_blocks.py [FOLDER ...]
        [--formats Q4_1,Q5_0] [--shapes 3072x576] [--rows 1,16]

Each FOLDER has another version of the kernels' C files, which is timed by turns with this one, their results compared:
`git worktree add OLD COMMIT` makes one, in OLD/kunserve/compute. A step is what a chain of additions takes for one,
timed before and after each run: so figures hold while others slow the core down. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kunserve.compute.cpu_kernels import FLAGS, SOURCE, find_compiler
from kunserve.compute.cpu_ops import FORMATS
from kunserve.model.quant.blocks import BLOCKS

WEIGHTS_PER_RUN = 60_000_000
CHAIN = 300_000  # additions
CLOCK = """__attribute__((visibility("default"))) void chain(long n) {
  for (long a = 0; n--;) __asm__ volatile("add $1, %0" : "+r"(a));
}
"""


def build(sources: list[Path], flags: list[str]) -> list[ctypes.CDLL]:
    """Compile and load each file; the libraries outlive their files."""
    libraries = []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(sources):
            library = Path(folder, f"{number}.so")
            subprocess.run([*find_compiler(), *FLAGS, *flags, str(source), "-o", str(library)], check=True)
            libraries.append(ctypes.CDLL(str(library)))
    return libraries


def random_rows(name: str, N: int, K: int) -> Tensor:
    """Return rows of blocks (N, bytes of a row) whose bytes make scales that are small numbers."""
    blocks = BLOCKS[name]
    return torch.randint(1, 60, (N, K // blocks.num_values * blocks.num_bytes), dtype=torch.uint8)


def multiply(kernels: ctypes.CDLL, name: str, x: Tensor, rows: Tensor, y: Tensor) -> None:
    pointers = (ctypes.c_void_p(p) for p in (x.data_ptr(), rows.data_ptr(), None, None, y.data_ptr()))
    (M, K), N = x.shape, len(rows)
    sizes = (ctypes.c_int64(size) for size in (M, N, K, N, FORMATS.index(name), rows.shape[1]))
    kernels.linear(*pointers, *sizes)


def steps_per_vector(clock: ctypes.CDLL, kernels: ctypes.CDLL, name: str, x: Tensor, rows: Tensor, y: Tensor) -> float:
    """Time one run of products."""
    num = max(1, WEIGHTS_PER_RUN // (len(x) * len(rows) * x.shape[1]))
    start = time.thread_time()
    clock.chain(ctypes.c_long(CHAIN))
    first = time.thread_time()
    for _ in range(num):
        multiply(kernels, name, x, rows, y)
    last = time.thread_time()
    clock.chain(ctypes.c_long(CHAIN))
    step_s = (first - start + time.thread_time() - last) / (2 * CHAIN)
    return (last - first) / step_s / (num * len(rows) * x.shape[1] / 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--formats", default="Q4_1,Q5_0,Q8_0,Q4_K,Q5_K,Q6_K")
    parser.add_argument("--shapes", default="3072x512,576x1536", help="outputs x columns")
    parser.add_argument("--rows", default="1,2,16,128", help="of x")
    parser.add_argument("--cflags", default="", help="further compiler flags, separated by spaces")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.manual_seed(0)
    with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
        file.write(CLOCK)
        file.flush()
        (clock,) = build([Path(file.name)], [])
    versions = build([*(folder / SOURCE.name for folder in args.folders), SOURCE], args.cflags.split())
    results = []
    for name in args.formats.split(","):
        for N, K in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
            rows = random_rows(name, N, K)
            for M in map(int, args.rows.split(",")):
                x, ys = torch.randn(M, K), [torch.empty(M, N) for _ in versions]
                times: list[list[float]] = [[] for _ in versions]
                for _ in range(args.repeats):
                    for kernels, y, of_version in zip(versions, ys, times, strict=True):
                        of_version.append(steps_per_vector(clock, kernels, name, x, rows, y))
                steps, same = [round(median(of), 2) for of in times], all(torch.equal(y, ys[0]) for y in ys)
                results.append({"format": name, "N": N, "K": K, "M": M, "steps": steps, "same": same})
                shown = " ".join(f"{step:7.2f}" for step in steps)
                print(f"{name:6} {N:6} x {K:5} by {M:4}: {shown}{'' if same else '  results differ'}", flush=True)
    print(json.dumps({"bench": "cpu_blocks", "cflags": args.cflags, "results": results}))


if __name__ == "__main__":
    main()
