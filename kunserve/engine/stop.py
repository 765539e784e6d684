"""When a request is finished: token by token, without text (stop strings belong to the detokenizer)."""

from __future__ import annotations

from kunserve.engine.request import FinishReason, Request


def finish_of(
    request: Request, eos_token_ids: tuple[int, ...], max_model_len: int
) -> tuple[FinishReason, int | None] | None:
    """Finish and stop reason after the newest token, or None if the request goes on."""
    params, token = request.params, request.token_ids[-1]
    if request.num_output_tokens >= params.min_tokens:
        if token in params.stop_token_ids:
            return FinishReason.STOP, token
        if not params.ignore_eos and token in eos_token_ids:
            return FinishReason.STOP, None
    if request.num_output_tokens >= params.max_tokens or request.num_tokens >= max_model_len:
        return FinishReason.LENGTH, None
    return None
