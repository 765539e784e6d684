"""Engines that tests launch on CPU devices, on GPUs that are not there instead: in transitions, and when devices go.

What one CPU device answers stays what is compared with. There every result is the same to the last bit, whatever is
computed with it; the reference's products, which stand for a GPU's, depend on how many rows there are: so tokens, texts
and ends are the same, and logprobs nearly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from fake_gpus import ACTIVATIONS, Gpus
from hooks import fail_on_gpus

from kunserve.engine.launch import cuda_machine, launch
from kunserve.engine.launch.machine import Machine
from kunserve.faults import Fault

ALONE = "cpu:1"  # whoever is undisturbed
GRANULARITY = 32 << 10  # of fake GPUs: chunks as small as those of the tests' CPU devices
MAX_NUM_SEQS = 8  # four batch sizes to capture
TOLERANCE = 1e-3  # of a logprob
RESTARTED = "a GPU that is gone comes back with a restart of the server"
CONFIGURATIONS = ("one GPU", "peers", "through the host")

SUITES = ("regroup", "survive")  # folders of tests
CONFIGURATION = os.environ.get("KUNSERVE_FAKE_GPU")  # of the suites that are run on GPUs as a whole

_gpus: list[Gpus] = []  # in whose place CPU devices are now
_faults: list[Fault] = []  # of the next machine


@contextmanager
def in_place_of_cpus(gpus: Gpus, configuration: str) -> Iterator[None]:
    """Launch engines on several CPU devices on these GPUs inside."""
    assert configuration in CONFIGURATIONS, configuration
    gpus.are_async, gpus.granularity = True, GRANULARITY
    gpus.count, gpus.are_peers = 1 if configuration == "one GPU" else 8, configuration == "peers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_make_machine", partial(_make_machine, launch._make_machine))
        patch.setattr(cuda_machine, "choose_chunk_bytes", lambda *_: GRANULARITY)  # tests count their chunks
        patch.setattr(cuda_machine, "measure_activations", lambda *_: ACTIVATIONS)  # tests of launching do measure
        _gpus.append(gpus)
        try:
            yield
        finally:
            _gpus.pop()


def _make_machine(make: Callable[..., Machine], *arguments: Any) -> Machine:
    machine = make(*arguments)
    if _faults and isinstance(machine, cuda_machine.CudaMachine):
        fail_on_gpus(machine, [_faults.pop() for _ in list(_faults)])
    return machine


@pytest.fixture(autouse=True)
def _on_fake_gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Launch the engines of a whole suite on GPUs, if `KUNSERVE_FAKE_GPU` says which."""
    if CONFIGURATION is None or request.path.parent.name not in SUITES:
        yield
        return
    gpus = request.getfixturevalue("gpus")
    request.getfixturevalue("kernels")
    with in_place_of_cpus(gpus, CONFIGURATION):
        yield


def of_cpus_alone(reason: str) -> pytest.MarkDecorator:
    """Mark tests of what only CPU devices do: they are left out where GPUs are in their place."""
    return pytest.mark.skipif(CONFIGURATION is not None, reason=reason)


def are_replaced() -> bool:
    """Return whether engines on several devices are on GPUs now."""
    return bool(_gpus)


def placed(devices: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the devices and settings of an engine, as they are to be where CPU devices are replaced."""
    if not _gpus or devices == ALONE:
        return devices, settings
    number = int(devices.removeprefix("cpu:"))
    on_one = _gpus[0].count == 1
    _faults[:] = settings.get("faults", ())  # the flag is for CPU devices
    of_gpus = {name: value for name, value in settings.items() if name not in ("chunk_bytes", "faults")}
    names = f"0*{number}" if on_one else ",".join(map(str, range(number)))
    return f"cuda:{names}", {"max_num_seqs": MAX_NUM_SEQS} | of_gpus
