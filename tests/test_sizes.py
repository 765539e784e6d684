"""Sizes of memory, as people write and read them."""

from __future__ import annotations

import pytest

from kunserve.errors import ConfigError
from kunserve.sizes import ceil_div, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("730MiB", 730 << 20),
        ("18GiB", 18 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("2kb", 2000),
        ("4KiB", 4096),
        ("123", 123),
        (" 7 b ", 7),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


def test_a_plain_number_of_gibibytes() -> None:
    assert parse_size("4", "GiB") == 4 << 30
    assert parse_size("100MiB", "GiB") == 100 << 20


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1TiB", "1e9", "12 34", "1.2.3GiB", "0x10", "10 MiB each"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a size: .*730MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MiB"), (730 << 20, "730 MiB"), (10239 << 20, "10239 MiB"), (141 << 30, "141.0 GiB")]
)
def test_sizes_as_people_read_them(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


def test_pieces_that_hold_an_amount() -> None:
    assert [ceil_div(amount, 4) for amount in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
