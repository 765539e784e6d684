"""What an output must be, and the compiler of it: from a structure to a constraint of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from kunserve.engine.request import Constraint
from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.errors import InvalidRequestError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.pool import Pool

# Compiling is not linear, and least so of grammars and regexes. A large web form is a schema of a hundred thousand.
MAX_CHARS, MAX_GRAMMAR_CHARS = 1 << 18, 1 << 16

Kind = Literal["json", "calls", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an output must be. `value`: JSON schema as JSON, regex, choices as a JSON list, Lark or GBNF grammar.

    Of `calls`, a list of calls of tools, it is what `kunserve.grammar.schema.plain.calls_schema` takes, as JSON.

    Whatever way it came in, InvalidRequestError if it is too long.
    """

    kind: Kind
    value: str
    param: str  # the field it came from

    def __post_init__(self) -> None:
        most = MAX_GRAMMAR_CHARS if self.kind in ("regex", "grammar") else MAX_CHARS
        if len(self.value) > most:
            text = f"`{self.param}` must have at most {most} characters; it has {len(self.value)}."
            raise InvalidRequestError(text, param=self.param)


class Begun(Constraint, Protocol):
    """A constraint at the beginning of its structure, where others may begin as well."""

    def copy(self) -> Begun:
        """Return another request's, at the same position."""


class Compiler(Protocol):
    """What makes constraints of structures, in this process or in another one."""

    async def compile(self, structure: Structure, reasons: bool, owner: str = "") -> Begun:
        """Return the constraint at its beginning, after the reasoning if the model `reasons`.

        Owners take turns. Raises InvalidRequestError when the structure cannot be used, OverloadedError when it
        cannot be compiled now.
        """


class Grammars(Compiler):
    """Compiles structures for one model's vocabulary, in processes of their own (`kunserve.grammar`)."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        reasoning_end: int | None = None,
        on_death: Callable[[str], None] = lambda reason: None,
        closes_objects: bool = True,
    ) -> None:
        """Make a pool. `reasoning_end`: id of the token that ends reasoning; structures hold for what follows it.

        `on_death` is told why, in a word, when a structure's process ends that should not have. `closes_objects`: an
        object has no other properties than those that its schema names, if it does not speak of others.
        """
        self._pool, self._reasoning_end = Pool(vocabulary, on_death), reasoning_end
        self._prefix = "" if closes_objects else "open_"

    async def open(self) -> None:
        """Get ready before there are streams."""
        await self._pool.open()

    async def close(self) -> None:
        """End the processes."""
        await self._pool.close()

    async def compile(self, structure: Structure, reasons: bool, owner: str = "") -> GrammarConstraint:
        """See `Compiler`."""
        kind = f"{self._prefix}{structure.kind}" if structure.kind in ("json", "calls") else structure.kind
        try:
            compiled = await self._pool.compile((kind, structure.value), owner)
        except RefusedError as error:
            text = f"`{structure.param}` cannot be used: {' '.join(str(error).split())[:300]}"
            raise InvalidRequestError(text, param=structure.param) from None
        return GrammarConstraint(compiled.matcher(), self._reasoning_end if reasons else None)
