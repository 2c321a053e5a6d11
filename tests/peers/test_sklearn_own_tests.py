"""scikit-learn's own tests of its multilayer perceptrons, from the installed package, with gpuback's in their place."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sklearn.neural_network
from numpy.typing import NDArray

import gpuback.sklearn
from gpuback.sklearn.lbfgs import Objective
from gpuback.sklearn.samples import TrainingSet

ESTIMATORS = ("MLPClassifier", "MLPRegressor")

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of networks that diverge
]


def with_gpubacks_estimators() -> ModuleType:
    """A copy of the tests' module, made while `sklearn.neural_network` has gpuback's estimators."""
    spec = importlib.util.find_spec("sklearn.neural_network.tests.test_mlp")
    module = importlib.util.module_from_spec(spec)
    ours = {name: getattr(gpuback.sklearn, name) for name in ESTIMATORS}
    with mock.patch.multiple(sklearn.neural_network, **ours):
        spec.loader.exec_module(module)
    return module


MODULE = with_gpubacks_estimators()
globals().update({name: item for name, item in vars(MODULE).items() if name.startswith("test_")})


def test_they_are_of_gpubacks_estimators():
    assert [getattr(MODULE, name) for name in ESTIMATORS] == [getattr(gpuback.sklearn, name) for name in ESTIMATORS]
    assert sum(name.startswith("test_") for name in vars(MODULE)) >= 40


@pytest.fixture
def global_random_seed() -> int:
    """scikit-learn's own fixture is in its conftest.py."""
    return 42


@pytest.fixture(autouse=True)
def _private_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_gradient` calls what scikit-learn's solver gives to SciPy; here it gets what gpuback's does."""
    if request.function.__name__ == "test_gradient":
        monkeypatch.setattr(gpuback.sklearn.MLPClassifier, "_loss_grad_lbfgs", loss_and_gradient, raising=False)


def loss_and_gradient(
    estimator: Any, packed: NDArray, X: NDArray, y: NDArray, sample_weight: NDArray | None, *buffers: Any
) -> tuple[float, NDArray]:
    """F and ∇F for parameters in scikit-learn's order: all weights, each (nI, nO), then all biases."""
    net = estimator._net
    objective = Objective(net, TrainingSet(net, X, y, sample_weight, len(X), one_loss=True), estimator.alpha)
    place = np.empty(net.n_parameters, int)  # of each parameter of gpuback's in scikit-learn's order
    weights, biases = net.architecture.layout.split(place)
    start = 0
    for part in (*(W.T for W in weights), *biases):
        part[...] = np.arange(start, start + part.size).reshape(part.shape)
        start += part.size
    value, gradient = objective(packed[place])
    return value, gradient[np.argsort(place)]
