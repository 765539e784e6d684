"""The command line of the server, without starting one (`e2e/test_process.py` does)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kunserve.command import serving
from kunserve.command.arguments import parse_args
from kunserve.config import parse_devices
from kunserve.errors import ConfigError
from kunserve.model.card import list_cards
from kunserve.model.host_copy import HostCopy
from kunserve.policies import OverloadPolicy


def test_defaults() -> None:
    config = parse_args(["--model", "smollm2-135m"])
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.served_names == ("smollm2-135m",)
    assert config.engine.model == "smollm2-135m"
    assert config.engine.devices == parse_devices("auto")
    assert config.engine.block_size == 16
    assert config.engine.device_memory_bytes is config.engine.num_blocks_override is None


def test_every_flag_arrives() -> None:
    flags = (
        "--model m --served-model-name a b --host 0.0.0.0 --port 81 --devices cpu:3 --device-memory 18GiB"
        " --block-size 32 --max-model-len 99 --dtype float64 --load-format dummy --seed 5 --max-num-batched-tokens 7"
        " --max-num-seqs 8 --max-num-queued-reqs 9 -pp 3 --overload-policy queue --watermark 0.25"
        " --host-copy none --shutdown-timeout 1.5 --log-level debug --log-format json"
    )
    config = parse_args(flags.split())
    engine = config.engine
    assert (config.served_names, config.host, config.port) == (("a", "b"), "0.0.0.0", 81)
    assert (config.shutdown_timeout_s, config.log_level, config.log_json) == (1.5, "debug", True)
    assert (engine.model, engine.devices.indices, engine.device_memory_bytes) == ("m", (0, 1, 2), 18 << 30)
    assert (engine.block_size, engine.max_model_len, engine.dtype, engine.load_format) == (32, 99, "float64", "dummy")
    assert (engine.seed, engine.max_num_batched_tokens, engine.max_num_seqs) == (5, 7, 8)
    assert (engine.max_num_queued_reqs, engine.pipeline_parallel_size) == (9, 3)
    assert (engine.overload_policy, engine.watermark) == (OverloadPolicy.QUEUE, 0.25)
    assert engine.host_copy is HostCopy.NONE
    assert parse_args(["m", "--num-gpu-blocks-override", "256"]).engine.num_blocks_override == 256
    assert parse_args(["m", "--kv-cache-memory-bytes", "1048576"]).engine.kv_bytes == 1 << 20
    assert parse_args(["m", "--kv-cache-memory-bytes", "2GiB"]).engine.kv_bytes == 2 << 30


def test_the_model_may_stand_alone() -> None:
    assert parse_args(["smollm2-135m", "--port", "1"]).engine.model == "smollm2-135m"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no model: give --model NAME"),
        ("m --devices tpu:4", "not devices: 'tpu:4'"),
        ("m --device-memory lots", "not a size: 'lots'"),
        ("m --max-model-len 1", "--max-model-len 1"),
        ("m --device-memory 1GiB --num-gpu-blocks-override 4", "not both"),
        ("m --device-memory 1GiB --kv-cache-memory-bytes 4", "not both"),
        ("m --kv-cache-memory-bytes 0", "--kv-cache-memory-bytes 0"),
        ("m --port 70000", "--port 70000: must be between 1 and 65535"),
        ("m --shutdown-timeout -1", "--shutdown-timeout -1.0: must be at least 0"),
    ],
)
def test_values_that_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(flags.split())
    assert message in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "flags", ["m --no-such-flag", "m --port many", "m --load-format gguf", "m --overload-policy x"]
)
def test_unknown_flags_and_choices_are_refused_in_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(flags.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("python -m kunserve.server: ") and error.endswith("(see --help)\n") and error.count("\n") == 1
    )


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--device-memory" in shown and "--pipeline-parallel-size" in shown and "Example:" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chat-template", "none.jinja"), "cannot read the chat template none.jinja"),
        (("--chat-template", "bad.jinja"), "the chat template does not compile"),
        (("--generation-config", "nowhere"), "nowhere/generation_config.json"),
        (("--override-generation-config", '{"temperature": -3}'), "--override-generation-config: `temperature`"),
    ],
)
async def test_files_are_read_before_the_model(
    flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def launch(*_: Any) -> None:
        raise AssertionError("loading has begun")

    monkeypatch.setattr("kunserve.engine.launch.launch.launch", launch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=message):
        await serving.serve(parse_args(["m", *flags]))


def test_flags_of_gpus_do_nothing_on_cpus() -> None:
    def ignored(flags: str) -> list[str]:
        return list(serving.flags_without_effect(parse_args(["m", *flags.split()]).engine))

    assert ignored("--enforce-eager --gpu-memory-utilization 0.5") == ["--gpu-memory-utilization", "--enforce-eager"]
    assert ignored("--devices cuda:0 --enforce-eager") == ignored("") == []


@pytest.mark.parametrize(
    ("module", "arguments", "refusal"),
    [
        ("kunserve.server", "smollm2-135m --no-such-flag", "no such flag: --no-such-flag"),
        ("kunserve.server", "smollm2-135m --port many", "--port: invalid int value: 'many'"),
        ("kunserve.server", "smollm2-135m --block-size 0", "--block-size 0: must be at least 1"),
        ("kunserve.server", "smolm2", "did you mean 'smollm2-135m'?"),
        (
            "kunserve.server",
            "FOLDER",
            "x.gguf: the file is damaged or its download is not complete; fetch it again (it is empty)",
        ),
        (
            "kunserve.server",
            "FOLDER/x.gguf",
            "x.gguf: the file is damaged or its download is not complete; fetch it again (it is empty)",
        ),
        ("kunserve.sim", "--policy none", "--policy: invalid choice: 'none'"),
        ("kunserve.sim", "--model none", "no model 'none'"),
    ],
)
def test_what_is_wrong_is_told_without_importing_torch(
    module: str, arguments: str, refusal: str, tmp_path: Path
) -> None:
    (tmp_path / "x.gguf").touch()
    script = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None  # an import would fail\n"
        f"sys.argv[1:] = {arguments.replace('FOLDER', str(tmp_path)).split()!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode and refusal in lines[-1] and not any("Traceback" in line for line in lines), done.stderr


def test_help_has_groups_and_no_empty_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "(default: None)" not in shown and "(default: False)" not in shown
    assert "(default: 16)" in shown and "(default: on)" in shown and "(default: 0)" in shown
    assert all(card in "".join(shown.split()) for card in list_cards())
    for group in ("model", "devices and memory", "batching and queue", "overload", "listening", "log and shutdown"):
        assert f"\n{group}:\n" in shown


def test_a_folder_is_called_by_its_own_name_or_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    for path in (str(folder), f"{folder}/"):
        assert parse_args(["--model", path]).served_names == ("some-model", path)
    assert parse_args(["--model", str(folder), "--served-model-name", "a"]).served_names == ("a",)
    assert parse_args(["--model", "org/some-model"]).served_names == ("org/some-model",)
