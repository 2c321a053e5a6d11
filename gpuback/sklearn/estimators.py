"""MLPClassifier and MLPRegressor: scikit-learn's interface, gpuback's network."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
from sklearn.utils.validation import validate_data

from gpuback._core.typing import ArrayLike
from gpuback.errors import LabelError
from gpuback.sklearn.base import BaseMLP

FLOATS = (np.float64, np.float32)
"""X of these dtypes is kept as it is. Any other becomes float64 before it is cast to the network's dtype."""


class MLPClassifier(ClassifierMixin, BaseMLP):  # type: ignore[misc]
    """`sklearn.neural_network.MLPClassifier` by gpuback: binary, multiclass and multilabel, labels of any kind.

    Args: name, default and meaning are scikit-learn's, with these differences:
        activation: any that `gpuback.MLP` takes, e.g. gelu or softplus(beta=100); sigmoid is logistic.
        momentum: below 1.
        backend: "numpy", "cupy", or "auto" for the fastest that this machine can use.
        dtype: what products' operands are rounded to: float64, float32, bfloat16 or float16. None is float32 if X is
            in the first fit, else float64, as scikit-learn computes. Parameters are float64 for float64, else float32;
            predictions are float64 if they or X are.

    Attributes: scikit-learn's. `coefs_` and `intercepts_` are read-only copies; assigning to them writes the network.
        `loss_curve_` and `best_loss_` are there after lbfgs too.

    With the same `random_state` the initial parameters, every batch and the validation set are scikit-learn's own, and
    so is the course of training, up to rounding. Reported losses differ where a wrong class has probability 1 to
    rounding, e.g. with unscaled features: scikit-learn clips probabilities, and may stop sooner.

    Example:
        >>> model = MLPClassifier((16,), learning_rate_init=0.05, random_state=0)
        >>> model.fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"]).predict([[0.5], [2.5]])
        array(['low', 'high'], dtype='<U4')
    """

    classes_: NDArray[Any]
    _label_binarizer: LabelBinarizer

    @available_if(BaseMLP._is_stochastic)
    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None, classes: ArrayLike | None = None
    ) -> Any:
        """Train for one epoch on these samples, from the current state.

        Args:
            X, y, sample_weight: as `fit` takes them.
            classes: all labels that will ever come; needed in the first call.

        Returns:
            self.
        """
        if _check_partial_fit_first_call(self, classes):
            multilabel = type_of_target(y).startswith("multilabel")
            self._label_binarizer = LabelBinarizer().fit(y if multilabel else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """(n_samples, n_classes) probabilities, in the order of `classes_`; each label's own if there are several."""
        outputs = self._outputs(X)
        if self.n_outputs_ == 1:
            return np.hstack([1 - outputs, outputs])
        if self.out_activation_ == "softmax":
            outputs /= outputs.sum(axis=1, keepdims=True)  # for rows of float32's that are given out as float64
        return outputs

    def predict_log_proba(self, X: ArrayLike) -> NDArray[Any]:
        """log(predict_proba(X))."""
        return np.asarray(np.log(self.predict_proba(X)))

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool, incremental: bool) -> tuple[Any, Any, Any]:
        X, y = validate_data(self, X, y, accept_sparse="csr", multi_output=True, dtype=FLOATS, reset=reset)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
        else:
            self._check_classes(unique_labels(y))
        if self._label_binarizer.y_type_ == "multiclass" and np.ndim(y) == 1:
            return X, y, np.searchsorted(self.classes_, y)
        return X, y, self._label_binarizer.transform(y)

    def _check_classes(self, came: Any) -> None:
        if self.warm_start and set(came) != set(self.classes_):
            raise LabelError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {came}"
            )
        if not set(came) <= set(self.classes_):
            raise LabelError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {came}."
            )

    def _output(self, targets: Any) -> tuple[int, str]:
        if self._label_binarizer.y_type_ == "multiclass":
            return len(self.classes_), "softmax"
        return targets.shape[1], "logistic"

    def _predictions(self, outputs: Any) -> Any:
        return self._label_binarizer.inverse_transform(outputs.ravel() if outputs.shape[1] == 1 else outputs)

    def _score(self, y: Any, predictions: Any, sample_weight: Any) -> float:
        return float(accuracy_score(y, predictions, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, BaseMLP):  # type: ignore[misc]
    """`sklearn.neural_network.MLPRegressor` by gpuback, for one output or several.

    Args: as scikit-learn's, with the differences that `MLPClassifier` names, and:
        loss: "squared_error", ½(ŷ − y)², or "poisson", half the Poisson deviance, for y ≥ 0 and predictions e^a.

    Attributes: as `MLPClassifier`'s.

    Example:
        >>> model = MLPRegressor(hidden_layer_sizes=(16,), learning_rate_init=0.05, random_state=0)
        >>> bool(model.fit([[0.0], [1.0], [2.0], [3.0]], [0.0, 1.0, 2.0, 3.0]).score([[0.5], [2.5]], [0.5, 2.5]) > 0.95)
        True
    """

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: Any = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        backend: str = "auto",
        dtype: object = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            solver=solver,
            alpha=alpha,
            batch_size=batch_size,
            learning_rate=learning_rate,
            learning_rate_init=learning_rate_init,
            power_t=power_t,
            max_iter=max_iter,
            shuffle=shuffle,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            warm_start=warm_start,
            momentum=momentum,
            nesterovs_momentum=nesterovs_momentum,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            n_iter_no_change=n_iter_no_change,
            max_fun=max_fun,
            backend=backend,
            dtype=dtype,
        )
        self.loss = loss

    @available_if(BaseMLP._is_stochastic)
    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Any:
        """Train for one epoch on these samples, from the current state; arguments as `fit`'s."""
        return self._fit(X, y, sample_weight, incremental=True)

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool, incremental: bool) -> tuple[Any, Any, Any]:
        X, y = validate_data(
            self, X, y, accept_sparse="csr", multi_output=True, y_numeric=True, dtype=FLOATS, reset=reset
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, y, y

    def _output(self, targets: Any) -> tuple[int, str]:
        return (1 if targets.ndim == 1 else targets.shape[1]), "exp" if self.loss == "poisson" else "identity"

    def _predictions(self, outputs: Any) -> Any:
        return outputs.ravel() if outputs.shape[1] == 1 else outputs

    def _score(self, y: Any, predictions: Any, sample_weight: Any) -> float:
        return float(r2_score(y, predictions, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
