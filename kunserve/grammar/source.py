"""In a structure's process: from what a client asked for to a matcher of the library, or a reason to refuse it."""

from __future__ import annotations

import json
import time
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from kunserve.grammar.finite_lark import check_lark
from kunserve.grammar.limits import CPU_S, RefusedError
from kunserve.grammar.schema.finite import check_schema
from kunserve.grammar.schema.plain import calls_schema, plain_schema

# Enough for an object of a thousand optional properties, whose masks take up to 25 ms.
LIMITS: Final = {"max_items_in_row": 4096, "step_max_items": 100_000, "verbose_errors": False}
# Tokens that are tried in each way, before a structure is taken to be usable. The lowest are short ones, or end an
# answer; those from elsewhere in the vocabulary are words, which a lexer has far more to do with.
NUM_TRIED, TRIED = 8, (0, 7_919, 20_011)
TRY_CPU_S = CPU_S / 2
_LIMITS = ("max is", "fuel", "limit", "too many", "lexer error")  # in the library's messages about them
# Models that may put any blanks anywhere put them for ever.
_WHITESPACE = r"(\n[ ]{0,32}|[ ])?"


def compile_matcher(tokenizer: LLTokenizer, kind: str, value: str) -> tuple[Any, bytes]:
    """Return a matcher at the beginning of a structure (`kind` and `value` as in `compiled.Key`), and its first mask.

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
    if is_stuck(matcher):
        raise RefusedError("nothing matches it")
    _try_tokens(matcher, mask)
    return matcher, mask


def is_stuck(matcher: Any) -> bool:
    """Return whether a matcher, once it has made a mask, allows no token although what it took is no answer."""
    return bool(matcher.is_stopped() and not matcher.is_accepting())


def is_limit(error: str) -> bool:
    """Return whether the library's message says that it gave up for lack of time, not that a token does not fit."""
    return any(words in error for words in _LIMITS)


def _try_tokens(matcher: Any, mask: bytes) -> None:
    """Take a few tokens in each of several ways. Raises RefusedError if the library gives up, or nothing can follow.

    Rules that double, or a regex of large counts, are compiled in a moment; their first masks are too much work.
    """
    for start in TRIED:
        _try_way(matcher.deep_copy(), mask, start)
        if time.process_time() > TRY_CPU_S:  # the rest of the second is for structures that are large, but usable
            return


def _try_way(probe: Any, mask: bytes, start: int) -> None:
    """Take, again and again, the first token that is allowed from `start` on, each time so much further."""
    is_forced = True
    for step in range(1, NUM_TRIED + 1):
        allowed = int.from_bytes(mask, "little")
        is_forced = is_forced and allowed.bit_count() == 1
        offset = start * step % (8 * len(mask))
        chosen = allowed >> offset << offset or allowed
        probe.consume_token((chosen & -chosen).bit_length() - 1)
        if probe.is_stopped() and not probe.is_error():
            return
        mask = probe.compute_bitmask() if not probe.is_error() else b""
        if is_limit(error := probe.get_error()):
            raise RefusedError(error)
        if is_stuck(probe):
            if is_forced:
                raise RefusedError("nothing matches it")
            return  # other tokens may lead elsewhere


def _grammar(kind: str, value: str) -> str:
    """Return the structure as the library reads it. Raises ValueError."""
    match kind:
        case "json":
            return _json_grammar(plain_schema(json.loads(value), closes=True))
        case "open_json":
            return _json_grammar(plain_schema(json.loads(value), closes=False))
        case "calls" | "open_calls":
            return _json_grammar(calls_schema(json.loads(value), closes=kind == "calls"))
        case "regex":
            return str(LLMatcher.grammar_from_regex(value))
        case "choice":
            choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(value)]
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(choices)}"))  # one lexeme
    grammar = str(grammar_from("grammar", value))
    check_lark(grammar)
    return grammar


def _json_grammar(schema: dict[str, Any]) -> str:
    check_schema(schema)
    options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options))
