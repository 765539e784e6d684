from __future__ import annotations

from typing import Any

import pytest
from api_fakes import FakeEngine, error_of, serving
from structures import EOS, VOCABULARY

from kunserve.api.structured import Grammars
from kunserve.engine.request import FinishReason, Output, Request
from kunserve.errors import EngineError


def grammars() -> Grammars:
    return Grammars(VOCABULARY)


async def accepts(request: Request, text: str) -> bool:
    """Whether the request's constraint allows `text` as the whole output."""
    assert request.constraint is not None
    place = request.constraint.copy()  # type: ignore[attr-defined]
    for byte in text.encode():
        place.accept(byte)
        await place.settled()
    if not place.is_finished:
        place.accept(EOS)
        await place.settled()
    place.close()
    assert place.error is None or isinstance(place.error, EngineError)
    return place.error is None


OPTIONAL = {
    "type": "object",
    "properties": {f"p{i}": {"type": "integer"} for i in range(500)},
    "additionalProperties": False,
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            '{"a": 1}',
            '{"a": "1"}',
        ),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a":1}', "{}"),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "12", "x"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"regex": "a+b"}}, "aab", "b"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "maybe"),
        ({"structured_outputs": {"choice": [f"choice {i}" for i in range(4000)]}}, "choice 3999", "choice 4000"),
        ({"structured_outputs": {"choice": ["a", "ab"]}}, "ab", "b"),
        ({"structured_outputs": {"json": OPTIONAL}}, '{"p3": 1, "p499": 2}', '{"p500": 1}'),
        ({"structured_outputs": {"grammar": 'start: "x" | "y" "z"'}}, "yz", "z"),
        ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, "y", "xy"),
        ({"guided_json": SCHEMA}, '{"a": 2}', "1"),
        ({"guided_regex": "[0-9]{2}"}, "42", "4"),
        ({"guided_choice": ["a", "b"]}, "b", "c"),
        ({"guided_grammar": 'start: "x"'}, "x", "y"),
    ],
)
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
async def test_structures(body: dict[str, Any], good: str, bad: str, url: str) -> None:
    engine = FakeEngine()
    prompt = {"prompt": "hi"} if url == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    async with serving(engine, grammars=grammars()) as client:
        response = await client.post(url, json={**prompt, **body, "n": 2})
        assert response.status == 200, await response.text()
        first, second = engine.requests
        assert first.constraint is not second.constraint
        for request in engine.requests:
            assert await accepts(request, good)
            assert not await accepts(request, bad)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "#/nowhere"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "start"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [98]}, "allowed_token_ids"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
    ],
)
async def test_structures_that_cannot_be(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars()) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", **body})
        error = await error_of(response)
    assert (response.status, error["param"]) == (400, param)
    assert len(error["message"]) < 400 and "\n" not in error["message"]
    assert engine.requests == []


async def test_blanks_have_an_end() -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars()) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "structured_outputs": {"json": SCHEMA}})
        assert await accepts(engine.requests[0], '{\n  "a": 1\n}')
        assert not await accepts(engine.requests[0], '{   "a": 1}')


async def test_a_reasoning_model_may_think_before() -> None:
    own = Grammars(VOCABULARY, reasoning_end=270)
    engine = FakeEngine(lambda _: [Output("x", (1,), (), FinishReason.STOP)])
    from kunserve.api.backend import ApiSettings

    async with serving(engine, ApiSettings(reasoning_parser="qwen3"), grammars=own) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200
        constraint = engine.requests[0].constraint
        assert constraint is not None
        assert constraint.mask(0)() is None
        for token in (*b"free text", 270, *b"{}"):
            constraint.accept(token)
            await constraint.settled()
            assert constraint.error is None
