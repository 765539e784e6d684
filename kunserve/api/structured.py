"""Structured output: what a client asks for (a schema, a regex, choices, a grammar) to a constraint of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import orjson

from kunserve.api.fields import Fields, is_str_list, wrong_type
from kunserve.engine.constraint import GrammarConstraint
from kunserve.errors import InvalidRequestError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.pool import Pool

MAX_CHARS = 1 << 16  # of a schema or grammar: compiling is not linear

Kind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an output must be. `value`: JSON schema as JSON, regex, choices as a JSON list, Lark or GBNF grammar.

    Whatever way it came in, InvalidRequestError if it is too long.
    """

    kind: Kind
    value: str
    param: str  # the field it came from

    def __post_init__(self) -> None:
        if len(self.value) > MAX_CHARS:
            text = f"`{self.param}` must have at most {MAX_CHARS} characters; it has {len(self.value)}."
            raise InvalidRequestError(text, param=self.param)


def json_structure(schema: object, param: str) -> Structure:
    """Output is JSON that matches `schema`. InvalidRequestError if it is nested too deeply."""
    try:
        return Structure("json", orjson.dumps(schema).decode(), param)
    except TypeError:  # orjson reads more levels than it writes
        raise InvalidRequestError(f"`{param}` is nested too deeply.", param=param) from None


def read_structure(fields: Fields) -> Structure | None:
    """The structure that `response_format`, `structured_outputs` or the older `guided_*` ask for, if one does."""
    found = [*_of_response_format(fields), *_of_options(fields.object("structured_outputs"), "structured_outputs.", "")]
    found += _of_options(fields, "", "guided_")
    if len(found) > 1:
        params = " and ".join(f"`{structure.param}`" for structure in found[:2])
        raise InvalidRequestError(f"{params} exclude each other.", param=found[1].param)
    return found[0] if found else None


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
    """Compiles structures for one model's vocabulary, in processes of their own (`kunserve.grammar`)."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        reasoning_end: int | None = None,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`reasoning_end`: id of the token that ends reasoning; structures hold for what follows it.

        `on_death` is told why, in a word, when a structure's process ends that should not have.
        """
        self._pool, self._reasoning_end = Pool(vocabulary, on_death), reasoning_end

    async def open(self) -> None:
        """Get ready before there are streams."""
        await self._pool.open()

    async def close(self) -> None:
        """End the processes."""
        await self._pool.close()

    async def compile(self, structure: Structure, reasons: bool, owner: str = "") -> GrammarConstraint:
        """Return the constraint at its beginning, after the reasoning if the model `reasons`.

        Owners take turns. Raises InvalidRequestError when the structure cannot be used, OverloadedError when it
        cannot be compiled now.
        """
        try:
            compiled = await self._pool.compile((structure.kind, structure.value), owner)
        except RefusedError as error:
            text = f"`{structure.param}` cannot be used: {' '.join(str(error).split())[:300]}"
            raise InvalidRequestError(text, param=structure.param) from None
        return GrammarConstraint(compiled.matcher(), self._reasoning_end if reasons else None)
