"""gpuback._cli.machine: what /proc/cpuinfo, threadpoolctl and NumPy's build say, on machines of all kinds."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import gpuback
from gpuback._cli import machine
from gpuback._cli.machine import Blas, Cpu, blas_of, cpu_of, survey, versions_of

ZEN_5 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model name\t: AMD EPYC 9655 96-Core Processor
flags\t\t: fpu sse sse2 sse4_2 avx f16c fma avx2 avx512f avx512bw avx512_bf16 avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRACE = "processor\t: 0\nFeatures\t: fp asimd asimdhp sve sve2 bf16\nCPU implementer\t: 0x41\n"


def pool(**changes: Any) -> dict[str, Any]:
    return {
        "user_api": "blas",
        "internal_api": "openblas",
        "version": "0.3.29",
        "num_threads": 8,
        "architecture": "Haswell",
    } | changes


def cpu(cpuinfo: str = ZEN_5) -> Cpu:
    return cpu_of(cpuinfo, fallback_model="arm64", fallback_simd=["ASIMD"], cores=4, usable_cores=2)


def test_cpu_of_linux() -> None:
    assert cpu() == Cpu(
        *("AMD EPYC 9655 96-Core Processor", 4, 2),
        ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16"),
        "AuthenticAMD 26",
    )
    assert cpu().has_avx512
    assert cpu(GRACE) == Cpu("arm64", 4, 2, ("asimd", "asimdhp", "bf16", "sve", "sve2"), "0x41")


def test_cpu_where_there_is_no_cpuinfo() -> None:
    assert cpu("") == Cpu("arm64", 4, 2, ("ASIMD",))
    assert not cpu("").has_avx2
    assert not cpu("").has_avx512
    windows = cpu_of("", fallback_model="Intel64", fallback_simd=["X86_V3", "X86_V4"], cores=8, usable_cores=None)
    assert windows.has_avx2
    assert windows.has_avx512
    assert windows.usable_cores == 8


def test_blas_is_the_first_that_was_loaded() -> None:
    openmp = {"user_api": "openmp", "internal_api": "openmp"}
    assert blas_of([openmp, pool(), pool(version="0.3.1")], {}) == Blas("openblas", "0.3.29", 8, "Haswell")
    mkl = pool(internal_api="mkl", version="2024.1")
    del mkl["architecture"]
    assert blas_of([mkl], {}) == Blas("mkl", "2024.1", 8, None)


def test_blas_that_threadpoolctl_does_not_know() -> None:
    config = {"Build Dependencies": {"blas": {"name": "accelerate", "version": "unknown"}}}
    assert blas_of([], config) == Blas("accelerate", "unknown", None, None)
    assert blas_of([], {}) == Blas(None, None, None, None)


def test_versions() -> None:
    installed = {"numpy": "2.1", "cupy-cuda12x": "13.4"}

    def lookup(package: str) -> str:
        try:
            return installed[package]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(package) from None

    versions = versions_of(lookup)
    assert versions["gpuback"] == gpuback.__version__
    assert versions["python"] is not None
    assert versions["numpy"] == "2.1"
    assert versions["cupy"] == "13.4"
    assert versions["rich"] is None
    assert set(versions) == {"gpuback", "python", *machine.REQUIRED, *machine.OPTIONAL}


def test_this_machine() -> None:
    found = survey()
    assert found.versions["numpy"]
    assert found.backends["numpy"].available
    assert found.cpu.model
    assert 1 <= found.cpu.usable_cores <= found.cpu.cores
    assert found.blas.library
