"""What counters cannot tell: the newest times to first token, the newest prompts, and the longest gap since a look."""

from __future__ import annotations

from collections import deque

HISTORY = 512  # first tokens that are remembered
NUM_PROMPTS = 1000  # whose share of cached tokens is the recent one, as in vLLM


class Recent:
    """Keeps these figures. Metrics tell it of every token, so it does little; the feed asks a few times a second."""

    __slots__ = ("_cached", "_first_tokens", "_looked_for", "_prompts", "gap_s")

    def __init__(self) -> None:
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=HISTORY)  # second they came at, seconds they took
        self._prompts: deque[tuple[int, int]] = deque()  # tokens, and those of them that were in the prefix cache
        self._looked_for = self._cached = 0  # tokens of all these
        self.gap_s = 0.0  # the longest between two tokens of a request, since `take_gap`

    def first_token(self, at_s: float, ttft_s: float) -> None:
        """Remember that a request got its first token at `at_s` on the engine's clock."""
        self._first_tokens.append((at_s, ttft_s))

    def prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Note a prompt: its tokens that were looked for in the prefix cache, and those that were found."""
        self._prompts.append((num_tokens, num_cached_tokens))
        self._looked_for += num_tokens
        self._cached += num_cached_tokens
        if len(self._prompts) > NUM_PROMPTS:
            oldest, its_cached = self._prompts.popleft()
            self._looked_for -= oldest
            self._cached -= its_cached

    @property
    def prefix_hit_rate(self) -> float | None:
        """Return which share of the newest prompts' tokens was in the prefix cache; None before the first prompt."""
        return self._cached / self._looked_for if self._looked_for else None

    def ttfts(self, since_s: float) -> list[float]:
        """Return the times to first token of those that came at `since_s` or later, ascending; at most `HISTORY`."""
        return sorted(ttft_s for at_s, ttft_s in self._first_tokens if at_s >= since_s)

    @property
    def last_first_token_s(self) -> float | None:
        """Return when the newest first token came, on the engine's clock; None before the first."""
        return self._first_tokens[-1][0] if self._first_tokens else None

    def take_gap(self) -> float:
        """Return the longest gap between two tokens of a request since the last call, in seconds; 0 without any."""
        gap_s, self.gap_s = self.gap_s, 0.0
        return gap_s
