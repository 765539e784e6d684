"""Request flow, after the last stage: logits in, one token per row out; the detokenizer is next.

A row's token is a function of its own logits, parameters, seed and position: never of the batch it is in, of
preemption, or of how often the row was computed before. Two choices make that exact. The randomness is a
number hashed from (seed, position). And probabilities are integers (2**-40 of the most likely token's is 1),
so that their sums come out the same in whatever order a device adds them.

A row's fault is its own as well: where others have a token, it has an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kunserve.compute.logprobs import logprobs_of, scored
from kunserve.errors import EngineError
from kunserve.sampling import SampledToken as SampledToken  # for whoever calls this
from kunserve.sampling import SamplingParams, TokenMask

UNIT = 2.0**40  # weight of the most likely token; the sum over 2**22 tokens still fits an int64
LEAST_LOG_WEIGHT = -28.0  # log of a probability relative to the most likely token's; UNIT times less than this is 0
NUM_CANDIDATES = 256  # largest weights looked at before the whole row is sorted
SLICE_ELEMENTS = 1 << 22  # bounds the workspace on a device: about 40 bytes per element


class SamplingRow(NamedTuple):
    """All that decides one row's token. `output_token_ids` must not change while `sample` runs.

    Where the token does not depend on which they are (`reads_output`), anything as long may stand for them.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]  # generated so far
    eos_token_ids: tuple[int, ...]
    mask: TokenMask | None = None  # of a grammar; read, and waited for, when the logits are there
    given: int | None = None  # not to choose but to score this token of the prompt


def failed(error: BaseException) -> SampledToken:
    """Return what stands for the token of a row that has none."""
    return SampledToken(0, error=error)


def not_finite() -> SampledToken:
    """Return what stands for the token of a row whose largest logit is no number to compare with."""
    return failed(EngineError("the largest logit is not finite: cannot sample a token"))


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Choose one token per row: logits (R, V), any float type and device, left unchanged; R rows.

    Order as in vLLM: grammar and allowed tokens, logit bias, min_tokens and bad words, penalties, temperature, min_p,
    top_k, top_p. Ties go to the lowest id. A row whose largest logit is not finite, or whose work raises, has that
    error instead of a token.
    """
    assert logits.shape[0] == len(rows)
    try:
        return _sample(logits, rows)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in a grammar's Rust code is no Exception
        if len(rows) == 1:
            return [failed(error)]
    half = len(rows) // 2  # whose fault it is turns out where rows are chosen alone, which changes no token
    return sample(logits[:half], rows[:half]) + sample(logits[half:], rows[half:])


def _sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Sample as `sample` does, but raise what the work for any row raises."""
    if not rows:
        return []
    token_ids = _greedy(logits)
    others = [
        i
        for i, row in enumerate(rows)
        if token_ids[i] is not None and row.given is None and (row.params.temperature > 0 or is_adjusted(row))
    ]
    rows_per_slice = 1 if logits.device.type == "cpu" else max(1, SLICE_ELEMENTS // logits.shape[1])
    for start in range(0, len(others), rows_per_slice):
        part = others[start : start + rows_per_slice]
        chosen = choose(_rows(logits, part), [rows[i] for i in part])
        for i, token_id in zip(part, chosen, strict=True):
            token_ids[i] = token_id
    return [
        not_finite()
        if token_id is None
        else SampledToken(token_id, logprobs_of(logits[i], token_id, row.params.num_logprobs))
        if row.given is None
        else SampledToken(row.given, scored(logits[i], row.given, row.params.num_prompt_logprobs))
        for i, (token_id, row) in enumerate(zip(token_ids, rows, strict=True))
    ]


def reads_output(params: SamplingParams) -> bool:
    """Tell whether a token depends on which ones were generated before it, and not only on how many."""
    return bool(params.bad_words) or _is_penalised(params)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that decides the token at `position` (tokens generated before it)."""
    digest = blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def integer_weights(scores: Tensor, temperature: Tensor, min_p: Tensor | None) -> Tensor:
    """Turn scores (R, V) float64, the rest (R,), into probabilities in units: (R, V) int64, UNIT where largest."""
    relative = (scores - scores.amax(-1, keepdim=True)).div_(temperature[:, None]).exp_()
    if min_p is not None:
        relative.masked_fill_(relative < min_p[:, None], 0.0)
    return relative.mul_(UNIT).long()


def keep_most_likely(weights: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int = NUM_CANDIDATES) -> Tensor:
    """Zero all but the top_k largest weights, and of those all but the fewest that reach top_p of their sum.

    weights (R, V) int64; top_k (R,) int64, V when off; top_p (R,) float64, 1 when off. The `num_candidates` largest
    weights of a row are looked at first, and more of them where these are not enough: the distribution is flat.
    """
    vocab_size = weights.shape[1]
    num_candidates = min(num_candidates, vocab_size)
    largest = _largest(weights, num_candidates)
    num_kept, is_decided = _count_kept(weights, largest, top_k, top_p)
    num_decided = int(is_decided.sum())
    further = vocab_size if weights.device.type == "cpu" else num_candidates * 16
    if num_decided == 0:
        return keep_most_likely(weights, top_k, top_p, further)
    kept = _keep(weights, largest, num_kept, is_off=(top_k >= vocab_size) & (top_p >= 1.0))
    if num_decided < len(weights):
        rest = (~is_decided).nonzero()[:, 0]
        kept[rest] = keep_most_likely(weights[rest], top_k[rest], top_p[rest], further)
    return kept


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the CDF in order of token ids: weights (R, V) int64, uniforms (R,) in [0, 1) -> ids (R,)."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = (uniforms * total.double()).long().minimum(total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """Choose tokens of rows that are drawn or whose logits are adjusted; None for those that are left without."""
    scores = logits.to(torch.float64, copy=True)
    for score, row in zip(scores, rows, strict=True):
        if is_adjusted(row):
            _adjust(score, row)
    token_ids = _greedy(scores)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and token_ids[i] is not None]
    if not drawn:
        return token_ids

    def column(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    params, scores = [rows[i].params for i in drawn], _rows(scores, drawn)
    likely = _likely(scores[0], params[0].temperature) if scores.device.type == "cpu" and len(drawn) == 1 else None
    if likely is not None:
        scores = torch.from_numpy(scores.numpy()[:, likely.numpy()])
    vocab_size = scores.shape[1]
    min_p = column(p.min_p for p in params) if any(p.min_p for p in params) else None
    weights = integer_weights(scores, column(p.temperature for p in params), min_p)
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        top_k = column((min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params), torch.int64)
        weights = keep_most_likely(weights, top_k, column(p.top_p for p in params))
    uniforms = column(uniform(rows[i].seed, len(rows[i].output_token_ids)) for i in drawn)
    chosen = draw(weights, uniforms)
    for i, token_id in zip(drawn, (chosen if likely is None else likely[chosen]).tolist(), strict=True):
        token_ids[i] = token_id
    return token_ids


def _likely(scores: Tensor, temperature: float) -> Tensor | None:
    """Return the ids, ascending, of (V,) scores on the CPU that come to a weight; None when nearly all do.

    At low temperatures and under grammars they are few. And the exponential of -inf is a slow one.
    """
    values = scores.numpy()  # whose comparisons are ten times faster than torch's
    is_likely = values - values.max() >= LEAST_LOG_WEIGHT * temperature
    is_dense = np.count_nonzero(is_likely) > 0.9 * len(values)
    return None if is_dense else torch.from_numpy(np.flatnonzero(is_likely))


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of (R, V), ascending: a view where they are neighbours."""
    first, last = rows[0], rows[-1]
    return values[first : last + 1] if last - first + 1 == len(rows) else values[rows]


def _greedy(logits: Tensor) -> list[int | None]:
    """Return the lowest id of each row's largest logit, None if not finite; no more than that leaves the device."""
    if logits.device.type == "cpu":  # numpy's argmax is twenty times faster than torch's
        values = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        best = torch.from_numpy(values.detach().numpy().argmax(-1))
    else:
        best = logits.argmax(-1)
    is_finite = logits.gather(-1, best[:, None])[:, 0].isfinite()  # argmax returns a NaN if there is one
    ids: list[int] = best.tolist()
    return [token_id if usable else None for token_id, usable in zip(ids, is_finite.tolist(), strict=True)]


def _count_kept(weights: Tensor, largest: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many weights of each row are kept, if its `largest` (R, C) are enough to know; and if they are."""
    vocab_size, num_candidates = weights.shape[1], largest.shape[1]
    cumulative = largest.cumsum(-1)
    is_all = top_k >= vocab_size
    last = top_k.clamp(max=num_candidates)[:, None] - 1
    mass = torch.where(is_all, weights.sum(-1), cumulative.gather(-1, last)[:, 0])
    is_short = cumulative.double() < (top_p * mass.double())[:, None]
    is_decided = torch.where(is_all, (top_p >= 1.0) | ~is_short[:, -1], top_k <= num_candidates)
    return (is_short.sum(-1) + 1).minimum(top_k).clamp(max=num_candidates), is_decided


def _keep(weights: Tensor, largest: Tensor, num_kept: Tensor, is_off: Tensor) -> Tensor:
    """Zero all but the `num_kept` largest weights of each row, of equal ones the later; none where it `is_off`."""
    # Which of several equal weights a sort puts first differs between devices: keep the lowest ids.
    least = largest.gather(-1, num_kept[:, None] - 1)
    is_kept = weights >= least
    if bool((is_kept.sum(-1) > num_kept).any()):
        num_equal = num_kept[:, None] - (largest > least).sum(-1, keepdim=True)
        is_equal = weights == least
        is_kept &= ~is_equal | (is_equal.cumsum(-1) <= num_equal)
    return weights.where(is_kept | is_off[:, None], 0)


def _largest(weights: Tensor, num_candidates: int) -> Tensor:
    """Return the largest weights of each row, in descending order: (R, V) -> (R, num_candidates)."""
    num_others = weights.shape[1] - num_candidates
    if weights.device.type == "cpu":  # numpy partitions and sorts up to ten times faster than torch
        values = weights.numpy()
        if num_others:
            values = np.partition(values, num_others, axis=-1)[:, num_others:]
        return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())
    return weights.topk(num_candidates).values if num_others else weights.sort(descending=True).values


def is_adjusted(row: SamplingRow) -> bool:
    """Return whether logits are changed before one is chosen: by a bias, a restriction or a penalty."""
    p = row.params
    is_biased = bool(p.logit_bias or p.bad_words) or len(row.output_token_ids) < p.min_tokens
    return is_biased or _is_restricted(row) or _is_penalised(p)


def _is_restricted(row: SamplingRow) -> bool:
    return row.mask is not None or row.params.allowed_token_ids is not None


def _is_penalised(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def _adjust(scores: Tensor, row: SamplingRow) -> None:
    """Apply masks, logit bias, min_tokens, bad words and penalties in place: scores (V,) float64."""
    params, vocab_size = row.params, scores.shape[0]
    _allow(scores, row)
    # Ids beyond the vocabulary are no error here: they cannot come up anyway.
    bias = [(i, value) for i, value in params.logit_bias if 0 <= i < vocab_size]
    if bias:
        ids, values = zip(*bias, strict=True)
        delta = torch.tensor(values, dtype=scores.dtype, device=scores.device)
        scores.index_add_(0, torch.tensor(ids, device=scores.device), delta)
    if banned := [i for i in _banned(row) if 0 <= i < vocab_size]:
        places = torch.tensor(banned, dtype=torch.int64, device=scores.device)
        before = scores[places]
        scores[places] = -torch.inf
        if _is_restricted(row) and float(scores.max()) == -torch.inf:  # nothing else is allowed
            scores[places] = before
    if _is_penalised(params):
        _penalise(scores, row)


def _penalise(scores: Tensor, row: SamplingRow) -> None:
    """Apply penalties in place to the scores (V,) of tokens that have been there."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen, _ = _counts(scores, row.prompt_token_ids, row.output_token_ids)
        of_seen, factor = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(of_seen > 0, of_seen / factor, of_seen * factor)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = _counts(scores, row.output_token_ids)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _allow(scores: Tensor, row: SamplingRow) -> None:
    """Rule out in place what grammar or request do not allow: scores (V,). One token always remains."""
    vocab_size = scores.shape[0]
    is_allowed: NDArray[np.bool_] | None = None
    words = row.mask() if row.mask is not None else None
    if words is not None:
        is_allowed = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
    if (ids := row.params.allowed_token_ids) is not None:
        is_listed = np.zeros(vocab_size, np.bool_)
        is_listed[[i for i in ids if 0 <= i < vocab_size]] = True
        both = is_listed if is_allowed is None else is_listed & is_allowed
        is_allowed = both if both.any() else is_allowed
    if is_allowed is not None and is_allowed.any():
        scores.masked_fill_(torch.from_numpy(~is_allowed).to(scores.device), -torch.inf)


def _banned(row: SamplingRow) -> list[int]:
    """Return the tokens that must not come next: the end before min_tokens, the last token of a bad word."""
    params, output = row.params, row.output_token_ids
    banned = set[int]()
    if len(output) < params.min_tokens:
        banned = {*row.eos_token_ids, *params.stop_token_ids}
    for word in params.bad_words:
        *begin, last = word
        if len(begin) <= len(output) and list(output[len(output) - len(begin) :]) == begin:
            banned.add(last)
    return sorted(banned)


def _counts(scores: Tensor, *token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which tokens there are, and how often each: (N,) int64 and (N,) in the dtype of `scores` (V,)."""
    ids, counts = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in token_ids]), return_counts=True)
    return torch.from_numpy(ids).to(scores.device), torch.from_numpy(counts).to(scores)
