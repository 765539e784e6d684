"""Models of the Hub, from a stand-in on loopback, in processes of their own: the library reads HF_* when imported."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from e2e.server_process import running_server
from fake_hub import TOKEN, FakeHub
from own_server import free_port
from tiny_models import make_tiny_model

MIB = 1 << 20
CHUNK = 10 * MIB  # the library writes so much at a time
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = b'{"weight_map": {"a": "%s", "b": "%s"}}' % (FIRST.encode(), SECOND.encode())

# Prints the progress, one line each; `at(text, share)` may do more.
FETCH = """
import os, sys
from kunserve.errors import ConfigError
from kunserve.model.hub.snapshot import hub_folder
def at(text, share): pass
{at}
def progress(text, share):
    print(f"{{share:.0%}} {{text}}", flush=True)
    at(text, share)
try:
    print(hub_folder(sys.argv[1], progress))
except ConfigError as error:
    sys.exit(f"kunserve: {{error.message}}")
"""
DIE_BEFORE_THE_CHECK = """
def at(text, share):
    if text.startswith("checking"):
        os._exit(9)
"""
PAUSE_BEFORE_THE_CHECK = """
def at(text, share):
    if text.startswith("checking") and share == 0:
        sys.stdin.readline()
"""
FILL_THE_DISK = """
def at(text, share):
    if share and not os.path.exists(ballast := os.environ["HF_HOME"] + "/ballast"):
        with open(ballast, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                print(error, flush=True)
"""


def random_bytes(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A model of two shards, of 1 and 24 MiB."""
    files = {
        "config.json": b"{}",
        "tokenizer/chat.jinja": b"{{ messages }}",
        "README.md": b"nobody needs it",
        "original/consolidated.safetensors": b"nor this",
        "model.safetensors.index.json": INDEX,
        FIRST: random_bytes(MIB),
        SECOND: random_bytes(24 * MIB),
    }
    with FakeHub(files) as hub:
        yield hub


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Without a token, and with a cache of its own."""
    home = tmp_path / "home"
    home.mkdir()
    nothing = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "")
    return {**nothing, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_CACHE": f"{home}/hub", "NO_PROXY": "*"}


Output = subprocess.CompletedProcess[str]


def run(environment: Mapping[str, str], *arguments: str, prefix: Sequence[str] = ()) -> Output:
    """Run Python with `arguments` to its end."""
    command = [*prefix, sys.executable, *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def fetch(environment: Mapping[str, str], at: str = "", *, hub_id: str = "somebody/tiny") -> Output:
    return run(environment, "-c", FETCH.format(at=at), hub_id)


def fetched_folder(done: Output) -> Path:
    """The folder that a process has got, which wrote nothing else to its stderr."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return Path(done.stdout.splitlines()[-1])


def line_of(done: Output) -> str:
    """The one line that a process ends with that could not get its model: only progress comes before."""
    assert done.returncode == 1, done.stdout + done.stderr
    *before, line = done.stderr.splitlines()
    assert all(re.match("downloading|checking", text) for text in before), done.stderr
    assert line.startswith("kunserve: ")
    return line


def refused(environment: Mapping[str, str], prefix: Sequence[str] = ()) -> str:
    """The one line of the real command."""
    flags = ("--model", "somebody/tiny", "--devices", "cpu:1", "--port", str(free_port()))
    return line_of(run(environment, "-m", "kunserve.server", *flags, prefix=prefix))


def assert_whole(folder: Path, hub: FakeHub) -> None:
    """Every file that we need is there and right, and no other; nothing is left to be checked."""
    here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert here == {name: data for name, data in hub.files.items() if name != "README.md" and "original" not in name}
    assert not list(folder.parents[1].glob("kunserve-*"))


# --- what goes well -------------------------------------------------------------------------------------------------


def test_a_server_downloads_its_model_and_later_needs_no_network(
    environment: dict[str, str], hub: FakeHub, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", tmp_path / "tiny")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ("--model", hub.hub_id, "--devices", "cpu:1", "--device-memory", "64MiB", "--max-model-len", "512")
    with running_server(*flags, environment=environment) as server:
        assert re.search(r"^downloading somebody/tiny \(.* MiB\)$", server.log, re.MULTILINE)
        assert "checking somebody/tiny" in server.log
        assert "Traceback" not in server.log and "it/s" not in server.log
    assert set(hub.fetched()) == set(hub.files)
    num_asked = len(hub.asked)
    hub.close()
    with running_server(*flags, environment=environment) as server:
        assert not re.search("downloading|checking", server.log)
    assert len(hub.asked) == num_asked


def test_progress_says_how_much_has_come(environment: dict[str, str], hub: FakeHub) -> None:
    done = fetch(environment)
    assert_whole(fetched_folder(done), hub)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["0% downloading somebody/tiny", "0% downloading somebody/tiny (25 MiB)"]
    shares = [int(match[1]) for line in lines if (match := re.match(r"(\d+)% downloading somebody/tiny \(", line))]
    assert shares == sorted(shares)
    assert 0 < shares[-2] < 100
    assert shares[-1] == 100
    checks = [line for line in lines if "checking" in line]
    assert (checks[0], checks[-1]) == ("0% checking somebody/tiny", "100% checking somebody/tiny")


def test_of_two_at_once_one_downloads_and_the_other_waits(environment: dict[str, str], hub: FakeHub) -> None:
    command = [sys.executable, "-c", FETCH.format(at=PAUSE_BEFORE_THE_CHECK), hub.hub_id]
    settings = {**os.environ, **environment}
    with subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdin is not None
        while "checking" not in first.stdout.readline():
            pass
        command[2] = FETCH.format(at="")
        with subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "0% another process downloads somebody/tiny: waiting for it\n"
            first.stdin.close()
            rest = second.stdout.read().splitlines()
    assert first.returncode == second.returncode == 0
    assert len(rest) == 1
    assert_whole(Path(rest[0]), hub)
    assert all(starts == [0] for starts in hub.fetched().values())


# --- what the Hub does not give -------------------------------------------------------------------------------------


def test_a_gated_model_needs_a_token_of_who_accepted_its_licence(environment: dict[str, str], hub: FakeHub) -> None:
    hub.is_gated = True
    page = f"{hub.url}/somebody/tiny"
    assert refused(environment) == (
        f"kunserve: somebody/tiny is gated: accept its licence on {page} and give a token of that account "
        "(HF_TOKEN, or `hf auth login`)"
    )
    line = refused({**environment, "HF_TOKEN": "hf_of_somebody_else"})
    assert "the account of the token may not read it" in line and page in line and "HF_TOKEN" in line
    assert_whole(fetched_folder(fetch({**environment, "HF_TOKEN": TOKEN})), hub)
    assert "hf_" not in line


def test_a_model_that_is_not_there(environment: dict[str, str], hub: FakeHub) -> None:
    hub.hub_id = "somebody/tinny"
    says = f"kunserve: {hub.url} has no model somebody/tiny, or none that you may see: check the spelling; if it is "
    assert refused(environment).startswith(f"{says}private, give a token")
    assert line_of(fetch({**environment, "HF_TOKEN": TOKEN})).startswith(says)
    assert "no model 'a--b/c'" in line_of(fetch(environment, hub_id="a--b/c"))


def test_a_model_in_another_format(environment: dict[str, str], hub: FakeHub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"weights"}
    assert "somebody/tiny has no safetensors files" in line_of(fetch(environment))
    assert not hub.fetched()


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (500, {}, r"has failed at somebody/tiny \(500 Internal Server Error\): start again later"),
        (429, {"Retry-After": "7"}, r"takes no more requests .*\(429 .*\): wait 7 s, then .*give a token.*HF_TOKEN"),
    ],
)
def test_a_hub_in_trouble(
    status: int, headers: dict[str, str], message: str, environment: dict[str, str], hub: FakeHub
) -> None:
    hub.status, hub.headers = status, headers
    assert re.search(message, refused(environment))


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, r"refuses the token .*\(401 "),
        (403, {}, r"refuses the token for somebody/tiny \(403 Forbidden\).*HF_TOKEN"),
        (404, {}, r"answers 404 Not Found for somebody/tiny: is HF_ENDPOINT the address of a Hub\?"),
        (429, {}, r"wait some minutes, then start again later$"),
        (503, {}, r"\(503 Service Unavailable\)"),
    ],
)
def test_other_answers_to_a_token(
    status: int, headers: dict[str, str], message: str, environment: dict[str, str], hub: FakeHub
) -> None:
    hub.status, hub.headers = status, headers
    assert re.search(message, line_of(fetch({**environment, "HF_TOKEN": TOKEN})))


def test_a_hub_that_never_answers(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line = line_of(fetch({**environment, "HF_ENDPOINT": url, "HF_HUB_ETAG_TIMEOUT": "1"}))
    assert re.search(rf"cannot fetch somebody/tiny from {url} \(timed out\): start again later", line)


# --- what happens on the way ----------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_goes_on_where_it_was(environment: dict[str, str], hub: FakeHub) -> None:
    hub.cuts = {SECOND: [15 * MIB]}
    done = fetch(environment)
    assert_whole(fetched_folder(done), hub)
    assert hub.fetched()[SECOND] == [0, CHUNK]
    assert hub.num_sent[SECOND] == 15 * MIB + 24 * MIB - CHUNK
    assert re.search(r"^\d+% downloading .*: Error while downloading .*Trying to resume", done.stdout, re.MULTILINE)


def test_after_a_lost_connection_the_next_start_fetches_what_is_missing(
    environment: dict[str, str], hub: FakeHub
) -> None:
    hub.cuts = {SECOND: [0] * 100}
    line = refused(environment)
    assert re.search(r"cannot fetch somebody/tiny .*: start again to fetch the rest \(files that are complete", line)
    hub.cuts, hub.asked = {}, []
    offline = line_of(fetch({**environment, "HF_HUB_OFFLINE": "1"}))
    assert "are not on this machine" in offline and "HF_HUB_OFFLINE is set" in offline
    assert not hub.asked
    assert_whole(fetched_folder(fetch(environment)), hub)
    assert hub.fetched() == {SECOND: [0]}


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_network_and_without_the_model(
    is_offline: bool, environment: dict[str, str], hub: FakeHub, tmp_path: Path
) -> None:
    url = hub.url
    hub.close()
    cache = tmp_path / "home" / "hub"
    line = refused({**environment, "HF_HUB_OFFLINE": str(int(is_offline))})
    assert line == (
        f"kunserve: the weights of somebody/tiny are not on this machine (in {cache}), and HF_HUB_OFFLINE is set; "
        f"get them with `hf download somebody/tiny` where {url} can be reached"
        if is_offline
        else f"kunserve: cannot fetch somebody/tiny from {url} (Connection refused): start again later, or give a "
        "local folder"
    )


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_network_a_complete_cache_serves(is_offline: bool, environment: dict[str, str], hub: FakeHub) -> None:
    folder = fetched_folder(fetch(environment))
    hub.close()
    done = fetch({**environment, "HF_HUB_OFFLINE": str(int(is_offline))})
    assert done.stdout == f"{folder}\n"
    assert fetched_folder(done) == folder


def test_a_file_that_is_lost_from_the_cache_is_fetched_again(environment: dict[str, str], hub: FakeHub) -> None:
    folder = fetched_folder(fetch(environment))
    (folder / "config.json").resolve().unlink()
    (folder / FIRST).resolve().unlink()
    hub.asked = []
    assert_whole(fetched_folder(fetch(environment)), hub)
    assert set(hub.fetched()) == {"config.json", FIRST}


# --- wrong content --------------------------------------------------------------------------------------------------


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_damaged_file_is_refused_and_fetched_again(environment: dict[str, str], hub: FakeHub) -> None:
    hub.sent_instead = {SECOND: damaged(hub.files[SECOND])}
    assert refused(environment) == (
        f"kunserve: somebody/tiny: wrong checksum of {SECOND}, damaged on its way or on this disk and deleted now; "
        "start again to fetch it once more"
    )
    hub.sent_instead, hub.asked = {}, []
    assert_whole(fetched_folder(fetch(environment)), hub)
    assert hub.fetched() == {SECOND: [0]}


def test_who_dies_before_the_check_leaves_nothing_that_is_trusted(environment: dict[str, str], hub: FakeHub) -> None:
    hub.sent_instead = {FIRST: damaged(hub.files[FIRST])}
    assert fetch(environment, DIE_BEFORE_THE_CHECK).returncode == 9
    hub.close()
    done = fetch({**environment, "HF_HUB_OFFLINE": "1"})
    assert f"wrong checksum of {FIRST}," in line_of(done)
    assert "are not on this machine" in line_of(fetch({**environment, "HF_HUB_OFFLINE": "1"}))


def test_who_dies_before_the_check_leaves_what_the_next_start_checks(environment: dict[str, str], hub: FakeHub) -> None:
    assert fetch(environment, DIE_BEFORE_THE_CHECK).returncode == 9
    hub.close()
    done = fetch(environment)
    assert_whole(fetched_folder(done), hub)
    assert "100% checking somebody/tiny" in done.stdout


# --- no room --------------------------------------------------------------------------------------------------------

Disk = Callable[[int], list[str]]


@pytest.fixture
def small_disk(environment: dict[str, str]) -> Disk:
    """What makes a command run with HF_HOME on a disk of so many MiB, seen by that command alone."""
    ways = (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"])
    errors = []

    def prefix(way: list[str], size_mib: int) -> list[str]:
        script = f'mount -t tmpfs -o size={size_mib}m tmpfs "$0" && exec "$@"'
        return [*way, "sh", "-c", script, environment["HF_HOME"]]

    for way in ways:
        done = subprocess.run([*prefix(way, 1), "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return lambda size_mib: prefix(way, size_mib)
        errors.append(done.stderr.strip())
    pytest.skip(f"this machine lets nobody mount a small disk, not even in a namespace of its own: {errors}")


def test_what_does_not_fit_is_refused_before_the_first_byte(
    environment: dict[str, str], hub: FakeHub, small_disk: Disk
) -> None:
    line = refused(environment, small_disk(16))
    folder = re.escape(environment["HF_HUB_CACHE"])
    assert re.search(rf"somebody/tiny needs 25 MiB more in {folder}, whose disk has 1[56] MiB free: make", line)
    assert not hub.fetched()


def test_a_disk_that_fills_meanwhile(environment: dict[str, str], hub: FakeHub, small_disk: Disk) -> None:
    hub.files = {name: data for name, data in hub.files.items() if name != FIRST}
    done = run(environment, "-c", FETCH.format(at=FILL_THE_DISK), hub.hub_id, prefix=small_disk(48))
    assert "No space left on device" in done.stdout  # of the ballast
    folder = re.escape(environment["HF_HUB_CACHE"])
    assert re.search(rf"somebody/tiny needs 24 MiB more in {folder}, whose disk has .* MiB free", line_of(done))


def test_a_home_that_cannot_be_written(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = line_of(fetch({**environment, "HF_HUB_CACHE": f"{tmp_path}/file/hub"}))
    assert re.search(rf"cannot write {tmp_path}/file/hub.*: Not a directory; set HF_HOME to a folder that has", line)
