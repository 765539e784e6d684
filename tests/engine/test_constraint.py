from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from kunserve.engine.constraint import GrammarConstraint
from kunserve.engine.tokenizer import Tokenizer
from kunserve.errors import EngineError, InvalidRequestError

EOS = 299


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(Tokenizer.dummy(300, (EOS,)).to_json(), n_vocab=300, eos_token=EOS)


def allowed(constraint: GrammarConstraint) -> set[int] | None:
    words = constraint.mask()()
    if words is None:
        return None
    return set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def test_follows_the_grammar(tokenizer: LLTokenizer) -> None:
    with ThreadPoolExecutor(1) as threads:
        first = GrammarConstraint(LLMatcher(tokenizer, LLMatcher.grammar_from_regex("a(b|c)d?")), 300, threads)
        assert allowed(first) == {ord("a")}
        first.accept(ord("a"))
        second = first.copy()
        assert allowed(first) == allowed(first) == {ord("b"), ord("c")}
        first.accept(ord("c"))
        assert allowed(first) == {ord("d"), EOS}
        assert not first.is_finished
        assert allowed(second) == {ord("b"), ord("c")}
        first.accept(ord("d"))
        assert first.is_finished or allowed(first) == {EOS}
        with pytest.raises(EngineError, match="does not allow token"):
            second.accept(ord("x"))


def test_the_mask_after_the_next_token_waits_for_it(tokenizer: LLTokenizer) -> None:
    with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as device:
        constraint = GrammarConstraint(LLMatcher(tokenizer, LLMatcher.grammar_from_regex("ab(c|d)e")), 300, threads)
        assert allowed(constraint) == {ord("a")}
        waiting = device.submit(constraint.next_mask())
        assert not waiting.done()
        constraint.accept(ord("a"))
        words = waiting.result(5)
        assert words is not None and np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist() == [
            98
        ]
        left = device.submit(constraint.next_mask())
        constraint.close()
        assert left.result(5) is None  # nobody needs it any more
        last = device.submit(constraint.next_mask())
        with pytest.raises(EngineError, match="does not allow token"):
            constraint.accept(ord("x"))
        constraint.close()
        assert last.result(5) is None
        constraint.close()  # again: nothing happens


def test_too_complex_for_its_limits(tokenizer: LLTokenizer) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "aa" | "ab" | "ac" | "ad"')
    with ThreadPoolExecutor(1) as threads:
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(max_items_in_row=3))
        constraint = GrammarConstraint(matcher, 300, threads)
        allowed(constraint)
        with pytest.raises(InvalidRequestError, match="too complex") as caught:
            constraint.accept(ord("a"))
        assert len(caught.value.message) < 300 and "\n" not in caught.value.message


def test_begins_after_the_reasoning(tokenizer: LLTokenizer) -> None:
    with ThreadPoolExecutor(1) as threads:
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_regex("ab"))
        constraint = GrammarConstraint(matcher, 300, threads, begins_after=270)
        for token in (5, 6, 7):
            assert allowed(constraint) is None
            constraint.accept(token)
        assert not constraint.is_finished
        constraint.accept(270)
        assert allowed(constraint) == {ord("a")}
