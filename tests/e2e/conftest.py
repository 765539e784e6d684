"""Models, references and servers, made once for all end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prompts import PROMPTS
from tiny_models import load_reference

from e2e.reference import assert_greedy
from e2e.server_process import ServerProcess, running_server
from e2e.tiny import TinyModels
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.model.card import resolve_model

GREEDY = Path(__file__).parent / "smollm2_greedy.json"


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
def smollm2_greedy(smollm2_folder: Path, smollm2_prompts: list[list[int]]) -> list[list[int]]:
    """The 64 tokens after each of `PROMPTS` that transformers finds most likely.

    They are kept in a file, made by `greedy_reference`, and transformers agrees to them in one pass over each: that
    takes less than half of the time that it takes to generate them.
    """
    greedy: list[list[int]] = json.loads(GREEDY.read_text())
    model = load_reference(smollm2_folder)
    assert model.dtype is torch.float32
    for prompt, tokens in zip(smollm2_prompts, greedy, strict=True):
        assert len(tokens) == 64
        assert_greedy(model, prompt, tokens)
    return greedy


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
