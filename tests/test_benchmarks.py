"""The benchmark's contestants compute the same thing; nothing here is timed."""

import numpy as np

import gpuback
from benchmarks.plain_numpy import plain_step
from benchmarks.training_step import Family, check


def test_the_check_before_the_clock_passes_and_can_fail(monkeypatch):
    rng = np.random.default_rng(0)
    family = Family("some", (5, 7, 6, 3), 50)
    x, y = rng.standard_normal((50, 5), dtype=np.float32), rng.integers(3, size=50)
    check(family, x, y)
    monkeypatch.setattr("benchmarks.training_step.plain_step", lambda W, b, eta: plain_step(W, b, eta * 1.01))
    try:
        check(family, x, y)
    except SystemExit as error:
        assert "plain NumPy" in str(error)
    else:
        raise AssertionError("an update 1% too long passed")


def test_the_plain_step_trains():
    net = gpuback.MLP([4, 16, 3], seed=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 4), dtype=np.float32)
    y = np.argmax(x[:, :3], axis=1)
    step = plain_step(list(net.weights), list(net.biases), 0.5)
    losses = [step(x, y) for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0]
