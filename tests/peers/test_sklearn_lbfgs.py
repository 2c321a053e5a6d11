"""solver="lbfgs": SciPy's L-BFGS-B on gpuback's loss and gradient, beside scikit-learn's."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn import neural_network
from sklearn.exceptions import ConvergenceWarning

import gpuback.sklearn.samples
from gpuback.errors import DataError
from gpuback.sklearn import MLPClassifier, MLPRegressor
from gpuback.sklearn.lbfgs import Objective
from gpuback.sklearn.samples import TrainingSet

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PEERS = {MLPClassifier: neural_network.MLPClassifier, MLPRegressor: neural_network.MLPRegressor}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(97, 6))
WEIGHT = RNG.uniform(0.1, 3, 97)
TARGETS = {
    "classes": (MLPClassifier, np.array(["ant", "bee", "cat"])[np.arange(97) % 3]),
    "two classes": (MLPClassifier, X[:, 0] + X[:, 1] > 0.3),
    "labels": (MLPClassifier, (RNG.random((97, 3)) < 0.4).astype(int)),
    "value": (MLPRegressor, np.sin(X[:, 0]) - X[:, 1]),
    "values": (MLPRegressor, np.c_[np.sin(X[:, 0]), X[:, 1] * X[:, 2]]),
    "counts": (partial(MLPRegressor, "poisson"), np.random.default_rng(1).poisson(np.exp(0.5 * X[:, 0]))),
}
each_target = pytest.mark.parametrize("targets", TARGETS)


def pair(targets: str, **options: Any) -> tuple[Any, Any, Any]:
    """One of ours and scikit-learn's with the same parameters, and y."""
    kind, y = TARGETS[targets]
    options = {"solver": "lbfgs", "hidden_layer_sizes": (5,), "activation": "tanh", "random_state": 3, **options}
    if isinstance(kind, partial):
        options["loss"], kind = kind.args[0], kind.func
    theirs = PEERS[kind](**{name: value for name, value in options.items() if name != "dtype"})
    return kind(**options), theirs, y


# Without "values": for several outputs scikit-learn's loss is not the one of its gradient, another line search.
@pytest.mark.parametrize("targets", [targets for targets in TARGETS if targets != "values"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_first_iterations_are_scikit_learns(targets, weighted, alpha):
    ours, theirs, y = pair(targets, alpha=alpha, max_iter=10)
    for model in (ours, theirs):
        model.fit(X, y, WEIGHT if weighted else None)
    assert ours.n_iter_ == theirs.n_iter_ == 10
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=1e-8)
    for part, expected in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-6, atol=1e-8)


@each_target
def test_it_converges_to_where_the_gradient_is_zero(targets):
    ours, theirs, y = pair(targets, alpha=1.0, activation="identity", max_iter=2000, tol=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpuback.sklearn.lbfgs.minimize", without_ftol)
        ours.fit(X, y, WEIGHT)
    theirs.fit(X, y, WEIGHT)
    target = ours._checked(X, y, reset=False, incremental=False)[2]
    net = ours._net
    _, gradient = Objective(net, TrainingSet(net, X, target, WEIGHT, len(X), one_loss=True), 1.0)(net.theta.copy())
    assert np.abs(gradient).max() < 1e-7
    assert ours.loss_ <= theirs.loss_ + 1e-7


def without_ftol(*arguments: Any, options: dict[str, Any], **keywords: Any) -> Any:
    from scipy.optimize import minimize

    return minimize(*arguments, options=options | {"ftol": 0.0}, **keywords)


@each_target
def test_gradients_are_those_of_the_loss(targets):
    ours, _, y = pair(targets, alpha=0.7, max_iter=2)
    ours.fit(X, y, WEIGHT)
    target = ours._checked(X, y, reset=False, incremental=False)[2]
    objective = Objective(ours._net, TrainingSet(ours._net, X, target, WEIGHT, len(X), one_loss=True), 0.7)
    theta = np.array(ours._net.theta)
    _, gradient = objective(theta)
    direction = np.random.default_rng(0).standard_normal(len(theta))
    h = 1e-6
    slope = (objective(theta + h * direction)[0] - objective(theta - h * direction)[0]) / (2 * h)
    assert slope == pytest.approx(gradient @ direction, rel=1e-6)


@each_target
def test_what_is_recorded(targets, capsys):
    ours, theirs, y = pair(targets, max_iter=15, early_stopping=True, verbose=True)
    ours.fit(X, y)
    theirs.set_params(max_iter=15).fit(X, y)
    assert len(ours.loss_curve_) == ours.n_iter_ == 15
    assert ours.loss_ == ours.loss_curve_[-1] == ours.best_loss_ == min(ours.loss_curve_)
    assert np.all(np.diff(ours.loss_curve_) < 0)
    assert ours.validation_scores_ is ours.best_validation_score_ is None  # early stopping is for the other solvers
    assert (ours.t_, ours.n_layers_, ours.out_activation_) == (theirs.t_, theirs.n_layers_, theirs.out_activation_)
    assert capsys.readouterr().out.startswith(f"Iteration 1, loss = {ours.loss_curve_[0]:.8f}\n")


@pytest.mark.parametrize("solvers", [("lbfgs", "adam"), ("sgd", "lbfgs")])
def test_warm_start_with_another_solver(solvers):
    y = TARGETS["value"][1]
    model = MLPRegressor(solver=solvers[0], warm_start=True, max_iter=4, random_state=0).fit(X, y)
    before = model.loss_
    model.set_params(solver=solvers[1]).fit(X, y)
    assert model.loss_ < before
    assert len(model.loss_curve_) == 8 and model.best_loss_ == min(model.loss_curve_)
    assert pickle.loads(pickle.dumps(model)).set_params(solver="sgd").partial_fit(X, y).n_iter_ == 1


def test_partial_fit_after_lbfgs_trains_the_network_that_lbfgs_made():
    y = TARGETS["value"][1]
    model = MLPRegressor(max_iter=2, random_state=0).fit(X, y)
    before = model.set_params(solver="lbfgs").fit(X, y).coefs_
    model.set_params(solver="adam").partial_fit(X, y)
    assert np.abs(model.coefs_[0] - before[0]).max() > 1e-4


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("limit", [{"max_iter": 3}, {"max_fun": 4}])
def test_an_end_before_convergence_is_warned_about(limit):
    with pytest.warns(ConvergenceWarning, match="lbfgs ended after . iter.* before it converged") as caught:
        model = MLPRegressor(solver="lbfgs", **limit).fit(X, X[:, 0])
    assert 1 <= model.n_iter_ <= 4
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_convergence_is_not_warned_about():
    y = X @ np.arange(6.0) + 1
    model = MLPRegressor(hidden_layer_sizes=(), solver="lbfgs", alpha=0.0, tol=1e-6).fit(X, y)
    np.testing.assert_allclose(model.predict(X), y, atol=1e-4)


def test_an_interrupted_fit_keeps_the_last_iteration(monkeypatch):
    calls = 0
    evaluate = Objective.__call__

    def interrupted(objective: Objective, theta: Any) -> Any:
        nonlocal calls
        calls += 1
        value = evaluate(objective, theta)
        if calls == 9:
            raise KeyboardInterrupt
        return value

    y = TARGETS["value"][1]
    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model = MLPRegressor(solver="lbfgs", alpha=0.0, random_state=0).fit(X, y)
    assert 1 <= model.n_iter_ == len(model.loss_curve_) < 9
    assert 0.5 * np.mean((model.predict(X) - y) ** 2) == pytest.approx(model.loss_, rel=1e-12)


@pytest.mark.parametrize("targets", ["classes", "values"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
def test_sparse_samples_in_parts(targets, weight, monkeypatch):
    ours, _, y = pair(targets, max_iter=8)
    expected = ours.fit(X, y, weight).coefs_
    monkeypatch.setattr(gpuback.sklearn.samples, "MOST_NUMBERS", 6 * 20)
    ours.fit(csr_array(X), y, weight)
    for part, dense in zip(ours.coefs_, expected, strict=True):
        np.testing.assert_allclose(part, dense, rtol=1e-8, atol=1e-10)


def test_weights_that_add_up_to_nothing():
    with pytest.raises(DataError, match="not zero, got 0 over all samples"):
        MLPRegressor(solver="lbfgs").fit(X, X[:, 0], np.r_[np.ones(48), -np.ones(48), 0])
    weight = np.where(np.arange(97) < 90, 0.0, 1.0)
    MLPRegressor(solver="lbfgs", max_iter=2).fit(csr_array(X), X[:, 0], weight)


@pytest.mark.parametrize("kind", PEERS)
def test_there_is_no_partial_fit(kind):
    model = kind(solver="lbfgs")
    assert not hasattr(model, "partial_fit")
    with pytest.raises(AttributeError, match="partial_fit"):
        model.partial_fit(X, X[:, 0] > 0)


@pytest.mark.on_each_backend
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@each_target
def test_on_each_backend(targets, dtype):
    ours, theirs, y = pair(targets, dtype=dtype, max_iter=8, alpha=0.1)
    ours.fit(X, y, WEIGHT)
    theirs.fit(X, y, WEIGHT)
    assert ours.loss_ == pytest.approx(theirs.loss_, rel={"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2}[dtype])
