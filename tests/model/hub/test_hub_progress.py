import logging
import warnings

import pytest

from kunserve.model.hub.progress import LIBRARY_LOGGER, DownloadProgress


def test_the_librarys_warnings_are_lines_of_the_progress_without_signatures(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[tuple[str, float]] = []
    logger = logging.getLogger(LIBRARY_LOGGER)
    before = list(logger.handlers)
    with DownloadProgress("a/b", lambda text, share: lines.append((text, share))) as shown:
        shown.expect(3 << 30)
        logging.getLogger(f"{LIBRARY_LOGGER}.file").warning("cut: https://cdn/x?Signature=secret&y\nTrying again")
        logging.getLogger(f"{LIBRARY_LOGGER}.file").info("nobody needs this")
        warnings.warn("little room", stacklevel=1)
    assert lines == [
        ("downloading a/b", 0.0),
        ("downloading a/b (3072 MiB)", 0.0),
        ("downloading a/b (3072 MiB): cut: https://cdn/x Trying again", 0.0),
    ]
    assert capsys.readouterr().err == ""
    assert logger.handlers == before


def test_bars_show_nothing_and_the_one_of_bytes_that_is_furthest_counts(capsys: pytest.CaptureFixture[str]) -> None:
    shares: list[float] = []
    with DownloadProgress("a/b", lambda text, share: shares.append(share)) as shown:
        files, received, written = shown.bar_class(total=2), shown.bar_class(unit="B"), shown.bar_class(unit="B")
        shown.expect(100)
        files.update(1)
        received.update(30)
        written.update(20)
        received.update(-30)  # a file that starts from its beginning
        written.update(40)
        received.update(90)
        received.update(90)  # more than was announced
    assert shares == [0.0, 0.0, 0.3, 0.6, 0.9, 1.0]
    assert capsys.readouterr().err == ""
