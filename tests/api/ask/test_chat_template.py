from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, save_tiny_tokenizer

from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.errors import ConfigError, InvalidRequestError

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hi <b> é"}, {"role": "assistant", "content": "Yes"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "é<", "parameters": {"b": 1, "a": None}}}]

# Everything that templates of real models use.
RICH_TEMPLATE = """
{%- set ns = namespace(count=0) %}
{{- bos_token }}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson }} {{ tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ message.role.upper() }}: {% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{{ ns.count }}{% if add_generation_prompt %} go{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %} <think></think>{% endif %}
"""


def test_a_conversation() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin|>"})
    turns = "<|begin|><|start|>user\nHi <b> é<|end|>\n<|start|>assistant\nYes<|end|>\n"
    assert template.render(MESSAGES) == turns + "<|start|>assistant\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == turns


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
def test_equal_to_transformers(tools: list[dict[str, Any]] | None, kwargs: dict[str, Any], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tiny_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    options = {"add_generation_prompt": True} | kwargs
    expected = theirs.apply_chat_template(MESSAGES, tools=tools, chat_template=RICH_TEMPLATE, tokenize=False, **options)
    ours = ChatTemplate(RICH_TEMPLATE, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token})
    assert ours.render(MESSAGES, tools, **kwargs) == expected
    assert "USER: Hi <b> é<|end|>" in expected


def test_the_date_comes_from_the_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 1, 2))
    assert template.render([]) == "02 Jan 2026"


def test_own_variables_win_over_the_clients() -> None:
    template = ChatTemplate("{{ messages | length }}{{ bos_token }}", {"bos_token": "<s>"})
    assert template.render(MESSAGES, bos_token="x", self=1) == "2x"
    assert ChatTemplate("{{ tools }}").render(MESSAGES) == "None"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.nothing.at_all }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_broken_template_is_found_at_the_start() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}")
