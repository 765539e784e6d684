"""What a request may ask for, how long the queue may get, and what is said to those beyond."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.engine.request import Request
from kunserve.errors import InvalidRequestError, OverloadedError


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Bounds of what an engine takes."""

    max_model_len: int  # tokens
    max_num_queued_reqs: int
    stall_s: float = 60.0  # work to do and no step finished for so long: not healthy
    device_timeout_s: float | None = None  # a device that ends nothing of its work for so long is lost; None: never

    def check(self, request: Request) -> None:
        """Set how long a request may get. Raises InvalidRequestError if its prompt can never be served."""
        if not 0 < request.num_prompt_tokens < self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; between 1 and {self.max_model_len - 1} "
                "can be served",
                param="prompt",
            )
        request.max_num_tokens = min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len)


def overlong(most_tokens: int) -> OverloadedError:
    """Return what is said to a request that is longer than any group that is left can hold."""
    message = f"without the devices that are gone, a request has {most_tokens} tokens at most"
    return OverloadedError(message, retry_after_s=60)
