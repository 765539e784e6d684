"""Arrays of those who decode in a group, kept from microbatch to microbatch: each step changes little of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kunserve.compute.sampler import SamplingRow, reads_output
from kunserve.engine.batch import Decoding
from kunserve.engine.request import Request
from kunserve.sizes import ceil_div

Ids = Mapping[int, "array[int]"]  # of a request's blocks by device, as its table has them
RowOf = Callable[[Request], SamplingRow]


class KeptRows:
    """Block tables and sampling rows of the requests that decoded in a group's last microbatch, row by row.

    A row stays as it is while its request takes token after token in the same blocks. It gets an id when the request
    comes to a new block; where requests join and leave, or their blocks are elsewhere, rows move or are made anew.
    """

    def __init__(self) -> None:
        self._requests: Sequence[Request] = ()
        self._ids: Sequence[Ids] = []  # of each row; a table has another mapping when its blocks are elsewhere
        self._ends: Sequence[int] = ()
        self._tables: list[NDArray[np.int32]] = []  # of each stage: (B, at least W), 0 behind the ids of a row
        self._rows: list[SamplingRow] = []
        self._changing: list[int] = []  # of these rows, those that are other ones in each step

    def follow(self, decoding: Decoding, block_size: int, row_of: RowOf) -> None:
        """Become the rows of a microbatch; `row_of` says what decides a next token."""
        requests, ends, _ = decoding
        ids = [request.table.ids for request in requests]
        if requests == self._requests and ids == self._ids and ends == [end + 1 for end in self._ends]:
            for i in self._changing:
                self._rows[i] = row_of(requests[i])
        else:
            self._join_and_leave(requests, ids, ends, block_size, row_of)
        self._requests, self._ids, self._ends = requests, ids, ends
        self._widen(ceil_div(max(ends), block_size))
        first = 1 % block_size
        for i in [i for i, end in enumerate(ends) if end % block_size == first]:  # it begins a block
            block = (ends[i] - 1) // block_size
            for table, own in zip(self._tables, ids[i].values(), strict=True):
                table[i, block] = own[block]

    def tables(self, width: int) -> list[NDArray[np.int32]]:
        """Return the first ids of each row, for each stage: (B, width)."""
        return [table[:, :width] for table in self._tables]

    @property
    def sampling(self) -> Sequence[SamplingRow]:
        """Return what decides the next token of each row."""
        return self._rows

    def _join_and_leave(
        self, requests: Sequence[Request], ids: Sequence[Ids], ends: Sequence[int], block_size: int, row_of: RowOf
    ) -> None:
        """Take over the rows of those who were there a token ago, and make those of the others."""
        row_of_ids = {id(own): i for i, own in enumerate(self._ids)}
        old_rows = np.array([row_of_ids.get(id(own), -1) for own in ids])
        stays = np.zeros(len(ids), np.bool_)
        if self._ids:
            stays = (old_rows >= 0) & (np.array(ends) == np.array(self._ends)[old_rows] + 1)
        num_stages = len(ids[0])
        if len(self._tables) != num_stages:
            self._tables, stays = [np.zeros((1, 1), np.int32)] * num_stages, np.zeros(len(ids), np.bool_)
        self._tables = [table[np.where(stays, old_rows, 0)] for table in self._tables]
        self._widen(ceil_div(max(ends), block_size))
        old, self._rows = self._rows, []
        for i, (request, is_old, old_row) in enumerate(zip(requests, stays.tolist(), old_rows.tolist(), strict=True)):
            row = old[old_row] if is_old else row_of(request)
            self._rows.append(row_of(request) if is_old and _is_changing(row) else row)
            if not is_old:
                num_ids = ceil_div(ends[i], block_size)
                for table, own in zip(self._tables, ids[i].values(), strict=True):
                    table[i, :num_ids] = own[:num_ids]
                    table[i, num_ids:] = 0
        self._changing = [i for i, row in enumerate(self._rows) if _is_changing(row)]

    def _widen(self, width: int) -> None:
        if self._tables and self._tables[0].shape[1] < width:
            self._tables = [np.pad(table, ((0, 0), (0, 2 * width - table.shape[1]))) for table in self._tables]


def _is_changing(row: SamplingRow) -> bool:
    """Tell whether what a row's next token is depends on those before it: on which they are, or on how many."""
    params = row.params
    is_early = len(row.output_token_ids) < params.min_tokens
    return params.temperature > 0 or is_early or row.mask is not None or reads_output(params)
