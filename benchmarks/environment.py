"""What figures belong to: the machine, its versions, and the variables that contestants' processes get."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

from benchmarks.results import Environment
from gpuback import machine

PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "scikit-learn", "threadpoolctl")
GPU_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy", "nvmath-python", "tinycudann")

AVX512_KERNEL = {"OPENBLAS_CORETYPE": "SkylakeX"}


def of_cpu() -> Environment:
    """This machine's processor."""
    here = machine.survey()
    kernel = here.blas.kernel
    if numpy_variables():
        kernel = f"{AVX512_KERNEL['OPENBLAS_CORETYPE']} by OPENBLAS_CORETYPE"
    threads = f"{here.blas.threads} threads" if here.blas.threads else None
    library = " ".join(filter(None, (here.blas.library, here.blas.version)))
    return Environment(
        device=here.cpu.model,
        kind="cpu",
        cores=here.cpu.usable_cores,
        commit=commit(),
        date=now(),
        versions=versions(PACKAGES),
        blas=", ".join(filter(None, (library or "BLAS unknown", kernel, threads))),
    )


def of_gpu() -> Environment:
    """CuPy's current device."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    cuda = {"CUDA": _cuda(runtime.runtimeGetVersion()), "CUDA driver": _cuda(runtime.driverGetVersion())}
    return Environment(
        device=properties["name"].decode(),
        kind="gpu",
        cores=int(properties["multiProcessorCount"]),
        commit=commit(),
        date=now(),
        versions={**versions((*GPU_PACKAGES, *PACKAGES)), **cuda},
        blas=f"cuBLAS {cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())}",
    )


def _cuda(version: int) -> str:
    """13020 is 13.2."""
    return f"{version // 1000}.{version % 1000 // 10}"


def numpy_variables() -> dict[str, str]:
    """For every process whose products are NumPy's: OpenBLAS's kernel for AVX-512, where the CPU has it and OpenBLAS
    does not choose one by itself. What the user has set stays.
    """
    advised = machine.survey().advice is not None and "OPENBLAS_CORETYPE" not in os.environ
    return dict(AVX512_KERNEL) if advised else {}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python, gpuback, and those of the packages that are installed."""
    known = machine.versions_of()
    found = {name: version for name in ("python", "gpuback") if (version := known[name])}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """GPUBACK_COMMIT, where there is no repository; else what git says."""
    if "GPUBACK_COMMIT" in os.environ:
        return os.environ["GPUBACK_COMMIT"]
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
