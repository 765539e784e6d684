from __future__ import annotations

from typing import Any

import pytest

from kunserve.api.wire.fields import Fields, show
from kunserve.errors import KunServeError


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
