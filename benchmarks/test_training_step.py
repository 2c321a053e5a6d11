"""pytest-benchmark's timings of gpuback's own training step, to compare with earlier ones (`make bench-pytest`)."""

import numpy as np
import pytest

import gpuback
from benchmarks.training_step import FAMILIES, LEARNING_RATE, Family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_training_step(benchmark, family: Family):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((family.batch_size, family.sizes[0]), dtype=np.float32)
    y = rng.integers(family.sizes[-1], size=family.batch_size)
    step = gpuback.TrainStep(gpuback.MLP(family.sizes, seed=0), gpuback.SGD(LEARNING_RATE))
    loss = benchmark(step, x, y)
    assert np.isfinite(loss)
