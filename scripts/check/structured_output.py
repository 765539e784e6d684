"""Structured output of a running server: 500 answers to 20 nested schemas, all valid, and what it costs.

    pip install jsonschema
    python -m kunserve.server smollm2-135m --port 8200 &
    python scripts/check/structured_output.py http://127.0.0.1:8200

Every round of answers is generated once more without schema, with as many tokens for each: the ratio of tokens per
second says what the masks cost. Rounds alternate, so that both see the same machine. Tokens are drawn at temperature
1, whatever the server's defaults are, so that texts vary. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import aiohttp

NUM_SCHEMAS = 20
WORDS = ["name", "city", "colour", "size", "price", "count", "state", "title", "kind", "owner"]
TOPICS = ["a cat", "a ship", "a recipe", "a football match", "a library", "a computer", "a garden", "a song"]


def make_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Make an object of objects and lists, all of bounded length: answers end before max_tokens."""
    names = rng.sample(WORDS, rng.randrange(2, 4))
    properties = {name: _make_value(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _make_value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "enum", "null"] + ["object", "array"] * 3 * (depth > 0)
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": 12}
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": 999}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": rng.sample(WORDS, 3)}
        case "null":
            return {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 8}]}
        case "object":
            return make_schema(rng, depth)
        case _:
            return {"type": "array", "items": _make_value(rng, depth - 1), "minItems": 1, "maxItems": 3}


def make_schemas(seed: int) -> list[dict[str, Any]]:
    """Make different schemas, each with an object or list inside."""
    rng = random.Random(seed)
    schemas: list[dict[str, Any]] = []
    while len(schemas) < NUM_SCHEMAS:
        schema = make_schema(rng)
        is_nested = any(value.get("type") in ("object", "array") for value in schema["properties"].values())
        if is_nested and schema not in schemas:
            schemas.append(schema)
    return schemas


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post("/v1/chat/completions", json=body) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer}")
        return answer


async def _round(session: aiohttp.ClientSession, bodies: Sequence[dict[str, Any]]) -> tuple[list[Any], float]:
    """Ask all at once; return answers, and tokens per second."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(_ask(session, body) for body in bodies))
    seconds = time.perf_counter() - started
    return answers, sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds


async def measure(url: str, num_answers: int, concurrency: int, seed: int) -> dict[str, Any]:
    from jsonschema import Draft202012Validator

    schemas = make_schemas(seed)
    validators = [Draft202012Validator(schema) for schema in schemas]
    bodies: list[dict[str, Any]] = []
    for i in range(num_answers):
        text = f"Describe {TOPICS[i % len(TOPICS)]} as JSON."
        described = {"name": "thing", "schema": schemas[i % NUM_SCHEMAS]}
        form = {"type": "json_schema", "json_schema": described}
        message = {"role": "user", "content": text}
        drawn = {"temperature": 1, "top_p": 1, "seed": seed + i, "max_tokens": 1024}
        bodies.append({"messages": [message], **drawn, "response_format": form})
    constrained, free, ratios = [], [], []
    num_valid = num_tokens = 0
    timeout = aiohttp.ClientTimeout(total=1200)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        await _ask(session, {**bodies[0], "max_tokens": 2})  # the vocabulary is read once
        for start in range(0, num_answers, concurrency):
            part = bodies[start : start + concurrency]
            answers, speed = await _round(session, part)
            plain = []
            for i, answer in enumerate(answers, start):
                lengths = answer["usage"]["completion_tokens"]
                num_tokens += lengths
                num_valid += is_valid(answer["choices"][0], validators[i % NUM_SCHEMAS])
                free_body = {name: value for name, value in bodies[i].items() if name != "response_format"}
                plain.append({**free_body, "max_tokens": lengths, "ignore_eos": True})
            _, free_speed = await _round(session, plain)
            constrained.append(speed)
            free.append(free_speed)
            ratios.append(speed / free_speed)
            print(f"{start + len(part):4} answers, {num_valid} valid, {speed:6.1f} and {free_speed:6.1f} tokens/s")
    return {
        "answers": num_answers,
        "valid": num_valid,
        "schemas": NUM_SCHEMAS,
        "tokens": num_tokens,
        "tokens_per_s": round(median(constrained), 1),
        "unconstrained_tokens_per_s": round(median(free), 1),
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def is_valid(choice: dict[str, Any], validator: Any) -> bool:
    """Tell whether an answer ended by itself and is what its schema says."""
    try:
        value = json.loads(choice["message"]["content"])
    except ValueError:
        value = None
    errors = [error.message for error in validator.iter_errors(value)]
    if errors or choice["finish_reason"] != "stop":
        print("not valid:", choice, errors[:2], file=sys.stderr)
    return not errors and choice["finish_reason"] == "stop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    result = asyncio.run(measure(args.url.rstrip("/"), args.answers, args.concurrency, args.seed))
    print(json.dumps(result))
    sys.exit(result["valid"] != result["answers"])


if __name__ == "__main__":
    main()
