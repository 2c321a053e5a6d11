"""from_sklearn: networks with the outputs of fitted estimators, scikit-learn's and gpuback's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import neural_network
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gpuback.sklearn
from gpuback.errors import EstimatorError
from gpuback.sklearn import from_sklearn

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

RNG = np.random.default_rng(1)
X = RNG.normal(size=(53, 6))
CLASSIFIER_TARGETS = {
    "cross_entropy": np.array(["a", "b", "c"])[np.arange(53) % 3],
    "binary_cross_entropy": np.where(X[:, 0] > 0, "yes", "no"),
    "labels": RNG.random((53, 4)) < 0.5,
}
each_library = pytest.mark.parametrize("library", [neural_network, gpuback.sklearn], ids=["scikit-learn", "gpuback"])


@each_library
@pytest.mark.parametrize("targets", CLASSIFIER_TARGETS)
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_classifiers(library, targets, activation):
    y = CLASSIFIER_TARGETS[targets]
    model = library.MLPClassifier((7, 5), activation, max_iter=8, random_state=0).fit(X, y)
    net = from_sklearn(model)
    assert net.architecture.loss == {"labels": "binary_cross_entropy"}.get(targets, targets)
    outputs, expected = net.forward(X), model.predict_proba(X)
    assert net.sizes[-1] == (1 if y.ndim == 1 and len(np.unique(y)) == 2 else expected.shape[1])
    np.testing.assert_allclose(
        outputs, expected[:, -outputs.shape[1] :], rtol=2e-6 if net.dtype == "float32" else 1e-13
    )


@each_library
@pytest.mark.parametrize("hidden", [(), (9,), (5, 4)])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_regressors(library, hidden, n_outputs):
    y = X[:, :n_outputs] * X[:, 1:2]
    model = library.MLPRegressor(hidden_layer_sizes=hidden, max_iter=8, random_state=0)
    model.fit(X, y.ravel() if n_outputs == 1 else y)
    net = from_sklearn(model)
    assert (net.sizes, net.architecture.loss) == ((6, *hidden, n_outputs), "squared_error")
    expected = model.predict(X).reshape(53, n_outputs)
    np.testing.assert_allclose(net.forward(X), expected, rtol=1e-13, atol=0 if library is gpuback.sklearn else 1e-14)


def test_what_lbfgs_has_fitted():
    model = neural_network.MLPClassifier((8,), solver="lbfgs", random_state=0).fit(
        X, CLASSIFIER_TARGETS["cross_entropy"]
    )
    np.testing.assert_allclose(from_sklearn(model).forward(X), model.predict_proba(X), rtol=1e-9, atol=1e-14)


@each_library
def test_dtypes(library):
    model = library.MLPRegressor(max_iter=2).fit(X.astype(np.float32), X[:, 0])
    assert from_sklearn(model).dtype == np.float32
    assert from_sklearn(model, dtype="float64").dtype == np.float64
    assert from_sklearn(neural_network.MLPRegressor(max_iter=2).fit(X, X[:, 0])).dtype == np.float64
    half = gpuback.sklearn.MLPRegressor(max_iter=2, dtype="bfloat16").fit(X, X[:, 0])
    assert from_sklearn(half).dtype.name == "bfloat16"
    np.testing.assert_array_equal(from_sklearn(half).forward(X)[:, 0], half.predict(X))


@each_library
def test_the_network_is_a_copy(library):
    model = library.MLPRegressor(max_iter=2).fit(X, X[:, 0])
    before = model.predict(X)
    from_sklearn(model).theta[:] = 0
    np.testing.assert_array_equal(model.predict(X), before)


@pytest.mark.on_each_backend
@each_library
def test_on_each_backend(library):
    model = library.MLPClassifier((7,), max_iter=8, random_state=0).fit(X, CLASSIFIER_TARGETS["cross_entropy"])
    net = from_sklearn(model, dtype="float32")
    np.testing.assert_allclose(net.forward(X), model.predict_proba(X), rtol=3e-6)


@pytest.mark.parametrize(
    "estimator, message",
    [
        (gpuback.sklearn.MLPClassifier(), r"expected a fitted one, got MLPClassifier\(\)"),
        (neural_network.MLPRegressor(), r"expected a fitted one, got MLPRegressor\(\)"),
        (LogisticRegression(), "expected a fitted MLPClassifier or MLPRegressor, got LogisticRegression"),
        (make_pipeline(StandardScaler(), neural_network.MLPRegressor()), r"got Pipeline \(.*pipeline\[-1\]"),
        (neural_network.MLPRegressor, "got ABCMeta"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_fitted_perceptron(estimator, message):
    with pytest.raises(EstimatorError, match=message):
        from_sklearn(estimator)


@each_library
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_poisson_regression(library, n_outputs):
    y = np.abs(X[:, :n_outputs])
    model = library.MLPRegressor(loss="poisson", max_iter=4, random_state=0)
    model.fit(X, y.ravel() if n_outputs == 1 else y)
    net = from_sklearn(model)
    assert (net.architecture.loss, net.architecture.output, model.out_activation_) == ("poisson", "exponential", "exp")
    expected = model.predict(X).reshape(53, n_outputs)
    np.testing.assert_allclose(net.forward(X), expected, rtol=1e-6 if library is gpuback.sklearn else 1e-13)


def test_an_output_that_gpuback_does_not_have():
    model = neural_network.MLPRegressor(max_iter=2).fit(X, X[:, 0])
    model.out_activation_ = "cube"
    with pytest.raises(EstimatorError, match="expected out_activation_ softmax, logistic, identity, exp, got 'cube'"):
        from_sklearn(model)


def test_parameters_set_after_the_fit_are_not_the_fitted_networks():
    model = gpuback.sklearn.MLPRegressor(hidden_layer_sizes=(5,), max_iter=5, random_state=0).fit(X, X[:, 0])
    model.set_params(activation="tanh", dtype="float32")
    net = from_sklearn(model)
    assert net.dtype == "float64"
    np.testing.assert_array_equal(net.forward(X)[:, 0], model.predict(X))
    assert from_sklearn(model, dtype="float32").dtype == "float32"
