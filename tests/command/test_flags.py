"""Flags around the engine: keys, files, and flags of vLLM's that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve.command.arguments import ServerConfig, parse_args
from kunserve.errors import ConfigError

VARIABLES = (
    *("KUNSERVE_API_KEY", "VLLM_API_KEY", "KUNSERVE_ADMIN_KEY", "VLLM_LOG_STATS_INTERVAL", "VLLM_LOGGING_LEVEL"),
)


@pytest.fixture(autouse=True)
def _no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def parse(text: str) -> ServerConfig:
    return parse_args(text.split())


def test_defaults() -> None:
    http = parse("m").http
    assert http.api_keys == http.admin_keys == () and http.ignored == {}
    assert http.uds is None and http.ssl_context() is None
    assert http.allowed_origins == ("*",)
    assert (http.logs_access, http.stats_interval_s) == (True, 10.0)
    config = parse("m")
    assert (config.shutdown_timeout_s, config.log_level, config.log_json) == (30.0, "info", False)
    assert (config.engine.max_num_queued_reqs, http.max_num_queued_tokens) == (1024, 4 << 20)  # bounded


def test_keys_come_from_flags_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert parse("m").http.api_keys == ("theirs",)
    monkeypatch.setenv("KUNSERVE_API_KEY", "ours")
    monkeypatch.setenv("KUNSERVE_ADMIN_KEY", "root")
    http = parse("m").http
    assert (http.api_keys, http.admin_keys) == (("ours", "theirs"), ("root",))
    http = parse("--api-key a --api-key b m --admin-key c").http
    assert (http.api_keys, http.admin_keys) == (("a", "b"), ("c",))


def test_the_scheduling_policy_says_whether_priorities_count() -> None:
    assert not parse("m").http.uses_priority
    assert not parse("m --scheduling-policy fcfs").http.uses_priority
    assert parse("m --scheduling-policy priority").http.uses_priority


def test_summary_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("m --disable-log-stats").http.stats_interval_s is None
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "2.5")
    assert parse("m").http.stats_interval_s == 2.5
    for text in ("0", "-1", "often", "inf", "nan"):
        monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", text)
        with pytest.raises(ConfigError, match="must be a number of seconds"):
            parse("m")


def test_flags_of_vllm_that_change_nothing() -> None:
    text = "m --trust-remote-code --cpu-offload-gb 0 --disable-cascade-attn -tp 2 --seed 3 --trust-remote-code"
    config = parse(text + " --cudagraph-capture-sizes 1 2 4 --port 99")
    assert list(config.http.ignored) == [
        *("--trust-remote-code", "--cpu-offload-gb", "--disable-cascade-attn", "-tp"),
        "--cudagraph-capture-sizes",
    ]
    assert config.http.ignored["--disable-cascade-attn"].startswith("the prefix cache")
    assert (config.engine.model, config.engine.seed, config.port) == ("m", 3, 99)


def test_the_prefix_cache_is_on_unless_it_is_turned_off() -> None:
    assert parse("m").engine.enable_prefix_caching
    assert not parse("m --no-enable-prefix-caching").engine.enable_prefix_caching


# Every flag of vLLM's that people have in their command lines (facts: CLI conventions), with a value that is common.
KNOWN = """--model m|--host 0.0.0.0|--port 8000|--api-key k|--served-model-name a b|--max-model-len 100
--gpu-memory-utilization 0.9|--num-gpu-blocks-override 10|--kv-cache-memory-bytes 99|--block-size 16
--tensor-parallel-size 1|-tp 1
--pipeline-parallel-size 1|-pp 1|--data-parallel-size 1|-dp 1|--max-num-seqs 4|--max-num-batched-tokens 512
--enable-prefix-caching|--no-enable-prefix-caching|--scheduling-policy fcfs|--watermark 0.0|--max-num-queued-reqs 5
--max-num-queued-tokens 5|--dtype auto|--kv-cache-dtype auto|--load-format auto|--seed 0|--trust-remote-code
--revision main|--download-dir /tmp|--generation-config auto|--override-generation-config {}|--enforce-eager
--cudagraph-capture-sizes 1 2|--chat-template x|--tool-call-parser hermes|--enable-auto-tool-choice
--reasoning-parser qwen3|--shutdown-timeout 3|--root-path /x|--ssl-keyfile a|--ssl-certfile b|--allowed-origins ["*"]
--uvicorn-log-level info|--enable-log-requests|--disable-log-stats|--enable-request-id-headers|--stream-interval 1
--default-chat-template-kwargs {"enable_thinking":false}|--tokenizer m|--load-format safetensors|--dtype half
--max_model_len 4096|--max-model-len=32k|--max-model-len auto|--max-num-batched-tokens 8K|--no-enforce-eager|-O3
--compilation-config.mode 3|--response-role assistant|--tokenizer-mode auto|--model-impl auto
--uds /tmp/x|--swap-space 4|--async-scheduling|--no-async-scheduling|--disable-log-requests|--max-log-len 5"""


@pytest.mark.parametrize("flag", KNOWN.replace("\n", "|").split("|"))
def test_flags_that_people_have_in_their_command_lines(flag: str) -> None:
    assert parse_args(["m", *flag.split()]).engine.model == "m"


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--quantization bitsandbytes", "invalid choice: 'bitsandbytes' (choose from 'awq', 'gptq'"),
        ("-q int8", "invalid choice: 'int8'"),
        ("--quantization-config {}", "a checkpoint says itself how it is quantized"),
        ("--tokenizer other", "--tokenizer other is not supported"),
        ("--revision abc", "--revision: invalid choice"),
        ("--speculative-config {}", "there is no speculative decoding"),
        ("--speculative-config.method ngram", "there is no speculative decoding"),
        ("--enable-lora --max-loras 4", "there are no LoRA adapters"),
        ("--cpu-offload-gb 10", "--cpu-offload-gb: invalid choice"),
        ('--allowed-methods ["GET"]', "--allowed-methods: invalid choice"),
        ("--max-model-lenn 5", "no such flag: --max-model-lenn; did you mean --max-model-len?"),
        ("--zzz=1", "no such flag: --zzz (see --help)\n"),
        ("another", "unexpected argument: another"),
        ("--max-model-len 1.5K", "not a number: 1.5K"),
    ],
)
def test_flags_that_would_change_something_are_not_ignored(
    flag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["m", *flag.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("python -m kunserve.server: ")
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5m", 1_500_000), ("auto", None)]
)
def test_numbers_as_vllm_reads_them(text: str, value: int | None) -> None:
    assert parse(f"m --max_model_len {text}").engine.max_model_len == value


def test_other_names_of_vllms_for_the_same() -> None:
    engine = parse("m --dtype half --load-format safetensors --no-enforce-eager").engine
    assert (engine.dtype, engine.load_format, engine.enforce_eager) == ("float16", "auto", False)


def test_arguments_of_the_template() -> None:
    http = parse('m --default-chat-template-kwargs {"enable_thinking":false}').http
    assert http.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="must not set tools"):
        parse('m --default-chat-template-kwargs {"tools":[]}')


def test_the_log_level_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, level in (("DEBUG", "debug"), ("CRITICAL", "info")):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", text)
        assert parse("m").log_level == level
    assert parse("m --log-level error").log_level == "error"


def test_sampling_defaults() -> None:
    http = parse("m").http
    assert (http.generation_config, http.sampling) == ("auto", {})
    http = parse('m --generation-config vllm --override-generation-config {"top_k":5}').http
    assert (http.generation_config, http.sampling) == ("vllm", {"top_k": 5})
    with pytest.raises(SystemExit):
        parse("m --override-generation-config 5")


@pytest.mark.parametrize(
    ("text", "origins"),
    [('["http://a","http://b"]', ("http://a", "http://b")), ("http://a", ("http://a",)), ("[]", ())],
)
def test_origins(text: str, origins: tuple[str, ...]) -> None:
    assert parse_args(["m", "--allowed-origins", text]).http.allowed_origins == origins


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(
        "model: other\nport: 81\nhost: 0.0.0.0\nserved-model-name: [a, b]\nmax_model_len: 99\npin: true\n"
        "enforce-eager: false\ndisable-log-stats: true\napi-key: [x, y]\nallowed-origins: ['http://a']\nseed: null\n"
    )
    config = parse(f"--config {path} --port 82")
    assert (config.engine.model, config.port, config.host) == ("other", 82, "0.0.0.0")
    assert (config.served_names, config.engine.max_model_len) == (("a", "b"), 99)
    assert config.engine.is_pinned and config.http.ignored == {} and config.http.stats_interval_s is None
    assert (config.http.api_keys, config.http.allowed_origins) == (("x", "y"), ("http://a",))
    assert parse(f"m --config={path}").engine.model == "m"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("port: [", "is not YAML"),
        ("- port", "must hold flags"),
        ("config: other.yaml", "must not name another"),
        ("port: 70000", "--port 70000"),
    ],
)
def test_config_files_that_cannot_be(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse(f"m --config {path}")
    assert message in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("m --max-num-queued-tokens 0", "--max-num-queued-tokens 0"),
        ("m --api-key=", "must not be empty"),
        ("m --max-body-memory 5", "--max-body-memory 5: must be at least 1MiB"),
        ("m --max-body-memory much", "not a size: 'much'"),
        ("m --response-store x.db --max-response-memory 0", "--response-store needs a --max-response-memory above 0"),
    ],
)
def test_values_that_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags)


def test_memory_for_bodies() -> None:
    assert parse("m").http.max_body_memory_bytes == 512 << 20
    assert parse("m --max-body-memory 2GiB").http.max_body_memory_bytes == 2 << 30


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    nothing = tmp_path / "cert.pem"
    with pytest.raises(ConfigError, match="cannot use the certificate"):
        parse(f"m --ssl-certfile {nothing}").http.ssl_context()
    nothing.write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot use the certificate"):
        parse(f"m --ssl-certfile {nothing}").http.ssl_context()
    with pytest.raises(ConfigError, match="needs --ssl-certfile"):
        parse(f"m --ssl-keyfile {nothing}").http.ssl_context()


def test_a_list_at_the_end_of_a_config_file_leaves_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("api-key: [x]\nserved-model-name: [a, b]\n")
    for flags in (f"m --config {path}", f"--config {path} m", f"--config={path} m"):
        config = parse(flags)
        assert (config.engine.model, config.served_names, config.http.api_keys) == ("m", ("a", "b"), ("x",))
    assert parse(f"m --config {path} --served-model-name c").served_names == ("c",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port: [1, 2]", "unexpected value '2': a list, for a flag that takes one value"),
        ("prot: 1", "no such flag: --prot; did you mean --port?"),
        ("dtype: [a, b, c]", "unexpected argument: c"),
        ("quantization: int8", "argument --quantization/-q: invalid choice: 'int8'"),
        ("port: many", "argument --port: invalid int value: 'many'"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_told_with_its_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse(f"m --config {path}")
    assert caught.value.message.startswith(f"{path}: {message}") and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--served-model-name=", "--served-model-name must not be empty"),
        ("--restore-hold nan", "--restore-hold nan: must be a number of seconds"),
        ("--restore-hold inf", "--restore-hold inf: must be a number of seconds"),
        ("--dtype int4", "--dtype int4: must be one of auto, float32"),
        ("--kv-cache-dtype int8", "--kv-cache-dtype int8 is not served: KV has 8 (e4m3), 16 or 32 bits; use one of"),
        (
            "--devices cpu:1 --kv-cache-dtype fp8",
            "fp8 is not served on CPU devices; use one of auto, float16, bfloat16",
        ),
        ("--kv-cache-dtype fp8_e5m2", "--kv-cache-dtype fp8_e5m2 is not served"),
        ("--config=", "cannot read the file of flags ''"),
    ],
)
def test_values_that_nobody_can_mean(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"m {flag}")
    assert message in caught.value.message


@pytest.mark.parametrize("flag", ["--uds=", "--allowed-origins=", '--allowed-origins=["a",""]'])
def test_nothing_where_something_is_needed(flag: str) -> None:
    with pytest.raises(SystemExit):
        parse(f"m {flag}")


def test_an_unknown_format_is_told_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, known in (("--tool-call-parser", "kimi_k2"), ("--reasoning-parser", "openai_gptoss")):
        with pytest.raises(SystemExit):
            parse_args(["m", flag, "hermis"])
        [line] = capsys.readouterr().err.splitlines()
        assert flag in line and "hermis" in line and known in line and "none" in line
        assert getattr(parse_args(["m", flag, "none"]).http, flag[2:].replace("-", "_")) == "none"
