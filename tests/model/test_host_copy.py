"""Which host copy of the weights is kept, from figures alone."""

from __future__ import annotations

import pytest

from kunserve.errors import ConfigError
from kunserve.model.host_copy import MARGIN_BYTES, HostCopy, choose_host_copy
from kunserve.sizes import format_size

WEIGHTS = 141 * 10**9


def choose(asked: HostCopy, available_bytes: int, *, are_gpus: bool = True) -> tuple[HostCopy, str]:
    return choose_host_copy(asked, are_gpus=are_gpus, num_bytes=WEIGHTS, available_bytes=available_bytes)


@pytest.mark.parametrize(
    ("available_bytes", "kind"),
    [
        (WEIGHTS + MARGIN_BYTES, HostCopy.PINNED),
        (WEIGHTS + MARGIN_BYTES - 1, HostCopy.MAPPED),
        (64 << 30, HostCopy.MAPPED),
    ],
)
def test_gpus_get_a_pinned_copy_where_it_fits_with_a_margin(available_bytes: int, kind: HostCopy) -> None:
    chosen, because = choose(HostCopy.AUTO, available_bytes)
    assert chosen is kind
    assert f"needs 131.3 GiB, and {format_size(available_bytes)} of host memory are available" in because


def test_cpu_devices_read_the_mapped_files() -> None:
    assert choose(HostCopy.AUTO, 1 << 50, are_gpus=False)[0] is HostCopy.MAPPED


@pytest.mark.parametrize("are_gpus", [True, False])
@pytest.mark.parametrize("asked", [HostCopy.PINNED, HostCopy.MAPPED, HostCopy.NONE])
def test_what_is_asked_for_is_what_is_kept(asked: HostCopy, are_gpus: bool) -> None:
    assert choose(asked, WEIGHTS, are_gpus=are_gpus) == (asked, f"--host-copy {asked}")


def test_a_copy_that_cannot_be_is_refused_with_figures() -> None:
    message = r"^--host-copy pinned needs 131\.3 GiB, and 64\.0 GiB .*; start with --host-copy mapped$"
    with pytest.raises(ConfigError, match=message):
        choose(HostCopy.PINNED, 64 << 30)
