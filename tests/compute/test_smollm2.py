"""The model that comes with the server: fetched from PyPI and converted once, then read from the cache."""

import pytest
import torch

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.model.card import ModelFiles, resolve_model
from kunserve.model.checkpoint import open_weights


@pytest.fixture(scope="module")
def smollm2() -> ModelFiles:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Tokenizer:
    assert smollm2.folder is not None
    return Tokenizer(smollm2.folder)


def test_the_card_says_what_the_file_is(smollm2: ModelFiles) -> None:
    assert smollm2.card is not None
    assert smollm2.config == smollm2.card.config


def test_weights_are_whole(smollm2: ModelFiles) -> None:
    source = open_weights(smollm2.folder, smollm2.config, "auto")
    embedding, norm = torch.empty(49152, 576), torch.empty(576)
    source.copy_into("model.embed_tokens.weight", embedding)
    source.copy_into("model.norm.weight", norm)
    assert embedding.isfinite().all()
    assert 0.05 < embedding.std() < 0.2
    assert 1.5 < norm.median() < 2


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a  5", [81, 256, 37]),
        ("x =  10", [104, 446, 256, 33, 32]),
        ("\n\n1. foo", [1116, 33, 30, 29856]),
        ("line  \n 42", [1311, 256, 3805, 36, 34]),
        ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30]),
        ("<|im_start|>user\nHi<|im_end|>", [1, 4093, 198, 26843, 2]),
    ],
)
def test_token_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.chat_template is not None
    assert "SmolLM" in tokenizer.chat_template
