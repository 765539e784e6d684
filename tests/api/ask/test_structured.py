from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from api_fakes import FakeEngine, error_of, serving
from structures import EOS, VOCABULARY

from kunserve.api.wire.grammars import MAX_CHARS, Grammars
from kunserve.engine.request import Output, Request
from kunserve.errors import EngineError
from kunserve.sampling import FinishReason

pytestmark = pytest.mark.asyncio(loop_scope="module")


class SharedGrammars(Grammars):
    """Structures of all tests here: a process that makes others takes as long to start as ten of these to compile."""

    async def open(self) -> None:
        """Leave it to the first structure."""

    async def close(self) -> None:
        """Leave it to the last test."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grammars() -> AsyncIterator[Grammars]:
    made = SharedGrammars(VOCABULARY)
    yield made
    await Grammars.close(made)


async def accepts(request: Request, text: str) -> bool:
    """Whether the request's constraint allows `text` as the whole output."""
    assert request.constraint is not None
    place = request.constraint.copy()  # type: ignore[attr-defined]
    for byte in text.encode():
        place.accept(byte)
        await place.decided()
    if not place.is_finished:
        place.accept(EOS)
        await place.decided()
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
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "json", "value": SCHEMA}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "regex", "value": "a+"}}, "aa", "b"),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "x"'}}, "x", "b"),
        ({"json_schema": SCHEMA}, '{"a": 1}', '{"b": 1}'),
        ({"json_schema": json.dumps(SCHEMA)}, '{"a": 1}', '{"b": 1}'),
        ({"regex": "a+"}, "aa", "b"),
        ({"grammar": 'root ::= "x" | "y"'}, "y", "b"),
        ({"ebnf": 'root ::= "x" | "y"'}, "y", "b"),
        ({"structured_outputs": {"json": True}}, "[1]", "x"),
        ({"guided_json": SCHEMA}, '{"a": 2}', '{"a": 2, "b": 3}'),
        ({"guided_regex": "[0-9]{2}"}, "42", "4"),
        ({"guided_choice": ["a", "b"]}, "b", "c"),
        ({"guided_grammar": 'start: "x"'}, "x", "y"),
    ],
)
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
async def test_structures(body: dict[str, Any], good: str, bad: str, url: str, grammars: Grammars) -> None:
    engine = FakeEngine()
    prompt = {"prompt": "hi"} if url == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    async with serving(engine, grammars=grammars) as client:
        response = await client.post(url, json={**prompt, **body, "n": 2})
        assert response.status == 200, await response.text()
        first, second = engine.requests
        assert first.constraint is not second.constraint
        for request in engine.requests:
            assert await accepts(request, good)
            assert not await accepts(request, bad)


REGEX = "[0-9]{2}"
PLACES: dict[str, Any] = {
    "guided_json": {"enum": [42]},
    "json_schema": {"enum": [42]},
    "guided_regex": REGEX,
    "regex": REGEX,
    "guided_choice": ["42", "43"],
    "guided_grammar": 'start: "42"',
    "grammar": 'root ::= "42"',
    "ebnf": 'root ::= "42"',
    "structured_outputs": {"regex": REGEX},
}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("url", ROUTES)
async def test_a_structure_in_another_servers_place_is_enforced_on_every_route(
    url: str, place: str, grammars: Grammars
) -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars) as client:
        response = await client.post(url, json={**ROUTES[url], place: PLACES[place]})
        assert response.status == 200, await response.text()
        assert await accepts(engine.requests[0], "42")
        assert not await accepts(engine.requests[0], "x")


@pytest.mark.parametrize("url", ROUTES)
@pytest.mark.parametrize("field", ["guided_whitespace_pattern", "structural_tag"])
async def test_what_is_no_structure_here_is_refused_by_name(url: str, field: str, grammars: Grammars) -> None:
    async with serving(FakeEngine(), grammars=grammars) as client:
        response = await client.post(url, json={**ROUTES[url], field: "x"})
        assert response.status == 400 and f"`{field}` is not supported" in await response.text()


@pytest.mark.parametrize(
    ("url", "field", "value", "own"),
    [
        ("/v1/responses", "response_format", {"type": "json_object"}, "`text.format`"),
        ("/v1/responses", "max_tokens", 5, "`max_output_tokens`"),
        ("/v1/responses", "max_completion_tokens", 5, "`max_output_tokens`"),
        ("/v1/responses", "reasoning_effort", "low", "`reasoning.effort`"),
        ("/v1/responses", "messages", [{"role": "user", "content": "hi"}], "`input`"),
        ("/v1/responses", "logprobs", True, "`include`"),
        ("/v1/responses", "n", 2, "`n` must be 1"),
        ("/v1/responses", "prompt_logprobs", 1, "not supported"),
        ("/v1/messages", "response_format", {"type": "json_object"}, "`output_config.format`"),
        ("/v1/messages", "stop", ["x"], "`stop_sequences`"),
        ("/v1/messages", "max_completion_tokens", 5, "`max_tokens`"),
        ("/v1/messages", "reasoning_effort", "low", "`output_config.effort`"),
        ("/v1/messages", "logprobs", True, "not supported"),
        ("/v1/messages", "n", 2, "`n` must be 1"),
    ],
)
async def test_another_apis_field_is_refused_with_the_name_it_has_here(
    url: str, field: str, value: Any, own: str, grammars: Grammars
) -> None:
    async with serving(FakeEngine(), grammars=grammars) as client:
        response = await client.post(url, json={**ROUTES[url], field: value})
        text = await response.text()
        assert response.status == 400 and f"`{field}`" in text and own in text
        assert (await client.post(url, json={**ROUTES[url], field: None})).status == 200


@pytest.mark.parametrize("place", ["output_config", "output_format"])
async def test_the_format_of_messages_is_enforced_where_it_was_and_where_it_is(place: str, grammars: Grammars) -> None:
    engine, form = FakeEngine(), {"type": "json_schema", "schema": {"enum": [42]}}
    body = {**ROUTES["/v1/messages"], place: form if place == "output_format" else {"format": form}}
    async with serving(engine, grammars=grammars) as client:
        assert (await client.post("/v1/messages", json=body)).status == 200
        assert await accepts(engine.requests[0], "42") and not await accepts(engine.requests[0], "43")
        both = {**body, "output_format": form, "output_config": {"format": form}}
        assert (await client.post("/v1/messages", json=both)).status == 400


SAMPLING: dict[str, Any] = {
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "seed": 18446744073709551615,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 2},
    "min_tokens": 3,
    "stop_token_ids": [4],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "allowed_token_ids": [5, 6],
}


@pytest.mark.parametrize("url", ROUTES)
async def test_sampling_is_obeyed_on_every_route(url: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(url, json={**ROUTES[url], **SAMPLING})
        assert response.status == 200, await response.text()
    params = engine.requests[0].params
    own = {
        "seed": (1 << 63) - 1,
        "logit_bias": ((5, 2.0),),
        "stop_token_ids": frozenset({4}),
        "allowed_token_ids": (5, 6),
    }
    assert {name: getattr(params, name) for name in SAMPLING} == {**SAMPLING, **own}


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
        ({"response_format": {"type": "json_object", "schema": SCHEMA, "json_schema": SCHEMA}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"json_schema": SCHEMA, "regex": "x"}, "regex"),
        ({"regex": "("}, "regex"),
        ({"grammar": "start"}, "grammar"),
    ],
)
async def test_structures_that_cannot_be(body: dict[str, Any], param: str, grammars: Grammars) -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", **body})
        error = await error_of(response)
    assert (response.status, error["param"]) == (400, param)
    assert len(error["message"]) < 400 and "\n" not in error["message"]
    assert engine.requests == []


async def test_objects_stay_open_where_the_server_is_told_so() -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=Grammars(VOCABULARY, closes_objects=False)) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "json_schema": SCHEMA})
        assert await accepts(engine.requests[0], '{"a": 1, "b": 2}')
        assert not await accepts(engine.requests[0], '{"b": 2}')


async def test_blanks_have_an_end(grammars: Grammars) -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "structured_outputs": {"json": SCHEMA}})
        assert await accepts(engine.requests[0], '{\n  "a": 1\n}')
        assert not await accepts(engine.requests[0], '{   "a": 1}')


async def test_a_reasoning_model_may_think_before() -> None:
    own = Grammars(VOCABULARY, reasoning_end=270)
    engine = FakeEngine(lambda _: [Output("x", (1,), (), FinishReason.STOP)])
    from kunserve.api.wire.backend import ApiSettings

    async with serving(engine, ApiSettings(reasoning_parser="qwen3"), grammars=own) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200
        constraint = engine.requests[0].constraint
        assert constraint is not None
        assert constraint.mask(0)() is None
        for token in (*b"free text", 270, *b"{}"):
            constraint.accept(token)
            await constraint.decided()
            assert constraint.error is None


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
WAYS_IN: dict[str, Any] = {
    "response_format": lambda schema: (
        "/v1/chat/completions",
        {**HI, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
    ),
    "tool_choice required": lambda schema: (
        "/v1/chat/completions",
        {**HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
        | {"tool_choice": "required"},
    ),
    "tool_choice named": lambda schema: (
        "/v1/chat/completions",
        {**HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
        | {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    "guided_json": lambda schema: ("/v1/completions", {"prompt": "hi", "guided_json": schema}),
    "guided_json as text": lambda schema: ("/v1/completions", {"prompt": "hi", "guided_json": json.dumps(schema)}),
    "structured_outputs": lambda schema: ("/v1/completions", {"prompt": "hi", "structured_outputs": {"json": schema}}),
    "messages": lambda schema: (
        "/v1/messages",
        {**HI, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
    ),
    "messages, output_config": lambda schema: (
        "/v1/messages",
        {**HI, "output_config": {"format": {"type": "json_schema", "schema": schema}}},
    ),
    "responses": lambda schema: (
        "/v1/responses",
        {"input": "hi", "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}},
    ),
    "responses, tools": lambda schema: (
        "/v1/responses",
        {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": schema}], "tool_choice": "required"},
    ),
}
ITSELF: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}
CHAIN = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1500)}


def having(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a chain of references": (
        {**having({"$ref": "#/$defs/0"}), "$defs": {**CHAIN, "1500": {"type": "null"}}},
        "nested too deeply",
    ),
    "too long": ({"description": "x" * MAX_CHARS}, f"at most {MAX_CHARS} characters"),
    "no end": ({"$ref": "#/$defs/n", "$defs": {"n": ITSELF}}, "ever ends"),
    "150 levels": (having(nested(150)), "cannot be used"),
    "190 levels": (having(nested(190)), "cannot be used"),
    "260 levels": (having(nested(260)), "deep"),
    "900 levels": (having(nested(900)), "deep"),
}


@pytest.mark.parametrize("way", WAYS_IN)
async def test_the_same_is_refused_whatever_way_it_comes_in(way: str, grammars: Grammars) -> None:
    engine = FakeEngine()
    async with serving(engine, grammars=grammars) as client:
        for name, (schema, reason) in REFUSED.items():
            url, body = WAYS_IN[way](schema)
            response = await client.post(url, json=body)
            text = await response.text()
            assert response.status == 400 and reason in text, (name, text)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/v1/responses", {"input": "hi", "metadata": nested(260)}, "metadata"),
        ("/v1/completions", {"prompt": "hi", "nothing_we_know": nested(900)}, "nothing_we_know"),
        ("/v1/chat/completions", {**HI, "chat_template_kwargs": nested(260)}, "chat_template_kwargs"),
        (
            "/v1/messages",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "x", "name": "f", "input": nested(260)}],
                    }
                ],
                "max_tokens": 2,
            },
            "messages",
        ),
    ],
)
async def test_nested_too_deeply_anywhere(url: str, body: dict[str, Any], param: str, grammars: Grammars) -> None:
    async with serving(FakeEngine(), grammars=grammars) as client:
        response = await client.post(url, json=body)
        text = await response.text()
    assert response.status == 400
    assert f"`{param}` is nested more than 200 levels deep" in text


async def test_what_is_as_deep_as_may_be_is_echoed(grammars: Grammars) -> None:
    async with serving(FakeEngine(), grammars=grammars) as client:
        metadata = nested(198)
        response = await client.post("/v1/responses", json={"input": "hi", "metadata": metadata})
        assert response.status == 200 and (await response.json())["metadata"] == metadata


@pytest.mark.parametrize(
    "grammar",
    [
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500)) + '\nr3500: "a"',
        'start: start "a"',
        'root ::= "a" root',
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30)) + '\nr30: "a"',
    ],
)
@pytest.mark.parametrize("field", ["guided_grammar", "structured_outputs"])
async def test_grammars_that_cannot_be(grammar: str, field: str, grammars: Grammars) -> None:
    value: Any = grammar if field == "guided_grammar" else {"grammar": grammar}
    async with serving(FakeEngine(), grammars=grammars) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True, field: value})
        assert response.status == 400 and "cannot be used" in (await error_of(response))["message"]
