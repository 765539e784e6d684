from __future__ import annotations

from api_fakes import FakeEngine, serving

from kunserve.api.routes.docs import docs_page, type_of
from kunserve.api.wire.backend import ApiSettings


async def test_every_route_and_field_can_be_read_without_a_key() -> None:
    async with serving(FakeEngine(), ApiSettings(api_keys=("k",))) as client:
        document = await (await client.get("/openapi.json")).json()
        response = await client.get("/docs")
        assert response.status == 200 and response.content_type == "text/html"
        page = await response.text()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                assert all(f"<code>{name}</code>: " in page for name in schema["properties"])


def test_types_in_words() -> None:
    number = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]}
    assert type_of(number) == "number from 0 to 2"
    assert type_of({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}) == (
        "string or list of string"
    )
    assert type_of({"enum": ["a", "b"]}) == "a, b"


def test_texts_are_escaped() -> None:
    operation = {"summary": "<script>"}
    assert "<script>" not in docs_page({"paths": {"/<b>": {"get": operation}}})
