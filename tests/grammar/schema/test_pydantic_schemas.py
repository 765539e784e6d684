"""The schemas that pydantic writes for everyday models: each compiles, and what it lets through is what they mean."""

from __future__ import annotations

import json
import random
from typing import Any, Literal

import jsonschema
import pytest
from answers import answer, compiled
from llguidance import LLTokenizer
from pydantic import BaseModel, ValidationError
from pydantic_models import MODELS

NUM_ANSWERS = 6
# What pydantic means by these is more than their schema says: a Decimal is any text there, for instance.
_MORE = {"Formats", "Invoice", "Numbers", "Scores", "Times"}


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_what_is_answered_matches_the_schema(
    vocabulary: LLTokenizer, model: type[BaseModel], mode: Literal["validation", "serialization"]
) -> None:
    schema: dict[str, Any] = model.model_json_schema(mode=mode)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    matcher, rng = compiled(vocabulary, "json", json.dumps(schema)), random.Random(model.__name__)
    for _ in range(NUM_ANSWERS):
        text = answer(matcher, rng)
        validator.validate(json.loads(text))
        try:
            model.model_validate_json(text)
        except ValidationError:
            assert model.__name__ in _MORE or mode == "serialization", text
