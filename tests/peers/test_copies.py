"""Copies and pickles of what goes with other libraries: estimators, modules, loggers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from support.requirements import require_emulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpuback
from gpuback._backends import registry
from gpuback._backends.registry import Backend, BackendStatus
from gpuback.errors import BackendError
from gpuback.sklearn import MLPClassifier, MLPRegressor
from gpuback.tensorboard import logger
from gpuback.torch import FusedMLP

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4))
LABELS = (X[:, 0] * X[:, 1] > 0).astype(int)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


each_copy = pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickled])


@each_copy
@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "adam", "beta_1": 0.5},
        {"solver": "sgd", "momentum": 0.9, "learning_rate": "invscaling"},
        {"solver": "sgd", "momentum": 0.0, "alpha": 0.1},
    ],
)
def test_an_estimator_goes_on_as_the_original(kind: Any, options: dict[str, Any], make_copy: Any) -> None:
    model = kind(hidden_layer_sizes=(5,), batch_size=10, random_state=0, shuffle=False, **options)
    assert not hasattr(make_copy(model), "coefs_")
    more = {"classes": [0, 1]} if kind is MLPClassifier else {}
    for _ in range(2):
        model.partial_fit(X, LABELS, **more)
    twin, before = make_copy(model), model.predict(X)
    for _ in range(3):
        twin.partial_fit(X, LABELS)
    np.testing.assert_array_equal(model.predict(X), before)  # the original has not moved
    assert len(model.loss_curve_) == 2 and len(twin.loss_curve_) == 5
    for _ in range(3):
        model.partial_fit(X, LABELS)
    for own, expected in zip((*twin.coefs_, *twin.intercepts_), (*model.coefs_, *model.intercepts_), strict=True):
        np.testing.assert_array_equal(own, expected)
    assert not hasattr(clone(model), "coefs_")


def test_an_estimator_of_a_gpu_predicts_without(monkeypatch: pytest.MonkeyPatch) -> None:
    require_emulator()
    from emulator import EmulatorLauncher, StrictNumpy

    from gpuback._backends.cuda.ops import CudaOps

    launcher = EmulatorLauncher()
    ops = CudaOps(StrictNumpy(launcher), launcher, name="cupy")
    monkeypatch.setitem(registry.BACKENDS, "cupy", Backend(lambda _: ops, lambda: BackendStatus(True, "emulated")))
    model = MLPClassifier(hidden_layer_sizes=(5,), backend="cupy", dtype="float64", random_state=0, max_iter=3)
    with pytest.warns(match="Maximum iterations"):
        model.fit(X, LABELS)
    content, expected = pickle.dumps(model), model.predict_proba(X)
    monkeypatch.setitem(registry.BACKENDS, "cupy", Backend(lambda _: ops, lambda: BackendStatus(False, "no GPU")))
    with pytest.warns(RuntimeWarning, match="'cupy', which cannot be used here: no GPU"):
        twin = pickle.loads(content)
    np.testing.assert_allclose(twin.predict_proba(X), expected, rtol=1e-12)
    twin.partial_fit(X, LABELS)
    with pytest.raises(BackendError):
        twin.fit(X, LABELS)  # anew, on the backend that was asked for


@each_copy
def test_a_module_goes_on_as_the_original(make_copy: Any) -> None:
    net = FusedMLP([4, 5, 2], activation="gelu", seed=0)
    x, y = torch.from_numpy(X).float(), torch.from_numpy(LABELS)

    def steps(net: FusedMLP) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in net.parameters()]

    steps(net)
    twin = make_copy(net)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    found = steps(twin)
    if make_copy is copy.copy:  # PyTorch's shallow copies share their parameters
        assert all(map(torch.equal, found, net.parameters()))
        return
    assert all(map(torch.equal, start, net.parameters()))
    assert all(map(torch.equal, found, steps(net)))


@each_copy
def test_a_logger_goes_on_in_its_folder(make_copy: Any, tmp_path: Path) -> None:
    log = logger(tmp_path, metrics={"squares": sum_of_squares})
    net, options = gpuback.MLP([4, 5, 2], seed=0), {"batch_size": 20, "seed": 0, "checkpoint": tmp_path / "run"}
    gpuback.fit(net, X, LABELS, epochs=2, callbacks=[log], **options)
    history = gpuback.fit(net, X, LABELS, epochs=4, callbacks=[make_copy(log)], resume=True, **options)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("squares")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss/training")] == list(map(np.float32, history.loss))


def sum_of_squares(net: gpuback.MLP) -> float:
    return float(net.theta @ net.theta)
