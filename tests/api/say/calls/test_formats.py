from __future__ import annotations

import pytest

from kunserve.api.say.calls.formats import format_of_template


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, None),
        ("{% for m in messages %}", None),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} <|python_tag|>", "llama3_json"),
        ("{{ tools }} <|start_header_id|>", "llama3_json"),
        ("{{ tools }} <tool_call>\\n<function=name>\\n<parameter=key>", "qwen3_coder"),
        ("{{ tools }} <tool_call>{name}\\n<arg_key>{key}</arg_key>\\n<arg_value>", "glm45"),
        ("{{ tools }} <|tool_calls_section_begin|><|tool_call_begin|>{{ id }}", "kimi_k2"),
        ("<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}", "kimi_k2"),
        ("{{ tools }} <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ type }}<｜tool▁sep｜>f\\n```json", "deepseek_v3"),
        ("{{ tools }} <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>", "deepseek_v31"),
        ("{% set available_tools = tools %} respond only with <|tool_call|> followed by a JSON list", "granite"),
        ("{{ tools }} <function_call> {{ call }}", "granite-20b-fc"),
        ("{{ tools }} <|start|>assistant<|channel|>commentary to=functions.{{ name }}<|message|>", "openai"),
    ],
)
def test_the_template_tells_the_parser(source: str | None, name: str | None) -> None:
    assert format_of_template(source) == name
