"""The switch of the kernels for Hopper. They have not run on a GPU yet, so they are off unless it is set."""

from __future__ import annotations

import os

from gpuback._cuda.launch import DeviceLimits
from gpuback.errors import BackendError, OptionError

SWITCH = "GPUBACK_HOPPER"
"""The environment variable; see `switched_on`."""

HOPPER = (9, 0)
"""The one compute capability that has `wgmma` and the instructions beside it."""


def switched_on() -> bool:
    """Say whether the user wants kernels for Hopper: yes for 1, no for 0, nothing, or no variable.

    Raises:
        OptionError: another value.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise OptionError(f"environment variable {SWITCH}: expected 0 or 1, got {value!r}")
    return value == "1"


def require_hopper(what: str, limits: DeviceLimits, device_id: int, remedy: str) -> None:
    """Refuse what needs Hopper on another device.

    Raises:
        BackendError: names the device's capability and the one that is needed.
    """
    if limits.capability != HOPPER:
        major, minor = limits.capability
        raise BackendError(
            f"{what} needs a GPU of compute capability 9.0 (Hopper: TMA and wgmma), CUDA device {device_id} has "
            f"{major}.{minor}; {remedy}"
        )


def switch_in_words(limits: DeviceLimits) -> str:
    """Say in a clause for `explain` whether plans may use the kernels for Hopper; empty on other devices."""
    if limits.wgmma:
        return f"kernels for Hopper are on ({SWITCH}=1)"
    return f"kernels for Hopper are off ({SWITCH}=1 turns them on)" if limits.capability == HOPPER else ""
