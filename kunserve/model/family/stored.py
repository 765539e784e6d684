"""How a checkpoint keeps a tensor, where that is not as a decoder reads it: under another name, or in a stored form."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor  # names are judged without it


class StoredForm(NamedTuple):
    """Says how tensors of a stored form become those that a decoder reads."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of what a decoder reads -> in the file
    read: Callable[[Tensor], Tensor]  # in the file -> as a decoder reads it
    rows: Callable[[Tensor], Tensor] = lambda tensor: tensor  # the same, of (E, N, ...) with a row for each output


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _columns(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


def _pairs(tensor: Tensor) -> Tensor:
    return tensor.view(*tensor.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


def _paired_rows(tensor: Tensor) -> Tensor:
    num, rows, *columns = tensor.shape
    return tensor.view(num, rows // 2, 2, *columns).transpose(1, 2).flatten(1, 2)


# By what names end in: gpt-oss keeps the weights of an output as a column, and gate and up by turns.
STORED_FORMS = {
    ".experts.gate_up_proj": StoredForm(_transposed, lambda tensor: _columns(_pairs(tensor)), _paired_rows),
    ".experts.gate_up_proj_bias": StoredForm(lambda shape: shape, _pairs),
    ".experts.down_proj": StoredForm(_transposed, _columns),
}


def stored_form(name: str) -> StoredForm | None:
    """Return the stored form of a tensor; None where it is as a decoder reads it."""
    return next((form for ending, form in STORED_FORMS.items() if name.endswith(ending)), None)


def names_of(name: str) -> tuple[str, str, str]:
    """Return what checkpoints may call a tensor: decoders of models that also see are a part of them."""
    return name, f"language_model.{name}", f"model.language_model.{name.removeprefix('model.')}"


def stored_name(name: str, names: Container[str]) -> str:
    """Return what a checkpoint with these names calls a tensor."""
    return next((candidate for candidate in names_of(name) if candidate in names), name)
