"""The fields of generation that all routes share, and the body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from kunserve.api.ask.declared.fields import in_order
from kunserve.api.ask.declared.values import (
    AtLeastOne,
    BadWords,
    Biases,
    Choices,
    Count,
    JsonSchema,
    Logprobs,
    MinusOneOrMore,
    Penalty,
    Positive,
    Priority,
    Salt,
    Seed,
    Share,
    Stop,
    TokenId,
    Unsupported,
)


class StructuredOutputs(Struct):
    """What vLLM's clients ask of an output."""

    json: JsonSchema | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Annotated[str, Meta(max_length=0)] | None = None  # another engine's: not supported


class Sampling(Struct, kw_only=True):
    """What every route that generates takes: how tokens are chosen, and how the answer is cut and served."""

    model: str | None = None
    temperature: Positive = 1.0
    top_p: Share = 1.0
    top_k: MinusOneOrMore = 0
    min_p: Share = 0.0
    seed: Seed | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    logit_bias: Biases = None
    min_tokens: Count = 0
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    truncate_prompt_tokens: MinusOneOrMore | None = None
    truncation_side: Literal["left", "right"] = "left"
    stream: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: Priority = 0
    cache_salt: Salt = ""
    request_id: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None
    json_schema: JsonSchema | str | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    use_beam_search: Unsupported = None
    logits_processors: Unsupported = None
    logprob_token_ids: Unsupported = None
    thinking_token_budget: Unsupported = None
    repetition_detection: Unsupported = None
    vllm_xargs: Unsupported = None
    kv_transfer_params: Unsupported = None
    guided_whitespace_pattern: Unsupported = None
    structural_tag: Unsupported = None


class StreamOptions(Struct):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


FormatType = Annotated[
    Literal["text", "json_object", "json_schema", "json", "regex", "grammar"],
    in_order("text", "json_object", "json_schema", "json", "regex", "grammar"),
]


class ResponseFormat(Struct):
    """What an output must be, as OpenAI's clients ask for it, and those of llama.cpp and TGI."""

    type: FormatType | None = None
    json_schema: dict[str, Any] | None = None
    schema: JsonSchema | None = None
    value: JsonSchema | str | None = None
    regex: str | None = None
    grammar: str | None = None
    pattern: str | None = None


Prompts = (
    Annotated[str, Meta(description="a string")]
    | Annotated[list[TokenId], Meta(min_length=1)]
    | Annotated[list[str], Meta(min_length=1)]
    | Annotated[list[list[TokenId]], Meta(min_length=1)]
)


class Completion(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts
    n: Choices = 1
    best_of: AtLeastOne | None = None
    stop: Stop | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    user: str = ""
    safety_identifier: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    echo: bool = False
    logprobs: Logprobs | None = None
    suffix: Unsupported = None
    prompt_embeds: Unsupported = None
