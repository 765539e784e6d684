from __future__ import annotations

from typing import Any

import pytest

from kunserve.api.wire.fields import Fields, show
from kunserve.errors import InvalidRequestError, KunServeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("hot", '"hot"'),
        ("x" * 1000, '"' + "x" * 40 + '"'),
        (True, "true"),
        (1.5, "1.5"),
        ([], "an empty list"),
        ([[0] * 1000], "a list"),
        ({"a": 1}, "an object"),
    ],
)
def test_values_are_shown_short(value: Any, text: str) -> None:
    assert show(value) == text


def test_nested_fields_are_named_in_full() -> None:
    with pytest.raises(KunServeError, match=r"`outer\.inner` must be true or false, not 1\.") as info:
        Fields({"outer": {"inner": 1}}).object("outer").boolean("inner")
    assert info.value.param == "outer.inner"


def test_bounds_say_what_is_allowed() -> None:
    fields = Fields({"x": -1, "y": 0.0})
    with pytest.raises(InvalidRequestError, match="between 0 and 5, not -1"):
        fields.integer("x", None, 0, 5)
    with pytest.raises(InvalidRequestError, match="at least 0, not -1"):
        fields.integer("x", None, 0)
    with pytest.raises(InvalidRequestError, match=r"above 0 and at most 1, not 0\.0"):
        fields.number("y", 1.0, 0.0, 1.0, above_low=True)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_empty_values_ask_for_nothing(value: Any) -> None:
    Fields({"x": value}).unsupported("x", "absent")


@pytest.mark.parametrize("value", [0, True, "x", [0], {"a": None}])
def test_other_values_of_unsupported_fields_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="`x` is not supported"):
        Fields({"x": value}).unsupported("x")
