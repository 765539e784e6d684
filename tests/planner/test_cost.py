from __future__ import annotations

from dataclasses import replace

import pytest
from cost_models import COST
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.planner.cost import CostModel, TokenSpan, Work

CHUNKS = st.lists(
    st.builds(TokenSpan, st.integers(0, 4000), st.integers(1, 600), st.integers(0, 1)), min_size=1, max_size=20
)


def test_the_papers_formula() -> None:
    paper = replace(COST, key_s=0.0, embed_token_s=0.0, stage_s=0.0)
    spans = [TokenSpan(100, 50), TokenSpan(0, 20), TokenSpan(7, 1)]
    a, b, g, load = paper.pair_s, paper.token_s, paper.chunk_s, paper.load_s
    per_span = sum(a * (p * c + (c * c + c) / 2) + b * c + g for p, c, _ in spans)
    assert paper.stage_time(3, spans, False, False) == pytest.approx(3 * (per_span + load))


def test_the_ends_count_where_they_are() -> None:
    spans = [TokenSpan(0, 10), TokenSpan(99, 1, 1), TokenSpan(50, 1, 1)]
    middle = COST.stage_time(4, spans, False, False)
    assert COST.stage_time(4, spans, True, False) == pytest.approx(middle + 12 * 1e-6)
    assert COST.stage_time(4, spans, False, True) == pytest.approx(middle + 6e-3 + 2 * (1e-3 + 1e-4))
    assert COST.stage_time(4, [TokenSpan(0, 10)], False, True) == COST.stage_time(4, [TokenSpan(0, 10)], False, False)
    assert COST.stage_time(4, [], True, True) == 0.0


def test_kv_of_fewer_bytes_is_read_sooner_and_computed_with_as_before() -> None:
    span = TokenSpan(900, 100, 1)
    saved_s = COST.key_s * 1000 / 4 * 3
    for time in (CostModel.added_time, lambda cost, layers, span: cost.stage_time(layers, [span], True, True)):
        assert time(COST, 6, span) - time(COST.with_kv(0.25), 6, span) == pytest.approx(6 * saved_s)
    assert COST.with_kv(1.0) == COST


def test_a_large_overlap_is_the_longer_of_loading_and_multiplying() -> None:
    cost = replace(COST, overlap=1000.0)
    for num_tokens, seconds in ((1, 1e-3), (200, 200 * 1e-4)):
        layer = cost.layer_time(Work(num_tokens=num_tokens))
        assert layer == pytest.approx(seconds, rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(CHUNKS, st.sampled_from([1.0, 1.5, 2.0, 8.0]), st.booleans())
def test_more_work_takes_longer(spans: list[TokenSpan], overlap: float, is_last: bool) -> None:
    cost = replace(COST, overlap=overlap)
    time = cost.stage_time(5, spans, True, is_last)
    assert 0 < time < cost.stage_time(6, spans, True, is_last)
    assert time < cost.stage_time(5, [*spans, TokenSpan(3, 1)], True, is_last)
    longer = spans[0]._replace(num_tokens=spans[0].num_tokens + 1)
    assert time < cost.stage_time(5, [longer, *spans[1:]], True, is_last)
    assert cost.stage_time(5, spans, True, is_last) <= sum(cost.stage_time(5, [c], True, is_last) for c in spans)


@settings(deadline=None, max_examples=40)
@given(CHUNKS, st.integers(1, 8))
def test_equal_parts_add_up(spans: list[TokenSpan], num_parts: int) -> None:
    work = Work.of(spans)
    total = Work()
    for _ in range(num_parts):
        total = total.join(work.part(num_parts))
    assert total == pytest.approx(work)


def test_through_a_dict_and_back() -> None:
    assert CostModel.from_dict(COST.to_dict()) == COST


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pair_s": -1.0}, "pair_s"),
        ({"token_s": "fast"}, "token_s"),
        ({"load_s": float("nan")}, "load_s"),
        ({"overlap": 0.5}, "overlap"),
        ({"gamma": 1.0}, "gamma"),
    ],
)
def test_constants_that_cannot_be_are_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CostModel.from_dict(COST.to_dict() | change)
    values = COST.to_dict()
    del values["stage_s"]
    with pytest.raises(ValueError, match="stage_s"):
        CostModel.from_dict(values)


def test_rows_that_decode_are_spans_of_one_token() -> None:
    lengths = [100, 7, 4000]
    spans = [TokenSpan(length - 1, 1, 1) for length in lengths]
    rows = Work.of_rows(lengths)
    assert rows == Work.of(spans) and Work.of_rows([]) == Work()
    assert COST.added_time(3, rows) == pytest.approx(sum(COST.added_time(3, span) for span in spans))
