"""Send thousands of requests made from /openapi.json to a running server: none may fail on its side, none may hang.

    pip install schemathesis
    python -m kunserve.server smollm2-135m --max-model-len 64 --port 8200 &
    python scripts/check/fuzz_api.py http://127.0.0.1:8200 --examples 1500

Leaves out the routes that regroup devices. Ends with one JSON line: requests sent, answers by status, slowest answer,
and what is still held by the server, which is nothing. Exits with 1 if an answer is 5xx or missing, or something is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

EXCLUDED = r"^/kunserve/(drop|restore|events)$"  # the last one never ends
HELD = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", re.MULTILINE)
TIMEOUT_S = 30  # without an answer for so long counts as a hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--examples", type=int, default=100, help="generated requests per route")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--routes", metavar="REGEX", help="only those whose path has this in it")
    parser.add_argument("--seconds", type=int, help="make no more requests after so long")
    args = parser.parse_args()
    url = args.url.rstrip("/")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "events.ndjson"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"),
            *("--exclude-path-regex", EXCLUDED, "--max-examples", str(args.examples), "--seed", str(args.seed)),
            *("--request-timeout", str(TIMEOUT_S), "--workers", str(args.workers), "--continue-on-failure"),
            *("--suppress-health-check", "all", "--report", "ndjson", "--report-ndjson-path", str(report)),
        ]
        if args.routes is not None:
            command += ["--include-path-regex", args.routes]
        if args.seconds is not None:
            command += ["--max-time", str(args.seconds)]
        code = subprocess.run(command, check=False).returncode
        statuses, slowest_s = read_report(report)
    with urlopen(f"{url}/health", timeout=TIMEOUT_S) as response:  # it still serves
        is_healthy = response.status == 200
    held = held_by(url)
    result = {
        "requests": sum(statuses.values()),
        "by_status": dict(sorted(statuses.items())),
        "slowest_s": round(slowest_s, 3),
        "seconds": round(time.monotonic() - started, 1),
        "is_healthy": is_healthy,
        "held": held,
        "schemathesis_exit_code": code,  # also 1 when it could not make a request
    }
    print(json.dumps(result))
    sys.exit(any(status[0] in "5n" for status in statuses) or any(held.values()) or not is_healthy)


def held_by(url: str) -> dict[str, float]:
    """Return what a server holds (requests, KV) after it was left alone for a second, by metric."""
    time.sleep(1)
    with urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in HELD.findall(text)}


def read_report(path: Path) -> tuple[dict[str, int], float]:
    """Return how many answers had each status ("none": no answer), and the seconds of the slowest."""
    statuses: dict[str, int] = {}
    slowest_s = 0.0

    def visit(value: object) -> None:
        nonlocal slowest_s
        if isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            if "interactions" in value and isinstance(value["interactions"], dict):
                for interaction in value["interactions"].values():
                    response = interaction.get("response") or {}
                    status = str(response.get("status_code", "none"))
                    statuses[status] = statuses.get(status, 0) + 1
                    slowest_s = max(slowest_s, float(response.get("elapsed", 0.0)))
            else:
                for item in value.values():
                    visit(item)

    for line in path.read_text(encoding="utf-8").splitlines():
        visit(json.loads(line))
    return statuses, slowest_s


if __name__ == "__main__":
    main()
