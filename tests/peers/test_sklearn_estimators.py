"""gpuback.sklearn's estimators: scikit-learn's own checks, and runs beside scikit-learn's, epoch by epoch."""

from __future__ import annotations

import inspect
import pickle
from functools import partial
from typing import Any

import joblib
import numpy as np
import pytest
from scipy.sparse import csc_array, csr_matrix
from sklearn import config_context, neural_network
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import gpuback
from gpuback.errors import DataError, LabelError, OptionError, ShapeError
from gpuback.sklearn import MLPClassifier, MLPRegressor, from_sklearn
from gpuback.sklearn.descent import Descent

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PEERS = {MLPClassifier: neural_network.MLPClassifier, MLPRegressor: neural_network.MLPRegressor}
each_estimator = pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor], ids=["classifier", "regressor"])


# --- scikit-learn's checks


@parametrize_with_checks(
    [kind(**options) for kind in PEERS for options in ({}, {"solver": "sgd"}, {"solver": "lbfgs", "max_iter": 20})]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


OF_SEVEN_DIGITS = {
    "check_sample_weight_equivalence_on_dense_data",
    "check_sample_weight_equivalence_on_sparse_data",
    "check_methods_subset_invariance",
}
"""Checks that ask for seven equal digits of sums in another order. float32 has as many."""


@parametrize_with_checks([kind(max_iter=100, dtype="float32") for kind in PEERS])
def test_scikit_learns_checks_in_float32(estimator, check):
    if check.func.__name__ in OF_SEVEN_DIGITS:
        estimator.set_params(dtype=None)
    check(estimator)


@each_estimator
def test_parameters_are_scikit_learns_in_its_order(kind):
    parameters, expected = (
        [(p.name, p.kind, p.default) for p in inspect.signature(each).parameters.values()]
        for each in (kind, PEERS[kind])
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert parameters == [*expected, ("backend", keyword, "auto"), ("dtype", keyword, None)]


# --- beside scikit-learn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(163, 7))
NAMES = np.array(["ant", "bee", "cat", "dog"])
TARGETS = {
    "classes": (MLPClassifier, NAMES[RNG.integers(4, size=163)]),
    "two classes": (MLPClassifier, NAMES[(X[:, 0] + X[:, 1] > 0.3).astype(int)]),
    "labels": (MLPClassifier, (RNG.random((163, 3)) < 0.4).astype(int)),
    "value": (MLPRegressor, np.sin(X[:, 0]) - X[:, 1]),
    "counts": (partial(MLPRegressor, "poisson"), np.random.default_rng(1).poisson(np.exp(0.5 * X[:, 0]))),
    "several counts": (partial(MLPRegressor, "poisson"), np.random.default_rng(1).poisson(2.0, (163, 3))),
    "values": (MLPRegressor, np.c_[np.sin(X[:, 0]), X[:, 1] * X[:, 2], RNG.normal(size=163)]),
}
WEIGHT = RNG.uniform(0.1, 3, 163)
each_target = pytest.mark.parametrize("targets", TARGETS)

TOLERANCE = {"float64": 1e-11, "float32": 3e-5}


def pair(kind: Any, dtype: str, **options: Any) -> tuple[Any, Any]:
    """One of ours and scikit-learn's with the same parameters."""
    options = {"random_state": 3, "max_iter": 12, "batch_size": 20, **options}
    if isinstance(kind, partial):
        options["loss"], kind = kind.args[0], kind.func
    return kind(dtype=dtype, **options), PEERS[kind](**options)


def assert_same_course(ours: Any, theirs: Any, dtype: str) -> None:
    """The same losses and scores in every epoch, the same parameters and predictions in the end."""
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=TOLERANCE[dtype])
    assert ours.loss_ == ours.loss_curve_[-1]
    assert (ours.n_iter_, ours.t_, ours.n_layers_) == (theirs.n_iter_, theirs.t_, theirs.n_layers_)
    assert (ours.n_outputs_, ours.out_activation_) == (theirs.n_outputs_, theirs.out_activation_)
    for name in ("best_loss_", "best_validation_score_", "validation_scores_"):
        expected = getattr(theirs, name)
        if expected is None:
            assert getattr(ours, name) is None
        else:
            np.testing.assert_allclose(getattr(ours, name), expected, **tolerance)
    for part, expected in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        assert part.shape == expected.shape
        np.testing.assert_allclose(part, expected, **tolerance)
    if hasattr(theirs, "predict_proba"):
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), **tolerance)
        np.testing.assert_array_equal(ours.classes_, theirs.classes_)
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    else:
        np.testing.assert_allclose(ours.predict(X), theirs.predict(X), **tolerance)


@each_target
@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_losses_and_parameters(targets, solver, weighted, alpha, dtype):
    kind, y = TARGETS[targets]
    for estimator in (models := pair(kind, dtype, solver=solver, alpha=alpha, shuffle=False, learning_rate_init=0.01)):
        estimator.fit(X, y, WEIGHT if weighted else None)
    assert_same_course(*models, dtype)


@each_target
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "logistic", "hidden_layer_sizes": (9, 5)},
        {"activation": "tanh", "hidden_layer_sizes": 11, "batch_size": "auto"},
        {"activation": "identity", "hidden_layer_sizes": [], "alpha": 0.1},
        {"solver": "sgd", "momentum": 0.0},
        {"solver": "sgd", "momentum": 0.8, "nesterovs_momentum": False},
        {"solver": "sgd", "learning_rate": "invscaling", "power_t": 0.2, "learning_rate_init": 0.3},
        {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.05, "n_iter_no_change": 1, "max_iter": 30},
        {"solver": "adam", "beta_1": 0.7, "beta_2": 0.9, "epsilon": 0.03},
        {"early_stopping": True, "learning_rate_init": 0.02, "n_iter_no_change": 2, "max_iter": 40},
        {"early_stopping": True, "validation_fraction": 0.3, "solver": "sgd", "learning_rate": "adaptive"},
        {"tol": 0.1, "n_iter_no_change": 2},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_options(targets, options):
    kind, y = TARGETS[targets]
    if "counts" in targets and options.get("learning_rate_init") == 0.3:
        options = options | {"learning_rate_init": 0.03}  # both diverge at more
    for estimator in (models := pair(kind, "float64", **options)):
        estimator.fit(X, y, WEIGHT)
    assert_same_course(*models, "float64")


@each_target
def test_partial_fit_goes_on_with_the_optimizer(targets):
    kind, y = TARGETS[targets]
    classes = {"classes": NAMES, "two classes": NAMES[:2], "labels": [0, 1, 2]}
    more = {"classes": classes[targets]} if targets in classes else {}
    for estimator in (models := pair(kind, "float64", solver="sgd", learning_rate="adaptive", tol=0.3)):
        for start in range(0, 160, 40):
            estimator.partial_fit(X[start : start + 40], y[start : start + 40], WEIGHT[start : start + 40], **more)
        estimator.partial_fit(X, y)
        assert estimator.n_iter_ == 1
    assert_same_course(*models, "float64")


@each_target
def test_warm_start(targets):
    kind, y = TARGETS[targets]
    for estimator in (models := pair(kind, "float64", warm_start=True)):
        for _ in range(3):
            estimator.fit(X, y)
    assert len(models[0].loss_curve_) == 36
    assert_same_course(*models, "float64")


def test_warm_start_keeps_the_best_parameters_of_all_fits():
    """scikit-learn's go on changing after the fit that restored them, for a later fit's sake."""
    y = np.sin(X[:, 0]) - X[:, 1]
    model = MLPRegressor(early_stopping=True, warm_start=True, max_iter=60, learning_rate_init=0.01, random_state=0)
    best, score = model.fit(X, y).coefs_, model.best_validation_score_
    model.set_params(learning_rate_init=1.0, n_iter_no_change=2).fit(X, y)
    assert max(model.validation_scores_[-3:]) < score == model.best_validation_score_
    for part, expected in zip(model.coefs_, best, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_warm_start_may_begin_to_stop_early():
    model = MLPRegressor(warm_start=True, max_iter=3, random_state=0).fit(X, X[:, 0])
    model.set_params(early_stopping=True).fit(X, X[:, 0])
    assert len(model.validation_scores_) == 3
    assert model.best_loss_ is None
    assert model.set_params(early_stopping=False).fit(X, X[:, 0]).best_loss_ == min(model.loss_curve_[-3:])


def test_sixteen_bit_operands_and_gpubacks_activations():
    y = X[:, 0] * X[:, 1]
    scores = {
        dtype: MLPRegressor(activation="gelu", dtype=dtype, max_iter=300, tol=0, random_state=0).fit(X, y).score(X, y)
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert min(scores.values()) > 0.9
    assert len(set(scores.values())) == 3


def test_activations_with_constants_and_of_the_users_own():
    gpuback.register_activation(
        "test_bump_of_estimators", forward=lambda a: np.exp(-a * a), slope=lambda a: -2 * a * np.exp(-a * a)
    )
    y = X[:, 0] * X[:, 1]
    for activation in ("softplus(beta=5)", "test_bump_of_estimators"):
        model = MLPRegressor(activation=activation, backend="numpy", max_iter=300, tol=0, random_state=0).fit(X, y)
        assert model.score(X, y) > 0.9
        assert from_sklearn(clone(model).fit(X, y)).architecture.activations == (activation,)


def test_sine_networks_begin_with_their_own_weights():
    model = MLPRegressor(
        hidden_layer_sizes=(40, 30), activation="sine(w0=30)", backend="numpy", max_iter=1, random_state=0
    )
    model.set_params(learning_rate_init=1e-9).fit(X, X[:, 0])
    bounds = [1 / X.shape[1], np.sqrt(6 / 40) / 30, np.sqrt(6 / 30) / 30]
    for W, bound in zip(model.coefs_, bounds, strict=True):
        assert 0.8 * bound < np.abs(W).max() < 1.001 * bound


def test_digits():
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, random_state=0, stratify=y)
    ours, theirs = (
        kind(max_iter=40, random_state=0).fit(x_train, y_train) for kind in (MLPClassifier, PEERS[MLPClassifier])
    )
    assert ours.score(x_test, y_test) == pytest.approx(theirs.score(x_test, y_test), abs=0.005)
    assert ours.score(x_test, y_test) > 0.96


# --- what comes out


def test_the_network_is_float32_if_the_first_x_is():
    for dtype, x in (("float32", X.astype(np.float32)), ("float64", X), ("float64", X.astype(np.float16))):
        model = MLPRegressor(max_iter=1, warm_start=True).fit(x, X[:, 0])
        assert from_sklearn(model).dtype == dtype
        assert from_sklearn(model.fit(X, X[:, 0])).dtype == dtype
        assert from_sklearn(model.partial_fit(X.astype(np.float32), X[:, 0])).dtype == dtype


def test_predictions_are_float64_if_x_or_the_network_is():
    regressor, classifier = (kind(max_iter=1, dtype="float32") for kind in (MLPRegressor, MLPClassifier))
    regressor.fit(X, X[:, 0]), classifier.fit(X, X[:, :3] > 0)
    for x, expected in ((X, np.float64), (X.astype(np.float32), np.float32), (X.astype(int), np.float64)):
        assert regressor.predict(x).dtype == classifier.predict_proba(x).dtype == expected
    double = MLPRegressor(max_iter=1).fit(X, X[:, 0])
    assert double.predict(X.astype(np.float32)).dtype == np.float64


def test_probabilities_of_classes_sum_to_one():
    probabilities = MLPClassifier(max_iter=5, random_state=0).fit(X, TARGETS["classes"][1]).predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-15)


def test_log_probabilities_and_multilabel_predictions():
    x, y = make_multilabel_classification(n_samples=60, n_classes=4, random_state=0)
    model = MLPClassifier(max_iter=50, random_state=0).fit(x, y)
    np.testing.assert_array_equal(model.predict_log_proba(x), np.log(model.predict_proba(x)))
    np.testing.assert_array_equal(model.predict(x), model.predict_proba(x) > 0.5)
    assert model.predict(x).shape == y.shape


def test_coefs_are_read_only_copies_and_can_be_assigned():
    model = MLPRegressor(hidden_layer_sizes=(5,), max_iter=2).fit(X, X[:, :2])
    assert [coef.shape for coef in model.coefs_] == [(7, 5), (5, 2)]
    with pytest.raises(ValueError, match="read-only"):
        model.coefs_[0][...] = 0
    model.coefs_ = [np.full((7, 5), 0.5), np.full((5, 2), [1.0, -1.0])]
    model.intercepts_ = [np.zeros(5), [10, 20]]
    x = np.abs(X)
    np.testing.assert_allclose(model.predict(x), 2.5 * x.sum(axis=1)[:, None] * [1, -1] + [10, 20], rtol=1e-5)
    with pytest.raises(ShapeError, match=r"coefs_: expected .*\(7, 5\)"):
        model.coefs_ = [coef.T for coef in model.coefs_]


def test_fitted_attributes_are_missing_before_fit():
    model = MLPClassifier()
    assert not [name for name in ("coefs_", "intercepts_", "classes_", "loss_", "n_iter_") if hasattr(model, name)]
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_verbose(capsys):
    assert MLPRegressor(verbose=True, max_iter=2).fit(X, X[:, 0]).n_iter_ == 2
    assert capsys.readouterr().out.startswith("Iteration 1, loss = ")


# --- among scikit-learn's tools


def pickled(model: Any, _: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def dumped(model: Any, folder: Any) -> Any:
    joblib.dump(model, folder / "model.joblib")
    return joblib.load(folder / "model.joblib", mmap_mode="r")


@pytest.mark.parametrize("copied", [pickled, dumped])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_a_pickled_model_goes_on_to_the_same_bits(copied, solver, tmp_path):
    kind, y = TARGETS["classes"]
    model = kind(solver=solver, learning_rate="invscaling", max_iter=3, random_state=0).fit(X, y)
    copy = copied(model, tmp_path)
    np.testing.assert_array_equal(copy.predict_proba(X), model.predict_proba(X))
    for each in (model, copy):
        each.partial_fit(X, y)
    for part, expected in zip(copy.coefs_, model.coefs_, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_pipeline_grid_search_and_clone_in_two_processes():
    y = TARGETS["two classes"][1]
    pipeline = make_pipeline(
        StandardScaler(), MLPClassifier((8,), learning_rate_init=0.05, max_iter=30, random_state=0)
    )
    grid = {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__solver": ["adam", "sgd"]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(X, y)
    assert search.best_score_ > 0.8
    again = clone(search.best_estimator_).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), search.predict_proba(X))


@pytest.mark.on_each_backend
@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("targets", TARGETS)
def test_on_each_backend(solver, targets):
    kind, y = TARGETS[targets]
    options = {"solver": solver, "learning_rate": "invscaling", "alpha": 0.5, "max_iter": 2, "early_stopping": True}
    ours, theirs = pair(kind, "float32", hidden_layer_sizes=(5,), **options)
    assert_same_course(pickled(ours.fit(X, y, WEIGHT), None), theirs.fit(X, y, WEIGHT), "float32")


# --- what is refused


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (MLPRegressor, {"loss": "huber"}, "loss: expected one of squared_error, poisson, got 'huber'"),
        (MLPClassifier, {"solver": "adamw"}, "solver: expected one of adam, sgd, lbfgs, got 'adamw'"),
        (MLPClassifier, {"activation": "swish"}, "activation: expected one of logistic, identity, relu.*'swish'"),
        (MLPClassifier, {"activation": 3}, "activation: expected one of logistic, .*softplus.beta=….*, got 3"),
        (MLPClassifier, {"activation": "elu(alpha=0)"}, "activation elu: expected alpha to be a number from"),
        (MLPClassifier, {"alpha": -1.0}, "alpha: expected a finite number ≥ 0, got -1.0"),
        (MLPClassifier, {"momentum": 1.0}, "momentum: expected a number ≥ 0 and < 1, got 1.0"),
        (MLPClassifier, {"max_iter": 0}, "max_iter: expected an integer ≥ 1, got 0"),
        (MLPClassifier, {"max_iter": 2.5}, "max_iter: expected an integer ≥ 1, got 2.5"),
        (MLPClassifier, {"batch_size": "all"}, "batch_size: expected 'auto' or an integer ≥ 1, got 'all'"),
        (MLPClassifier, {"n_iter_no_change": 0}, "n_iter_no_change: expected an integer ≥ 1 or infinity, got 0"),
        (MLPClassifier, {"shuffle": "yes"}, "shuffle: expected True or False, got 'yes'"),
        (MLPClassifier, {"hidden_layer_sizes": (5, 0)}, r"hidden_layer_sizes must be > 0, got \[5, 0\]"),
        (MLPClassifier, {"hidden_layer_sizes": (5, 2.5)}, "hidden_layer_sizes: expected integers"),
        (MLPClassifier, {"hidden_layer_sizes": "5"}, "hidden_layer_sizes: expected integers, got '5'"),
        (MLPClassifier, {"backend": "tpu"}, "unknown backend 'tpu'"),
        (MLPClassifier, {"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_parameters_out_of_range(kind, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        kind(**options).fit(X, X[:, 0] > 0)
    assert isinstance(caught.value, ValueError)


def test_n_iter_no_change_may_be_infinite_and_batches_larger_than_the_data():
    model = MLPRegressor(n_iter_no_change=np.inf, max_iter=5, tol=10.0, batch_size=1000)
    with pytest.warns(UserWarning, match="batch_size") as caught:
        assert model.fit(X, X[:, 0]).n_iter_ == 5
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
@each_estimator
def test_too_few_iterations_are_warned_about(kind):
    model = kind(max_iter=2, random_state=0)
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\) reached") as caught:
        model.fit(X, X[:, 0] > 0)
    assert caught[0].filename == __file__


def test_an_interrupted_fit_keeps_what_it_has(monkeypatch):
    epoch = Descent.epoch

    def interrupted(descent: Descent, *arguments: Any) -> float:
        if descent.steps == 3:
            raise KeyboardInterrupt
        return epoch(descent, *arguments)

    monkeypatch.setattr(Descent, "epoch", interrupted)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model = MLPRegressor(max_iter=9, random_state=0).fit(X, X[:, 0])
    assert model.n_iter_ == len(model.loss_curve_) == 3
    assert model.predict(X).shape == (163,)


def test_partial_fit_refuses_early_stopping_and_missing_or_unknown_classes():
    with pytest.raises(ValueError, match="does not support early_stopping"):
        MLPRegressor(early_stopping=True).partial_fit(X, X[:, 0])
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        MLPClassifier().partial_fit(X, X[:, 0] > 0)
    model = MLPClassifier().partial_fit(X, TARGETS["classes"][1], classes=NAMES)
    with pytest.raises(LabelError, match="classes not in `self.classes_`"):
        model.partial_fit(X[:2], ["ant", "elk"])


def test_warm_start_refuses_other_classes_and_another_network():
    model = MLPClassifier(warm_start=True, max_iter=1).fit(X, TARGETS["classes"][1])
    with pytest.raises(LabelError, match="same classes as in the previous call"):
        model.fit(X, TARGETS["two classes"][1])
    with pytest.raises(OptionError, match=r"go on with the network that there is.*ask for sizes \(7, 3, 4\)"):
        model.set_params(hidden_layer_sizes=(3,)).fit(X, TARGETS["classes"][1])
    counts = np.arange(len(X))
    regressor = MLPRegressor(warm_start=True, max_iter=1).fit(X, counts)
    with pytest.raises(OptionError, match=r"loss='squared_error'.*now ask for .*, loss 'poisson' and dtype float64"):
        regressor.set_params(loss="poisson").fit(X, counts)


def test_a_batch_without_weight():
    weight = np.where(np.arange(163) < 40, 0.0, 1.0)
    with pytest.raises(DataError, match="not zero, got 0 over the 20 samples of batch 0"):
        MLPRegressor(batch_size=20, shuffle=False).fit(X, X[:, 0], weight)
    MLPRegressor(max_iter=2).fit(X, X[:, 0], weight)


@pytest.mark.parametrize("matrix", [np.asarray, csr_matrix, csc_array])
@pytest.mark.parametrize("dtype, number", [("float32", 1e39), ("float32", -1e300), ("float16", 7e4)])
def test_numbers_that_the_networks_dtype_cannot_hold(matrix, dtype, number):
    model = MLPRegressor(max_iter=1, dtype=dtype).fit(matrix(X), X[:, 0])
    x = X.copy()
    x[17, 2] = number
    message = f"X: expected finite numbers that {dtype} can hold, up to .*; got .* in row 17"
    for call in (model.predict, lambda x: model.fit(x, X[:, 0]), lambda x: model.score(x, X[:, 0])):
        with pytest.raises(DataError, match=message):
            call(matrix(x))


def test_numbers_that_are_not_finite():
    model = MLPRegressor(max_iter=1).fit(X, X[:, 0])
    for number in (np.nan, np.inf, -np.inf):
        x = X.copy()
        x[17, 2] = number
        with pytest.raises(ValueError, match="infinity|NaN"):
            model.predict(x)
        with config_context(assume_finite=True), pytest.raises(DataError, match=r"NaN, infinity .* in row 17"):
            model.predict(x)


def test_training_that_diverges():
    with pytest.raises(DataError, match="Solver produced non-finite parameter weights"):
        MLPRegressor(solver="sgd", learning_rate_init=1e6, max_iter=20, n_iter_no_change=20).fit(X, X[:, 0])


def test_one_array_may_take_the_place_of_another():
    X, y = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 3
    model = MLPClassifier((5,), max_iter=2, random_state=0).fit(X, y)
    model.coefs_[1] = np.zeros((5, 3))
    model.intercepts_[-1] = np.array([0.0, 9.0, 0.0])
    assert not model.coefs_[1].any() and (model.predict(X) == 1).all()
    with pytest.raises(ShapeError, match="coefs_: expected arrays of shapes"):
        model.coefs_[0] = np.zeros(3)
    again = pickle.loads(pickle.dumps(model.coefs_))
    assert type(again) is list and not again[1].any()


def test_rows_of_labels_are_refused_where_labels_were_fitted():
    X, y = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 3
    for rows in (np.ones((30, 3), int), np.eye(3, dtype=int)[y], csr_matrix(np.eye(3, dtype=int)[y])):
        messages = []
        for kind in (MLPClassifier, neural_network.MLPClassifier):
            model = kind((3,), max_iter=2, random_state=0).fit(X, y)
            with pytest.raises(ValueError, match="multilabel") as caught:
                model.partial_fit(X, rows)
            messages.append(str(caught.value))
        assert len(set(messages)) == 1


def test_features_that_are_not_scaled_take_the_same_course():
    """But for the losses that are reported: scikit-learn clips the probabilities of what is certainly wrong."""
    X, y = load_wine(return_X_y=True)
    ours, theirs = (
        kind((5,), max_iter=3, random_state=0, **options).fit(X, y)
        for kind, options in ((MLPClassifier, {"dtype": "float64"}), (neural_network.MLPClassifier, {}))
    )
    assert ours.loss_curve_[0] > theirs.loss_curve_[0]
    for mine, its in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-9, atol=1e-12)


# --- sparse X


@pytest.mark.parametrize("targets", ["classes", "two classes", "labels", "values", "counts"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("more", [{}, {"shuffle": False}, {"early_stopping": True}], ids=str)
def test_sparse_samples_take_the_course_of_dense_ones(targets, solver, more):
    kind, y = TARGETS[targets]
    dense = np.where(np.abs(X) > 0.7, X, 0)
    for estimator in (models := pair(kind, "float64", solver=solver, **more)):
        estimator.fit(csr_matrix(dense) if estimator is models[0] else dense, y, WEIGHT)
    assert_same_course(*models, "float64")
    np.testing.assert_array_equal(models[0].predict(csc_array(dense)), models[0].predict(dense))


@pytest.mark.on_each_backend
@pytest.mark.parametrize("targets", ["classes", "values"])
def test_sparse_samples_on_each_backend(targets):
    kind, y = TARGETS[targets]
    models = pair(kind, "float32", hidden_layer_sizes=(5,), max_iter=2)
    for model in models:
        model.fit(csr_matrix(X), y, WEIGHT)
    assert_same_course(*models, "float32")


def test_sparse_samples_are_predicted_in_parts(monkeypatch):
    model = MLPRegressor(max_iter=2).fit(X, X[:, :2])
    expected = model.predict(csr_matrix(X))
    for most in (1, 7 * 50):
        monkeypatch.setattr("gpuback.sklearn.samples.MOST_NUMBERS", most)
        np.testing.assert_allclose(model.predict(csr_matrix(X)), expected, rtol=1e-12)


def test_targets_and_weights_beside_sparse_samples_are_checked():
    x, y = csr_matrix(X), X[:, 0].copy()
    y[5] = 1e39
    with pytest.raises(DataError, match="y: expected finite numbers that float32 can hold.* in row 5"):
        MLPRegressor(dtype="float32").fit(x, y)
    with pytest.raises(DataError, match="sample_weight: expected finite numbers that float32 can hold.* in row 5"):
        MLPRegressor(dtype="float32").fit(x, X[:, 0], y)
    with pytest.raises(LabelError, match="y: expected numbers ≥ 0"):
        MLPRegressor("poisson").fit(x, X[:, 0])


# --- parameters assigned before the first fit


@pytest.mark.parametrize("assign_one_by_one", [False, True])
def test_the_first_fit_goes_on_with_assigned_parameters(assign_one_by_one):
    y = TARGETS["value"][1]
    start = MLPRegressor(hidden_layer_sizes=(5,), max_iter=4, random_state=0).fit(X, y)
    ours, theirs = pair(MLPRegressor, "float64", hidden_layer_sizes=(5,), warm_start=True)
    for model in (ours, theirs):
        if assign_one_by_one:
            model.coefs_, model.intercepts_ = [0, 0], [0, 0]
            for k in range(2):
                model.coefs_[k], model.intercepts_[k] = start.coefs_[k].copy(), start.intercepts_[k].copy()
        else:
            model.coefs_ = [coef.copy() for coef in start.coefs_]
            model.intercepts_ = [intercept.copy() for intercept in start.intercepts_]
    theirs.loss_curve_, theirs.best_loss_ = [], np.inf
    theirs.validation_scores_ = theirs.best_validation_score_ = None
    theirs.t_, theirs.n_layers_, theirs.out_activation_, theirs._no_improvement_count = 0, 3, "identity", 0
    assert_same_course(pickle.loads(pickle.dumps(ours)).fit(X, y), theirs.fit(X, y), "float64")
    ours.set_params(warm_start=False, max_iter=1, learning_rate_init=1e-12).fit(X, y)  # draws its own
    assert np.abs(ours.coefs_[0] - start.coefs_[0]).max() > 0.1


def test_assigned_parameters_that_do_not_fit():
    model = MLPRegressor(hidden_layer_sizes=(5,))
    model.coefs_ = [np.ones((7, 5)), np.ones((5, 1))]
    with pytest.raises(OptionError, match="expected both coefs_ and intercepts_ before the first fit, got coefs_"):
        model.partial_fit(X, X[:, 0])
    model = MLPRegressor(hidden_layer_sizes=(5,))
    model.coefs_, model.intercepts_ = [np.ones((7, 5)), np.ones((4, 1))], [np.ones(5), np.ones(1)]
    with pytest.raises(ShapeError, match=r"coefs_: expected .*\(5, 1\).*got .*\(4, 1\)"):
        model.partial_fit(X, X[:, 0])
    with pytest.raises(NotFittedError):
        model.predict(X)
