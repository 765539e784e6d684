"""What the scripts that prove promises of the API count as kept."""

from __future__ import annotations

import json
import random
from typing import Any

import fuzz_structures
import gguf_answers
import loop_holds
import made_structures
import scrape_metrics
import structured_output
import torch


class Validator:
    message = "no"

    def iter_errors(self, value: object) -> list[Validator]:
        return [] if value == {"a": 1} else [self]


def test_schemas_are_nested_bounded_and_the_same_every_time() -> None:
    schemas = structured_output.make_schemas(1)
    assert schemas == structured_output.make_schemas(1) != structured_output.make_schemas(2)
    assert len(schemas) == 20 and all(schema["additionalProperties"] is False for schema in schemas)

    def check(schema: dict[str, Any]) -> None:
        assert schema.get("type") != "string" or schema["maxLength"] < 20
        assert schema.get("type") != "array" or schema["maxItems"] < 4
        for inner in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])):
            check(inner)

    for schema in schemas:
        check(schema)


def test_an_answer_is_valid_if_it_ended_and_is_what_was_asked_for() -> None:
    for content, reason, expected in (
        ('{"a": 1}', "stop", True),
        ('{"a": 2}', "stop", False),
        ('{"a": 1}', "length", False),
        ('{"a": 1', "stop", False),
    ):
        choice = {"message": {"content": content}, "finish_reason": reason}
        assert structured_output.is_valid(choice, Validator()) is expected


def test_a_scrape_tells_the_tokens() -> None:
    text = b'# TYPE x counter\nvllm:generation_tokens_total{engine="0",model_name="m"} 42.0\n'
    found = scrape_metrics.TOKENS.search(text)
    assert found is not None and float(found[1]) == 42


def test_holds_are_sorted_by_the_loops_own_time() -> None:
    log = "PLACE a.py:1 f < b.py:2 g\nHELD 0.9 0.001 0.2\nHELD 0.05 0.04 0.04\nPLACE a.py:1 f < b.py:2 g\n"
    held, places = loop_holds.worst_of(log)
    assert held == [[0.05, 0.04, 0.04], [0.9, 0.001, 0.2]]
    assert places == {"a.py:1 f < b.py:2 g": 2}


def test_made_structures_are_json_and_the_same_every_time() -> None:
    def requests(seed: int) -> list[tuple[str, str]]:
        rng = random.Random(seed)
        made = [made_structures.asked(rng, made_structures.make(rng)) for _ in range(40)]
        return [(path, json.dumps(body)) for path, body in made]

    first = requests(3)
    assert first == requests(3) != requests(4)
    assert {path for path, _ in first} == {"/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"}


def test_half_of_the_streams_to_be_exact_are_constrained() -> None:
    bodies = fuzz_structures.stream_bodies(1)
    assert len(bodies) == 16 and sum("response_format" in body for body in bodies) == 8


def test_a_token_that_is_not_the_likeliest_has_a_gap() -> None:
    class Model:
        def __call__(self, ids: torch.Tensor) -> Any:
            """After a token the next one is likeliest, by 2."""
            logits = 2 * torch.nn.functional.one_hot((ids + 1) % 9, 9).float()
            return type("Output", (), {"logits": logits})

    assert gguf_answers.gaps(Model(), [3, 4], [5, 6, 7]).tolist() == [0, 0, 0]
    assert gguf_answers.gaps(Model(), [3, 4], [5, 8, 0]).tolist() == [0, 2, 0]
