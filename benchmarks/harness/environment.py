"""The environment of figures: the machine, the commit and its versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reports.results import Environment
from gpuback._cli import blas_kernels, machine

PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "scikit-learn", "threadpoolctl")
GPU_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy", "nvmath-python", "tinycudann")


def numpy_variables() -> dict[str, str]:
    """Name OpenBLAS's fastest kernels, as measured here, for every process whose products are NumPy's.

    The result is empty where the user has chosen, and with another BLAS. Where nothing was compared, it names
    OpenBLAS's own choice, so that all processes of a run have the same.
    """
    cpu, blas = machine.cpu_here(), machine.blas_here()
    if blas_kernels.VARIABLE in os.environ or "openblas" not in (blas.library or ""):
        return {}
    kernels = blas_kernels.compare(cpu, blas).fastest or blas.kernel
    return {blas_kernels.VARIABLE: kernels} if kernels else {}


def of_cpu(numpy_variables: Mapping[str, str]) -> Environment:
    """Describe this machine's processor, and the environment variables of contestants on NumPy."""
    here = machine.survey()
    kernel = next((f"{value} by {name}" for name, value in numpy_variables.items()), here.blas.kernel)
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
    """Describe CuPy's current device."""
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
    """Format CUDA's version: 13020 is 13.2."""
    return f"{version // 1000}.{version % 1000 // 10}"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """List the versions of Python, gpuback, and the installed ones of `packages`."""
    known = machine.versions_of()
    found = {name: version for name in ("python", "gpuback") if (version := known[name])}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return GPUBACK_COMMIT, which serves where there is no repository, or else git's description."""
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
