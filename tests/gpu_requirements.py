"""What tests marked `gpu` need. Elsewhere they are skipped, and the reason is named."""

import pytest

import gpuback


def require_gpu() -> None:
    """For a fixture: asking at a module's top would start CUDA in every run of the tests."""
    status = gpuback.backends()["cupy"]
    if not status.available:
        pytest.skip(status.reason)
