"""What tests need of the machine. CI must have g++ and NVRTC; elsewhere what is missing skips tests and is named."""

import os
from functools import partial

import pytest

import gpuback
from gpuback._cuda import compiler
from gpuback._gates import disassembly
from gpuback.errors import BackendError


def on_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def require(*needs) -> None:
    """Calls each of them; what raises BackendError is missing."""
    try:
        for need in needs:
            need()
    except BackendError as error:
        if on_ci():
            pytest.fail(f"CI has to compile kernels: {error}")
        pytest.skip(str(error))


def require_nvrtc(*archs: str) -> None:
    require(compiler.load_nvrtc, *(partial(_require_known, arch) for arch in archs))


def require_gates(*archs: str) -> None:
    require_nvrtc(*archs)
    require(disassembly.disassembler)


def _require_known(arch: str) -> None:
    compiler.require_known(*compiler.load_nvrtc(), arch)


def require_emulator() -> None:
    """For the top of a module."""
    from emulator import compiler_missing  # it cannot be imported everywhere

    if reason := compiler_missing():
        if on_ci():
            raise RuntimeError(f"CI has to run the kernels: {reason}")
        pytest.skip(reason, allow_module_level=True)


def require_gpu() -> None:
    """For a fixture: asking at a module's top would start CUDA in every run of the tests."""
    status = gpuback.backends()["cupy"]
    if not status.available:
        pytest.skip(status.reason)
