from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from states import state

from kunserve.api.operate.page import page_files
from kunserve.command import replay
from kunserve.command.replay import Event, bundle, read_recording, replay_html
from kunserve.observe.frame import delta_of, frame_of

HOSTILE = "</script><script>alert(1)</script><!--<script>"


def a_recording() -> list[Event]:
    """A drop, seen by a viewer, of a model with a name that nobody should have."""
    frames = [frame_of(state(1.0), model=HOSTILE, rates={"tok_s": 0.0})]
    frames.append(frame_of(state(2.5, is_dropped=True, used=40), model=HOSTILE, rates={"tok_s": 80.0}))
    return [("snapshot", frames[0]), ("delta", delta_of(*frames))]


def lines(events: list[Event]) -> list[bytes]:
    return [json.dumps({"at_s": 0.0, "event": name, "data": data}).encode() for name, data in events]


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)


def test_it_is_one_file_that_asks_for_nothing() -> None:
    html = replay_html(a_recording())
    parsed = Elements(html)
    assert not [attrs for _, attrs in parsed.elements if {"src", "href", "action"} & attrs.keys()]
    urls = set(re.findall(r"https?:[^\s\"'`)]+", html))
    assert urls == {"https://github.com/leeoniya/uPlot"}  # its licence line
    assert not re.search(r"@import|url\(|\bimport\s*[({\"']|\bfetch\(|XMLHttpRequest|EventSource", html)
    [policy] = [attrs["content"] for _, attrs in parsed.elements if attrs.get("http-equiv")]
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy


def test_hostile_text_stays_within_its_element() -> None:
    html = replay_html(a_recording())
    parsed = Elements(html)
    assert [attrs.get("type") for tag, attrs in parsed.elements if tag == "script"] == [
        "application/json",
        None,
        "module",
    ]
    events = json.loads(next(text for text in parsed.scripts if text.startswith("[[")))
    assert events[0][1]["model"] == HOSTILE


def test_modules_come_after_what_they_need_and_names_do_not_clash() -> None:
    script = bundle(page_files(), "replay.js")
    assert "import " not in re.sub(r"//.*|/\*.*?\*/", "", script) and "export " not in script
    names = re.findall(r"^(?:async )?(?:function\*?|class|const|let) +(\w+)", script, re.MULTILINE)
    assert len(names) > 40 and len(set(names)) == len(names)
    order = [script.index(f"class {name} ") for name in ("History", "Memory", "View")]
    assert order == sorted(order)


def test_a_recording_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = a_recording()
    assert [list(event) for event in read_recording(lines(events))] == json.loads(json.dumps(events))
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n".join(lines(events)))
    replay.main([str(path)])
    assert "2 updates" in capsys.readouterr().out
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == replay_html(read_recording(lines(events)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "begins with a snapshot"),
        (b'{"event": "delta", "data": {}}', "begins with a snapshot"),
        (b'{"event": "snapshot", "data": {}}', "line 1 is a snapshot without at_s"),
        (b'{"event": "snapshot", "data": {"at_s": 1, "devices": []}}', "line 1 is a snapshot without devices"),
        (b'{"at_s"', "line 1 is no event"),
        (b"[]", "line 1 is no event"),
        (b'{"event": "other", "data": {}}', "line 1 is neither"),
        (b'{"event": "delta", "data": 1}', "line 1 is neither"),
    ],
)
def test_what_is_no_recording_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(text)
    with pytest.raises(SystemExit, match="2"):
        replay.main([str(path)])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        replay.main([str(tmp_path / "missing.jsonl")])
    assert "missing.jsonl: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [b'{"at_s": 1.5, "ev\n', b'{"at_s"\n{"at_s"', b"[]"])
def test_a_broken_line_that_is_not_the_cut_end_is_refused(broken: bytes) -> None:
    recorded = [line + b"\n" for line in lines(a_recording())]
    with pytest.raises(ValueError, match="line 3 is no event"):
        read_recording([*recorded, *broken.splitlines(keepends=True)])


def test_a_recording_that_was_cut_in_its_last_line_replays_up_to_there(tmp_path: Path) -> None:
    whole = b"\n".join(lines(a_recording()))
    path = tmp_path / "run.jsonl"
    for kept in (len(whole) - 1, whole.index(b"\n") + 2):
        path.write_bytes(whole[:kept])
        replay.main([str(path)])
        assert (tmp_path / "run.html").read_text(encoding="utf-8") == replay_html(a_recording()[:1])


@pytest.mark.parametrize("name", ["run.html", "run.jsonl"])
def test_the_recording_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, link = tmp_path / name, tmp_path / "link.html"
    path.write_bytes(b"\n".join(lines(a_recording())))
    link.symlink_to(path)
    asked = [["--html", str(path)], ["--html", str(link)]]
    for html in [*asked, []] if path.suffix == ".html" else asked:  # without --html its suffix is replaced
        with pytest.raises(SystemExit, match="2"):
            replay.main([str(path), *html])
        assert "would overwrite the recording" in capsys.readouterr().err
    assert path.read_bytes() == b"\n".join(lines(a_recording()))


@pytest.mark.parametrize("path", ["/", "."])
def test_a_folder_is_no_recording(capsys: pytest.CaptureFixture[str], path: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        replay.main([path])
    assert capsys.readouterr().err == f"kunserve replay: {path}: Is a directory\n"
