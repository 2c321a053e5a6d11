"""Describe this machine: versions, processor, and the BLAS that NumPy's matrix products run on.

Every function takes what it interprets as arguments; `survey` collects that from the running system.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import gpuback
from gpuback._backends.registry import BackendStatus

REQUIRED = ("numpy", "ml_dtypes", "safetensors", "threadpoolctl")
OPTIONAL = ("cupy", "typer", "rich", "matplotlib", "scikit-learn")
# CuPy is published once for each CUDA version, under another name each time.
PUBLISHED_AS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}

SIMD_THAT_MATTERS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)
AVX512_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")


@dataclass(frozen=True)
class Cpu:
    """A processor.

    Attributes:
        model: as it calls itself.
        cores: logical ones.
        usable_cores: those that this process may run on.
        simd: the instruction sets that matter here, as Linux names them; elsewhere NumPy's names.
    """

    model: str
    cores: int
    usable_cores: int
    simd: tuple[str, ...]

    @property
    def has_avx512(self) -> bool:
        return any(name in ("avx512f", "AVX512F", "X86_V4") for name in self.simd)


@dataclass(frozen=True)
class Blas:
    """The library behind NumPy's matrix products; None where nothing tells.

    Attributes:
        kernel: the kernel set that the library chose, e.g. "SkylakeX".
    """

    library: str | None
    version: str | None
    threads: int | None
    kernel: str | None


@dataclass(frozen=True)
class Machine:
    """Everything `gpuback info` reports.

    Attributes:
        versions: name → version, None where it is not installed.
        advice: what would make it faster, or None.
    """

    versions: Mapping[str, str | None]
    backends: Mapping[str, BackendStatus]
    cpu: Cpu
    blas: Blas
    advice: str | None


def survey() -> Machine:
    """Describe this machine."""
    config = _numpy_config()
    processor = cpu_of(
        _content("/proc/cpuinfo"),
        fallback_model=platform.processor() or platform.machine(),
        fallback_simd=_numpy_simd(config),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    )
    blas = blas_of(threadpool_info(), config)
    return Machine(versions_of(), gpuback.backends(), processor, blas, advice_for(processor, blas))


def versions_of(lookup: Callable[[str], str] = importlib.metadata.version) -> dict[str, str | None]:
    """gpuback's and Python's version, and those of the packages it needs or can use; None for what is not installed."""
    versions: dict[str, str | None] = {"gpuback": gpuback.__version__, "python": platform.python_version()}
    for name in (*REQUIRED, *OPTIONAL):
        versions[name] = None
        for package in PUBLISHED_AS.get(name, (name,)):
            try:
                versions[name] = lookup(package)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def cpu_of(
    cpuinfo: str, *, fallback_model: str, fallback_simd: Iterable[str], cores: int, usable_cores: int | None
) -> Cpu:
    """Read the processor out of /proc/cpuinfo's text; use the fallbacks where there is no such file."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    simd = tuple(name for name in SIMD_THAT_MATTERS if name in flags) if flags else tuple(fallback_simd)
    return Cpu(fields.get("model name", fallback_model), cores, usable_cores or cores, simd)


def blas_of(pools: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Blas:
    """Find the BLAS that NumPy uses.

    Args:
        pools: what `threadpoolctl.threadpool_info` returned, NumPy's library before those loaded later; may be empty.
        config: what `numpy.show_config` knows, as of when NumPy was built: neither threads nor kernel.
    """
    for pool in pools:
        if pool.get("user_api") == "blas":
            return Blas(
                pool.get("internal_api"), pool.get("version"), pool.get("num_threads"), pool.get("architecture")
            )
    built_with = config.get("Build Dependencies", {}).get("blas", {})
    return Blas(built_with.get("name"), built_with.get("version"), None, None)


def advice_for(processor: Cpu, blas: Blas) -> str | None:
    """Advise what to set where OpenBLAS leaves AVX-512 unused, as it does on processors that it does not know."""
    if not processor.has_avx512 or "openblas" not in (blas.library or "") or blas.kernel in (None, *AVX512_KERNELS):
        return None
    return (
        f"OpenBLAS runs its {blas.kernel} kernel, for AVX2, on a CPU with AVX-512. OPENBLAS_CORETYPE=SkylakeX in the"
        " environment makes float32 matrix products about 1.8 times faster on Zen 5 (no faster on Zen 4, whose units"
        " are half as wide)."
    )


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _numpy_config() -> Mapping[str, Any]:
    config: Mapping[str, Any] | None = np.show_config(mode="dicts")
    return config or {}


def _numpy_simd(config: Mapping[str, Any]) -> list[str]:
    extensions = config.get("SIMD Extensions", {})
    return [*extensions.get("baseline", ()), *extensions.get("found", ())]
