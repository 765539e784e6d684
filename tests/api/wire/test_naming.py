from __future__ import annotations

import pytest

from kunserve.api.wire.naming import FieldNames
from kunserve.errors import InvalidRequestError


def test_the_longest_known_path_is_renamed() -> None:
    names = FieldNames({"stop": "stop_sequences", "tools[0].function": "tools[0]"})
    names.add("tools[0].function.parameters", "tools[0].input_schema")
    names.add("messages[1]", "system", is_whole=True)
    expected = {
        "stop": "stop_sequences",
        "stop[3]": "stop_sequences[3]",
        "stops": "stops",
        "tools[0].function.name": "tools[0].name",
        "tools[0].function.parameters.$defs": "tools[0].input_schema.$defs",
        "tools[01].function": "tools[01].function",
        "messages[1].content[2]": "system",
        "messages[11]": "messages[11]",
    }
    assert {path: names.own(path) for path in expected} == expected


def test_errors_keep_all_but_the_names() -> None:
    names = FieldNames({"stop": "stop_sequences"})
    with pytest.raises(InvalidRequestError) as info, names.told():
        raise InvalidRequestError("`stop` and `n` exclude each other.", param="stop", retry_after_s=3)
    error = info.value
    assert (error.message, error.param, error.retry_after_s) == (
        "`stop_sequences` and `n` exclude each other.",
        "stop_sequences",
        3,
    )
