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
OPTIONAL = ("cupy", "typer", "rich", "matplotlib", "scikit-learn", "pandas", "pyarrow")
# CuPy is published once for each CUDA version, under another name each time.
PUBLISHED_AS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}

SIMD_THAT_MATTERS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)
REVISION = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")


@dataclass(frozen=True)
class Cpu:
    """A processor.

    Attributes:
        model: as it calls itself.
        revision: vendor, family, model and stepping, where /proc/cpuinfo tells.
        cores: logical ones.
        usable_cores: those that this process may run on.
        simd: the instruction sets that matter here, as Linux names them; elsewhere NumPy's names.
    """

    model: str
    cores: int
    usable_cores: int
    simd: tuple[str, ...]
    revision: str = ""

    @property
    def has_avx2(self) -> bool:
        return any(name in ("avx2", "AVX2", "X86_V3", "X86_V4") for name in self.simd)

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
    """

    versions: Mapping[str, str | None]
    backends: Mapping[str, BackendStatus]
    cpu: Cpu
    blas: Blas


def survey() -> Machine:
    """Describe this machine."""
    return Machine(versions_of(), gpuback.backends(), cpu_here(), blas_here())


def cpu_here() -> Cpu:
    """Describe this machine's processor."""
    return cpu_of(
        _content("/proc/cpuinfo"),
        fallback_model=platform.processor() or platform.machine(),
        fallback_simd=_numpy_simd(_numpy_config()),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    )


def blas_here() -> Blas:
    """Describe the BLAS of this process."""
    return blas_of(threadpool_info(), _numpy_config())


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
    revision = " ".join(fields[name] for name in REVISION if name in fields)
    return Cpu(fields.get("model name", fallback_model), cores, usable_cores or cores, simd, revision)


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
