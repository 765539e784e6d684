"""A body that has been parsed to its declared values; whatever does not fit is an InvalidRequestError that names it.

Null counts as absent, unknown fields are ignored, and 16.0 is an integer. msgspec keeps the GIL while it works, so that
long lists and large objects pass through it in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from kunserve.api.ask.declared.faults import raise_fault, raise_missing, raise_unfit
from kunserve.api.ask.declared.fields import Alternative, Field, convert, fields_of, required_of
from kunserve.api.wire.fields import PIECE, pieces, show
from kunserve.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)

FEW, FEW_OBJECTS = PIECE, PIECE >> 5  # of one piece: a millisecond at most
SCALARS = frozenset({"string", "integer", "number"})


def read(values: Mapping[str, Any], declared: type[T], defaults: Mapping[str, Any] | None = None) -> T:
    """Return the body that `values` are. `defaults`: of fields that are absent, checked as if they had been sent."""
    fields, asked = fields_of(declared), dict[str, Any]()
    for name, value in values.items():
        if value is not None and (field := fields.get(name)) is not None:
            asked[name] = _read_field(value, field)
    for name, value in (defaults or {}).items():
        if values.get(name) is None:
            asked[name] = _read_field(value, fields[name])
    for name in required_of(declared):
        if name not in asked:
            raise_missing(name)
    return declared(**asked)


def _read_field(value: object, field: Field) -> Any:
    if field.refused is not None:
        if value is not False and not (isinstance(value, str | list | dict) and not value):
            raise InvalidRequestError(f"`{field.name}` {field.refused.reason}.", param=field.name)
        return None
    if field.holder is not None and not (isinstance(value, list | dict) and len(value) > FEW_OBJECTS):
        try:
            quick = convert(value, field.holder)
        except msgspec.ValidationError:
            pass  # it may still be right, with 16.0 for 16
        else:
            return value if field.keeps else quick
    slow = _read_value(value, _alternative_for(value, field), field.name)
    return value if field.keeps else slow


def _alternative_for(value: object, field: Field) -> Alternative:
    """Return the alternative that a value of its type can be; of several lists, that of its first item."""
    fitting = [each for each in field.alternatives if each.has_kind(value)]
    if not fitting:
        raise_unfit(value, [each.schema for each in field.alternatives], field.name)
    if len(fitting) > 1 and isinstance(value, list) and value:
        first = value[0]
        return next((each for each in fitting if each.item is None or each.item.has_kind(first)), fitting[0])
    return fitting[0]


def _read_value(value: Any, alternative: Alternative, param: str) -> Any:
    if alternative.item is None:
        return _convert(value, alternative, param)
    if not alternative.has_kind(value):
        raise_unfit(value, [alternative.schema], param)
    if alternative.key is not None:
        _check_object(value, alternative, param)
        return value
    schema = alternative.schema
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise_unfit(value, [schema], param)
    if alternative.item.item is not None:
        return [_read_value(each, alternative.item, f"{param}[{index}]") for index, each in enumerate(value)]
    return _read_items(value, alternative.item, param)


def _read_items(items: list[Any], item: Alternative, param: str) -> list[Any]:
    """Return a list of values of one type."""
    whole: list[Any] = []
    start = 0
    for piece in pieces(items, FEW if item.schema.get("type") in SCALARS else FEW_OBJECTS):
        try:
            whole += convert(piece, item.list_holder)
        except msgspec.ValidationError:
            for index, each in enumerate(piece):
                whole.append(_convert(each, item, f"{param}[{start + index}]"))
        start += len(piece)
    return whole


def _check_object(values: dict[str, Any], alternative: Alternative, param: str) -> None:
    """Check an object whose keys and values are of one type each."""
    assert alternative.key is not None and alternative.item is not None
    if len(values) > alternative.schema.get("maxProperties", len(values)):
        raise_unfit(values, [alternative.schema], param)
    names = list(values)
    try:
        _read_items(names, alternative.key, param)
    except InvalidRequestError:
        wrong = next(name for name in names if not _fits(name, alternative.key))
        noun = alternative.key.schema.get("description", "a key").removeprefix("a ")
        raise InvalidRequestError(f"`{param}` has the key {show(wrong)}, which is no {noun}.", param=param) from None
    try:
        _read_items(list(values.values()), alternative.item, param)
    except InvalidRequestError:
        for name, value in values.items():
            _convert(value, alternative.item, f"{param}.{name}")
        raise


def _fits(value: object, alternative: Alternative) -> bool:
    try:
        convert(value, alternative.holder)
    except msgspec.ValidationError:
        return False
    return True


def _convert(value: Any, alternative: Alternative, param: str) -> Any:
    try:
        return convert(value, alternative.holder)
    except msgspec.ValidationError:
        pass
    try:
        return convert(_with_integers(value), alternative.holder)
    except msgspec.ValidationError as error:
        raise_fault(error, value, alternative.schema, param)


def _with_integers(value: Any) -> Any:
    """Return a value in which 16.0 is 16; what is beyond 64 bits stays."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and -(2.0**63) <= value < 2.0**64 else value
    if isinstance(value, list):
        return list(map(_with_integers, value))
    if isinstance(value, dict):
        return {name: _with_integers(each) for name, each in value.items()}
    return value
