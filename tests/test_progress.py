import pytest

from kunserve.progress import LINE_EVERY_S, LoadingProgress


def test_plain_lines_come_at_each_quarter_and_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    progress = LoadingProgress(clock=lambda: now_s)
    for text, share, pause_s in [
        ("reading", 0.0, 1.0),
        ("loading", 0.0, 1.0),
        ("loading", 0.1, 1.0),  # nothing new to say
        ("loading", 0.2, LINE_EVERY_S),
        ("loading", 0.21, 1.0),
        ("loading", 0.5, 1.0),
        ("loading", 0.6, LINE_EVERY_S - 1),  # the last line is younger than that
        ("loading", 1.0, 0.0),
    ]:
        now_s += pause_s
        progress.update(text, share)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading", "loading", "loading: 20%", "loading: 50%", "loading: 100%"]
