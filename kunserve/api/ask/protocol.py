"""JSON of a generation request to typed values: what the client asked for, checked but not yet tokenized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kunserve.api.ask.allowed_tools import with_allowed_tools
from kunserve.api.ask.messages import read_messages
from kunserve.api.ask.structured import read_structure
from kunserve.api.ask.tools import Tools, read_tools
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.api.wire.fields import (
    INT64_MAX,
    Fields,
    is_int_list,
    is_str_list,
    pieces,
    show,
    wrong_items,
    wrong_type,
    wrong_value,
)
from kunserve.api.wire.grammars import Structure
from kunserve.errors import InvalidRequestError, NotFoundError
from kunserve.sampling import SamplingParams

MAX_N = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_USER_CHARS = 256
# No vocabulary we know has a longer token (runs of blanks reach 128), so longer text is too long without
# tokenizing it: a 100 ms answer instead of seconds of a thread.
MAX_TOKEN_CHARS = 256
DEFAULT_COMPLETION_TOKENS = 16
TEMPLATE_FIELDS = ("messages", "tools", "add_generation_prompt")  # of a request, not of its template's arguments

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """What completions and chat have in common."""

    model: str
    params: SamplingParams  # its max_tokens: as asked, or the default, which `prompts.fit` cuts to what fits
    has_max_tokens: bool
    max_tokens_param: str  # the field that says it
    n: int
    is_stream: bool
    include_usage: bool
    continuous_usage: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None  # keep so many tokens
    keeps_begin: bool  # of a prompt that is truncated; else its end is kept
    return_token_ids: bool
    priority: int
    request_id: str | None
    bad_words: tuple[str, ...]
    structure: Structure | None
    prompt_logprobs: int | None  # as asked for; params has more if `echo` needs more
    tokens_as_ids: bool  # log-probabilities name tokens by their ids
    user: str  # whom the client asks for; "": it does not say
    cache_salt: str  # its prefix is shared with requests of the same salt only


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """POST /v1/completions."""

    generation: GenerationCall
    prompts: tuple[Prompt, ...]
    echo: bool
    is_echo_only: bool  # max_tokens is 0: the prompt and perhaps its log-probabilities are the answer


@dataclass(frozen=True, slots=True)
class ChatCall:
    """POST /v1/chat/completions."""

    generation: GenerationCall
    messages: list[dict[str, Any]]
    num_chars: int  # of all of them
    tools: Tools
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]


def read_model(fields: Fields, model: ModelInfo) -> str:
    """The name under which the client knows the model; NotFoundError if it is another's."""
    name = fields.string("model", model.name)
    if name not in model.served_names:
        raise NotFoundError(f"The model `{name[:200]}` does not exist.", param="model")
    return name


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """A string, a list of strings, token ids, or a list of token id lists."""
    expected = "a string, a list of strings, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return (value,)
    if value == []:
        wrong_value("prompt", "a prompt", value)
    if is_int_list(value):
        return (value,)
    if is_str_list(value) or (isinstance(value, list) and all(map(is_int_list, value))):
        return tuple(value)
    if not isinstance(value, list):
        wrong_type("prompt", expected, value)
    if not isinstance(value[0], list):
        kind = str if isinstance(value[0], str) else int
        wrong_items("prompt", expected, "a string" if kind is str else "a token id", kind, value)
    for index, prompt in enumerate(value):
        if not is_int_list(prompt):
            wrong_items(f"prompt[{index}]", "a list of token ids", "a token id", int, prompt)
    raise AssertionError("one of them is wrong")


def _read_max_tokens(fields: Fields, least: int = 1) -> int | None:
    return fields.integer("max_completion_tokens", fields.integer("max_tokens", None, least), least)


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.any("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not is_str_list(stops):
        wrong_items("stop", "a string or a list of strings", "a string", str, stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"`stop` must have at most {MAX_STOPS} strings.", param="stop")
    if "" in stops:
        raise InvalidRequestError("`stop` must not have an empty string.", param="stop")
    return tuple(stops)


def _read_token_ids(fields: Fields, name: str, vocab_size: int) -> list[int] | None:
    ids = fields.any(name)
    if ids is None:
        return None
    if not is_int_list(ids):
        wrong_items(name, "a list of token ids", "a token id", int, ids)
    check_token_ids(ids, vocab_size, name)
    return ids


def _read_allowed_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...] | None:
    ids = _read_token_ids(fields, "allowed_token_ids", vocab_size)
    if ids == []:
        wrong_value("allowed_token_ids", "at least one token id", ids)
    return None if ids is None else tuple(dict.fromkeys(ids))


def _read_bad_words(fields: Fields) -> tuple[str, ...]:
    words = fields.any("bad_words")
    if words is None:
        return ()
    if not is_str_list(words):
        wrong_items("bad_words", "a list of strings", "a string", str, words)
    if len(words) > MAX_BAD_WORDS or any(not 0 < len(word) <= MAX_BAD_WORD_CHARS for word in words):
        text = f"`bad_words` must be at most {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_WORD_CHARS} characters."
        raise InvalidRequestError(text, param="bad_words")
    return tuple(words)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequestError unless all of `ids` are in the vocabulary."""
    for piece in pieces(ids):
        for token_id in (min(piece), max(piece)):
            if not 0 <= token_id < vocab_size:
                text = f"`{param}` has token id {token_id}, out of the vocabulary of {vocab_size}."
                raise InvalidRequestError(text, param=param)


def check_text(text: Prompt, call: GenerationCall, max_model_len: int, param: str) -> None:
    """Refuse text (or ids) that cannot fit whatever its tokens are, before any work on it."""
    longest = max_model_len * MAX_TOKEN_CHARS if isinstance(text, str) else max_model_len
    if len(text) > longest and call.truncate_prompt_tokens is None:
        unit = "characters" if isinstance(text, str) else "tokens"
        raise too_long(f"the prompt has {len(text)} {unit}", param, max_model_len)


def too_long(what: str, param: str, max_model_len: int) -> InvalidRequestError:
    """The error for what does not fit the model."""
    return InvalidRequestError(f"This model's maximum context length is {max_model_len} tokens; {what}.", param=param)


def _read_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    values = fields.mapping("logit_bias")
    reader = Fields(values, "logit_bias.")
    for key in values:
        if not key.isdecimal() or not key.isascii() or len(key) > 10:
            text = f"`logit_bias` has the key {show(key)}, which is no token id."
            raise InvalidRequestError(text, param="logit_bias")
        biases.append((int(key), reader.number(key, 0.0, -100.0, 100.0)))
    check_token_ids([token_id for token_id, _ in biases], vocab_size, "logit_bias")
    return tuple(biases)


def _read_top_k(fields: Fields) -> int:
    return max(fields.integer("top_k", 0, -1), 0)  # -1 and 0 both mean off


def _read_seed(fields: Fields) -> int | None:
    seed = fields.integer("seed", None, -INT64_MAX - 1)
    return None if seed is None else seed & INT64_MAX


def _with_defaults(values: dict[str, Any], model: ModelInfo) -> Fields:
    if not model.sampling:
        return Fields(values)
    return Fields({**model.sampling, **{name: value for name, value in values.items() if value is not None}})


def read_params(fields: Fields, max_tokens: int, num_logprobs: int | None, vocab_size: int) -> SamplingParams:
    """How tokens are chosen, and when to stop."""
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens", 0, 0),
        temperature=fields.number("temperature", 1.0, 0.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=_read_top_k(fields),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        seed=_read_seed(fields),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        logit_bias=_read_logit_bias(fields, vocab_size),
        stop=_read_stop(fields),
        stop_token_ids=frozenset(_read_token_ids(fields, "stop_token_ids", vocab_size) or ()),
        allowed_token_ids=_read_allowed_token_ids(fields, vocab_size),
        num_prompt_logprobs=fields.integer("prompt_logprobs", None, 0, MAX_LOGPROBS),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output"),
        ignore_eos=fields.boolean("ignore_eos"),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        num_logprobs=num_logprobs,
    )


def _read_n(fields: Fields) -> int:
    n = fields.integer("n", 1, 1, MAX_N)
    best_of = fields.integer("best_of", n, 1)
    if best_of not in (1, n):
        raise InvalidRequestError("`best_of` is not supported unless it is 1 or equals `n`.", param="best_of")
    return n


def _refuse_unsupported(fields: Fields) -> None:
    fields.unsupported("use_beam_search", "logits_processors", "logprob_token_ids", "thinking_token_budget")
    fields.unsupported("repetition_detection", "vllm_xargs", "kv_transfer_params")
    if fields.boolean("stream") and fields.any("prompt_logprobs") is not None:
        raise InvalidRequestError("`prompt_logprobs` is not supported together with `stream`.", param="prompt_logprobs")


def _check_restrictions(params: SamplingParams, structure: Structure | None) -> None:
    """One restriction may leave nothing of another."""
    if structure is not None and params.allowed_token_ids is not None:
        text = f"`{structure.param}` and `allowed_token_ids` exclude each other."
        raise InvalidRequestError(text, param="allowed_token_ids")


def _read_generation(
    fields: Fields,
    model: ModelInfo,
    params: SamplingParams,
    has_max_tokens: bool,
    add_special_tokens: bool,
) -> GenerationCall:
    _refuse_unsupported(fields)
    options = fields.object("stream_options")
    include_usage = options.boolean("include_usage")
    structure = read_structure(fields)
    _check_restrictions(params, structure)
    room = model.max_model_len - (params.max_tokens if has_max_tokens else 1)
    return GenerationCall(
        model=read_model(fields, model),
        params=params,
        has_max_tokens=has_max_tokens,
        max_tokens_param="max_tokens" if fields.any("max_completion_tokens") is None else "max_completion_tokens",
        n=_read_n(fields),
        is_stream=fields.boolean("stream"),
        include_usage=include_usage,
        continuous_usage=include_usage and options.boolean("continuous_usage_stats"),
        add_special_tokens=fields.boolean("add_special_tokens", add_special_tokens),
        truncate_prompt_tokens=_read_truncation(fields, room),
        keeps_begin=fields.choice("truncation_side", ("left", "right")) == "right",
        return_token_ids=fields.boolean("return_token_ids"),
        priority=fields.integer("priority", 0, -(2**31), 2**31 - 1),
        request_id=fields.string("request_id", None),
        bad_words=_read_bad_words(fields),
        structure=structure,
        prompt_logprobs=params.num_prompt_logprobs,
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        user=fields.string("safety_identifier", fields.string("user", ""))[:MAX_USER_CHARS],
        cache_salt=_read_cache_salt(fields),
    )


def _read_cache_salt(fields: Fields) -> str:
    salt: str = fields.string("cache_salt", "")
    if len(salt) > MAX_USER_CHARS:
        wrong_value("cache_salt", f"at most {MAX_USER_CHARS} characters", salt[:20] + "...")
    return salt


def _read_truncation(fields: Fields, room: int) -> int | None:
    """How many tokens of the prompt to keep; -1 stands for as many as there is room for."""
    kept = fields.integer("truncate_prompt_tokens", None, -1)
    if kept == 0:
        wrong_value("truncate_prompt_tokens", "-1 or at least 1", kept)
    return max(room, 1) if kept == -1 else kept


def read_completion(values: dict[str, Any], model: ModelInfo, settings: ApiSettings, vocab_size: int) -> CompletionCall:
    """Check the body of POST /v1/completions."""
    fields = _with_defaults(values, model)
    echo = fields.boolean("echo")
    asked = _read_max_tokens(fields, 0 if echo else 1)
    num_logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    max_tokens = DEFAULT_COMPLETION_TOKENS if asked is None else max(asked, 1)  # the last prompt token computes one
    params = read_params(fields, max_tokens, num_logprobs, vocab_size)
    generation = _read_generation(fields, model, params, asked is not None, add_special_tokens=True)
    fields.unsupported("suffix", "prompt_embeds")
    if echo and num_logprobs is not None:
        params = replace(params, num_prompt_logprobs=max(num_logprobs, params.num_prompt_logprobs or 0))
        generation = replace(generation, params=params)
    prompts = read_prompts(fields.required("prompt"))
    if len(prompts) * generation.n > settings.max_sequences:
        text = f"`prompt` times `n` must be at most {settings.max_sequences} sequences."
        raise InvalidRequestError(text, param="prompt")
    for prompt in prompts:
        check_text(prompt, generation, model.max_model_len, "prompt")
        if isinstance(prompt, list):
            check_token_ids(prompt, vocab_size, "prompt")
    return CompletionCall(generation, prompts, echo, is_echo_only=asked == 0)


def _read_template_kwargs(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    kwargs = fields.mapping("chat_template_kwargs")
    for name in TEMPLATE_FIELDS:
        if name in kwargs:
            text = f"`chat_template_kwargs` must not set `{name}`: it is a field of its own."
            raise InvalidRequestError(text, param="chat_template_kwargs")
    if (effort := fields.string("reasoning_effort", None)) is not None:
        kwargs = {"reasoning_effort": effort, **kwargs}
    return {**model.template_kwargs, **kwargs}


def read_chat(values: dict[str, Any], model: ModelInfo, vocab_size: int) -> ChatCall:
    """Check the body of POST /v1/chat/completions."""
    fields = _with_defaults(with_allowed_tools(values), model)
    asked = _read_max_tokens(fields)
    top_logprobs = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    wants_logprobs = fields.boolean("logprobs")
    if top_logprobs and not wants_logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    num_logprobs = (top_logprobs or 0) if wants_logprobs else None
    params = read_params(fields, asked or model.max_model_len, num_logprobs, vocab_size)
    generation = _read_generation(fields, model, params, asked is not None, add_special_tokens=False)
    fields.unsupported("chat_template", "echo", "audio", "functions", "documents", "web_search_options")
    if fields.any("modalities") not in (None, ["text"]):
        raise InvalidRequestError("`modalities` must be text; nothing else is supported.", param="modalities")
    continues = fields.boolean("continue_final_message")
    if continues and fields.boolean("add_generation_prompt"):
        text = "`continue_final_message` and `add_generation_prompt` exclude each other."
        raise InvalidRequestError(text, param="continue_final_message")
    tools = read_tools(fields)
    if generation.structure is not None and tools.structure is not None:
        text = f"`{generation.structure.param}` and `tool_choice` exclude each other."
        raise InvalidRequestError(text, param="tool_choice")
    given = fields.required("messages")
    if isinstance(given, list) and len(given) > model.max_model_len:  # each takes a token at least
        raise too_long(f"there are {len(given)} messages", "messages", model.max_model_len)
    messages = read_messages(given)
    return ChatCall(
        generation=generation,
        messages=messages,
        num_chars=sum(len(message["content"]) for message in messages),
        tools=tools,
        add_generation_prompt=not continues and fields.boolean("add_generation_prompt", True),
        continue_final_message=continues,
        template_kwargs=_read_template_kwargs(fields, model),
    )
