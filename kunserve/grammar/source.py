"""In a structure's process: from what a client asked for to a matcher of the library, or a reason to refuse it."""

from __future__ import annotations

import json
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from kunserve.grammar.finite_lark import check_lark
from kunserve.grammar.finite_schema import check_schema
from kunserve.grammar.limits import RefusedError

# Enough for an object of a thousand optional properties, whose masks take up to 25 ms.
LIMITS: Final = {"max_items_in_row": 4096, "step_max_items": 100_000, "verbose_errors": False}
# Models that may put any blanks anywhere put them for ever.
_WHITESPACE = r"(\n[ ]{0,32}|[ ])?"


def compile_matcher(tokenizer: LLTokenizer, kind: str, value: str) -> tuple[Any, bytes]:
    """Return a matcher at the beginning of a structure (`kind` and `value` as in `pool.Key`), and its first mask.

    Raises RefusedError if the structure is not valid, or if no answer could ever end.
    """
    try:
        matcher = LLMatcher(tokenizer, _grammar(kind, value), log_level=0, limits=LLParserLimits(**LIMITS))
        error = matcher.get_error()
        mask = b"" if error else matcher.compute_bitmask()
    except ValueError as caught:
        raise RefusedError(str(caught)) from None
    if error:
        raise RefusedError(error)
    if matcher.is_stopped():  # there is no first token
        raise RefusedError("nothing matches it")
    _try_token(matcher, mask)
    return matcher, mask


def _try_token(matcher: Any, mask: bytes) -> None:
    """Raise RefusedError if the library gives up after the first token: its rules double, or are ambiguous."""
    probe, first = matcher.deep_copy(), next((i for i, byte in enumerate(mask) if byte), None)
    if first is None:
        return
    token_id = 8 * first + (mask[first] & -mask[first]).bit_length() - 1
    probe.consume_token(token_id)
    if not probe.is_stopped():
        probe.compute_bitmask()
    if probe.is_error():
        raise RefusedError(probe.get_error())


def _grammar(kind: str, value: str) -> str:
    """Return the structure as the library reads it. Raises ValueError."""
    match kind:
        case "json":
            check_schema(json.loads(value))
            options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
            return str(LLMatcher.grammar_from_json_schema(value, defaults=options))
        case "regex":
            return str(LLMatcher.grammar_from_regex(value))
        case "choice":
            choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(value)]
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(choices)}"))  # one lexeme
    grammar = str(grammar_from("grammar", value))
    check_lark(grammar)
    return grammar
