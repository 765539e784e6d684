from __future__ import annotations

import pytest
from api_fakes import FakeEngine, error_of, serving

from kunserve.api.wire.backend import ApiSettings

ADMIN = ApiSettings(admin_keys=("root",))
HEADERS = {"Authorization": "Bearer root"}


async def test_operators_bring_the_key() -> None:
    async with serving(FakeEngine(), ADMIN) as client:
        answer = await client.post("/kunserve/drop", headers=HEADERS, json={"groups": [1, 2]})
        assert await answer.json() == {"dropped": [1, 2], "is_forced": False}
        answer = await client.post("/kunserve/drop", headers=HEADERS, json={"force": True})
        assert await answer.json() == {"dropped": None, "is_forced": True}
        assert await (await client.post("/kunserve/restore", headers=HEADERS)).json() == {"restored": None}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer \udcff"}):
            assert (await error_of(await client.post("/kunserve/drop", headers=headers)))["code"] == 401
    async with serving(FakeEngine()) as client:
        assert (await error_of(await client.post("/kunserve/drop", headers=HEADERS)))["code"] == 403


@pytest.mark.parametrize("groups", ["all", ["1"], [True]])
async def test_groups_are_ids(groups: object) -> None:
    async with serving(FakeEngine(), ADMIN) as client:
        response = await client.post("/kunserve/drop", headers=HEADERS, json={"groups": groups})
        assert (await error_of(response))["param"] == "groups"
