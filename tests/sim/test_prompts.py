"""The prefix cache in simulations: hits are what the hash ids of a trace allow, and memory bounds them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kunserve.sim.options import Options, simulate
from kunserve.sim.prompts import make_prompt
from kunserve.sim.traces import HASHED_TOKENS, TraceRow, read_rows
from kunserve.sizes import ceil_div

BLOCK = 64
MODEL = Options(cluster="1xA800", memory_gib=70.0, duration_s=1e5, has_prefix_cache=True, block_size=BLOCK)


def write_chats(path: Path, num_chats: int = 24, num_turns: int = 5) -> list[TraceRow]:
    """Chats in turns, all of which begin with the same 1,024 tokens, one request after the other."""
    rng, lines, ids = random.Random(1), [], iter(range(100, 10**6))
    histories = {chat: [1, 2] for chat in range(num_chats)}
    for number in range(num_chats * num_turns):
        history = histories[number % num_chats]
        num_tokens = len(history) * HASHED_TOKENS + rng.randrange(1, HASHED_TOKENS)
        row = {"timestamp": 60_000 * number, "input_length": num_tokens, "output_length": 8}
        lines.append(json.dumps({**row, "hash_ids": [*history, next(ids)]}))
        history += [next(ids) for _ in range(rng.randrange(1, 4))]
    path.write_text("\n".join(lines))
    return read_rows(path, needs_times=True)


def allowed_hit_rate(rows: Sequence[TraceRow]) -> float:
    """What a cache of any size could find: by the trace's own ids, block by block."""
    seen: set[tuple[int, ...]] = set()
    num_found = 0
    for row in rows:
        ids = [row.hash_ids[: ceil_div(end, HASHED_TOKENS)] for end in range(BLOCK, row.num_prompt_tokens + 1, BLOCK)]
        places = [(number, *covering) for number, covering in enumerate(ids)]
        for number, place in enumerate(places):
            if place not in seen or (number + 1) * BLOCK >= row.num_prompt_tokens:  # the last token is computed
                break
            num_found += BLOCK
        seen.update(places)
    return num_found / sum(row.num_prompt_tokens for row in rows)


def report_of(path: Path, **more: Any) -> dict[str, Any]:
    return simulate(replace(MODEL, workload=str(path), **more))


def test_the_hit_rate_is_what_the_hash_ids_allow_and_eviction_lowers_it(tmp_path: Path) -> None:
    rows = write_chats(path := tmp_path / "chats.jsonl")
    allowed = allowed_hit_rate(rows)
    assert 0.5 < allowed < 0.9
    large, small, none = report_of(path), report_of(path, memory_gib=38.4), report_of(path, has_prefix_cache=False)
    assert large["prefix_hit_rate"] == pytest.approx(allowed, abs=1e-4)
    assert small["memory"]["kv_tokens"] < sum(row.num_prompt_tokens for row in rows) / 4
    assert 0.1 < small["prefix_hit_rate"] < large["prefix_hit_rate"] - 0.05
    assert "prefix_hit_rate" not in none
    assert large["ttft_s"]["p50"] < small["ttft_s"]["p50"] <= none["ttft_s"]["p50"]  # what is found is not computed
    assert large["finished"] == small["finished"] == len(rows)


def test_requests_at_once_share_memory(tmp_path: Path) -> None:
    path, ids = tmp_path / "alike.jsonl", list(range(20))
    row = {"timestamp": 0, "input_length": 20 * HASHED_TOKENS, "output_length": 400}
    later = [{**row, "timestamp": 60_000 + i, "hash_ids": ids} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, [{**row, "hash_ids": ids}, *later])))
    shared, apart = report_of(path), report_of(path, has_prefix_cache=False)
    assert shared["memory"]["peak_usage_of_undropped"] < apart["memory"]["peak_usage_of_undropped"] / 4


def test_prompts_of_traces_without_hash_ids_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,2000,8\n100,2000,8\n200,2000,8\n")
    assert report_of(path)["prefix_hit_rate"] == 0.0


def test_a_long_prompt_costs_no_more_memory_than_a_list_of_its_length() -> None:
    row = TraceRow(0.0, 100_000, 1, tuple(range(10_000, 10_196)))
    token_ids, keys = make_prompt(row, 7, row.num_prompt_tokens, BLOCK)
    assert len(token_ids) == 100_000 and len(keys) == 100_000 // BLOCK
    assert len({id(token) for token in token_ids}) <= 2


def test_where_prompts_differ_within_a_block_their_answers_are_not_shared() -> None:
    alike = make_prompt(TraceRow(0.0, 100, 1, (5,)), 0, 100, BLOCK)
    assert make_prompt(TraceRow(9.0, 100, 1, (5,)), 1, 100, BLOCK) == alike
    other = make_prompt(TraceRow(0.0, 100, 1, (6,)), 0, 100, BLOCK)
    assert other[0] != alike[0] and other[1] != alike[1]
    rows = [TraceRow(0.0, HASHED_TOKENS + 100, 1, (5,)) for _ in range(2)]  # 100 tokens that no id covers
    first, second = (make_prompt(row, i, row.num_prompt_tokens, BLOCK) for i, row in enumerate(rows))
    assert first[1] == second[1] and len(first[1]) == HASHED_TOKENS // BLOCK and first[0] != second[0]
