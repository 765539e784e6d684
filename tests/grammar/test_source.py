"""Structures that compile in a moment and that a real vocabulary then overwhelms: found out before the first token."""

from __future__ import annotations

import pytest
from llguidance import LLTokenizer

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.grammar import source
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.source import compile_matcher
from kunserve.model.card import resolve_model


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    files = resolve_model("smollm2-135m")
    assert files.folder is not None
    tokenizer = Tokenizer(files.folder)
    return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=list(files.config.eos_token_ids))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has used more CPU than a structure's may; what is tried must not depend on it."""
    monkeypatch.setattr(source, "TRY_CPU_S", float("inf"))


@pytest.mark.parametrize("regex", [r"((\p{L}{0,50}){1,9}){5,974}", r"(\p{Lu}{0,20}\p{Ll}{3,90}){2,800}"])
def test_a_regex_of_large_counts_is_refused(tokenizer: LLTokenizer, regex: str) -> None:
    with pytest.raises(RefusedError, match="too many expressions"):
        compile_matcher(tokenizer, "regex", regex)


@pytest.mark.parametrize(
    "regex", [r"[a-z]{1,20}@[a-z]{1,20}\.com", r"(\w{1,80}\s){10,500}", r".{0,20000}", r"\d{3}-\d{4}"]
)
def test_what_people_ask_for_is_not(tokenizer: LLTokenizer, regex: str) -> None:
    matcher, mask = compile_matcher(tokenizer, "regex", regex)
    assert any(mask) and not matcher.is_error()
