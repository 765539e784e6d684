"""POST /v1/completions: prompts as text or token ids, answers as plain text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from kunserve.api.answering import answer, make_choices
from kunserve.api.answers import AnswerFormat, Choice
from kunserve.api.context import API, choose_request_id, read_json
from kunserve.api.prompts import check_text, fit, tokenize
from kunserve.api.protocol import read_completion
from kunserve.engine.request import TokenLogprobs


class CompletionFormat(AnswerFormat):
    """OpenAI's `text_completion`."""

    object = "text_completion"
    chunk_object = "text_completion"
    text_open = b',"text":'
    text_close = b""

    def logprobs_json(self, entries: Sequence[TokenLogprobs], text_offset: int) -> dict[str, Any]:
        """Four parallel lists; the most likely tokens of a position always include the one that was taken."""
        tokens = [self.token_text(entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(text_offset)
            text_offset += len(token)
        top = [{self.token_text(i): p for i, p in ((entry.token_id, entry.logprob), *entry.top)} for entry in entries]
        logprobs = [entry.logprob for entry in entries]
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}

    def opening(self, choice: Choice) -> bytes:
        """The prompt, to clients that want it back."""
        if not choice.echo and not self.call.return_token_ids:
            return b""
        first = {"index": choice.index, "text": choice.echo, "logprobs": None, "finish_reason": None}
        if self.call.return_token_ids:
            first |= {"prompt_token_ids": choice.request.prompt_token_ids, "token_ids": []}
        return self.event([first])

    def choice_json(self, choice: Choice) -> dict[str, Any]:
        """Text, its log-probabilities, and the token ids if asked for."""
        asked = self.call.params.num_logprobs is not None
        logprobs = self.logprobs_json(choice.logprobs, len(choice.echo)) if asked else None
        ids = {}
        if self.call.return_token_ids:
            ids = {"token_ids": choice.token_ids, "prompt_token_ids": choice.request.prompt_token_ids}
        return {"text": choice.echo + choice.text, "logprobs": logprobs, **ids}


async def completions(request: web.Request) -> web.StreamResponse:
    """The route."""
    api = request.app[API]
    call = read_completion(await read_json(request, api.settings), api.model, api.settings, api.tokenizer.vocab_size)
    generation = call.generation
    for prompt in call.prompts:
        check_text(prompt, generation, api.model.max_model_len, "prompt")
    prompts = []
    tokenized = await tokenize(api, call.prompts, generation.add_special_tokens)
    for prompt, whole in zip(call.prompts, tokenized, strict=True):
        ids, params = fit(whole, generation, api, "prompt")
        echo = ""
        if call.echo:
            is_whole_text = isinstance(prompt, str) and len(ids) == len(whole)
            echo = str(prompt) if is_whole_text else api.tokenizer.decode(ids)
        prompts.append((ids, params, echo))
    answer_id = f"cmpl-{choose_request_id(request, generation.request_id)}"
    form = CompletionFormat(answer_id, int(time.time()), generation, api.tokenizer)
    return await answer(request, api, form, make_choices(api, answer_id, generation, prompts))
