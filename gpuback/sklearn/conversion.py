"""A fitted estimator of scikit-learn's as a network of gpuback's."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import neural_network

from gpuback._network.mlp import MLP
from gpuback.errors import EstimatorError
from gpuback.sklearn.base import BaseMLP
from gpuback.sklearn.parameters import LOSSES, gpuback_activation


def from_sklearn(estimator: object, *, backend: str = "auto", dtype: object = None) -> MLP:
    """Make a network that computes what a fitted multilayer perceptron does.

    ŷ is what `predict_proba` of a multiclass or multilabel classifier and `predict` of a regressor return; of a binary
    classifier it is the one sigmoid output, the probability of classes_[1]. The loss is the estimator's: cross_entropy,
    binary_cross_entropy, squared_error or poisson.

    Args:
        estimator: a fitted MLPClassifier or MLPRegressor, of sklearn.neural_network or of gpuback.sklearn.
        backend: as MLP's.
        dtype: as MLP's; by default what the estimator computes in.

    Returns:
        A network of its own: later changes to either do not reach the other.

    Raises:
        EstimatorError: not fitted, another kind of estimator, or one with an output that gpuback does not have.
    """
    kinds = (neural_network.MLPClassifier, neural_network.MLPRegressor, BaseMLP)
    if not isinstance(estimator, kinds):
        hint = " (a pipeline's last step is pipeline[-1])" if hasattr(estimator, "named_steps") else ""
        raise EstimatorError(
            f"estimator: expected a fitted MLPClassifier or MLPRegressor, got {type(estimator).__name__}{hint}"
        )
    fitted: Any = estimator
    if not hasattr(fitted, "coefs_"):
        raise EstimatorError(f"estimator: expected a fitted one, got {fitted!r} before its fit")
    if fitted.out_activation_ not in LOSSES:
        raise EstimatorError(
            f"estimator: expected out_activation_ {', '.join(LOSSES)}, got {fitted.out_activation_!r} of {fitted!r}"
        )
    if isinstance(fitted, BaseMLP):  # whose parameters may have been set anew since
        source = fitted._net
        options = source.architecture.as_options() | ({} if dtype is None else {"dtype": dtype})
        net = MLP(**options, backend=backend, seed=0)
        net.theta = source.ops.to_numpy(source.theta)
        return net
    coefs = fitted.coefs_
    if dtype is None:
        dtype = coefs[0].dtype
    net = MLP(
        [len(coefs[0]), *(coef.shape[1] for coef in coefs)],
        activation=gpuback_activation(fitted.activation),
        loss=LOSSES[fitted.out_activation_],
        dtype=dtype,
        backend=backend,
        seed=0,
    )
    pairs = zip(coefs, fitted.intercepts_, strict=True)
    net.theta = np.concatenate([part for coef, intercept in pairs for part in (coef.T.ravel(), intercept)])
    return net
