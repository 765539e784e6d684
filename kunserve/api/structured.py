"""Structured output: what a client asks for (a schema, a regex, choices, a grammar) to a constraint of the engine.

Needs the extra `structured` (llguidance). Compiling takes milliseconds, at the first use 0.4 s for the vocabulary:
always on a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from kunserve.api.fields import Fields, is_str_list, wrong_type
from kunserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from kunserve.engine.constraint import GrammarConstraint

MAX_CHARS = 1 << 16  # of a schema or grammar: compiling is not linear
# Enough for an object of a thousand optional properties, whose masks take up to 25 ms.
LIMITS: Final = {"max_items_in_row": 4096, "step_max_items": 100_000, "verbose_errors": False}
# Models that may put any blanks anywhere put them for ever.
_WHITESPACE = r"(\n[ ]{0,32}|[ ])?"

Kind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an output must be. `value`: JSON schema as JSON, regex, choices as a JSON list, Lark or GBNF grammar."""

    kind: Kind
    value: str
    param: str  # the field it came from


def json_structure(schema: object, param: str) -> Structure:
    """Output is JSON that matches `schema`."""
    return Structure("json", orjson.dumps(schema).decode(), param)


def read_structure(fields: Fields) -> Structure | None:
    """The structure that `response_format`, `structured_outputs` or the older `guided_*` ask for, if one does."""
    found = [*_of_response_format(fields), *_of_options(fields.object("structured_outputs"), "structured_outputs.", "")]
    found += _of_options(fields, "", "guided_")
    if len(found) > 1:
        params = " and ".join(f"`{structure.param}`" for structure in found[:2])
        raise InvalidRequestError(f"{params} exclude each other.", param=found[1].param)
    if not found:
        return None
    if len(found[0].value) > MAX_CHARS:
        text = f"`{found[0].param}` must have at most {MAX_CHARS} characters."
        raise InvalidRequestError(text, param=found[0].param)
    return found[0]


def _of_response_format(fields: Fields) -> list[Structure]:
    form = fields.object("response_format")
    match form.string("type", "text"):
        case "text":
            return []
        case "json_object":
            return [json_structure({"type": "object"}, "response_format")]
        case "json_schema":
            described = form.object("json_schema")
            schema = described.any("schema")
            if not isinstance(schema, dict | bool):
                wrong_type("response_format.json_schema.schema", "a JSON schema", schema)
            return [json_structure(schema, "response_format")]
    raise InvalidRequestError(
        "`response_format` must have type text, json_object or json_schema.", param="response_format"
    )


def _of_options(options: Fields, prefix: str, name_prefix: str) -> list[Structure]:
    found = []
    for kind in ("json", "regex", "choice", "grammar"):
        name = name_prefix + kind
        param, value = prefix + name, options.any(name)
        if value is None:
            continue
        if kind == "json":
            found.append(_of_schema(value, param))
        elif kind == "choice":
            if not is_str_list(value) or not value:
                wrong_type(param, "a list of strings", value)
            found.append(Structure("choice", orjson.dumps(value).decode(), param))
        elif not isinstance(value, str):
            wrong_type(param, "a string", value)
        else:
            found.append(Structure("regex" if kind == "regex" else "grammar", value, param))
    if name_prefix == "":
        options.unsupported("structural_tag")
        if options.boolean("json_object"):
            found.append(json_structure({"type": "object"}, prefix + "json_object"))
    return found


def _of_schema(value: object, param: str) -> Structure:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequestError(f"`{param}` is not JSON.", param=param) from None
    if not isinstance(value, dict | bool):
        wrong_type(param, "a JSON schema", value)
    return json_structure(value, param)


class Grammars:
    """Compiles structures for one model's vocabulary."""

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        reasoning_end: int | None = None,
    ) -> None:
        """`reasoning_end`: id of the token that ends reasoning; structures hold for what follows it."""
        self._tokenizer_json, self._vocab_size = tokenizer_json, vocab_size
        self._eos_token_ids, self._reasoning_end = list(eos_token_ids), reasoning_end
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def compile(self, structure: Structure, reasons: bool) -> GrammarConstraint:
        """The constraint at its beginning, after the reasoning if the model `reasons`. Blocking.

        Raises InvalidRequestError when it is not valid, or when the server was installed without the extra.
        """
        try:
            import llguidance

            from kunserve.engine.constraint import GrammarConstraint
        except ImportError:
            text = f"`{structure.param}` needs a server installed with the extra `structured`."
            raise InvalidRequestError(text, param=structure.param) from None
        with self._lock:
            if self._tokenizer is None:
                eos = self._eos_token_ids or None
                self._tokenizer = llguidance.LLTokenizer(
                    self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=eos
                )
        try:
            limits = llguidance.LLParserLimits(**LIMITS)
            matcher = llguidance.LLMatcher(self._tokenizer, _grammar(structure), log_level=0, limits=limits)
            error = matcher.get_error()
        except ValueError as caught:
            error = str(caught)
        if error:
            text = f"`{structure.param}` cannot be used: {' '.join(error.split())[:300]}"
            raise InvalidRequestError(text, param=structure.param)
        begins_after = self._reasoning_end if reasons else None
        return GrammarConstraint(matcher, self._vocab_size, self._threads, begins_after)


def _grammar(structure: Structure) -> str:
    """As llguidance reads it. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json":
            options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
            return str(LLMatcher.grammar_from_json_schema(structure.value, defaults=options))
        case "regex":
            return str(LLMatcher.grammar_from_regex(structure.value))
        case "choice":
            choices = [orjson.dumps(choice).decode() for choice in orjson.loads(structure.value)]
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(choices)}"))  # one lexeme
        case "grammar":
            return str(grammar_from("grammar", structure.value))
