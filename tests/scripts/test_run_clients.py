from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import run_clients
from flows import MARK, Result
from run_clients import Client, read_results, run_client, table

PASSED = Result("dspy", "3.4", "chat")
FAILED = Result("dspy", "3.4", "chat stream", "AssertionError: a | b")
FLOWS = """
from flows import Target, run

def chat(target: Target) -> None:
    print("a client prints things")
    assert target.openai_url == "http://nowhere/v1", target

async def chat_stream(target: Target) -> None:
    raise ValueError("no such target")

run("pytest", chat{others})
"""


def told(*results: Result) -> str:
    return "".join(f"{MARK}{json.dumps({name: getattr(one, name) for name in one.__slots__})}\n" for one in results)


def script(code: str) -> Client:
    path = repr(str(Path(run_clients.__file__).parent))
    return Client("it", (sys.executable, "-c", f"import sys; sys.path.insert(0, {path})\n{code}"))


def run_main(monkeypatch: pytest.MonkeyPatch, clients: Sequence[Client], *args: str) -> int:
    monkeypatch.setattr(run_clients, "CLIENTS", tuple(clients))
    monkeypatch.setattr(sys, "argv", ["run_clients.py", "--url", "http://nowhere", *args])
    with pytest.raises(SystemExit) as exit_:
        run_clients.main()
    return int(exit_.value.code or 0)


def test_results_are_told_between_what_the_client_prints() -> None:
    assert read_results(f"hello\n{told(PASSED)}FLO\n{told(FAILED)}bye") == [PASSED, FAILED]


def test_a_table_has_a_row_for_each_flow_and_problems_stay_in_their_column() -> None:
    rows = table([PASSED, FAILED]).splitlines()[2:]
    assert rows[0] == "| dspy | 3.4 | chat | passes |"
    assert rows[1] == "| dspy | 3.4 | chat stream | **fails**: AssertionError: a \\| b |"


def test_a_flow_passes_when_it_returns_and_fails_with_what_it_raises() -> None:
    passed, failed = run_client(script(FLOWS.format(others=", chat_stream")), "http://nowhere")
    assert (passed.client, passed.flow, passed.problem) == ("pytest", "chat", None)
    assert (failed.flow, failed.problem) == ("chat stream", "ValueError: no such target")


@pytest.mark.parametrize(
    ("code", "limit_s", "problem"),
    [
        ("pass", 60, "told no result"),
        (f"print({told(PASSED)!r}); sys.exit(3)", 60, "the process ended with 3"),
        (f"print({told(PASSED)!r}, flush=True); import time; time.sleep(600)", 1, "not over after 1 s"),
    ],
)
def test_a_client_that_does_not_get_to_its_end_fails(code: str, limit_s: float, problem: str) -> None:
    results = run_client(script(code), "http://nowhere", limit_s)
    assert results[-1] == Result("it", "", "all to the end", problem)


def test_a_client_that_is_not_installed_fails() -> None:
    [result] = run_client(Client("it", ("/no/such/python",)), "http://nowhere")
    assert result.problem is not None and result.problem.startswith("does not start: ")


@pytest.mark.parametrize(("others", "status"), [("", 0), (", chat_stream", 1)])
def test_a_flow_that_fails_fails_the_whole_and_the_page_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: str, status: int
) -> None:
    page = tmp_path / "docs" / "clients.md"
    assert run_main(monkeypatch, [script(FLOWS.format(others=others))], "--page", str(page)) == status
    text = page.read_text()
    assert "| chat | passes |" in text
    assert ("| chat stream | **fails**: ValueError: no such target |" in text) == bool(status)
    assert f"1 of {1 + status} flows pass" in text


def test_only_the_clients_asked_for_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Client("bad", ("/no/such/python",))
    assert run_main(monkeypatch, [script(FLOWS.format(others="")), bad], "--only", "it") == 0
    assert run_main(monkeypatch, [script(FLOWS.format(others="")), bad]) == 1


def test_a_client_finds_neither_keys_nor_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a real one")
    seen = "dict(client=os.environ['HTTPS_PROXY'], version='', flow=str('OPENAI_API_KEY' in os.environ))"
    code = f"import json, os\nprint({MARK!r} + json.dumps({seen}))"
    [result] = run_client(script(code), "http://nowhere")
    assert (result.client, result.flow) == (run_clients.NOWHERE, "False")
