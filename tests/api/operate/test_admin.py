from __future__ import annotations

import pytest
from api_fakes import FakeEngine, error_of, serving

from kunserve.api.wire.backend import ApiSettings
from kunserve.errors import ConflictError

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


async def test_a_device_is_taken_out_and_in_again() -> None:
    engine = FakeEngine()
    url = "/kunserve/devices/1"
    async with serving(engine, ADMIN) as client:
        for body, drain_s in ((None, 30.0), ({}, 30.0), ({"drain_s": 0}, 0.0), ({"drain_s": 2.5}, 2.5)):
            answer = await client.post(f"{url}/remove", headers=HEADERS, json=body)
            assert await answer.json() == {"removed": 1, "drain_s": drain_s}
        assert await (await client.post(f"{url}/add", headers=HEADERS)).json() == {"added": 1}
        engine.refusal = ConflictError("cpu:1 is the last device")
        error = await error_of(await client.post(f"{url}/remove", headers=HEADERS))
        assert (error["code"], error["message"]) == (409, "cpu:1 is the last device")


@pytest.mark.parametrize("drain_s", [-1, "5", True, [1]])
async def test_requests_have_a_number_of_seconds_to_end(drain_s: object) -> None:
    async with serving(FakeEngine(), ADMIN) as client:
        response = await client.post("/kunserve/devices/0/remove", headers=HEADERS, json={"drain_s": drain_s})
        error = await error_of(response)
        assert (error["code"], error["param"]) == (400, "drain_s")


@pytest.mark.parametrize("index", ["2", "-1", "01", "cpu:0", "9" * 5000])
@pytest.mark.parametrize("verb", ["remove", "add"])
async def test_only_devices_that_there_are(index: str, verb: str) -> None:
    async with serving(FakeEngine(), ADMIN) as client:
        error = await error_of(await client.post(f"/kunserve/devices/{index}/{verb}", headers=HEADERS))
        assert error["code"] == 404
        assert error["message"] == f"There is no device `{index[:100]}`: devices are 0 (cpu:0), 1 (cpu:1)."
        assert (await client.post(f"/kunserve/devices/{index}/{verb}")).status == 401
