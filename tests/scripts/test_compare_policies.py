"""The picture that compares policies: a reader needs nothing else to understand it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_policies import BURSTS, count_others, draw, figure_of


def results() -> dict[str, dict[str, Any]]:
    """Two policies and a peer, of which only the first has transitions; the peer has no metrics of ours."""
    requests: list[dict[str, float | None]] = [
        {"sent_s": i / 4, "ttft_s": 0.1 * i, "longest_gap_s": 0.2} for i in range(8)
    ]
    requests.append({"sent_s": 3.0, "ttft_s": None, "longest_gap_s": None})  # it failed
    pool = {"at_s": [0.0, 5.0, 10.0], "kunserve:kv_pool_bytes": [2**28, 2**29, None], "kv_usage": [0.5, 0.9, None]}
    done = {"boundary": 1.5, "remap": 0.5, "committed": 2.0, "exchange": 0.75, "total": 2.75}
    transitions = [
        {"kind": "drop", "at_s": 3.0, "seconds": done},
        {"kind": "restore", "at_s": 6.0, "seconds": {"shrink": 0.1, "total": 0.2}},  # a burst came
        {"kind": "restore", "at_s": 8.0, "seconds": {"committed": 0.25, "exchange": 0.0, "total": 0.3}},
    ]
    ours = {"requests": requests, "metrics": [pool]}
    of_policy: dict[str, Any] = {
        "drop": {**ours, "transitions": transitions},
        "recompute": {**ours, "transitions": []},
        "vllm": {"requests": requests, "metrics": [{"at_s": [0.0, 5.0], "kv_usage": [0.1, 0.2]}]},
    }
    return {name: dict.fromkeys(BURSTS, result) for name, result in of_policy.items()}


def test_it_says_what_bursts_colours_and_units_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(results(), tmp_path / "overload.png")
    assert (tmp_path / "overload.png").read_bytes().startswith(b"\x89PNG")
    figure = figure_of(results())
    for part in figure.subfigs:
        assert [axes.get_ylabel() for axes in part.axes if axes.get_ylabel()] == [
            "TTFT, s",
            "longest gap, s",
            "KV, MiB",
        ]
        assert [axes.get_title() for axes in part.axes if axes.get_title()] == ["drop", "recompute", "vllm"]
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "burst A: 48 requests, 16 a second,\n64 tokens in, 256 out",
        "burst B: 48 requests, 4 a second,\n256 tokens in, 128 out",
    ]
    legend = {entry.get_text() for entry in figure.legends[0].get_texts()}
    assert {"weights dropped", "weights back", "KV follows its layers", "KV capacity", "KV used"} < legend


def test_a_transition_is_marked_where_its_groups_were_live() -> None:
    pytest.importorskip("matplotlib")
    panel = figure_of(results()).axes[0]
    marks = [line.get_xdata()[0] for line in panel.lines]
    assert marks == [5.0, 8.25]  # not at their starts; what came to nothing is not marked
    [band] = panel.patches
    assert (band.get_x(), band.get_width()) == (5.0, 0.75)


def test_answers_are_compared_with_those_of_plenty() -> None:
    plenty = {"texts": ["one", "two", "three", None]}
    assert count_others({"texts": ["one", "two", "three", "four"]}, plenty) == 1
    assert count_others({"texts": ["one", "to", None, None]}, plenty) == 3  # what never came is no answer
    assert count_others({"texts": ["one", "two", "three", None]}, plenty) == 1
