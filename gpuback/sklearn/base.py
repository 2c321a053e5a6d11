"""The base class of both estimators: fitting, epoch by epoch, as scikit-learn does it, and the fitted attributes."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, shuffle
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from gpuback._core.activations import Siren
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import initial_parameters
from gpuback._core.typing import ArrayLike
from gpuback._network.mlp import MLP
from gpuback.errors import DataError, OptionError
from gpuback.sklearn.descent import Descent
from gpuback.sklearn.lbfgs import Objective, minimize_loss
from gpuback.sklearn.parameters import LOSSES, Parameters, check_parameters, gpuback_activation, layer_widths
from gpuback.sklearn.parts import Parts, copies_of_parts, write_parts
from gpuback.sklearn.samples import TrainingSet, dense_parts, require_range, rows_at_a_time


class BaseMLP(Parameters, ABC):
    """A multilayer perceptron as an estimator; the public ones say what it predicts."""

    # The fitted state. `_net` is there from the first fit on, and with it all the rest.
    _net: MLP
    _optimizer: Descent
    _best_theta: NDArray[Any] | None
    _assigned: dict[str, Any]  # coefs_ and intercepts_, where they were assigned before the first fit
    _no_improvement_count: int
    loss_: float
    loss_curve_: list[float]
    best_loss_: float | None
    validation_scores_: list[float] | None
    best_validation_score_: float | None
    n_iter_: int
    t_: int
    n_layers_: int
    n_outputs_: int
    out_activation_: str

    # What differs between the two

    @abstractmethod
    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool, incremental: bool) -> tuple[Any, Any, Any]:
        """Check X and y. Return X, y in the form of predictions, and y as targets. `reset` sets the outputs anew.

        X is dense or in CSR format.
        """

    @abstractmethod
    def _output(self, targets: Any) -> tuple[int, str]:
        """Return the number of outputs, and their function in scikit-learn's words."""

    @abstractmethod
    def _predictions(self, outputs: Any) -> Any:
        """Turn the network's outputs into predictions."""

    @abstractmethod
    def _score(self, y: Any, predictions: Any, sample_weight: Any) -> float:
        """Compute the validation score."""

    # Fitting

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Any:
        """Train on X and y until the loss (or, with early stopping, the score) no longer improves.

        Args:
            X: (n_samples, n_features) real numbers, dense or sparse.
            y: (n_samples,) or (n_samples, n_outputs).
            sample_weight: (n_samples,).

        Returns:
            self.

        Raises:
            OptionError, DataError, and ValueErrors of scikit-learn's: a parameter or the data cannot be used.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, *, incremental: bool) -> Any:
        check_parameters(self.get_params(deep=False))
        if incremental and self.early_stopping:
            raise OptionError("partial_fit does not support early_stopping=True")
        goes_on = self.warm_start or incremental
        first = not (goes_on and hasattr(self, "_net"))
        X, y, targets = self._checked(X, y, reset=first, incremental=incremental)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        random = check_random_state(self.random_state)
        architecture = self._architecture(X, targets, first)
        require_range(X, architecture.precision.operand)
        if first:
            self._initialise(architecture, random, goes_on)
        elif architecture != self._net.architecture:
            raise OptionError(
                f"warm_start and partial_fit go on with the network that there is, {self._net!r}; "
                f"the parameters and data now ask for sizes {architecture.sizes}, activation {self.activation!r}, "
                f"loss {architecture.loss!r} and dtype {architecture.precision.name}"
            )
        if first or self._stops_early != (self.validation_scores_ is not None):
            self._start_watching()
        try:
            if self.solver == "lbfgs":
                self._minimise(X, targets, weight)
            else:
                self._descend(X, y, targets, weight, random, incremental)
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=3)
        if self._stops_early:
            self._net.theta = self._best_theta
        with self._net.ops.scope():
            if not self._net.ops.all_finite(self._net.theta):
                raise DataError(
                    "Solver produced non-finite parameter weights. The input data may contain large values and need "
                    "to be preprocessed."
                )
        return self

    @property
    def _stops_early(self) -> bool:
        return bool(self.early_stopping) and self.solver != "lbfgs"

    def _is_stochastic(self) -> bool:
        """Tell whether there is a `partial_fit`.

        Raises:
            AttributeError: there is none; this says why.
        """
        if self.solver == "lbfgs":
            raise AttributeError("partial_fit goes with solver 'adam' and 'sgd': 'lbfgs' needs all samples at once")
        return True

    def _architecture(self, X: Any, targets: Any, first: bool) -> Architecture:
        n_outputs, output = self._output(targets)
        dtype = self.dtype
        if dtype is None:
            dtype = X.dtype if first else self._net.dtype
        return Architecture.create(
            [X.shape[1], *layer_widths(self.hidden_layer_sizes), n_outputs],
            activation=gpuback_activation(self.activation),
            loss=LOSSES[output],
            dtype=dtype,
        )

    def _initialise(self, architecture: Architecture, random: np.random.RandomState, goes_on: bool) -> None:
        """Make a fresh network and reset the fitted attributes; go on with parameters that were assigned before."""
        assigned = self.__dict__.get("_assigned", {}) if goes_on else {}
        if len(assigned) == 1:
            raise OptionError(f"expected both coefs_ and intercepts_ before the first fit, got {next(iter(assigned))}")
        net = MLP(**architecture.as_options(), backend=self.backend, seed=0)
        for name, values in assigned.items():
            write_parts(net, name, values)
        if not assigned:
            net.theta = self._initial_theta(architecture, random)
        self._net = net
        for name in ("_assigned", "_optimizer"):  # of the network before
            self.__dict__.pop(name, None)
        self.n_layers_ = len(architecture.sizes)
        self.n_outputs_ = architecture.sizes[-1]
        self.out_activation_ = next(name for name, loss in LOSSES.items() if loss == architecture.loss)
        self.n_iter_ = self.t_ = self._no_improvement_count = 0
        self.loss_curve_ = []

    def _initial_theta(self, architecture: Architecture, random: np.random.RandomState) -> NDArray[Any]:
        """Draw the very numbers that scikit-learn does.

        Before sine(w0=…), whose training depends on them, initial weights are gpuback's.
        """
        theta = np.empty(architecture.layout.n_parameters)
        weights, biases = architecture.layout.split(theta)
        factor = 2.0 if gpuback_activation(self.activation) == "sigmoid" else 6.0
        for W, b in zip(weights, biases, strict=True):
            bound = math.sqrt(factor / sum(W.shape))
            W[...] = random.uniform(-bound, bound, W.T.shape).T
            b[...] = random.uniform(-bound, bound, b.shape)
        if any(isinstance(row.initialisation, Siren) for row in architecture.hidden_activations):
            names = (*architecture.activations, architecture.output)
            theta = initial_parameters(architecture.layout, names, int(random.randint(np.iinfo(np.int32).max)))
        return theta

    def _start_watching(self) -> None:
        """Reset the records that stopping goes by: losses or validation scores."""
        early = self._stops_early
        self.best_loss_ = None if early else math.inf
        self.validation_scores_ = [] if early else None
        self.best_validation_score_ = -math.inf if early else None
        self._best_theta = self._net.ops.to_numpy(self._net.theta).copy() if early else None

    # Stochastic solvers

    def _descend(self, X: Any, y: Any, targets: Any, weight: Any, random: Any, incremental: bool) -> None:
        """Run Adam or SGD, with early stopping on a part of the samples."""
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = Descent(self._net, self.get_params(deep=False))
        rows, held = self._hold_out(X, y, targets, weight, random)
        X, targets, weight = X[rows], targets[rows], None if weight is None else weight[rows]
        samples = TrainingSet(self._net, X, targets, weight, self._size_of_batches(X.shape[0]))
        self._epochs(samples, X.shape[0], random, held, incremental)

    def _hold_out(self, X: Any, y: Any, targets: Any, weight: Any, random: Any) -> tuple[Any, tuple[Any, ...] | None]:
        """Choose the rows to train on, and X, y and weights to validate on, as scikit-learn does."""
        if not self.early_stopping:
            return slice(None), None
        binary = self.out_activation_ == "logistic" and self.n_outputs_ == 1
        stratify = targets.astype(bool) if binary else None  # which names classes in messages as scikit-learn does
        rows, others = train_test_split(
            np.arange(X.shape[0]), random_state=random, test_size=self.validation_fraction, stratify=stratify
        )
        if len(others) < 2:
            raise DataError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        x_held = X[others]
        if not issparse(X):
            x_held = self._net.ops.asarray(x_held, self._net.theta.dtype, "X")
        return rows, (x_held, y[others], None if weight is None else weight[others])

    def _size_of_batches(self, n_samples: int) -> int:
        if self.batch_size == "auto":
            return min(200, n_samples)
        if self.batch_size > n_samples:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=5
            )
        return min(int(self.batch_size), n_samples)

    def _epochs(self, samples: TrainingSet, n_samples: int, random: Any, held: Any, incremental: bool) -> None:
        """Run one epoch, or as many as max_iter and the stopping rule allow."""
        order = np.arange(n_samples)
        self.n_iter_ = 0
        while self.n_iter_ < (1 if incremental else self.max_iter):
            if self.shuffle:
                order = shuffle(order, random_state=random)
            loss = self._optimizer.epoch(samples, order if self.shuffle else None, float(self.alpha))
            self.t_ += n_samples
            self._note_iteration(loss)
            improved = self._note_loss() if held is None else self._note_score(*held)
            self._no_improvement_count = 0 if improved else self._no_improvement_count + 1
            self._optimizer.end_epoch(self.t_)
            if self._no_improvement_count > self.n_iter_no_change:
                what = "Training loss" if held is None else "Validation score"
                message = (
                    f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs."
                )
                if self._optimizer.stops(message, bool(self.verbose)):
                    return
                self._no_improvement_count = 0
        if not incremental:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't "
                "converged yet.",
                ConvergenceWarning,
                stacklevel=5,
            )

    def _note_iteration(self, loss: float) -> None:
        self.loss_ = loss
        self.n_iter_ += 1
        self.loss_curve_.append(loss)
        if self.verbose:
            print(f"Iteration {self.n_iter_}, loss = {loss:.8f}")

    def _note_loss(self) -> bool:
        """Tell whether the loss is the best so far by more than tol; NaN counts as better, as in scikit-learn."""
        assert self.best_loss_ is not None
        improved = not self.loss_ > self.best_loss_ - self.tol
        self.best_loss_ = self.loss_ if self.loss_ < self.best_loss_ else self.best_loss_
        return improved

    def _note_score(self, X: Any, y: Any, sample_weight: Any) -> bool:
        """Tell whether the validation score is the best so far by tol or more; keep the best θ."""
        assert self.validation_scores_ is not None
        assert self.best_validation_score_ is not None
        outputs = self._forward(X)
        score = math.nan
        if np.isfinite(outputs).all():
            score = float(self._score(y, self._predictions(outputs), sample_weight))
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        improved = not score < self.best_validation_score_ + self.tol
        if score > self.best_validation_score_:
            self.best_validation_score_ = score
            self._best_theta = self._net.ops.to_numpy(self._net.theta).copy()
        return improved

    # L-BFGS

    def _minimise(self, X: Any, targets: Any, weight: Any) -> None:
        """Minimize the loss of all samples."""

        def note(loss: float) -> None:
            self._note_iteration(loss)
            self._note_loss()

        samples = TrainingSet(self._net, X, targets, weight, rows_at_a_time(X), one_loss=True)
        objective = Objective(self._net, samples, float(self.alpha))
        self.n_iter_ = 0
        reason = minimize_loss(
            objective, self._net, note, gtol=float(self.tol), maxiter=int(self.max_iter), maxfun=int(self.max_fun)
        )
        self.loss_ = objective.loss
        if reason is not None:
            warnings.warn(
                f"lbfgs ended after {self.n_iter_} iterations and before it converged: {reason}. Increase max_iter or "
                "max_fun, or scale the data.",
                ConvergenceWarning,
                stacklevel=4,
            )

    # What has been fitted

    def _forward(self, X: Any) -> NDArray[Any]:
        """Compute the outputs on the host, in θ's dtype; X is dense or in CSR format."""
        return np.concatenate([self._net.ops.to_numpy(self._net.forward(part)) for part in dense_parts(X)])

    def _outputs(self, X: ArrayLike) -> NDArray[Any]:
        """Compute the outputs on the host, (n_samples, n_outputs), in the dtype that X and θ have in common."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False)
        require_range(X, self._net.dtype)
        outputs = self._forward(X)
        return outputs.astype(np.result_type(X.dtype, outputs.dtype), copy=False)

    def predict(self, X: ArrayLike) -> Any:
        """Predict for X, (n_samples,) or (n_samples, n_outputs)."""
        return self._predictions(self._outputs(X))

    @property
    def coefs_(self) -> list[NDArray[Any]]:
        """The weights as scikit-learn has them, W_kᵀ, each (nI, nO): read-only copies on the host, new at each access.

        Assigning a list of arrays of these shapes, or one array in its place, writes them into the network; so does
        `intercepts_`. Assigned before the first fit, both are where `partial_fit`, or `fit` with warm_start, begins.
        """
        return self._parts("coefs_")

    @coefs_.setter
    def coefs_(self, values: Sequence[ArrayLike]) -> None:
        self._assign("coefs_", values)

    @property
    def intercepts_(self) -> list[NDArray[Any]]:
        """The biases, each (nO,); see `coefs_`."""
        return self._parts("intercepts_")

    @intercepts_.setter
    def intercepts_(self, values: Sequence[ArrayLike]) -> None:
        self._assign("intercepts_", values)

    def _parts(self, name: str) -> list[NDArray[Any]]:
        if not hasattr(self, "_net") and name in self.__dict__.get("_assigned", {}):
            assigned: list[NDArray[Any]] = self._assigned[name]
            return assigned
        check_is_fitted(self)
        return Parts(copies_of_parts(self._net, name), partial(setattr, self, name))

    def _assign(self, name: str, values: Sequence[ArrayLike]) -> None:
        if hasattr(self, "_net"):
            write_parts(self._net, name, values)
        else:
            self.__dict__.setdefault("_assigned", {})[name] = values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_net")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state in host arrays, for copy and pickle: backend="auto" is decided anew where it is loaded."""
        state = dict(super().__getstate__())
        if "_net" in state:
            state["_net"] = self._net.to("numpy")
        if "_optimizer" in state:
            state["_optimizer"] = self._optimizer.portable()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_net" in state:
            state["_net"] = state["_net"].to(state["backend"])
        if "_optimizer" in state:
            state["_optimizer"] = Descent.restored(state["_net"], state["_optimizer"])
        super().__setstate__(state)
