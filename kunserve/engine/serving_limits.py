"""What a request may ask for, and how long the queue may get."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.engine.request import Request
from kunserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Bounds of what an engine takes."""

    max_model_len: int  # tokens
    max_num_queued_reqs: int
    stall_s: float = 60.0  # work to do and no step finished for so long: not healthy
    device_timeout_s: float | None = None  # a device that ends nothing of its work for so long is lost; None: never

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError if a request's prompt can never be served."""
        if not 0 < request.num_prompt_tokens < self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; between 1 and {self.max_model_len - 1} "
                "can be served",
                param="prompt",
            )
