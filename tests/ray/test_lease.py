from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kunserve.ray.lease import Lease, Leases


async def test_a_lease_ends_when_the_front_lets_go_or_never_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(tmp_path / "leases", tmp_path / "http")
    await leases.open()
    given = [leases.give() for _ in range(2)]
    first, second = [await anext(lease) for lease in given]
    assert isinstance(first, Lease) and (first.number, second.number) == (0, 1)
    ends = [asyncio.ensure_future(anext(lease, None)) for lease in given]
    async with second.held():
        async with first.held():
            await asyncio.sleep(0.05)
            assert not ends[0].done()
        assert await ends[0] is None  # and the other goes on
        assert not ends[1].done()
    assert await ends[1] is None
    monkeypatch.setattr(Leases, "TAKE_UP_S", 0.0)
    assert len([lease async for lease in leases.give()]) == 1
    await leases.close()
    with pytest.raises(OSError):
        async with first.held():
            pass
