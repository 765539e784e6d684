"""Flags and metrics have their line in the documentation, and the figures of its tables are what the code computes."""

from __future__ import annotations

import argparse
from pathlib import Path

import decode_estimate
import flags_page
import make_pages
import metrics_page
import pytest
import sizing_page

from kunserve.command.vllm_flags import IGNORED, REFUSED, SAME
from kunserve.model.costs import device_rates
from kunserve.planner.cost import CostModel
from kunserve.sim.cluster import Instances, parse_cluster

DOCS = make_pages.DOCS
ADVICE = "run `make pages` and commit what it writes"


def shown_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {name for _, actions in flags_page.shown(parser) for action in actions for name in action.option_strings}


@pytest.mark.parametrize("name", make_pages.PAGES)
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    page = make_pages.PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == page, ADVICE


def test_the_estimate_of_a_decode_step_is_what_its_script_says() -> None:
    assert "\n".join(decode_estimate.lines()) in (DOCS / "design.md").read_text(encoding="utf-8")


def test_a_page_that_differs_or_lacks_is_told(tmp_path: Path) -> None:
    for name, page in list(make_pages.PAGES.items())[:-1]:
        (tmp_path / name).write_text(page(), encoding="utf-8")
    first, *_, last = make_pages.PAGES
    (tmp_path / first).write_text("something else", encoding="utf-8")
    assert make_pages.stale(tmp_path) == [first, last]


def test_every_flag_of_every_command_has_a_line() -> None:
    text = (DOCS / "flags.md").read_text(encoding="utf-8")
    sections = {section.splitlines()[0]: section for section in text.split("\n## ")[1:]}
    parsers = flags_page.parsers()
    assert len(parsers) == 7
    for parser in parsers:
        names = shown_flags(parser)
        assert {"--help", "--version"} <= names
        assert not {name for name in names if f"`{name}" not in sections[parser.prog]}, ADVICE
    others = [flag for flags in (*IGNORED.values(), SAME, *REFUSED.values()) for flag in flags]
    assert not [flag for flag in others if f"`{flag}`" not in sections["vLLM's flags"]], ADVICE


def test_every_flag_says_what_it_does() -> None:
    for parser in flags_page.parsers():
        assert not [action.dest for _, actions in flags_page.shown(parser) for action in actions if not action.help], (
            parser.prog
        )


def test_every_metric_has_a_line() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    names = [metrics_page.name_of(family) for family in metrics_page.families(metrics_page.metrics_of_everything())]
    assert {"vllm:prompt_tokens_total", "kunserve:devices", "kunserve:transition_seconds"} <= set(names)
    assert not [name for name in names if f"`{name}`" not in text], ADVICE


def test_every_metric_is_explained_in_a_sentence_of_its_own() -> None:
    texts = [family.documentation for family in metrics_page.families(metrics_page.metrics_of_everything())]
    assert len(texts) > 40
    assert not [text for text in texts if not text.endswith(".") or len(text.split()) < 4]


def h100(gpus: int = 1) -> tuple[CostModel, int]:
    model = sizing_page.served_models()["llama-8b"]
    return Instances(parse_cluster(f"{gpus}xH100"), gpus).cost(model), model.num_layers


def test_one_request_is_no_faster_in_a_chain() -> None:
    cost, num_layers = h100()
    alone, *chains = (sizing_page.chain_token_time(cost, num_layers, length, 1) for length in (1, 2, 4, 8))
    for length, seconds in zip((2, 4, 8), chains, strict=True):
        assert seconds == pytest.approx(alone + (length - 1) * cost.stage_s)


def test_many_requests_keep_all_stages_of_a_chain_busy() -> None:
    cost, num_layers = h100()
    for length in (2, 4):
        chain_s = sizing_page.chain_token_time(cost, num_layers, length, 10_000)
        alone_s = sizing_page.chain_token_time(cost, num_layers, 1, 10_000)
        assert 1 / length <= chain_s / alone_s < 1.1 / length


def test_tensor_parallelism_divides_all_but_the_launch() -> None:
    (one, num_layers), (four, _) = h100(), h100(4)
    launch_s = device_rates()["h100"].stage_s
    alone_s, together_s = (sizing_page.chain_token_time(cost, num_layers, 1, 32) for cost in (one, four))
    assert together_s - launch_s == pytest.approx((alone_s - launch_s) / 4)


def test_what_does_not_fit_is_said() -> None:
    model = sizing_page.served_models()["llama-70b"]
    assert sizing_page.capacity(model, "4090", 2) is None
    found = sizing_page.capacity(model, "H200", 8)
    assert found is not None and found.dropped_kv_tokens > found.kv_tokens


def test_kv_of_8_bits_is_twice_the_tokens_beside_the_same_weights() -> None:
    rows = [line.strip("| ").split(" | ") for line in sizing_page.page().splitlines()]
    (row,) = [row for row in rows if row[0] == "qwen2.5-14b, A100-80" and len(row) == 7]
    cells = row[1:]
    pairs = [[float(figure.rstrip("k").replace(",", "")) for figure in cell.split(" / ")] for cell in cells]
    (token_bytes, tokens, dropped, *rates, milliseconds) = pairs
    assert token_bytes == [2 * 48 * 8 * 128 * 2, 2 * 48 * 8 * 128]
    for wide, narrow in (tokens, dropped):
        assert narrow == pytest.approx(2 * wide, rel=0.001)
    assert all(narrow > wide for wide, narrow in rates)
    gpu = device_rates()["a100-80"]
    saved_s = 256 * sizing_page.CONTEXT * token_bytes[1] / (gpu.bytes_per_s * gpu.memory_share)
    assert milliseconds[0] - milliseconds[1] == pytest.approx(saved_s * 1e3, abs=0.11)
