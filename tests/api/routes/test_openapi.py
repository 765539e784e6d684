from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from api_fakes import FakeEngine, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_values import fitting, near

from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.ask.declared.chat import Chat
from kunserve.api.ask.declared.fields import body_schema
from kunserve.api.ask.declared.generation import Completion
from kunserve.api.routes.openapi import openapi_document
from kunserve.api.wire.backend import ApiSettings

TEMPLATE = ChatTemplate("{% for message in messages %}[{{ message.role }}:{{ message.content }}]{% endfor %}")
BOTH = ApiSettings(tool_call_parser="hermes", reasoning_parser="qwen3", max_sequences=256)

EXAMPLES: dict[str, Any] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [65]},
}


async def test_the_document_has_exactly_the_routes() -> None:
    async with serving(FakeEngine()) as client:
        document = await (await client.get("/openapi.json")).json()
        application = client.app
        assert isinstance(application, web.Application)
        served = {
            (route.resource.canonical, route.method.lower())
            for route in application.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    documented = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert documented == served


@pytest.mark.parametrize("path", EXAMPLES)
async def test_what_is_required_is_enough_and_needed(path: str) -> None:
    body = openapi_document("1")["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    async with serving(FakeEngine()) as client:
        response = await client.post(path, json=EXAMPLES[path])
        assert response.status == 200, await response.text()
        for name in body["required"]:
            without = {key: value for key, value in EXAMPLES[path].items() if key != name}
            assert (await client.post(path, json=without)).status == 400
        response = await client.post(
            path, json={**EXAMPLES[path], **dict.fromkeys(body["properties"].keys() - EXAMPLES[path].keys())}
        )
        assert response.status == 200, await response.text()


# What OpenAI's clients send, and the extras of vLLM's that its clients rely on.
SAMPLING = (
    *("model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop"),
    *("stream", "stream_options", "temperature", "top_p", "user", "response_format", "top_k", "min_p"),
    *("repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens", "structured_outputs"),
    *("include_stop_str_in_output", "priority", "request_id", "prompt_logprobs", "allowed_token_ids", "bad_words"),
    *("truncate_prompt_tokens", "return_token_ids", "add_special_tokens"),
)
OF_COMPLETIONS = ("prompt", "echo", "best_of")
OF_CHAT = (
    *("messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls"),
    *("reasoning_effort", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
)


def test_every_parameter_that_clients_rely_on_is_documented() -> None:
    assert {*SAMPLING, *OF_COMPLETIONS} <= body_schema(Completion)["properties"].keys()
    assert {*SAMPLING, *OF_CHAT} <= body_schema(Chat)["properties"].keys()


@pytest.mark.parametrize("path", EXAMPLES)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_comes_is_answered_or_refused(path: str, data: st.DataObject) -> None:
    """As schemathesis would send it: bodies that fit the document, and others that nearly do."""
    schema = openapi_document("1")["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    bodies = st.one_of(fitting(schema), near(schema), fitting(schema).map(lambda body: EXAMPLES[path] | body))

    async def send() -> None:
        async with serving(FakeEngine(), BOTH, template=TEMPLATE) as client:
            for body in data.draw(st.lists(bodies, min_size=12, max_size=12)):
                response = await client.post(path, json=body)
                assert response.status in (200, 400, 404), (body, await response.text())

    asyncio.run(send())
