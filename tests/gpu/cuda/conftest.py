"""A GPU that is not there, for tests of its rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_cuda import FakeCuda


@pytest.fixture
def driver() -> Iterator[FakeCuda]:
    driver = FakeCuda(is_async=True)
    yield driver
    for stream in list(driver.streams):
        driver.synchronize(stream)
        driver.return_stream(stream)
    driver.close()
