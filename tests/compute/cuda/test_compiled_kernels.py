"""Triton's kernels compile for every architecture that is served, and take no more of a GPU than they may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import compile_kernels
import pytest
from compile_kernels import (
    ARCHITECTURES,
    FP8_KERNELS,
    FP8_SINCE,
    KERNELS,
    PDL_KERNELS,
    PDL_SINCE,
    is_within_limits,
)


@pytest.mark.long
def test_all_that_the_decoder_launches_compiles_and_fits(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, compile_kernels.__file__, "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert last["compiled"] == len(rows) and last["beyond_limits"] == []
    wanted = {(sm, name) for sm in ARCHITECTURES for name in KERNELS}
    wanted |= {(sm, name) for sm in ARCHITECTURES if sm >= FP8_SINCE for name in FP8_KERNELS}
    assert {(row["sm"], row["kernel"]) for row in rows} == wanted
    # Codes of 4 bits by their step and the width of their scales, of 8 by that, floats: each for three kinds of tiles.
    assert all(sum(row["kernel"] == "packed_product" and row["sm"] == sm for row in rows) == 18 for sm in ARCHITECTURES)
    kv = Counter((row["sm"], row["kv"]) for row in rows if row["kernel"] == "_rotate_and_append")
    assert all(kv[sm, "*u8"] == kv[sm, "*bf16"] + kv[sm, "*fp16"] + kv[sm, "*fp32"] > 0 for sm in ARCHITECTURES)
    for row in rows:  # nothing that is launched early goes on before the kernel before it has ended
        assert (row["early"] is not None) == (row["kernel"] in PDL_KERNELS and row["sm"] >= PDL_SINCE), row
        assert row["kernel"] == "_rms_norm" or not row["early"]
        assert set(row["early"] or ()) <= {"ld.global"}  # the weight of a norm
    assert all(is_within_limits(row) and row["registers"] > 8 for row in rows)
    dtypes = {row["first"].split()[1] for row in rows}
    assert dtypes == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize(
    "beyond", [{"spilled_bytes": 8}, {"registers": 255}, {"shared_bytes": 200 << 10}], ids=lambda d: next(iter(d))
)
def test_what_takes_too_much_is_beyond_the_limits(beyond: dict[str, int]) -> None:
    row = {"spilled_bytes": 0, "registers": 32, "shared_bytes": 16}
    assert is_within_limits(row) and not is_within_limits(row | beyond)
