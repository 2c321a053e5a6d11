"""h Wᵀ directly, or by way of a copy of Wᵀ: the same network either way."""

from __future__ import annotations

import numpy as np
import pytest

from gpuback import MLP, SGD, TrainStep
from gpuback._backends.numpy import plans


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("precision", [{"dtype": "float64"}, {}, {"allow_tf32": True}, {"dtype": "bfloat16"}], ids=str)
def test_integers_come_out_exactly_either_way(
    transposed: bool, precision: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "is_quicker_transposed", lambda *shape: transposed)
    rng = np.random.default_rng(0)
    net = MLP([7, 5, 3], loss="squared_error", activation="relu", backend="numpy", **precision)
    net.theta[:] = rng.integers(-2, 3, net.n_parameters)
    x, y = rng.integers(-2, 3, (9, 7)), rng.integers(-2, 3, (9, 3))
    step = TrainStep(net, SGD(1.0))
    for _ in range(2):  # the second step multiplies by weights that the first one left
        W, b = ([part.astype(np.float64) for part in parts] for parts in (net.weights, net.biases))
        h = np.maximum(x @ W[0].T + b[0], 0)
        expected = h @ W[1].T + b[1]
        np.testing.assert_array_equal(net.forward(x), expected)
        assert float(step(x, y)) == pytest.approx(0.5 * ((expected - y) ** 2).sum() / 9, rel=1e-6)
        net.theta[:] = np.rint(net.theta) % 3


def test_small_products_of_avx512_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def quicker(core: str, *shape: int) -> bool:
        monkeypatch.setattr(plans, "blas_cores", lambda: {core})
        return plans.is_quicker_transposed(*shape)

    assert quicker("skylakex", 64, 64, 64)
    assert quicker("cooperlake", 32, 96, 96)
    assert not quicker("haswell", 64, 64, 64)
    assert not quicker("skylakex", 16, 64, 64)
    assert not quicker("skylakex", 64, 10, 64)
    assert not quicker("skylakex", 64, 128, 128)
    assert not quicker("skylakex", 256, 64, 64)
