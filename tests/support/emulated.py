"""The CUDA backend, run by the emulator: one for all tests, so that its launches are bound once."""

import functools

import numpy as np
from emulator import EmulatorLauncher, StrictNumpy

from gpuback._backends.cuda.ops import CudaOps
from support.kernel_layers import HOPPER


@functools.cache
def emulated_ops(reproducible: bool = False, *, fuse_networks: bool = True, hopper: bool = False) -> CudaOps:
    limits = {"limits": HOPPER} if hopper else {}
    launcher = EmulatorLauncher("random", copies="random", resident_blocks=3, **limits)
    if reproducible:
        from gpuback._backends.exact.cuda_ops import ReproducibleCudaOps

        return ReproducibleCudaOps(np, launcher, np.dot, name="emulated")
    return CudaOps(StrictNumpy(launcher), launcher, name="emulated", fuse_networks=fuse_networks)
