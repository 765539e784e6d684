"""POST /v1/completions: prompts as text or token ids, answers as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from kunserve.api.ask.prompts import CALL_CHARS, fit_to_context, tokenize, tokenize_bad_words
from kunserve.api.ask.protocol import CompletionCall, Prompt, read_completion
from kunserve.api.ask.structured import compile_structure
from kunserve.api.say.answering import answer, make_choices
from kunserve.api.say.answers import AnswerFormat, Choice, usage_json
from kunserve.api.say.echo import Echo, echo_of, positions_of_answer
from kunserve.api.wire.access import created_s, owner_of
from kunserve.api.wire.admission import estimated_tokens
from kunserve.api.wire.body import read_call
from kunserve.api.wire.context import API, Api, choose_request_id, fragment, long_list
from kunserve.engine.request import Output
from kunserve.sampling import FinishReason, SamplingParams, TokenLogprobs


class CompletionFormat(AnswerFormat):
    """OpenAI's `text_completion`."""

    object = "text_completion"
    chunk_object = "text_completion"
    text_open = b',"text":'
    text_close = b""

    def _token_name(self, token_id: int) -> str:
        """Return a token's text; of half a character its bytes, as OpenAI writes them: texts are keys."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.token_bytes(token_id))

    def logprobs_json(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return four parallel lists; the most likely tokens of a position always include the one that was taken."""
        if choice.positions is None:
            choice.positions = positions_of_answer(self.tokenizer, choice.request)
        start, take = len(choice.echo.text) if choice.echo else 0, choice.positions.take
        skips = choice.request.params.skip_special_tokens
        offsets = [start + take(self.tokenizer.shown_bytes(entry.token_id, skips)) for entry in entries]
        return self._lists(entries, offsets)

    def _lists(self, entries: Sequence[TokenLogprobs], offsets: list[int]) -> dict[str, Any]:
        name = self._token_name
        tokens = [name(entry.token_id) for entry in entries]
        top = [fragment({name(i): p for i, p in ((entry.token_id, entry.logprob), *entry.top)}) for entry in entries]
        logprobs = [entry.logprob for entry in entries]
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}

    def _prompt_logprobs(self, choice: Choice, echo: Echo, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return log-probabilities of an echoed prompt; its first token has none."""
        first = self._token_name(choice.request.prompt_token_ids[0])
        shown = self._lists(_cut(entries, self.call.params.num_logprobs), list(echo.offsets[1:]))
        nothing = {"text_offset": echo.offsets[0], "token_logprobs": None, "tokens": first, "top_logprobs": None}
        return {name: [nothing[name], *values] for name, values in shown.items()}

    def opening(self, choice: Choice, output: Output) -> bytes:
        """Return the prompt, for clients that want it back."""
        echo = choice.echo
        if echo is None and not self.call.return_token_ids:
            return b""
        text = "" if echo is None else echo.text
        first = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}
        if echo is not None and self.call.params.num_logprobs is not None:
            first["logprobs"] = self._prompt_logprobs(choice, echo, output.prompt_logprobs)
        if self.call.return_token_ids:
            first |= {"prompt_token_ids": long_list(choice.request.prompt_token_ids), "token_ids": []}
        return self.event_of(choice, first)

    def choice_json(self, choice: Choice) -> dict[str, Any]:
        """Return text, its log-probabilities, and the token ids if asked for."""
        echo = choice.echo
        asked = self.call.params.num_logprobs is not None
        logprobs = self.logprobs_json(choice, choice.logprobs) if asked else None
        if logprobs is not None and echo is not None:
            prompt = self._prompt_logprobs(choice, echo, choice.prompt_logprobs)
            logprobs = {name: prompt[name] + values for name, values in logprobs.items()}
        ids: dict[str, Any] = {}
        if self.call.return_token_ids:
            ids = {"token_ids": choice.token_ids, "prompt_token_ids": long_list(choice.request.prompt_token_ids)}
        if self.call.prompt_logprobs is not None:
            ids["prompt_logprobs"] = self.prompt_logprobs_json(choice)
        return {"text": (echo.text if echo else "") + choice.text, "logprobs": logprobs, **ids}


class EchoFormat(CompletionFormat):
    """Writes the prompt alone, for max_tokens 0. The token that the last of it computes is not shown."""

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """Return the event that ends a choice."""
        return super().chunk(choice, _without_tokens(output))

    def usage_of(self, choice: Choice, output: Output | None = None) -> dict[str, Any]:
        """Return the usage of a request for which nothing was generated."""
        return usage_json(choice.request.num_prompt_tokens, 0, choice.request.num_cached_tokens)

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """See `AnswerFormat`."""
        _forget(choices)
        return super().ending(choices)

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        _forget(choices)
        return super().answer_json(choices)


def _without_tokens(output: Output) -> Output:
    return output._replace(text="", token_ids=(), logprobs=(), finish_reason=FinishReason.LENGTH, stop_reason=None)


def _forget(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.num_tokens = 0
        choice.outputs = [_without_tokens(output) for output in choice.outputs]


def _cut(entries: Sequence[TokenLogprobs], num_top: int | None) -> list[TokenLogprobs]:
    return [replace(entry, top=entry.top[:num_top]) for entry in entries]


async def _echoes(
    api: Api, call: CompletionCall, tokenized: Sequence[list[int]], fitted: Sequence[tuple[list[int], SamplingParams]]
) -> list[Echo | None]:
    """Return what each answer begins with: the prompt's text, or that of the tokens that are left of it."""
    if not call.echo:
        return [None] * len(call.prompts)
    wants_offsets = call.generation.params.num_logprobs is not None

    def echo(prompt: Prompt, whole: list[int], ids: list[int]) -> Echo:
        text = prompt if isinstance(prompt, str) and len(ids) == len(whole) else None
        return echo_of(api.tokenizer, ids, text, wants_offsets)

    given = [(prompt, whole, ids) for prompt, whole, (ids, _) in zip(call.prompts, tokenized, fitted, strict=True)]
    num_tokens = sum(len(ids) + CALL_CHARS for _, _, ids in given)
    return await api.offload(num_tokens, lambda: [echo(*each) for each in given])


async def completions(request: web.Request) -> web.StreamResponse:
    """Answer POST /v1/completions."""
    api = request.app[API]
    vocab_size = api.tokenizer.vocab_size
    call = await read_call(request, api, lambda values: read_completion(values, api.model, api.settings, vocab_size))
    generation = call.generation
    owner = owner_of(request, generation.user)
    num_tokens = sum(map(estimated_tokens, call.prompts)) * generation.n
    async with api.admission.accepted(owner, len(call.prompts) * generation.n, num_tokens) as reservation:
        tokenized = await tokenize(api, call.prompts, generation.add_special_tokens)
        bad_words = await tokenize_bad_words(api, generation.bad_words)
        constraint = await compile_structure(request, api, generation.structure, generation.user, reasons=False)
        fitted = [fit_to_context(whole, generation, bad_words, api, "prompt") for whole in tokenized]
        echoes = await _echoes(api, call, tokenized, fitted)
        prompts = [(ids, params, echo) for (ids, params), echo in zip(fitted, echoes, strict=True)]
        answer_id = f"cmpl-{choose_request_id(request, generation.request_id)}"
        choices = await make_choices(api, answer_id, generation, owner, prompts, constraint)
        make_form = EchoFormat if call.is_echo_only else CompletionFormat
        writer = make_form(answer_id, created_s(request), generation, api.tokenizer)
        return await answer(request, api, writer, choices, reservation)
