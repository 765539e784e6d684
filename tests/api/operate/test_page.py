from __future__ import annotations

import re

import pytest
from api_fakes import FakeEngine, serving

from kunserve.api.operate.page import page_files
from kunserve.api.wire.backend import ApiSettings


async def test_everybody_gets_the_page_under_a_strict_policy() -> None:
    async with serving(FakeEngine(), ApiSettings(api_keys=("k",))) as client:
        for path in ("/", *(f"/page/{name}" for name in page_files())):
            response = await client.get(path)
            assert response.status == 200
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.charset == "utf-8"
        assert (await client.get("/")).content_type == "text/html"
        assert (await client.get("/page/main.js")).content_type == "text/javascript"


@pytest.mark.parametrize("name", ["none.js", "uplot.LICENSE", "..%2Fapi%2Fapp.py", "%2Fetc%2Fpasswd", "%00"])
async def test_there_are_no_other_files(name: str) -> None:
    async with serving(FakeEngine()) as client:
        assert (await client.get(f"/page/{name}")).status == 404


def test_the_page_needs_no_other_host_and_nothing_inline() -> None:
    files = page_files()
    html = files["index.html"]
    assert not re.search(r"<script(?![^>]* src=\"/page/)|\son\w+=|style=|javascript:", html)
    for name, text in files.items():
        urls = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert urls <= {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}, name
        if name.endswith(".js") and name != "uplot.min.js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), (
                name
            )
