"""What all tests of schemas need: a vocabulary of bytes, and time."""

from __future__ import annotations

import pytest
from answers import byte_vocabulary
from llguidance import LLTokenizer

from kunserve.grammar import source


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return byte_vocabulary()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has used more CPU than a structure's may; what is tried must not depend on it."""
    monkeypatch.setattr(source, "TRY_CPU_S", float("inf"))
