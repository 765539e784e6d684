from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kunserve.api.ask.protocol import ChatCall, CompletionCall, read_chat, read_completion
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.errors import InvalidRequestError, KunServeError
from kunserve.sampling import SamplingParams

MODEL = ModelInfo(("tiny",), max_model_len=100, root="tiny", created=0)


def completion(**body: Any) -> CompletionCall:
    return read_completion({"prompt": "hi", **body}, MODEL, ApiSettings(), 128)


def chat(**body: Any) -> ChatCall:
    return read_chat({"messages": [{"role": "user", "content": "hi"}], **body}, MODEL, 128)


def test_defaults() -> None:
    assert completion().generation.params == SamplingParams(max_tokens=16)
    assert chat().generation.params == SamplingParams(max_tokens=100)
    assert not completion().generation.has_max_tokens
    assert completion().generation.add_special_tokens
    assert not chat().generation.add_special_tokens


def test_every_sampling_field() -> None:
    params = completion(
        max_tokens=20.0,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=-1,
        presence_penalty=1,
        frequency_penalty=-2.0,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 1.5},
        stop=["a", "bc"],
        stop_token_ids=[3, 3],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=3,
    ).generation.params
    assert params == SamplingParams(
        max_tokens=20,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=2**63 - 1,
        presence_penalty=1.0,
        frequency_penalty=-2.0,
        repetition_penalty=1.1,
        logit_bias=((5, -100.0), (6, 1.5)),
        stop=("a", "bc"),
        stop_token_ids=frozenset({3}),
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        num_logprobs=3,
    )


def test_one_stop_string_and_top_k_off() -> None:
    params = completion(stop="x", top_k=-1).generation.params
    assert (params.stop, params.top_k) == (("x",), 0)


@pytest.mark.parametrize(("body", "kept"), [({}, 99), ({"max_tokens": 30}, 70), ({"max_tokens": 500}, 1)])
def test_truncation_to_what_there_is_room_for(body: dict[str, Any], kept: int) -> None:
    assert completion(truncate_prompt_tokens=-1, **body).generation.truncate_prompt_tokens == kept


def test_chat_logprobs() -> None:
    assert chat().generation.params.num_logprobs is None
    assert chat(logprobs=True).generation.params.num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).generation.params.num_logprobs == 20
    assert chat(logprobs=False, top_logprobs=0).generation.params.num_logprobs is None


def test_nulls_and_unknown_fields_ask_for_nothing() -> None:
    asked = completion(max_tokens=None, stop=None, logit_bias=None, response_format=None, novelty=1, suffix="")
    assert asked == completion()
    assert chat(response_format={"type": "text"}, tools=[], tool_choice="auto", functions=None) == chat()


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("max_tokens", "many", 400),
        ("max_tokens", 1.5, 400),
        ("max_tokens", True, 400),
        ("max_tokens", 1e30, 400),
        ("temperature", -0.1, 400),
        ("temperature", "hot", 400),
        ("temperature", True, 400),
        ("top_p", -0.1, 400),
        ("top_p", 1.01, 400),
        ("top_k", -2, 400),
        ("min_p", 1.5, 400),
        ("seed", 0.5, 400),
        ("presence_penalty", 2.1, 400),
        ("frequency_penalty", -2.1, 400),
        ("repetition_penalty", 0, 400),
        ("repetition_penalty", 1e-300, 400),
        ("logit_bias", [], 400),
        ("logit_bias", {"x": 1}, 400),
        ("logit_bias", {"128": 1}, 400),
        ("logit_bias", {"-1": 1}, 400),
        ("logit_bias", {"5": 101}, 400),
        ("logit_bias", {"5": "up"}, 400),
        ("stop", 5, 400),
        ("stop", ["a", 5], 400),
        ("stop", "", 400),
        ("stop", ["x"] * 17, 400),
        ("stop_token_ids", 5, 400),
        ("stop_token_ids", [128], 400),
        ("min_tokens", -1, 400),
        ("n", 0, 400),
        ("n", 129, 400),
        ("best_of", 2, 400),
        ("logprobs", 21, 400),
        ("stream", "yes", 400),
        ("stream_options", True, 400),
        ("stream_options", {"include_usage": 1}, 400),
        ("truncate_prompt_tokens", 0, 400),
        ("priority", 2**40, 400),
        ("request_id", 5, 400),
        ("model", 5, 400),
        ("response_format", "text", 400),
        ("prompt_logprobs", 21, 400),
        ("prompt_logprobs", -1, 400),
        ("allowed_token_ids", [], 400),
        ("allowed_token_ids", [128], 400),
        ("bad_words", "x", 400),
        ("bad_words", [""], 400),
        ("bad_words", ["x"] * 65, 400),
        ("structured_outputs", {"json": "{"}, 400),
        ("structured_outputs", {"json": 5}, 400),
        ("structured_outputs", {"regex": 5}, 400),
        ("structured_outputs", {"choice": []}, 400),
        ("structured_outputs", {"json": {}, "regex": "a"}, 400),
        ("structured_outputs", {"structural_tag": "x"}, 400),
        ("guided_regex", "x" * 70_000, 400),
        ("response_format", {"type": "xml"}, 400),
        ("response_format", {"type": "json_schema"}, 400),
        ("use_beam_search", True, 400),
    ],
)
def test_errors_name_the_field(field: str, value: Any, status: int) -> None:
    with pytest.raises(KunServeError) as info:
        completion(**{field: value})
    assert info.value.status == status
    assert (info.value.param or "").split(".")[0] == field
    assert field in info.value.message
    assert len(info.value.message) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ messages }}"),  # as vLLM without --trust-request-chat-template: it is a program
        ("echo", True),
        ("audio", {"voice": "x"}),
        ("functions", [{"name": "f"}]),
        ("documents", [{"text": "x"}]),
        ("web_search_options", {"search_context_size": "low"}),
        ("modalities", ["text", "audio"]),
        ("use_beam_search", True),
        ("logits_processors", ["x"]),
        ("logprob_token_ids", [5]),
        ("thinking_token_budget", 5),
        ("truncation_side", "middle"),
        ("include_reasoning", False),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("parallel_tool_calls", "no"),
        ("reasoning_effort", 3),
        ("add_special_tokens", 1),
        ("include_stop_str_in_output", "yes"),
    ],
)
def test_chat_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(KunServeError) as info:
        chat(**{field: value})
    assert info.value.status == 400
    assert info.value.param == field
    assert field in info.value.message


def test_what_changes_nothing_here_is_ignored() -> None:
    """Hints and isolation of caches that there are not."""
    hints = {"prompt_cache_key": "k", "metadata": {"a": "b"}, "service_tier": "auto", "store": False}
    assert completion(**hints) == completion()
    assert chat(**hints, verbosity="low", prediction={"type": "content"}, modalities=["text"]) == chat()


def test_extras_of_chat() -> None:
    call = chat(reasoning_effort="low", chat_template_kwargs={"a": 1}, add_special_tokens=True, priority=-3)
    assert call.template_kwargs == {"reasoning_effort": "low", "a": 1}
    assert call.generation.add_special_tokens and call.generation.priority == -3
    assert chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}).template_kwargs == {
        "reasoning_effort": "high"
    }
    model = replace(MODEL, template_kwargs={"enable_thinking": False, "a": 0})
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": 1}}
    assert read_chat(body, model, 128).template_kwargs == {"enable_thinking": False, "a": 1}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools).tools.is_parallel
    assert not chat(tools=tools, parallel_tool_calls=False).tools.is_parallel


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_bias", {"bad1": 1}, '`logit_bias` has the key "bad1", which is no token id.'),
        ("stop", ["a", 5], "`stop[1]` must be a string, not 5."),
        ("stop_token_ids", [1, "x"], '`stop_token_ids[1]` must be a token id, not "x".'),
        ("allowed_token_ids", [True], "`allowed_token_ids[0]` must be a token id, not true."),
        ("bad_words", ["a", ["b"]], "`bad_words[1]` must be a string, not a list."),
        ("prompt", ["a", 1], "`prompt[1]` must be a string, not 1."),
        ("prompt", [1, "a"], '`prompt[1]` must be a token id, not "a".'),
        ("prompt", [[1], [2, None]], "`prompt[1][1]` must be a token id, not null."),
        ("prompt", [[1], "a"], '`prompt[1]` must be a list of token ids, not "a".'),
        ("prompt", [{}], "`prompt[0]` must be a token id, not an object."),
    ],
)
def test_errors_do_not_contradict_themselves(field: str, value: Any, message: str) -> None:
    with pytest.raises(KunServeError) as info:
        completion(**{field: value})
    assert info.value.message == message


def test_the_limit_that_is_exceeded_has_the_name_that_was_sent() -> None:
    assert chat(max_completion_tokens=5).generation.max_tokens_param == "max_completion_tokens"
    assert chat(max_tokens=5).generation.max_tokens_param == "max_tokens"


def test_the_model_says_what_requests_do_not() -> None:
    model = replace(MODEL, max_tokens=7, stop=("###",), sampling={"min_tokens": 2})
    call = read_completion({"prompt": "x"}, model, ApiSettings(), 320).generation
    assert (call.params.max_tokens, call.params.min_tokens, call.params.stop) == (7, 2, ("###",))
    assert not call.has_max_tokens  # a prompt that leaves less room gets what there is
    call = read_completion(
        {"prompt": "x", "max_tokens": 9, "stop": [], "min_tokens": 0}, model, ApiSettings(), 320
    ).generation
    assert (call.params.max_tokens, call.params.min_tokens, call.params.stop) == (9, 0, ())
    chat = read_chat({"messages": [{"role": "user", "content": "x"}]}, model, 320).generation
    assert (chat.params.max_tokens, chat.params.stop, chat.has_max_tokens) == (7, ("###",), False)


def test_prompts_may_hold_what_the_model_has_numbers_for() -> None:
    """A tokenizer may have fewer tokens than that, or more."""
    for rows, good, bad in ((300, 299, 300), (400, 399, 400)):
        model = replace(MODEL, vocab_size=rows)
        assert read_completion({"prompt": [good]}, model, ApiSettings(), 320).prompts == ([good],)
        with pytest.raises(InvalidRequestError, match=f"token id {bad}, out of the vocabulary of {rows}"):
            read_completion({"prompt": [bad]}, model, ApiSettings(), 320)
    with pytest.raises(InvalidRequestError, match="token id 310, out of the vocabulary of 300"):
        read_completion({"prompt": "x", "stop_token_ids": [310]}, replace(MODEL, vocab_size=300), ApiSettings(), 320)
