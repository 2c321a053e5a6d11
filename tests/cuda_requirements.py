"""What tests of kernels need. CI must have it; elsewhere its absence skips them, and the reason is named."""

import os
from functools import partial

import pytest

from gpuback._cuda import compiler
from gpuback._gates import disassembly
from gpuback.errors import BackendError


def require(*needs) -> None:
    try:
        for need in needs:
            need()
    except BackendError as error:
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"CI has to compile kernels: {error}")
        pytest.skip(str(error))


def require_nvrtc(*archs: str) -> None:
    require(compiler.load_nvrtc, *(partial(_require_known, arch) for arch in archs))


def require_gates(*archs: str) -> None:
    require_nvrtc(*archs)
    require(disassembly.disassembler)


def _require_known(arch: str) -> None:
    compiler.require_known(*compiler.load_nvrtc(), arch)
