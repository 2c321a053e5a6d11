"""What the device allows: rates of large copies and products, and how many clusters of blocks run at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

KERNEL = 'extern "C" __global__ void empty() {}'

# Numbers of cuda.h: CUfunction_attribute, CUlaunchAttributeID.
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14
_CLUSTER_DIMENSION = 4


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute with a cluster's three dimensions, of a union of 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("dimensions", ctypes.c_uint * 3),
        ("_", ctypes.c_char * 52),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


def clusters(sizes: Sequence[int], shared_bytes: int, threads: int) -> dict[str, Any]:
    """Ask how many clusters run at once, for each number of blocks in one; a block fills a multiprocessor."""
    import cupy

    kernel = cupy.RawKernel(KERNEL, "empty")
    driver = ctypes.CDLL("libcuda.so.1")
    function = ctypes.c_void_p(kernel.kernel.ptr)
    found: dict[str, Any] = {}
    for attribute, value in ((_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes), (_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)):
        if code := driver.cuFuncSetAttribute(function, attribute, value):
            raise RuntimeError(f"cuFuncSetAttribute({attribute}, {value}) returned error {code}")
    for size in sizes:
        attribute = LaunchAttribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint * 3)(size, 1, 1))
        config = LaunchConfig(
            (ctypes.c_uint * 3)(size * 64, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1), shared_bytes, None,
            ctypes.pointer(attribute), 1,
        )  # fmt: skip
        count = ctypes.c_int()
        code = driver.cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(config))
        found[str(size)] = f"error {code}" if code else count.value
    said = ", ".join(f"{count} of {size} blocks" for size, count in found.items())
    return {"clusters": found, "said": f"{said}, {shared_bytes} bytes a block"}


def ceilings() -> dict[str, Any]:
    """Measure the rates that the roofline is drawn with, and describe the machine."""
    import dataclasses

    from benchmarks.harness import environment, gpu_timing

    rates = gpu_timing.ceilings()
    said = ", ".join(
        f"{name} {rate / 1e12:.3g} {'TB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in rates.items()
    )
    return {"ceilings": rates, "environment": dataclasses.asdict(environment.of_gpu()), "said": said}
