"""Whether a Lark grammar has an answer that ends: some rule may never come to its end, whatever is chosen.

`start: "a" start` is a valid grammar, and a model that follows it writes until its tokens are used up. A rule comes
to an end if one of its alternatives consists of symbols that do: the least fixpoint, found by adding rules until none
is added. Whatever is not understood here is taken to end, for the library reads the grammar afterwards and says what
is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kunserve.grammar.limits import RefusedError
from kunserve.grammar.schema.finite import check_schema

_TOKEN = re.compile(
    r"""(?P<blank>[^\S\n]+|//[^\n]*|\#[^\n]*|\\\n)|(?P<newline>\n)
    |(?P<object>%(?:json|regex|llguidance)(?=\s*\{))|(?P<directive>%(?!lark)\w+[^\n]*)
    |(?P<name>[!?]?[A-Za-z_]\w*)|(?P<literal>"(?:[^"\\\n]|\\.)*"i?|/(?!\*)(?:[^/\\\n]|\\.)+/[a-z]*|<[^<>\s]+>|@[\w.\-$]+)
    |(?P<repeat>[?*+]|~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*\d*\s*(?:,\s*\d*\s*)?\})|(?P<range>\.\.)
    |(?P<alias>->\s*\w+)|(?P<mark>[()\[\]|:&~])|(?P<attribute>[=,]|\d+(?:\.\d+)?)""",
    re.VERBOSE,
)
_LEAST = re.compile(r"\d+")
_DECODER = json.JSONDecoder()
_MAX_DEPTH = 200  # of parentheses: beyond, the grammar is not looked at, and the library has its own bound


class _UnknownError(Exception):
    """The grammar is not understood."""


class _Token(NamedTuple):
    kind: str
    text: str


class _Node(NamedTuple):
    """One of: any of `parts` (kind "any"), all of them ("all"), the rule `name` ("rule"), nothing in doubt ("ends")."""

    kind: str
    parts: tuple[Any, ...] = ()
    name: str = ""


_ENDS = _Node("ends")
_NEVER = _Node("any")  # of nothing


def check_lark(text: str) -> None:
    """Raise RefusedError if no answer to the grammar, from its rule `start`, ever ends."""
    try:
        rules = _rules(list(_tokens(text)))
    except _UnknownError:
        return
    if "start" not in rules:
        return
    used_by = defaultdict[str, list[str]](list)
    for name, node in rules.items():
        for used in set(_names(node)):
            used_by[used].append(name)
    ending: set[str] = set()
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name in rules and name not in ending and _ends(rules[name], rules, ending):
            ending.add(name)
            waiting += used_by[name]
    if "start" not in ending:
        raise RefusedError("no answer to it ever ends")


def _ends(node: _Node, rules: Mapping[str, _Node], ending: set[str]) -> bool:
    match node.kind:
        case "any":
            return any(_ends(part, rules, ending) for part in node.parts)
        case "all":
            return all(_ends(part, rules, ending) for part in node.parts)
        case "rule":
            return node.name in ending or node.name not in rules
    return True


def _names(node: _Node) -> Iterator[str]:
    """Yield the rules that a node uses."""
    if node.kind == "rule":
        yield node.name
    for part in node.parts:
        yield from _names(part)


def _tokens(text: str) -> Iterator[_Token]:
    """Split a grammar; nested schemas become a token that ends or never does. Raises _UnknownError."""
    index = 0
    while index < len(text):
        found = _TOKEN.match(text, index)
        if found is None:
            raise _UnknownError
        index, kind = found.end(), found.lastgroup or ""
        if kind == "object":
            index = _skip_blanks(text, index)
            try:
                value, index = _DECODER.raw_decode(text, index)
            except (ValueError, RecursionError):
                raise _UnknownError from None
            yield _object(found.group(), value)
        elif kind != "blank":
            yield _Token(kind, found.group())


def _object(directive: str, value: Any) -> _Token:
    if directive == "%llguidance":
        return _Token("directive", directive)
    try:
        if directive == "%json":
            check_schema(value)
    except RefusedError:
        return _Token("never", directive)
    return _Token("literal", directive)


def _skip_blanks(text: str, index: int) -> int:
    while index < len(text) and text[index].isspace():
        index += 1
    return index


def _rules(tokens: list[_Token]) -> dict[str, _Node]:
    """Parse definitions: `name: alternatives`, up to the next line that begins with one, or with a directive."""
    starts = [i for i, _ in enumerate(tokens) if (i == 0 or tokens[i - 1].kind == "newline") and _head(tokens, i)]
    if any(token.kind not in ("newline", "directive") for token in tokens[: starts[0] if starts else len(tokens)]):
        raise _UnknownError
    rules: dict[str, _Node] = {}
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        name, body = tokens[start].text.lstrip("!?"), _head(tokens, start)
        if name in rules:
            raise _UnknownError
        parts = [token for token in tokens[body:end] if token.kind not in ("newline", "directive")]
        node, rest = _alternatives(parts, 0, 0)
        if rest != len(parts):
            raise _UnknownError
        rules[name] = node
    return rules


def _head(tokens: list[_Token], start: int) -> int:
    """Return where the body of the definition at `start` begins; 0 if none begins there."""
    if tokens[start].kind != "name":
        return 0
    at = start + 1
    if at < len(tokens) and tokens[at].text == "[":  # attributes
        while at < len(tokens) and tokens[at].text != "]":
            at += 1
        at += 1
    return at + 1 if at < len(tokens) and tokens[at].text == ":" else 0


def _alternatives(tokens: list[_Token], at: int, depth: int) -> tuple[_Node, int]:
    if depth > _MAX_DEPTH:
        raise _UnknownError
    options = []
    while True:
        items: list[_Node] = []
        while at < len(tokens) and tokens[at].text not in ("|", ")", "]"):
            node, at = _item(tokens, at, depth)
            items.append(node)
        options.append(_Node("all", tuple(items)))
        if at == len(tokens) or tokens[at].text != "|":
            return _Node("any", tuple(options)), at
        at += 1


def _item(tokens: list[_Token], at: int, depth: int) -> tuple[_Node, int]:
    """Parse one symbol and how often it may come."""
    kind, text = tokens[at]
    if kind == "name":
        node, at = _Node("rule", name=text), at + 1
    elif kind in ("literal", "range", "alias") or text in ("&", "~"):
        node, at = _ENDS, at + 1
    elif kind == "never":
        node, at = _NEVER, at + 1
    elif kind == "mark" and text in ("(", "["):
        node, at = _alternatives(tokens, at + 1, depth + 1)
        if at == len(tokens) or tokens[at].text != {"(": ")", "[": "]"}[text]:
            raise _UnknownError
        at += 1
        node = _ENDS if text == "[" else node
    else:
        raise _UnknownError
    while at < len(tokens) and tokens[at].kind == "repeat":
        text = tokens[at].text
        least = _LEAST.search(text.partition(",")[0])
        is_optional = text in "?*" or (text[0] in "{~" and (least is None or int(least.group()) == 0))
        node, at = _ENDS if is_optional else node, at + 1
    return node, at
