from __future__ import annotations

import pytest

from kunserve.command.server_url import connection_reason, parse_server_url


@pytest.mark.parametrize("text", ["http://h:8", " http://h:8/ ", "http://h:8/v1", "http://h:8/v1/"])
def test_the_base_of_every_form_is_the_same(text: str) -> None:
    assert parse_server_url(text) == "http://h:8"


def test_a_path_before_v1_and_an_address_of_ipv6_are_kept() -> None:
    assert parse_server_url("https://h/kun/v1") == "https://h/kun"
    assert parse_server_url("http://[::1]:8000") == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not start with"),
        ("localhost:8000", "does not start with"),
        ("http://", "names no host"),
        ("http://:8000", "names no host"),
        ("http://a b", "names no host"),
        ("http://[::1", "is not a URL"),
        ("http://h:99999", "is not a URL"),
        ("http://h:x", "is not a URL"),
        ("http://a..b", "is not a URL"),
        (f"http://{'a' * 70}", "is not a URL"),
        ("http://h?key=1", "must end before"),
    ],
)
def test_what_no_request_can_go_to_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^'.*' {reason}"):
        parse_server_url(text)


def test_a_reason_is_one_line_and_never_empty() -> None:
    assert connection_reason(OSError("host h:1 ssl:default [refused\nnow]")) == "host h:1 [refused now]"
    assert connection_reason(TimeoutError()) == "TimeoutError"
