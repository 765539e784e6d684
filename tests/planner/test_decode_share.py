from __future__ import annotations

import pytest

from kunserve.planner.microbatch import decode_share


@pytest.mark.parametrize(
    ("num_decoding", "num_stages", "rows"), [(0, 2, 1), (1, 2, 1), (8, 1, 8), (8, 2, 4), (9, 2, 5), (3, 4, 1)]
)
def test_share_of_one_microbatch(num_decoding: int, num_stages: int, rows: int) -> None:
    assert decode_share(num_decoding, num_stages) == rows
