"""What a stranger gets: wheel and sdist of a clean clone, installed in an empty environment outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
import zipfile
from contextlib import AbstractContextManager
from importlib.metadata import distribution
from pathlib import Path

import pytest
from e2e.server_process import ServerProcess, running_server
from packaging.requirements import Requirement
from tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0  # of one command: an environment is installed from nothing
SERVE = ("--devices", "cpu:2", "--device-memory", "730MiB", "--max-model-len", "512")

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


class Environment:
    """A virtual environment in which KunServe is installed, and an empty folder where its commands run."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "env" / "bin", folder / "elsewhere"
        self.work.mkdir(parents=True)
        venv.create(folder / "env", with_pip=True)
        # The models of this machine's cache are taken; nothing of the checkout may be found.
        self.variables = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }

    def install(self, *arguments: str) -> None:
        """Run `pip install` with the versions that the tests have run with. AssertionError, with its output.

        Nothing is compiled ahead: of most modules, torch's above all, no command here makes use.
        """
        flags = ("--quiet", "--no-compile", "--constraint", str(ROOT / "constraints.txt"))
        done = self.run("python", "-m", "pip", "install", *flags, *arguments)
        assert done.returncode == 0, done.stderr

    def adopt(self, name: str) -> None:
        """Put a package here that the tests run with, as pip would have: the same files, by links to them."""
        [site] = self.bin.parent.glob("lib/python*/site-packages")
        package = distribution(name)
        for file in package.files or ():
            source, target = Path(str(package.locate_file(file))), site / file
            if ".." in file.parts or not source.exists():  # commands of its own, which name the other Python
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # on another file system
                shutil.copy2(source, target)

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment to its end."""
        return subprocess.run(
            [self.bin / command, *arguments],
            cwd=self.work,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def refusal(self, command: str, *arguments: str) -> str:
        """Return the one line of a command that must fail."""
        done = self.run(command, *arguments)
        [line] = done.stderr.splitlines()
        assert done.returncode != 0 and not done.stdout
        return line

    def serving(self, command: str, *arguments: str) -> AbstractContextManager[ServerProcess]:
        """Start a server with a command of the environment; it is ready inside the block."""
        program = (str(self.bin / command), *arguments)
        return running_server(command=program, folder=self.work, environment={"PYTHONPATH": ""})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built by `python -m build` from what git has of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    clone = folder / "clone"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        source, target = ROOT / name, clone / name
        if name and (source.exists() or source.is_symlink()):  # else it is deleted here, but not yet in git
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(clone)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def sdist_of(folder: Path) -> Path:
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel in it; what pip makes of the sdist is the same to the byte, as a test shows."""
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.adopt("torch")  # the build for CPUs, which `make install` has got: pip would unpack a gigabyte again
    environment.install(str(wheel_of(built)))
    return environment


def ask(url: str, model: str) -> str:
    """Return what a model answers to a prompt."""
    body = json.dumps({"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == 4
    return str(answer["choices"][0]["text"])


def test_a_card_serves(installed: Environment) -> None:
    with installed.serving("kunserve", "serve", "smollm2-135m", *SERVE) as server:
        url = server.url
        assert ask(url, "smollm2-135m")
        body = {"model": "smollm2-135m", "prompt": "A color:", "max_tokens": 9, "guided_choice": ["red", "green"]}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["choices"][0]["text"] in ("red", "green")
        with urllib.request.urlopen(f"{url}/", timeout=60) as page:
            assert b"<title>" in page.read()
        flags = ("--num-requests", "2", "--output-len", "3", "--record", "run.jsonl")
        measured = installed.run("kunserve", "loadgen", url, *flags)
        assert measured.returncode == 0, measured.stderr
        assert json.loads(measured.stdout.splitlines()[-1])["completed"] == 2
        replayed = installed.run("kunserve", "replay", "run.jsonl")
        assert replayed.returncode == 0, replayed.stderr
        assert (installed.work / "run.html").read_text().startswith("<!doctype html>")
        watched = installed.run("kunserve", "top", url, "--once")
        assert watched.returncode == 0, watched.stderr


def test_a_hugging_face_folder_serves(installed: Environment, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3", tmp_path / "tiny")
    flags = ("--model", str(folder), "--devices", "cpu:2", "--num-gpu-blocks-override", "64")
    with installed.serving("python", "-m", "kunserve.server", *flags) as server:
        ask(server.url, str(folder))


def test_the_simulator_runs(installed: Environment) -> None:
    done = installed.run("python", "-m", "kunserve.sim", "--cluster", "2xA800", "--duration", "4", "--brief")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])


def test_every_command_tells_its_version(installed: Environment) -> None:
    version = installed.run("kunserve", "--version").stdout
    assert version.strip() == distribution("kunserve").version
    for arguments in (
        ("kunserve",),
        ("kunserve", "serve"),
        ("kunserve.server",),
        ("kunserve.sim",),
        ("kunserve", "top"),
    ):
        done = installed.run("python", "-m", *arguments, "--version")
        assert (done.returncode, done.stdout) == (0, version)


def test_the_doctor_finds_a_machine_that_can_serve(installed: Environment) -> None:
    done = installed.run("kunserve", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"]


def test_wrong_flags_and_names_are_refused_in_a_line(installed: Environment) -> None:
    flag = installed.refusal("kunserve", "serve", "smollm2-135m", "--devicess", "cpu:2")
    assert flag == "kunserve serve: no such flag: --devicess; did you mean --devices? (see --help)"
    assert installed.refusal("kunserve", "serve", "smolm2-135m") == (
        "kunserve: no model 'smolm2-135m'; did you mean 'smollm2-135m'?"
    )
    assert "did you mean 'smollm2-135m'" in installed.refusal("python", "-m", "kunserve.server", "--model", "smolm2")
    assert "no such command: 'serv'" in installed.refusal("python", "-m", "kunserve", "serv")


def test_a_wheel_made_from_the_sdist_is_the_same(built: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, sdist_of(built)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(wheel_of(built)) as direct, zipfile.ZipFile(wheel_of(tmp_path)) as again:
        assert {name: direct.read(name) for name in direct.namelist()} == {
            name: again.read(name) for name in again.namelist()
        }
        cards = {name for name in direct.namelist() if name.startswith("kunserve/models/")}
    models = ROOT / "models"
    assert cards == {f"kunserve/models/{path.relative_to(models)}" for path in models.rglob("*.toml")}


def test_uv_builds_and_installs_the_same(built: Path, tmp_path: Path) -> None:
    """Without dependencies: uv does not look where pip finds the build of torch for CPUs."""

    def uv(*arguments: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "uv", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr

    uv("build", "--quiet", "--python", sys.executable, "--out-dir", tmp_path / "dist", built / "clone")
    with zipfile.ZipFile(wheel_of(built)) as ours, zipfile.ZipFile(wheel_of(tmp_path / "dist")) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "env")
    uv("pip", "install", "--quiet", "--no-deps", "--python", tmp_path / "env", wheel_of(tmp_path / "dist"))
    shown = subprocess.run([tmp_path / "env/bin/kunserve", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == distribution("kunserve").version


def test_every_requirement_has_an_upper_bound_that_the_tests_run_under() -> None:
    requirements = [Requirement(text) for text in distribution("kunserve").requires or ()]
    needed = [requirement for requirement in requirements if requirement.marker is None]
    assert len(needed) > 10
    for requirement in needed:
        assert requirement.specifier.contains(distribution(requirement.name).version), requirement
        if requirement.name != "pip":  # of which only the command line is used
            assert any(bound.operator in ("<", "<=", "==", "~=") for bound in requirement.specifier), requirement
