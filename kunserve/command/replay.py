"""`kunserve replay run.jsonl --html out.html`: a recorded run as one file that shows it as the live page would.

The file holds the page's own modules and the recording, and needs nothing else: it can be attached to an issue or
opened in a talk without a network.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from kunserve.api.operate.page import page_files
from kunserve.command.command_line import OneLineParser
from kunserve.version import add_version_flag

_IMPORT = re.compile(r'^import [^;]*? from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async |function|class|const)", re.MULTILINE)
_STYLE = re.compile(r'<link rel="stylesheet" href="/page/([\w.]+)">')

Event = tuple[str, dict[str, Any]]  # "snapshot" or "delta", and its data
# Fields of a snapshot that the page cannot do without, and their types.
NEEDED: dict[str, type | tuple[type, ...]] = {"at_s": (int, float), "devices": dict, "groups": dict, "requests": dict}


def read_recording(lines: Sequence[bytes]) -> list[Event]:
    """Return the events of a file of `kunserve loadgen --record`; raise ValueError, naming the line, if it is none.

    A last line that was cut (no end of line, no JSON) is left out: the run was stopped while it was written.
    """
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            value = orjson.loads(line)
            name, data = value["event"], value["data"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            is_cut = isinstance(error, orjson.JSONDecodeError) and number == len(lines) and not line.endswith(b"\n")
            if is_cut and events:
                break
            raise ValueError(f"line {number} is no event of a recording") from None
        if name not in ("snapshot", "delta") or not isinstance(data, dict):
            raise ValueError(f"line {number} is neither a snapshot nor a delta")
        if name == "snapshot" and (
            wrong := [key for key, kind in NEEDED.items() if not isinstance(data.get(key), kind)]
        ):
            raise ValueError(f"line {number} is a snapshot without {wrong[0]}")
        events.append((name, data))
    if not events or events[0][0] != "snapshot":
        raise ValueError("a recording begins with a snapshot")
    return events


def replay_html(events: Sequence[Event], files: Mapping[str, str] | None = None) -> str:
    """Return the page with everything in it. `files`: those of the live page, by name."""
    files = page_files() if files is None else files
    styles = [files[name] for name in _STYLE.findall(files["index.html"])]
    scripts = [files["uplot.min.js"], bundle(files, "replay.js")]
    body = files["index.html"].partition("<body>")[2].partition("<script")[0]
    assert all("</" not in style for style in styles) and all("</script" not in script for script in scripts)
    # Only these very texts may run; nothing may be fetched from anywhere.
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    data = orjson.dumps(events).decode().replace("<", "\\u003c")  # so that nothing in it ends the element
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>KunServe: a recorded run</title>",
        *(f"<style>{style}</style>" for style in styles),
        f"</head>\n<body>{body}",
        f'<script type="application/json" id="recording">{data}</script>',
        f"<script>{scripts[0]}</script>",
        f'<script type="module">{scripts[1]}</script>',
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def bundle(files: Mapping[str, str], entry: str) -> str:
    """Return one script of a module and all it imports, each after what it needs. Top-level names are unique."""
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        done[name] = ""  # so that modules that import each other end here
        for needed in _IMPORT.findall(files[name]):
            add(needed)
        del done[name]
        done[name] = _EXPORT.sub("", _IMPORT.sub("", files[name]))

    add(entry)
    return "\n".join(done.values())


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def make_parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="kunserve replay", description="Make a page of a recorded run.")
    add_version_flag(parser)
    parser.add_argument("recording", type=Path, help="file that kunserve loadgen --record wrote")
    parser.add_argument("--html", type=Path, metavar="FILE", help="file to write (default: the recording's name .html)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run `kunserve replay`; exit with one line if the recording cannot be read or the page not written."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    recording: Path = args.recording
    try:
        events = read_recording(recording.read_bytes().splitlines(keepends=True))
        out = args.html or recording.with_suffix(".html")
        if out.exists() and out.samefile(recording):
            raise ValueError("the page would overwrite the recording: name another file with --html")
        out.write_text(replay_html(events), encoding="utf-8")
    except ValueError as error:
        parser.exit(2, f"kunserve replay: {recording}: {error}\n")
    except OSError as error:
        parser.exit(2, f"kunserve replay: {error.filename or recording}: {error.strerror}\n")
    print(f"{out}: {len(events)} updates, {out.stat().st_size >> 10} KiB")
