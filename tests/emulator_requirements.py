"""What tests in the emulator need. CI must have it; elsewhere its absence skips them, and the reason is named."""

import os

import pytest
from emulator import compiler_missing


def require_emulator() -> None:
    """For the top of a module."""
    if reason := compiler_missing():
        if os.environ.get("CI", "").lower() in ("true", "1"):
            raise RuntimeError(f"CI has to run the kernels: {reason}")
        pytest.skip(reason, allow_module_level=True)
