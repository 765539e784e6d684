"""Shared by all tests. `helpers/` makes what they need, `fakes/` stands in for it; pytest has both on its path."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import torch
from fake_gpus import _rules_are_kept, driver, gpus, kernels  # noqa: F401  fixtures
from hypothesis import settings
from on_gpus import _on_fake_gpus  # noqa: F401  a fixture
from op_layers import ops  # noqa: F401  a fixture
from seeds import asked_seed
from tiny_models import make_tiny_model

torch.set_num_threads(1)  # as when serving: two are no faster, and far slower when something else runs
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

os.environ["KUNSERVE_CONFIG"] = os.devnull  # cards that a developer has written are not looked at

# No failures because a machine is slow. The same examples in every run, but for `make test-random`: it gives a seed.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("random", deadline=None, database=None, print_blob=True)
settings.load_profile("fixed" if asked_seed() is None else "random")


def plain_logging() -> None:
    """Let the log be as structlog has it, but for tracebacks: to show all locals of a failed step takes seconds."""
    structlog.reset_defaults()
    *processors, _ = structlog.get_config()["processors"]
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, renderer])


plain_logging()


def pytest_report_header() -> str | None:
    """Say which seed draws the cases of this run, if it is not the one of every run."""
    seed = asked_seed()
    return None if seed is None else f"cases are drawn from seed {seed}: SEED={seed} make test-random draws them again"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that draw their cases: of Hypothesis, and those that are called once for each seed.

    Files with `long` tests come first: the last one of a run is one worker's alone, while the others have nothing.
    """
    for item in items:
        is_seeded = isinstance(item, pytest.Function) and "seed" in item.fixturenames
        if is_seeded or item.get_closest_marker("hypothesis"):
            item.add_marker(pytest.mark.drawn)
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Let collections pass over what is loaded, as a server does: they would take 0.2 s, and 0.4 with transformers.

    Every decoder and every machine with GPUs that are not there collects.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name what failed at once: a run that is ended later would not say it any more."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}", flush=True)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """What a test sets up for the log (a command that it runs does) is nobody else's."""
    yield
    plain_logging()


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of six layers."""
    folder = tmp_path_factory.mktemp("six_layers")
    return make_tiny_model("llama", folder, num_hidden_layers=6, hidden_size=32)
