"""gpuback's training steps on the CPU as pytest-benchmark tests, to compare with earlier ones (`make bench-pytest`)."""

import numpy as np
import pytest

import gpuback
from benchmarks.cases import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(benchmark, name: str):
    net = NETWORKS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((net.batch_size, net.sizes[0]), dtype=np.float32)
    y = rng.integers(net.sizes[-1], size=net.batch_size)
    step = gpuback.TrainStep(gpuback.MLP(net.sizes, backend="numpy", seed=0), gpuback.SGD(1e-3))
    loss = benchmark(step, x, y)
    assert np.isfinite(loss)
