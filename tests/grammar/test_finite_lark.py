from __future__ import annotations

import pytest
from llguidance import grammar_from

from kunserve.grammar.finite_lark import check_lark
from kunserve.grammar.limits import RefusedError


@pytest.mark.parametrize(
    "text",
    [
        'start: start "a"',
        'start: "a" start',
        "start: a\na: b\nb: a",
        'start: "x" (a | b)\na: start "c" |  b a\nb: "(" start ")"',
        'start: a+\na: "x" start',
        'start: a{2,3}\na: start "x"',
        "start: a~2\na: a a",
        'start: a // | "y"\n\na: "x" a\n  | b # nothing else\nb: a a\n',
        'start: "a" x\nx: %json {"$ref": "#"}',
        'start: "a" x\nx: %json {\n "type": "array", "minItems": 1, "items": {"$ref": "#"}\n}\n%ignore / /',
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + "\nr3000: start",
        'root ::= "a" root',
        'root ::= item+\nitem ::= "[" root "]"',
        'start[max_tokens=5]: a\na: "x" a',
        '?start: a\n!a: "x" a',
    ],
)
def test_no_answer_ever_ends(text: str) -> None:
    lark = str(grammar_from("grammar", text)) if "[max_tokens" not in text and "?start" not in text else text
    with pytest.raises(RefusedError, match="no answer to it ever ends"):
        check_lark(lark)


@pytest.mark.parametrize(
    "text",
    [
        'start: "a"',
        'start: ""',
        'start: "a" |',
        'start: "a" | start "b"',
        "start: a*\na: start",
        "start: a?\na: start",
        "start: [a]\na: start",
        "start: a{0,3}\na: start",
        "start: a~0..3\na: start",
        'start: "|" a | "x:" ")"\na: /[/]\\/\\|/ A\nA: "y"~3 | "a".."z"',
        'start: "a"\nb: b',
        "start: nowhere",
        'start: "a" x\nx: %json {"type": "object"}',
        'start: "a" <|endoftext|> x -> y\nx: /x/i "y"i',
        'start: "a"\nstart: start',
        'start: ((("a"',
        "%import common.INT\nstart: INT",
        "start: " + "(" * 1000 + '"a"' + ")" * 1000,
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "a"',
        'start: %lark { start: start "a" }',
    ],
)
def test_a_grammar_with_an_answer_that_ends_or_that_the_library_judges_is_not_refused(text: str) -> None:
    check_lark(text)
    check_lark(text + "\n%llguidance {}\n")
