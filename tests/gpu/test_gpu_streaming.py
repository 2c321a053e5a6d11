"""fit(net, batches=…) on a real GPU: copies beside the steps change no bit, and data on the GPU stay there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.requirements import require_gpu

import gpuback
from gpuback import MLP, Adam
from gpuback.testing import random_batch

pytestmark = pytest.mark.gpu

NETWORKS = {
    "fused": {"sizes": (40, 32, 9)},
    "graphs": {"sizes": (40, 300, 9)},
    "too large for graphs": {"sizes": (4000, 64, 9)},
    "bfloat16": {"sizes": (40, 300, 9), "dtype": "bfloat16"},
    "reproducible": {"sizes": (40, 64, 9), "reproducible": True},
}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    require_gpu()


def network(name: str) -> MLP:
    return MLP(backend="cupy", **({"activation": "tanh", "seed": 1} | NETWORKS[name]))


def data(net: MLP, rows: int = 30_000) -> tuple[np.ndarray, np.ndarray]:
    x, y = random_batch(net, rows)
    return np.asarray(x, np.float32), y


def parts(x: Any, y: Any, size: int = 1100) -> list[tuple[Any, Any]]:
    return [(x[start : start + size], y[start : start + size]) for start in range(0, len(x), size)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_those_of_arrays_in_their_order(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    net, twin, third = network(name), network(name), network(name)
    x, y = data(net)
    gpuback.fit(net, x, y, epochs=3, batch_size=1100, shuffle=False, optimizer=Adam(0.01))
    gpuback.fit(twin, batches=parts(x.astype(np.float64), y), epochs=3, optimizer=Adam(0.01))
    assert (net.theta == twin.theta).all()
    gpuback.fit(third, batches=parts(cupy.asarray(x), cupy.asarray(y)), epochs=3, optimizer=Adam(0.01))
    assert (net.theta == third.theta).all()


def test_batches_made_on_the_gpu_and_dropped_at_once() -> None:
    """Their memory goes back to CuPy's pool while steps are queued that read it."""
    cupy = pytest.importorskip("cupy")
    net, twin = network("graphs"), network("graphs")
    x, y = data(net)

    def made(epoch: int) -> Iterator[Any]:
        for batch in parts(x, y):
            on_gpu = cupy.asarray(batch[0])
            yield (on_gpu * 2 + 1 - 1) / 2, cupy.asarray(batch[1])

    exact = ((x * np.float32(2)) + np.float32(1) - np.float32(1)) / np.float32(2)
    gpuback.fit(net, exact, y, epochs=3, batch_size=1100, shuffle=False)
    gpuback.fit(twin, batches=made, epochs=3)
    assert (net.theta == twin.theta).all()


def test_batches_that_come_in_the_same_arrays_again_and_again() -> None:
    net, twin = network("graphs"), network("graphs")
    x, y = data(net, 22_000)
    mine = np.empty((1100, 40), np.float32), np.empty(1100, y.dtype)

    def reusing(epoch: int) -> Iterator[Any]:
        for batch in parts(x, y):
            for target, source in zip(mine, batch, strict=True):
                target[...] = source
            yield mine

    gpuback.fit(net, batches=parts(x, y), epochs=2)
    gpuback.fit(twin, batches=reusing, epochs=2)
    assert (net.theta == twin.theta).all()


def test_a_stream_of_the_users_and_a_run_that_ends_early() -> None:
    cupy = pytest.importorskip("cupy")
    net, twin = network("graphs"), network("graphs")
    x, y = data(net)
    expected = gpuback.fit(twin, batches=parts(x, y), epochs=2)

    def raise_interrupt(net: MLP, history: gpuback.History) -> None:
        raise KeyboardInterrupt

    with cupy.cuda.Stream(non_blocking=True):
        with pytest.raises(KeyboardInterrupt):
            gpuback.fit(network("graphs"), batches=parts(x, y), callbacks=[raise_interrupt])
        history = gpuback.fit(net, batches=parts(x, y), epochs=2)
    assert history.loss == expected.loss
    assert (net.theta == twin.theta).all()


def test_numbers_on_the_gpu_are_checked_too() -> None:
    cupy = pytest.importorskip("cupy")
    net = network("fused")
    x, y = (cupy.asarray(array) for array in data(net, 50))
    x[7, 3] = cupy.nan
    with pytest.raises(gpuback.errors.DataError, match=r"^batch 0 of epoch 0: x: expected finite .* in row 7$"):
        gpuback.fit(net, batches=[(x, y)])
