"""Models, references and servers, made once for all end-to-end tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prompts import PROMPTS
from tiny_models import load_reference

from e2e.reference import greedy_reference
from e2e.server_process import ServerProcess, running_server
from e2e.tiny import TinyModels
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.model.card import resolve_model
from kunserve.model.file_lock import file_lock


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    folder = resolve_model("smollm2-135m").folder
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def smollm2_prompts(smollm2_folder: Path) -> list[list[int]]:
    """Token ids of `PROMPTS`."""
    tokenizer = Tokenizer(smollm2_folder)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def smollm2_greedy(
    smollm2_folder: Path, smollm2_prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """The 64 tokens after each of `PROMPTS` that transformers finds most likely: told by one worker to the others."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "smollm2-greedy.json"
    with file_lock(path.with_suffix(".lock"), lambda: None):
        if not path.exists():
            path.write_text(json.dumps(_greedy(smollm2_folder, smollm2_prompts)))
    together: list[list[int]] = json.loads(path.read_text())
    return together


def _greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = load_reference(folder)
    assert model.dtype is torch.float32
    together = greedy_reference(model, prompts, 64)
    alone = greedy_reference(model, prompts[:1], 64)
    assert alone == together[:1], "padding changes what transformers says"
    return together


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2_session_server() -> Iterator[ServerProcess]:
    arguments = ("--model", "smollm2-135m", "--devices", "cpu:2", "--device-memory", "730MiB")
    with running_server(*arguments, "--max-model-len", "2048", "--tool-call-parser", "hermes") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_flags(tiny_models: TinyModels) -> tuple[str, ...]:
    """Flags of a server of a tiny model with room for long answers, on two devices."""
    folder = tiny_models.folder("llama", max_position_embeddings=2048)
    model = ("--model", str(folder), "--served-model-name", "tiny")
    return (*model, "--devices", "cpu:2", "--num-gpu-blocks-override", "512")


@pytest.fixture(scope="session")
def tiny_session_server(tiny_flags: tuple[str, ...]) -> Iterator[ServerProcess]:
    with running_server(*tiny_flags) as server:
        yield server


@pytest.fixture
def smollm2_server(smollm2_session_server: ServerProcess) -> Iterator[ServerProcess]:
    """A server of the embedded model; a test that fails shows what the server logged meanwhile."""
    with smollm2_session_server.log_shown():
        yield smollm2_session_server


@pytest.fixture
def tiny_server(tiny_session_server: ServerProcess) -> Iterator[ServerProcess]:
    """A server of a tiny model."""
    with tiny_session_server.log_shown():
        yield tiny_session_server
