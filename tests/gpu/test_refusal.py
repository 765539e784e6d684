from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from kunserve.errors import DeviceError, DeviceLostError, EngineError
from kunserve.gpu.refusal import is_refusal, log_failure


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DeviceError("refused"), True),
        (DeviceLostError("gone"), True),
        (OSError("refused"), True),
        (EngineError("planned to fit"), False),
        (TypeError("a bug"), False),
        (RuntimeError("of torch, whatever it means"), False),
        (ExceptionGroup("both", [OSError(), ExceptionGroup("", [DeviceError("")])]), True),
        (ExceptionGroup("one is a bug", [OSError(), TypeError()]), False),
    ],
)
def test_what_a_device_or_the_system_refuses_is_no_bug(error: Exception, expected: bool) -> None:
    assert is_refusal(error) is expected
    with capture_logs() as logs:
        log_failure("copy failed", error, request="r")
    [entry] = logs
    assert (entry["log_level"], entry.get("exc_info")) == (("warning", None) if expected else ("error", error))
    assert (entry["event"], entry["request"], entry["error"]) == ("copy failed", "r", repr(error))
