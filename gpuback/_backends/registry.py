"""List the backends, tell whether this machine can use them, and find the backend of an array."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpuback._backends.numpy.ops import NumpyOps
from gpuback._backends.protocol import Ops
from gpuback._core.typing import Array
from gpuback._cuda.hopper import SWITCH
from gpuback.errors import BackendError, DeviceError, DtypeError, require_known


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and why or why not."""

    available: bool
    reason: str


def _numpy_status() -> BackendStatus:
    return BackendStatus(True, f"NumPy {np.__version__}, always there")


@functools.cache
def _cupy_status() -> BackendStatus:
    try:
        import cupy
    except ImportError as error:
        return BackendStatus(
            False, f"CuPy cannot be imported ({error}); pip install '.[cuda12]' or '.[cuda13]' in gpuback's source tree"
        )
    try:
        if not cupy.is_available():
            return BackendStatus(False, "CuPy is installed, but finds no CUDA device or no driver")
        cupy.empty(1)
        name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    except RuntimeError as error:
        return BackendStatus(False, f"CuPy finds a CUDA device, but cannot use it: {error}")
    switch = f", {SWITCH}={os.environ[SWITCH]}" if os.environ.get(SWITCH) else ""
    return BackendStatus(True, f"CuPy {cupy.__version__} on {name}{switch}")


def _numpy_ops(reproducible: bool) -> Ops:
    if reproducible:
        from gpuback._backends.exact.numpy_ops import ReproducibleNumpyOps

        return ReproducibleNumpyOps()
    return NumpyOps()


def _cupy_ops(reproducible: bool) -> Ops:
    """Make the backend of CuPy's current device."""
    import cupy

    return _cupy_ops_on(cupy.cuda.runtime.getDevice(), reproducible)


@functools.cache
def _cupy_ops_on(device_id: int, reproducible: bool) -> Ops:
    import cupy

    from gpuback._backends.cuda.ops import CudaOps
    from gpuback._cuda.device import CudaLauncher

    device = cupy.cuda.Device(device_id) if cupy.cuda.runtime.getDeviceCount() > 1 else None
    if reproducible:
        from gpuback._backends.exact.cuda_ops import ReproducibleCudaOps
        from gpuback._cuda.cublas import bind_multiply

        return ReproducibleCudaOps(cupy, CudaLauncher(device_id), bind_multiply(), device=device)
    return CudaOps(cupy, CudaLauncher(device_id), device=device)


class Backend(NamedTuple):
    """How to make a backend's operations (reproducible ones or not), and whether they can be used here."""

    make: Callable[[bool], Ops]
    status: Callable[[], BackendStatus]


BACKENDS = {"numpy": Backend(_numpy_ops, _numpy_status), "cupy": Backend(_cupy_ops, _cupy_status)}


def backends() -> dict[str, BackendStatus]:
    """List every backend that gpuback knows, whether this machine can use it, and why or why not."""
    return {name: backend.status() for name, backend in BACKENDS.items()}


def ops_for(name: str, *, reproducible: bool = False) -> Ops:
    """Return the backend of that name; "auto" is the fastest that can be used here.

    Args:
        name: of the backend.
        reproducible: whether results have the same bits as on every other backend.

    Raises:
        OptionError: an unknown name.
        BackendError: it cannot be used on this machine; the message says why.
    """
    require_known("backend", name, (*BACKENDS, "auto"))
    if name == "auto":
        name = "cupy" if BACKENDS["cupy"].status().available else "numpy"
    status = BACKENDS[name].status()
    if not status.available:
        raise BackendError(f"backend {name!r} cannot be used here: {status.reason}. backend='numpy' always works")
    return BACKENDS[name].make(reproducible)


def usable_backend(name: str) -> str:
    """Return the name of the backend that something pickled goes on with: its own, or "numpy" where it has none here.

    A RuntimeWarning says why.
    """
    status = BACKENDS[name].status() if name in BACKENDS else BackendStatus(False, "there is none of that name")
    if name == "auto" or status.available:
        return name
    warnings.warn(
        f"pickled on backend {name!r}, which cannot be used here: {status.reason}. It goes on with 'numpy'",
        RuntimeWarning,
        stacklevel=3,
    )
    return "numpy"


def ops_of(arrays: dict[str, Array]) -> Ops:
    """Return the backend that all arrays belong to.

    Raises:
        DtypeError: something that is no array.
        DeviceError: arrays of different backends or devices, or of a library that is none of them.
    """
    for name, array in arrays.items():
        if not hasattr(array, "__dlpack__"):
            raise DtypeError(
                f"{name}: expected a numpy.ndarray or a cupy.ndarray (nothing is converted here), "
                f"got {type(array).__name__}"
            )
    kinds = {type(array) for array in arrays.values()}
    if kinds == {np.ndarray}:
        return NumpyOps()
    homes = {name: _home(array) for name, array in arrays.items()}
    home = next(iter(homes.values()))
    if len(set(homes.values())) > 1 or not home.startswith((NUMPY_HOME, CUPY_HOME)):
        raise DeviceError(
            "expected arrays of NumPy, or of CuPy on one device, got "
            + ", ".join(f"{name}: {home}" for name, home in homes.items())
        )
    if home == NUMPY_HOME:  # of a subclass
        for name, array in arrays.items():
            if isinstance(array, (np.ma.MaskedArray, np.matrix)):  # whose products and out= are others
                remedy = f"{name}.A" if isinstance(array, np.matrix) else f"{name}.filled(value)"
                raise DtypeError(
                    f"{name}: expected a plain numpy.ndarray, got a {type(array).__name__}; {remedy} makes one"
                )
        return NumpyOps()
    return _cupy_ops_on(next(iter(arrays.values())).device.id, reproducible=False)


NUMPY_HOME, CUPY_HOME = "numpy.ndarray", "cupy.ndarray on device"


def _home(array: Array) -> str:
    """Say in words where an array lives."""
    if isinstance(array, np.ndarray):
        return NUMPY_HOME
    kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"
    return f"{CUPY_HOME} {array.device.id}" if kind == "cupy.ndarray" else f"{kind}, another library's"
