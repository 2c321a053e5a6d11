"""Every test of networks, losses, optimizers and fused_backward runs on NumPy and on the emulated CUDA backend."""


import pytest

import gpuback.network
import gpuback.ops
from gpuback.ops import Backend, BackendStatus


def pytest_addoption(parser):
    parser.addoption("--backend", default="numpy", help="what backend='auto' stands for: numpy or emulated")


def pytest_configure(config):
    config.addinivalue_line("markers", "numpy_only: about how NumPy does it, or too large for the emulator")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--backend") != "numpy":
        skip = pytest.mark.skip(reason="about NumPy")
        for item in items:
            if item.get_closest_marker("numpy_only"):
                item.add_marker(skip)


def emulated_ops():
    import numpy as np
    from emulator import EmulatorLauncher

    from gpuback.ops.cuda_ops import CudaOps

    launcher = EmulatorLauncher("random", copies="random", resident_blocks=3)
    return CudaOps(np, launcher, name="emulated")


@pytest.fixture(autouse=True, scope="session")
def _chosen_backend(request):
    if request.config.getoption("--backend") == "numpy":
        yield
        return
    gpuback.ops.BACKENDS["emulated"] = Backend(emulated_ops, lambda: BackendStatus(True, "the emulator"))
    ops = emulated_ops()
    original = gpuback.ops.ops_for, gpuback.ops.ops_of
    def ops_for(name):
        return ops if name in ("auto", "emulated") else original[0](name)

    gpuback.ops.ops_for = gpuback.network.ops_for = ops_for
    gpuback.ops.ops_of = lambda arrays: original[1](arrays) and ops
    yield
    gpuback.ops.ops_for, gpuback.ops.ops_of = original
    gpuback.network.ops_for = original[0]
