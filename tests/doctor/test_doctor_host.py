from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_machine import FILES, GIB, Bindings, cpu_machine, files, gpu_machine, hub_constants, modules

from kunserve.compute import cpu_kernels
from kunserve.doctor.finding import Finding, Status
from kunserve.doctor.probe import Probe
from kunserve.doctor.report import examine
from kunserve.errors import ConfigError
from kunserve.model.card import CARDS
from kunserve.model.quant.blocks import ITEM_BYTES


def line(finding: Finding) -> str:
    return f"{finding.status}: {finding.found} / {finding.consequence} / {finding.remedy}"


def raising(error: Exception) -> Any:
    def function(*arguments: Any) -> Any:
        raise error

    return function


def test_64_kib_of_locked_memory_is_no_obstacle(tmp_path: Path) -> None:
    finding = examine(cpu_machine(tmp_path, limit={resource.RLIMIT_MEMLOCK: 64 << 10}.get))["locked memory"]
    assert finding.found == "64 KiB; pinning weights does not count against it" and finding.status is Status.OK


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cores": lambda: 1}, ["warning: 1 core(s), AVX-512", "--devices cpu:1"]),
        ({"read_text": files({**FILES, "/proc/cpuinfo": "flags : sse4_2"})}, ["warning", "four numbers at once"]),
        ({"kernel": "5.14.0-503.el9"}, ["warning", "pages of 4 KiB", "Linux 6.1"]),
        ({"take_memory": raising(PermissionError(13, "Permission denied"))}, ["problem", "vm.memfd_noexec=0"]),
        ({"take_memory": raising(OSError(22, "Invalid argument")), "kernel": "4.18.0"}, ["problem", "Linux 5.14"]),
    ],
)
def test_what_cpu_devices_lack_is_said(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    finding = examine(cpu_machine(tmp_path, **changes))["CPU devices"]
    assert all(word in line(finding) for word in words), line(finding)
    assert finding.prevents == ({"cpu"} if finding.status is Status.PROBLEM else set())


def test_memory_of_a_device_can_be_taken_here() -> None:
    Probe().take_memory(2 << 20)
    with pytest.raises(OSError):
        Probe().take_memory(1 << 62)


def test_too_little_memory_for_the_smallest_model_keeps_cpu_devices_from_serving(tmp_path: Path) -> None:
    finding = examine(cpu_machine(tmp_path, available_bytes=lambda: GIB // 4))["host memory"]
    assert "problem: 0.2 GiB available; smollm2-135m alone needs 0.5 GiB" in line(finding)
    assert finding.prevents == {"cpu"}
    some = examine(cpu_machine(tmp_path, available_bytes=lambda: 2 * GIB))["host memory"]
    assert some.found == "2.0 GiB available; fits in float32: smollm2-135m"


def test_weights_that_fit_on_gpus_but_not_in_pinned_memory_are_named(tmp_path: Path) -> None:
    gpus = Bindings([FakeCuda(0, 20 * GIB)])
    finding = examine(gpu_machine(tmp_path, gpus, available_bytes=lambda: 8 * GIB))["host memory"]
    assert "warning: 8.0 GiB available / no pinned copy of llama-8b, mistral-7b, qwen3-8b" in line(finding)
    assert "--host-copy none" in finding.remedy and not finding.prevents


def test_a_container_that_leaves_less_than_the_machine_has_decides(tmp_path: Path) -> None:
    contents = {
        **FILES,
        "/sys/fs/cgroup/memory.max": "1073741824\n",
        "/sys/fs/cgroup/memory.current": "943718400\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 104857600\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    findings = examine(cpu_machine(tmp_path, read_text=files(contents)))
    assert findings["host memory"].details["available_bytes"] == 1073741824 - 943718400 + 104857600
    assert findings["CPU devices"].found.startswith("1.5 core(s)")


def test_mappings_and_addresses_that_do_not_suffice_are_a_warning(tmp_path: Path) -> None:
    few = {**FILES, "/proc/sys/vm/max_map_count": "10000"}
    finding = examine(cpu_machine(tmp_path, read_text=files(few)))["mappings"]
    assert (
        "warning: 10,000: enough for 20 GiB" in line(finding) and "sysctl -w vm.max_map_count=61440" in finding.remedy
    )
    finding = examine(cpu_machine(tmp_path, limit={resource.RLIMIT_AS: 8 * GIB}.get))["mappings"]
    assert "limited to 8,192 MiB" in finding.found and finding.remedy == "ulimit -v unlimited"


def test_few_open_files_are_a_warning(tmp_path: Path) -> None:
    finding = examine(cpu_machine(tmp_path, limit={resource.RLIMIT_NOFILE: 1024}.get))["open files"]
    assert finding.consequence == "more than 924 clients at once are not answered"
    assert finding.remedy == "ulimit -n 65536"


def test_a_compiler_is_missing_or_fails_or_is_not_needed(tmp_path: Path) -> None:
    missing = examine(cpu_machine(tmp_path, which=lambda name: None))["C compiler"]
    assert "missing: no C compiler (cc, gcc or clang) on PATH / slower" in line(missing)
    said = "<stdin>:1:10: fatal error: stdint.h: No such file or directory\n"
    failing = examine(cpu_machine(tmp_path, run=lambda command, text: (1, said)))["C compiler"]
    assert "problem: cc fails: <stdin>:1:10: fatal error: stdint.h" in line(failing)
    absent = examine(cpu_machine(tmp_path, run=raising(FileNotFoundError(2, "no such file", "icx"))))["C compiler"]
    assert "problem: cannot run: [Errno 2] no such file: 'icx'" in line(absent)
    environment = {"KUNSERVE_CACHE": str(tmp_path / "filled")}
    library = cpu_kernels.library_path(environment=environment)
    library.parent.mkdir(parents=True)
    library.touch()
    cached = examine(cpu_machine(tmp_path, environment=environment, which=lambda name: None))["C compiler"]
    assert cached.status is Status.OK and "in the cache" in cached.found


def test_the_compiler_is_tried_with_what_the_kernels_need(tmp_path: Path) -> None:
    """The real one, if there is one: the trial must not fail where the kernels compile."""
    finding = examine(cpu_machine(tmp_path, which=Probe().which, run=Probe().run))["C compiler"]
    try:
        cpu_kernels.find_compiler()
    except cpu_kernels.KernelsUnavailableError:
        assert finding.status is Status.MISSING
    else:
        assert finding.status is Status.OK


def test_a_cache_that_cannot_be_written_or_is_full_is_named(tmp_path: Path) -> None:
    readonly = examine(cpu_machine(tmp_path, is_writable=lambda path: False))
    assert "problem: ~/kunserve cannot be written to / smollm2-135m cannot be prepared" in line(
        readonly["server cache"]
    )
    assert "KUNSERVE_CACHE=FOLDER" in readonly["server cache"].remedy
    assert "problem: ~/hf/hub cannot be written to" in line(readonly["Hub"]) and "HF_HOME" in readonly["Hub"].remedy
    full = examine(cpu_machine(tmp_path, free_bytes=lambda path: 5 << 20))
    assert "0 GiB free / disk nearly full" in line(full["server cache"])
    (tmp_path / "kunserve").write_text("a file where the folder should be")
    assert examine(cpu_machine(tmp_path))["server cache"].status is Status.PROBLEM


def test_the_token_is_noticed_and_never_shown(tmp_path: Path) -> None:
    assert examine(cpu_machine(tmp_path))["Hub"].found.endswith("no token")
    findings = examine(cpu_machine(tmp_path, environment={"HF_TOKEN": "hf_secret"}))
    assert findings["Hub"].found.endswith("a token") and "hf_secret" not in str(findings)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret")
    findings = examine(cpu_machine(tmp_path))
    assert findings["Hub"].details["has_token"] and "hf_secret" not in str(findings)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_being_offline_is_a_warning(tmp_path: Path, name: str) -> None:
    fakes = modules({"huggingface_hub.constants": hub_constants(tmp_path, is_offline=True)})
    finding = examine(cpu_machine(tmp_path, environment={name: "True"}, import_module=fakes))["Hub"]
    assert finding.status is Status.WARNING and finding.remedy == f"unset {name}"


def test_models_on_this_machine_are_found_where_the_hub_puts_them(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    index = '{"weight_map": {"lm_head.weight": "model-2-of-2.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert examine(cpu_machine(tmp_path))["models"].details["here"] == []  # an interrupted download
    (snapshot / "model-2-of-2.safetensors").write_bytes(b"12345")
    findings = examine(cpu_machine(tmp_path))
    assert findings["models"].found == "1 of 12 are on this machine: qwen3-8b"
    assert findings["Hub"].details["bytes"] == len(index) + 5


def test_a_folder_is_writable_if_a_file_can_be_made_there(tmp_path: Path) -> None:
    """Root may write anywhere, says the kernel when asked; /proc takes no files all the same."""
    assert Probe().is_writable(tmp_path) and not list(tmp_path.iterdir())
    assert not Probe().is_writable(Path("/proc"))
    real = {"is_writable": Probe().is_writable, "free_bytes": Probe().free_bytes}
    finding = examine(cpu_machine(tmp_path, cache_root=lambda: Path("/proc/x"), **real))["server cache"]
    assert "problem: /proc/x cannot be written to" in line(finding)


def test_a_folder_below_one_that_may_not_be_looked_into_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user with root's HOME. Root itself may look anywhere, so the kernel's answer is made up."""
    stat, closed = os.stat, tmp_path / "root"
    closed.mkdir()

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and closed in Path(os.fsdecode(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    probe = cpu_machine(tmp_path, cache_root=lambda: closed / ".cache", is_writable=lambda path: path != closed)
    findings = examine(probe)
    assert "problem: ~/root/.cache cannot be written to" in line(findings["server cache"])
    assert findings["models"].status is Status.OK


def test_a_cache_of_a_user_that_does_not_exist_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUNSERVE_CACHE", "~no-such-user/x")
    probe = cpu_machine(tmp_path, environment=os.environ, cache_root=Probe().cache_root)
    faulty = {name: one for name, one in examine(probe).items() if one.status is Status.PROBLEM}
    assert list(faulty) == ["server cache"]
    assert "KUNSERVE_CACHE" in faulty["server cache"].found
    assert faulty["server cache"].remedy.startswith("KUNSERVE_CACHE=FOLDER")
    said = ConfigError("KUNSERVE_CACHE: there is no such user")
    named = examine(cpu_machine(tmp_path, cache_root=raising(said)))["server cache"]
    assert named.found == said.message


def test_a_user_without_a_home_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert Probe().home == Path("~")


def test_broken_cards_are_named_and_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "models"
    own.mkdir()
    monkeypatch.setenv("KUNSERVE_CONFIG", str(tmp_path))
    good = (CARDS / "smollm2-135m.toml").read_text(encoding="utf-8").replace('"smollm2-135m"', '"mine"')
    dtype = re.search(r'dtype = "(\w+)"', good)
    assert dtype is not None
    (own / "mine.toml").write_text(good.replace(dtype[0], 'dtype = "float64"'))
    (own / "torn.toml").write_text(good[: len(good) // 2] + '"')
    findings = examine(cpu_machine(tmp_path))
    assert findings["models"].status is Status.WARNING and "torn.toml" in findings["models"].found
    assert findings["models"].consequence == "no server of torn starts"
    sizes = findings["models"].details["missing"]
    assert sizes["mine"] == 8 * sizes["smollm2-135m"] // ITEM_BYTES[dtype[1]]
    assert findings["host memory"].status is Status.OK
    (own / "mine.toml").write_text(good.replace(dtype[0], 'dtype = "float8"'))
    broken = examine(cpu_machine(tmp_path))["models"]
    assert list(broken.details["broken"]) == ["mine", "torn"] and "float8" in broken.found


def test_a_working_directory_that_was_removed_is_a_problem(tmp_path: Path) -> None:
    finding = examine(cpu_machine(tmp_path, working_folder=None))["KunServe"]
    assert "problem: the working directory was removed" in line(finding) and finding.prevents == {"cpu", "cuda"}
