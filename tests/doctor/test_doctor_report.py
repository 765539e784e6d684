from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_machine import FILES, GIB, VERSIONS, WANTED, Bindings, cpu_machine, fake_torch, files, gpu_machine, modules

from kunserve.cli import main
from kunserve.doctor import command
from kunserve.doctor.finding import Status
from kunserve.doctor.probe import Probe
from kunserve.doctor.report import CHECKS, as_screen, can_start, examine, prevented, verdict


def screen(probe: Probe) -> list[str]:
    return list(as_screen(examine(probe), has_colors=False))


def names_on(lines: list[str]) -> list[str]:
    """Checks that a screen names, in its order."""
    starts = [line for line in lines[:-1] if not line.startswith(" ")]
    known = sorted(CHECKS, key=len, reverse=True)
    names = []
    for line in starts:
        while found := next((name for name in known if line.startswith(name)), None):
            names.append(found)
            line = line.removeprefix(found).removeprefix(", ")
    return names


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().out


def test_screen_and_json_of_this_machine_name_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys)
    lines = text.splitlines()
    json_status, text = run(capsys, "--json")
    answer = json.loads(text)
    assert max(map(len, lines)) <= 80
    has_gpus = any("gpus" in check["details"] for check in answer["checks"])
    assert has_gpus or len(lines) <= 24
    assert [check["name"] for check in answer["checks"]] == list(CHECKS) == names_on(lines)
    assert status == json_status == (0 if any(answer["can_start"].values()) else 1)
    for check in answer["checks"]:
        assert (check["status"] == "ok") == (check["consequence"] is None) == (check["remedy"] is None)


def test_a_good_machine_without_gpus_serves_on_cpu_devices(tmp_path: Path) -> None:
    findings = examine(cpu_machine(tmp_path))
    assert {name for name, one in findings.items() if one.status is not Status.OK} == {"GPUs"}
    assert prevented(findings) == {"cpu": [], "cuda": ["GPUs"]} and can_start(findings)
    assert verdict(findings) == "A server can start here on CPU devices; not on GPUs (see GPUs)."


def test_a_good_machine_with_gpus_serves_on_both(tmp_path: Path) -> None:
    findings = examine(gpu_machine(tmp_path, Bindings([FakeCuda(0, GIB, [1]), FakeCuda(1, GIB, [0])])))
    assert {name: one for name, one in findings.items() if one.status is not Status.OK} == {}
    assert verdict(findings) == "A server can start here on GPUs and CPU devices."


def test_a_beginners_machine_that_lacks_everything_optional_fits_a_screen(tmp_path: Path) -> None:
    lacking = {**VERSIONS, "llguidance": None, "huggingface-hub": None}
    limits = {resource.RLIMIT_NOFILE: 1024}
    lines = screen(
        cpu_machine(tmp_path, version=lacking.get, which=lambda name: None, limit=limits.get, kernel="5.15.0-1")
    )
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert names_on(lines) == list(CHECKS)


def test_exit_status_is_1_when_no_server_can_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = modules({"torch": OSError("libc10.so: cannot open shared object file")})
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments, cpu_machine(tmp_path, import_module=broken))
        assert caught.value.code == 1
    shown = capsys.readouterr().out
    assert "No server can start here: not on CPU devices (see torch)" in shown


def test_what_packages_print_is_not_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def import_module(name: str) -> Any:
        print(f"hello from {name}")
        return probe.import_module(name)

    probe = cpu_machine(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command.main(["--json"], dataclasses.replace(probe, import_module=import_module))
    said = capsys.readouterr()
    assert caught.value.code == 0 and json.loads(said.out)["can_start"]["cpu"] and "hello from torch" in said.err


def test_gpus_that_the_default_would_choose_and_fail_on_are_named(tmp_path: Path) -> None:
    findings = examine(gpu_machine(tmp_path, Bindings([FakeCuda(0)]), find_package=lambda name: None))
    assert can_start(findings) and prevented(findings) == {"cpu": [], "cuda": ["FlashInfer"]}
    assert "Without --devices cpu:2 it would choose the GPUs and fail" in verdict(findings)


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), RuntimeError(), ImportError("libGL.so.1")])
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(Probe) if str(field.type).startswith("Callable")]
)
def test_whatever_breaks_becomes_a_line(tmp_path: Path, name: str, error: Exception) -> None:
    """Every question to the machine fails in turn."""

    def broken(*arguments: Any) -> Any:
        raise error

    for probe in (cpu_machine(tmp_path), gpu_machine(tmp_path, Bindings([FakeCuda(0)]))):
        changes: dict[str, Any] = {name: broken}
        findings = examine(dataclasses.replace(probe, **changes))
        lines = list(as_screen(findings, has_colors=False))
        assert names_on(lines) == list(CHECKS) and max(map(len, lines)) <= 80


def test_a_package_that_ends_the_process_is_an_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_the_process.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="ends_the_process ends the process: 3"):
        Probe().import_module("ends_the_process")


def test_colors_change_nothing_but_the_color_of_the_status(tmp_path: Path) -> None:
    findings = examine(cpu_machine(tmp_path))
    plain, colored = (list(as_screen(findings, has_colors=flag)) for flag in (False, True))
    assert any("\033[35mmissing\033[0m" in line for line in colored)
    stripped = [line.replace("\033[0m", "").replace("\033[32m", "").replace("\033[35m", "") for line in colored]
    assert stripped == plain


def test_another_operating_system_is_refused(tmp_path: Path) -> None:
    findings = examine(cpu_machine(tmp_path, system="Darwin", read_text=files({**FILES})))
    assert findings["KunServe"].status is Status.PROBLEM and not can_start(findings)


def test_torch_outside_the_bounds_is_a_warning(tmp_path: Path) -> None:
    findings = examine(cpu_machine(tmp_path, version={**VERSIONS, "torch": "9.0.1"}.get))
    assert findings["torch"].status is Status.WARNING
    assert findings["torch"].found == f"torch 9.0.1 (wanted {WANTED['torch']})"
    assert findings["torch"].remedy == f"pip install 'torch{WANTED['torch']}'"


def test_missing_old_and_broken_packages_are_told_apart(tmp_path: Path) -> None:
    absent = examine(cpu_machine(tmp_path, version={**VERSIONS, "aiohttp": None}.get))
    assert absent["packages"].found == "not installed: aiohttp" and not can_start(absent)
    assert absent["packages"].remedy == f"pip install 'aiohttp{WANTED['aiohttp']}'"
    old = examine(cpu_machine(tmp_path, version={**VERSIONS, "aiohttp": "3.9", "llguidance": "0.1"}.get))
    assert old["packages"].status is Status.WARNING
    assert old["packages"].found == f"aiohttp 3.9 (wanted {WANTED['aiohttp']})"
    assert old["structured"].status is Status.WARNING and can_start(old)
    fakes = {
        "torch": fake_torch(None),
        "kunserve.command.serving": ImportError("libssl.so.3: not found"),
        "llguidance": OSError(),
    }
    broken = examine(cpu_machine(tmp_path, import_module=modules(fakes)))
    assert broken["packages"].found == "the server cannot be imported: libssl.so.3: not found"
    assert broken["structured"].found == "llguidance cannot be imported: OSError" and not can_start(broken)


@pytest.mark.parametrize(
    ("package", "module", "check"),
    [
        ("gguf", "gguf.quants", "packages"),
        ("pyyaml", "yaml", "packages"),
        ("pip", "pip", "packages"),
        ("huggingface-hub", "kunserve.model.hub.snapshot", "Hub"),
        ("llguidance", "llguidance", "structured"),
    ],
)
def test_what_servers_start_without_keeps_none_from_it(tmp_path: Path, package: str, module: str, check: str) -> None:
    absent = examine(cpu_machine(tmp_path, version={**VERSIONS, package: None}.get))
    fakes = modules({"torch": fake_torch(None), module: OSError("lib.so: not found")})
    broken = examine(cpu_machine(tmp_path, import_module=fakes))
    for findings, status in ((absent, Status.MISSING), (broken, Status.PROBLEM)):
        assert findings[check].status is status and package in findings[check].found
        assert findings[check].remedy.startswith(f"pip install '{package}{WANTED[package]}'")
        assert findings[check].consequence != "no server starts" and can_start(findings)
