"""Model files, step 2: the fields of a `config.json`, each read by its kind and within bounds. Strangers wrote them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from kunserve.errors import ConfigError

# The most that a field may say: ten times or more what any known model has. More is damage, and would end far from
# here: layers are made one by one, sizes are multiplied and handed to C, and a float32 ends at 3e38.
HIGHEST_SIZE = 2**27  # the longest context known has 10 M positions, the largest vocabulary 0.3 M tokens
HIGHEST_LAYERS = 2000  # known: 126
HIGHEST_EXPERTS = 10_000  # of a layer; known: 512
HIGHEST_EPS = 0.1  # known: 1e-5; it is added to the mean square of a token's values, which is near 1
HIGHEST_THETA = 1e15  # known: 5e10
FIELD_MAXIMUMS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers"), HIGHEST_LAYERS),  # in a config.json, in a model card
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), HIGHEST_EXPERTS),
    **dict.fromkeys(("n_routed_experts", "n_shared_experts"), HIGHEST_EXPERTS),
    "rms_norm_eps": HIGHEST_EPS,
    **dict.fromkeys(("rope_theta", "local_rope_theta"), HIGHEST_THETA),
}
# What a field must be above: of 1 all pairs of a head would turn alike, and a logarithm of it is what YaRN divides by;
# what is smaller than any model's number is 0 as a float32, and what is divided by it no number any more.
FIELD_MINIMUMS = dict.fromkeys(("rope_theta", "local_rope_theta"), 1.0)
LOWEST_NUMBER = 1e-30


def read_int(values: Mapping[str, Any], field: str, default: int | None = None, may_be_0: bool = False) -> int:
    """Return a positive integer (or 0); `default` where it is absent or null. Raises ConfigError naming the field."""
    value = _present(values, field, default)
    if type(value) is not int:
        raise ConfigError(f"field {field}: expected an integer, not {show(value)}")
    check_range(field, value, may_be_0)
    return value


def read_float(values: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """Return a positive number; `default` where it is absent or null. Raises ConfigError naming the field."""
    value = _present(values, field, default)
    if type(value) not in (int, float):
        raise ConfigError(f"field {field}: expected a number, not {show(value)}")
    check_range(field, value)
    return float(value)


def read_flag(values: Mapping[str, Any], field: str) -> bool:
    """Return a flag; False where it is absent or null. Raises ConfigError naming the field."""
    value = _present(values, field, False)
    if type(value) is not bool:
        raise ConfigError(f"field {field}: expected true or false, not {show(value)}")
    return value


def read_object(values: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Return a nested object; an empty one where it is absent or null. Raises ConfigError naming the field."""
    value = _present(values, field, {})
    if not isinstance(value, dict):
        raise ConfigError(f"field {field}: expected an object, not {show(value)}")
    return value


def read_ints(values: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """Return a list of integers that are not negative; an empty one where it is absent or null. ConfigError if not."""
    value = _present(values, field, [])
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= HIGHEST_SIZE for item in value):
        raise ConfigError(f"field {field}: expected a list of integers, not {show(value)}")
    return tuple(value)


def read_numbers(values: Mapping[str, Any], field: str) -> tuple[float, ...]:
    """Return a list of positive numbers. Raises ConfigError naming the field."""
    value = _present(values, field, None)
    if not isinstance(value, list) or not value or not all(type(item) in (int, float) for item in value):
        raise ConfigError(f"field {field}: expected a list of numbers, not {show(value)}")
    for item in value:
        check_range(field, item)
    return tuple(float(item) for item in value)


def read_names(values: Mapping[str, Any], field: str) -> list[str]:
    """Return a list of strings; an empty one where it is absent or null. Raises ConfigError naming the field."""
    value = _present(values, field, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"field {field}: expected a list of names, not {show(value)}")
    return value


def read_tokens(values: Mapping[str, Any], field: str, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens of a field: none, one or a list of them. Raises ConfigError naming the field."""
    value = values.get(field)
    tokens = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    check_tokens(field, tokens, vocab_size)
    return tokens


def check_tokens(field: str, tokens: tuple[Any, ...], vocab_size: int) -> None:
    """Raise ConfigError, naming the field, if one of these is no token of the vocabulary."""
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ConfigError(f"field {field}: {show(token)} is none of the {vocab_size} tokens")


def check_range(field: str, value: float, may_be_0: bool = False) -> None:
    """Raise ConfigError, naming the field, for a number that is not positive (or 0), for NaN and for a huge one."""
    highest, lowest = FIELD_MAXIMUMS.get(field, HIGHEST_SIZE), FIELD_MINIMUMS.get(field, LOWEST_NUMBER)
    # Each comparison with NaN is false, and one with a huge integer makes no float of it.
    if not (lowest < value <= highest or (may_be_0 and value == 0)):
        kind = f"number above {lowest:.9g} and" if field in FIELD_MINIMUMS else "positive number"
        raise ConfigError(f"field {field}: expected a {kind} up to {highest:.9g}, not {show(value)}")


def show(value: object) -> str:
    """Return a value as an error's line can hold it: short, and without a line break."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a huge number"


def shorten(names: Sequence[str]) -> str:
    """Return the first of many names."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _present(values: Mapping[str, Any], field: str, default: Any) -> Any:
    value = values.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"field {field} is missing")
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
