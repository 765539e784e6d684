"""Read the load generator's command line: flags -> checked values."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kunserve.command.command_line import OneLineParser, checked
from kunserve.command.server_url import parse_server_url
from kunserve.loadgen.workload import Span, parse_segments
from kunserve.version import add_version_flag

T = TypeVar("T")
EXAMPLES = """\
examples:
  twenty requests at once, 100 to 300 tokens in, 64 out:
    %(prog)s --num-requests 20 --input-len 100:300 --output-len 64
  steady load with a burst of 16 requests per second from second 30 to 40, and a picture of it:
    %(prog)s --arrival burst --burst 30:4,10:16,30:4 --json run.json --plot run.png
  two servers asked in turn, measured as one:
    %(prog)s --url http://127.0.0.1:9001,http://127.0.0.1:9002 --arrival poisson --rate 5 --num-requests 300
  three minutes of Azure's code trace, thinned to 200 requests, twice as slow:
    %(prog)s --trace AzureLLMInferenceTrace_code.csv --trace-window 600:780 --limit 200 --time-scale 2 \\
               --max-input 1024 --max-output 64
  four chats of five turns, all with the same system prompt of 400 words:
    %(prog)s --prompt-mode chat --num-requests 4 --turns 5 --system-len 400 --input-len 30 --output-len 64
  lengths of real conversations; a third of the clients hang up:
    %(prog)s --arrival fixed --rate 2 --num-requests 60 --lengths-csv sharegpt.csv --cancel-fraction 0.33
"""


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of the command called `prog`; its values have their final types, defaults included."""
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version_flag(parser)
    _add_target(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("workload"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write summary, every request and /metrics here")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw the timeline (needs matplotlib)")
    output.add_argument("--record", type=Path, metavar="FILE", help="record KunServe's feed (see: kunserve replay)")
    output.add_argument(
        "--record-after", type=float, default=10.0, metavar="S", help="go on recording after the last answer (10)"
    )
    output.add_argument("--quiet", action="store_true", help="show no progress, only the report")
    return parser


def _add_target(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    either = group.add_mutually_exclusive_group()  # not one `dest`: a URL that is not there would undo --url
    urls = checked(_urls)
    either.add_argument("server", nargs="?", type=urls, metavar="URL", help="the same as --url")
    either.add_argument(
        "--url",
        type=urls,
        default=("http://127.0.0.1:8000",),
        help="base URL, or several with commas: asked in turn (default http://127.0.0.1:8000)",
    )
    add("--model", help="model name (default: the first one the server lists)")
    add(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="key that requests bring (default: $OPENAI_API_KEY)"
    )
    add(
        "--prompt-mode",
        choices=("ids", "text", "chat"),
        default="ids",
        help="ids: random token ids, lengths are exact (default); text, chat: about one word per token",
    )
    add(
        "--vocab",
        type=checked(Span.parse, "low:high"),
        default=Span(100, 20000),
        help="token ids that prompts are drawn from (default 100:20000)",
    )
    add(
        "--extra-body",
        type=checked(_json_object, "a JSON object"),
        default={},
        help="JSON object that is merged into every request",
    )
    add("--timeout", type=_positive, default=600.0, help="seconds until a request counts as failed (default 600)")
    add("--concurrency", type=_count, help="at most so many requests at a time (default: no limit)")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    span = checked(Span.parse, "a number or low:high")
    kinds = ("all", "fixed", "poisson", "burst", "trace")
    add(
        "--arrival",
        choices=kinds,
        help="when requests are sent (default: as --trace, --burst or --rate ask for, else all at once)",
    )
    add("--rate", type=_positive, help="requests per second, for fixed and poisson")
    add("--num-requests", type=_count, help="requests to send (default 100; for burst: no limit)")
    segments = checked(parse_segments, "seconds:rate,...")
    add("--burst", type=segments, metavar="S:RATE,...", help="poisson arrivals, the rate changing in steps")
    add("--input-len", type=span, default=Span(128, 128), help="tokens of a prompt, or low:high (default 128)")
    add("--output-len", type=span, default=Span(64, 64), help="tokens of an answer, or low:high (default 64)")
    add("--lengths-csv", type=Path, help="draw lengths from rows of this file (ShareGPT lengths or Azure format)")
    add(
        "--trace",
        type=Path,
        help="arrivals and lengths of this file (Azure, BurstGPT; Mooncake, if called .jsonl: prompts begin alike "
        "as its hash ids say)",
    )
    window = checked(_window, "start:end")
    add(
        "--trace-window",
        type=window,
        default=(0.0, math.inf),
        metavar="START:END",
        help="seconds of the trace to send (default: all)",
    )
    add("--limit", type=_count, help="a random choice of so many rows of the trace")
    add("--time-scale", type=_positive, default=1.0, help="multiplies arrival times: 2 is half the rate (default 1)")
    add("--max-input", type=_count, help="clip prompts to so many tokens")
    add("--max-output", type=_count, help="clip outputs to so many tokens")
    add("--turns", type=_count, default=1, help="turns of a chat; --num-requests counts chats (default 1)")
    add("--system-len", type=_count, help="tokens of the system prompt that each chat begins with (default: none)")
    add("--num-systems", type=_count, default=1, help="different system prompts, by turns (default 1)")
    add("--cancel-fraction", type=_fraction, default=0.0, help="share of streams closed at a random token (default 0)")
    add("--seed", type=int, default=0, help="same seed, same load (default 0)")


def _urls(text: str) -> tuple[str, ...]:
    return tuple(parse_server_url(url) for url in text.split(","))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"'{text}' is not an object")
    return value


def _window(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    window = (float(start or 0), float(end or "inf"))
    if not 0 <= window[0] < window[1]:
        raise ValueError(f"'{text}' is empty")
    return window


def _number(text: str, convert: Callable[[str], T], is_valid: Callable[[T], bool], what: str) -> T:
    with contextlib.suppress(ValueError):
        if is_valid(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not {what}")


def _positive(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < math.inf, "a positive number")


def _count(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a positive whole number")


def _fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "between 0 and 1")
