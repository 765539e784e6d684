"""Engines that tests launch on CPU devices, on GPUs that are not there instead: in transitions, and when devices go.

What one CPU device answers stays what is compared with. There every result is the same to the last bit, whatever is
computed with it; the reference's products, which stand for a GPU's, depend on how many rows there are: so tokens, texts
and ends are the same, and logprobs nearly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fake_gpus import Gpus

ALONE = "cpu:1"  # whoever is undisturbed
GRANULARITY = 32 << 10  # of fake GPUs: chunks as small as those of the tests' CPU devices
MAX_NUM_SEQS = 8  # four batch sizes to capture
TOLERANCE = 1e-3  # of a logprob
CONFIGURATIONS = ("one GPU", "peers", "through the host")

_gpus: list[Gpus] = []  # in whose place CPU devices are now


@contextmanager
def in_place_of_cpus(gpus: Gpus, configuration: str) -> Iterator[None]:
    """Launch engines on several CPU devices on these GPUs inside."""
    gpus.are_async, gpus.granularity = True, GRANULARITY
    gpus.count, gpus.are_peers = 1 if configuration == "one GPU" else 8, configuration == "peers"
    _gpus.append(gpus)
    yield
    _gpus.clear()


def are_replaced() -> bool:
    """Return whether engines on several devices are on GPUs now."""
    return bool(_gpus)


def placed(devices: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the devices and settings of an engine, as they are to be where CPU devices are replaced."""
    if not _gpus or devices == ALONE:
        return devices, settings
    number = int(devices.removeprefix("cpu:"))
    on_one = _gpus[0].count == 1
    of_gpus = {name: value for name, value in settings.items() if name != "chunk_bytes"}
    names = f"0*{number}" if on_one else ",".join(map(str, range(number)))
    return f"cuda:{names}", {"max_num_seqs": MAX_NUM_SEQS} | of_gpus
