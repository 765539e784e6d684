from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from cost_models import COST
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.planner.cost import TokenSpan, Work
from kunserve.planner.microbatch import LONG_BACKLOG, MOST_PARTS, SCARCE, Lookahead

COST2 = replace(COST, overlap=2.0, stage_s=1e-4)
LOOKAHEAD = Lookahead(COST2, 30, 2048)
PROMPTS = st.lists(st.integers(1, 1500), min_size=1, max_size=30)


def split(lookahead: Lookahead, prompts: list[int], num_stages: int) -> list[list[tuple[int, TokenSpan]]]:
    """Cut a backlog of prompts into microbatches: (prompt, piece) of each, as the scheduler does, one by one."""
    done, parts = [0] * len(prompts), []
    in_flight: list[list[TokenSpan]] = []
    while any(d < n for d, n in zip(done, prompts, strict=True)):
        rest = [TokenSpan(d, n - d, 1) for d, n in zip(done, prompts, strict=True) if d < n]
        total_s = lookahead.target(Work(), [*rest, *chain.from_iterable(in_flight)], num_stages).total_s
        part: list[tuple[int, TokenSpan]] = []
        work = Work()
        for i, num_tokens in enumerate(prompts):
            if cut := lookahead.cut(work, done[i], num_tokens - done[i], total_s):
                span = TokenSpan(done[i], cut, int(done[i] + cut == num_tokens))
                part.append((i, span))
                work, done[i] = work.plus(span), done[i] + cut
        assert part, "no progress"
        parts.append(part)
        in_flight = [*in_flight, [span for _, span in part]][-(num_stages - 1) :]
    return parts


@settings(deadline=None, max_examples=60)
@given(PROMPTS, st.integers(2, 4))
def test_parts_cover_all_tokens_once_and_are_equally_long(prompts: list[int], num_stages: int) -> None:
    parts = split(LOOKAHEAD, prompts, num_stages)
    reached = [0] * len(prompts)
    for part in parts:
        for i, span in part:
            assert span.prefix == reached[i]
            reached[i] += span.num_tokens
            assert span.num_samples == (reached[i] == prompts[i])
    assert reached == prompts
    times = [LOOKAHEAD.time(Work.of(span for _, span in part)) for part in parts]
    sizes = [sum(span.num_tokens for _, span in part) for part in parts]
    efficient_s = LOOKAHEAD.time(Work.of([TokenSpan(0, LOOKAHEAD.least_tokens)]))
    one_token_s = LOOKAHEAD.added_time(TokenSpan(1500, 1, 1))
    assert times[-1] <= efficient_s * 1.2 + one_token_s
    assert max(sizes) <= LOOKAHEAD.max_num_tokens
    for time, after, size in zip(times, times[1:-num_stages], sizes, strict=False):  # the last ones share what is left
        assert size >= 8 and 0.35 * time < after < 1.3 * time + one_token_s  # each like the one before, or half of it


@settings(deadline=None)
@given(st.integers(200, 4000), st.integers(2, 4))
def test_one_prompt_is_cut_for_all_stages(num_tokens: int, num_stages: int) -> None:
    part = LOOKAHEAD.target(Work(), [TokenSpan(0, num_tokens, 1)], num_stages)
    first = LOOKAHEAD.cut(Work(), 0, num_tokens, part.total_s)
    least = LOOKAHEAD.least_tokens
    most = max(least * 1.2, num_tokens / (LONG_BACKLOG * num_stages) * 1.2)
    assert least // 2 - 1 <= first <= min(most, max(num_tokens / num_stages, least / 2) * 1.1)


def test_a_long_backlog_goes_in_larger_parts_as_far_as_a_microbatch_carries_them() -> None:
    least = LOOKAHEAD.least_tokens
    sizes = []
    for num_least in (2 * LONG_BACKLOG, 4 * LONG_BACKLOG, 8 * LONG_BACKLOG, 1000):  # two stages
        total_s = LOOKAHEAD.target(Work(), [TokenSpan(0, least)] * num_least, 2).total_s
        sizes.append(LOOKAHEAD.cut(Work(), 0, 10**5, total_s) / least)
    assert sizes[:3] == pytest.approx([1, 2, 4], rel=0.2)
    assert sizes[3] * least <= LOOKAHEAD.max_num_tokens * 1.1


def test_a_long_backlog_goes_in_shorter_parts_where_blocks_are_scarce() -> None:
    least = LOOKAHEAD.least_tokens
    sizes = []
    for free_share in (1.0, SCARCE, SCARCE / 2, SCARCE / MOST_PARTS, 0.0):
        total_s = LOOKAHEAD.target(Work(), [TokenSpan(0, least)] * 16 * LONG_BACKLOG, 2, free_share).total_s
        sizes.append(LOOKAHEAD.cut(Work(), 0, 10**5, total_s) / least)
    assert sizes == pytest.approx([8, 8, 4, 1, 1], rel=0.2)


def test_a_piece_after_a_long_prefix_is_shorter() -> None:
    total_s = LOOKAHEAD.target(Work(), [TokenSpan(0, 3000)], 2).total_s
    cuts = [LOOKAHEAD.cut(Work(), prefix, 1000, total_s) for prefix in (0, 1000, 8000)]
    assert cuts[0] > cuts[1] > cuts[2] > 0


def test_what_decodes_is_shared_and_leaves_room_for_prompts() -> None:
    decoding = Work.of([TokenSpan(1000, 1, 1)] * 60)
    alone = LOOKAHEAD.target(decoding, [], 2)
    assert alone.decode_s == pytest.approx(30 * LOOKAHEAD.added_time(TokenSpan(1000, 1, 1)))
    part = LOOKAHEAD.target(decoding, [TokenSpan(500, 900, 1)], 2)
    assert part.decode_s == alone.decode_s
    assert LOOKAHEAD.cut(decoding.part(2), 500, 900, part.total_s) >= LOOKAHEAD.least_tokens // 2


def test_the_smallest_efficient_size_follows_the_cost_of_loading() -> None:
    sizes = [Lookahead(replace(COST2, load_s=load), 30, 2048).least_tokens for load in (0.0, 1e-3, 1e-2, 10.0)]
    assert sizes == sorted(sizes) and sizes[0] < 40 and sizes[-1] == 2048
