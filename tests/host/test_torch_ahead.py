"""An import of torch that was hastened: the same torch."""

from __future__ import annotations

import subprocess
import sys

HASTENED = """
from kunserve.host.torch_ahead import hasten_torch

hasten_torch()
import torch

assert float((torch.ones(3, 4) @ torch.ones(4)).sum()) == 12
assert torch.randn(3, generator=torch.Generator().manual_seed(0)).tolist() == torch.randn(
    3, generator=torch.Generator().manual_seed(0)
).tolist()
from torch._meta_registrations import meta_mm

assert meta_mm(torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")).shape == (2, 5)
"""


def test_torch_works() -> None:
    """It draws numbers, too: with a module of torch put off, a server with made-up weights did not start."""
    done = subprocess.run([sys.executable, "-c", HASTENED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
