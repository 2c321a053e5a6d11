"""fit(net, batches=DataLoader): PyTorch's loaders, their workers and their tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gpuback
from gpuback.errors import DataError, ShapeError

pytestmark = pytest.mark.on_each_backend


def data(n: int = 70) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(int)


def network() -> gpuback.MLP:
    return gpuback.MLP([6, 16, 2], activation="tanh", seed=0)


def dataset(*arrays: np.ndarray) -> TensorDataset:
    return TensorDataset(*map(torch.from_numpy, arrays or data()))


def fitted(**options: Any) -> tuple[bytes, list[float]]:
    net = network()
    history = gpuback.fit(net, epochs=3, **options)
    return net.theta.tobytes(), history.loss


def arrays_in_order(**options: Any) -> tuple[bytes, list[float]]:
    x, y = data()
    return fitted(x=x, y=y, batch_size=16, shuffle=False, **options)


def test_a_loader_gives_the_bits_of_arrays() -> None:
    assert fitted(batches=DataLoader(dataset(), batch_size=16)) == arrays_in_order()


def test_a_loader_with_weights() -> None:
    weight = np.random.default_rng(1).uniform(0.5, 2, 70)
    loader = DataLoader(dataset(*data(), weight), batch_size=16)
    assert fitted(batches=loader) == arrays_in_order(sample_weight=weight)


@pytest.mark.numpy_only
def test_workers_load_and_a_run_may_end_early() -> None:
    options: Any = {"batch_size": 16, "num_workers": 1, "persistent_workers": True}
    loader = DataLoader(dataset(), multiprocessing_context="spawn", **options)
    assert fitted(batches=loader) == arrays_in_order()
    with pytest.raises(ShapeError, match="^batch 0 of epoch 0: x: "):
        gpuback.fit(gpuback.MLP([5, 2]), batches=loader)
    assert "gpuback batches" not in [thread.name for thread in threading.enumerate()]


def test_a_loader_that_shuffles_gives_the_order_of_a_loop_over_it() -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(dataset(), batch_size=16, shuffle=True, generator=generator)

    net, batches = network(), loader()
    step = gpuback.TrainStep(net, gpuback.Adam())
    for _ in range(3):
        for batch in batches:
            step(*batch)
    assert fitted(batches=loader())[0] == net.theta.tobytes() != arrays_in_order()[0]


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.rand(6, generator=generator)
            yield x, (x.sum() > 3).long()


def test_an_endless_data_set_needs_steps_per_epoch_and_has_no_length() -> None:
    loader = DataLoader(Endless(), batch_size=16)
    net = network()
    assert gpuback.fit(net, batches=loader, steps_per_epoch=4, epochs=3).steps == 12


def test_a_data_set_without_a_loader_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"^batch 0 of epoch 0: x: .*; one sample is x\[None, :\]"):
        gpuback.fit(network(), batches=dataset())
    with pytest.raises(DataError, match=r"got Tensor of shape \(16, 6\)"):
        gpuback.fit(network(), batches=DataLoader(dataset().tensors[0], batch_size=16))


def test_tensors_that_need_gradients_are_refused_by_name() -> None:
    x, y = dataset().tensors
    with pytest.raises(gpuback.errors.DtypeError, match="^batch 0 of epoch 0: x: expected an array that can be shared"):
        gpuback.fit(network(), batches=[(x.requires_grad_(), y)])
