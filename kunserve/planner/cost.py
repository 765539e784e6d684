"""How long a microbatch takes on a stage, predicted: what balances microbatches in a chain, and the simulator's clock.

The form is the paper's (KunServe, section 4.3): a span (chunk) of c tokens after a prefix of p costs
`a * (p*c + (c*c+c)/2) + b*c + g` in each layer, and loading a layer's weights is paid once per microbatch. A decoding
request is a span of one token. Around the layers there are the embedding, the norm and head per sampled row, and
what submitting a stage costs.

Two things are added, because decode needs them. A span reads the KV of all it attends to once, whatever its length:
`k * (p+c)`. For a long span that is little beside `a`; a decoding row does nothing else (on a GPU, k is 20 times a).
And reading weights and multiplying overlap: a few rows cost no more than reading. So the two are joined by a norm,
`(load^o + (b*T)^o)^(1/o)` for T tokens in all spans: o = 1 is the paper's sum, a large o is their maximum.
Which o fits is found with the other constants (scripts/bench/fit_cost_model.py). A server corrects them by
its own steps (engine/step/own_steps.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from operator import add
from typing import NamedTuple


class TokenSpan(NamedTuple):
    """`num_tokens` tokens of one request after `prefix` others; the head is computed for `num_samples` of them."""

    prefix: int
    num_tokens: int
    num_samples: int = 0

    @property
    def num_pairs(self) -> int:
        """Return how many pairs it has of a token and one that this token attends to."""
        return self.prefix * self.num_tokens + (self.num_tokens * self.num_tokens + self.num_tokens) // 2

    @property
    def num_keys(self) -> int:
        """Return how many tokens' KV it reads."""
        return self.prefix + self.num_tokens

    @property
    def num_spans(self) -> int:
        """Return 1, as `Work` counts it."""
        return 1


class Work(NamedTuple):
    """What a microbatch asks of a layer: the sums over its spans that its time depends on."""

    num_pairs: float = 0  # of a token and one it attends to
    num_keys: float = 0  # tokens whose KV is read, span by span
    num_tokens: float = 0
    num_spans: float = 0
    num_samples: float = 0

    @classmethod
    def of(cls, spans: Iterable[TokenSpan]) -> Work:
        """Sum up the work of all these spans in one microbatch."""
        pairs = keys = tokens = num_spans = samples = 0
        for span in spans:
            pairs += span.num_pairs
            keys += span.num_keys
            tokens += span.num_tokens
            num_spans += 1
            samples += span.num_samples
        return cls(pairs, keys, tokens, num_spans, samples)

    @classmethod
    def of_rows(cls, lengths: Sequence[int]) -> Work:
        """Sum up the work of requests that compute one token each; `lengths`: all tokens of each, with the new one."""
        num_rows, num_keys = len(lengths), sum(lengths)
        return cls(num_keys, num_keys, num_rows, num_rows, num_rows)

    def plus(self, span: TokenSpan) -> Work:
        """Return this work with one more span."""
        return Work(
            self.num_pairs + span.num_pairs,
            self.num_keys + span.num_keys,
            self.num_tokens + span.num_tokens,
            self.num_spans + 1,
            self.num_samples + span.num_samples,
        )

    def join(self, other: Work) -> Work:
        """Return the work of both in one microbatch."""
        return Work(*map(add, self, other))

    def part(self, num_parts: int) -> Work:
        """Return the work of one of `num_parts` equal parts."""
        return Work(*(amount / num_parts for amount in self))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Constants of one model on one kind of device, in seconds; none is negative."""

    pair_s: float  # a: one token attends to one other, in one layer
    key_s: float  # k: a span reads the KV of one token, in one layer
    token_s: float  # b: one token through the matrices of a layer
    chunk_s: float  # g: one span (the paper's chunk) in a layer, whatever its length
    load_s: float  # reading one layer's weights, once per microbatch
    embed_token_s: float  # embedding of one token
    head_row_s: float  # norm and head of one sampled row
    head_load_s: float  # reading the head's weights, if a row is sampled
    stage_s: float  # a stage of a microbatch, whatever it holds
    sample_s: float = 0.0  # choosing one token from its logits; a fit leaves it in head_row_s
    overlap: float = 1.0  # of loading and multiplying; 1: one after the other, large: the longer of both

    def layer_time(self, work: Work) -> float:
        """Predict the seconds that one layer takes for `work`."""
        matrices = self._overlapped(self.load_s, self.token_s * work.num_tokens)
        attention = self.pair_s * work.num_pairs + self.key_s * work.num_keys
        return matrices + attention + self.chunk_s * work.num_spans

    def head_time(self, num_samples: float) -> float:
        """Predict the seconds for norm, head and sampling of so many rows."""
        if num_samples == 0:
            return 0.0
        return self._overlapped(self.head_load_s, self.head_row_s * num_samples) + self.sample_s * num_samples

    def stage_time(self, num_layers: int, spans: Iterable[TokenSpan], is_first: bool, is_last: bool) -> float:
        """Predict the seconds of a microbatch of these spans on a stage of `num_layers` layers; 0 without spans."""
        return self.work_time(num_layers, Work.of(spans), is_first, is_last)

    def work_time(self, num_layers: int, work: Work, is_first: bool, head_share: float) -> float:
        """Predict the same as `stage_time`, from the sums over the spans; `head_share`: of the head, 1 if it is alone.

        Ends of a chain that share the head have a part of its matrix each, and of its rows' sampling.
        """
        if work.num_spans == 0:
            return 0.0
        ends = self.embed_token_s * work.num_tokens if is_first else 0.0
        if head_share:
            ends += head_share * self.head_time(work.num_samples)
        return self.stage_s + ends + num_layers * self.layer_time(work)

    def added_time(self, num_layers: int, span: TokenSpan | Work) -> float:
        """Predict the seconds that one or more spans add to a large microbatch in `num_layers` layers and the head."""
        attention = self.pair_s * span.num_pairs + self.key_s * span.num_keys
        layer = attention + self.token_s * span.num_tokens + self.chunk_s * span.num_spans
        return num_layers * layer + (self.head_row_s + self.sample_s) * span.num_samples

    def with_kv(self, share: float) -> CostModel:
        """Return the constants for KV of `share` times the bytes: reading it takes so long, computing is the same."""
        return replace(self, key_s=self.key_s * share)

    def to_dict(self) -> dict[str, float]:
        """Return the constants by name, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> CostModel:
        """Take constants from a file. Raises ValueError that names what is missing, unknown or no sensible number."""
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if wrong := (set(values) - known) | (needed - set(values)):
            raise ValueError(f"{', '.join(sorted(wrong))}: missing or unknown among the constants of a cost model")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r}: must be a number, not negative")
        if values.get("overlap", 1.0) < 1:
            raise ValueError(f"overlap = {values['overlap']!r}: must be at least 1")
        return cls(**{name: float(value) for name, value in values.items()})

    def _overlapped(self, load: float, compute: float) -> float:
        longer, shorter = max(load, compute), min(load, compute)
        if shorter == 0.0:
            return longer
        return float(longer * (1.0 + (shorter / longer) ** self.overlap) ** (1.0 / self.overlap))
