"""The estimators' parameters: scikit-learn's ranges, and its names for what gpuback calls otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from gpuback._core.activation_families import examples
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS
from gpuback.errors import OptionError, UnknownActivationError

ACTIVATION_NAMES = {"logistic": "sigmoid"}
"""gpuback's names for the activations that scikit-learn calls otherwise."""

LOSSES = {
    "softmax": "cross_entropy",
    "logistic": "binary_cross_entropy",
    "identity": "squared_error",
    "exp": "poisson",
}
"""The loss that goes with each `out_activation_`."""

Check = tuple[str, Callable[[Any], bool]]


class Parameters(BaseEstimator):  # type: ignore[misc]
    """The parameters that both estimators have; `MLPClassifier` says what they mean."""

    def __init__(
        self,
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
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.backend = backend
        self.dtype = dtype


def gpuback_activation(name: str) -> str:
    """gpuback's name for an activation that may have scikit-learn's."""
    return ACTIVATION_NAMES.get(name, name)


def layer_widths(hidden_layer_sizes: Any) -> list[int]:
    """Read the hidden layers' widths from one number or a sequence of them.

    Raises:
        OptionError: a width is not an integer ≥ 1.
    """
    one = isinstance(hidden_layer_sizes, Integral)
    widths = [hidden_layer_sizes] if one else hidden_layer_sizes
    if not isinstance(widths, (Sequence, np.ndarray)) or not all(isinstance(n, Integral) for n in widths):
        raise OptionError(f"hidden_layer_sizes: expected integers, got {hidden_layer_sizes!r}")
    numbers = [int(n) for n in widths]
    if any(n <= 0 for n in numbers):
        raise OptionError(f"hidden_layer_sizes must be > 0, got {numbers}.")
    return numbers


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise OptionError, a ValueError, if a parameter is outside what scikit-learn and gpuback can both do."""
    for name, value in parameters.items():
        if name in CHECKS:
            expected, holds = CHECKS[name]
            if not holds(value):
                raise OptionError(f"{name}: expected {expected}, got {value!r}")


def _one_of(*names: str) -> Check:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def _is_activation(value: Any) -> bool:
    """Say whether there is an activation of that name.

    Raises:
        OptionError: its constants are out of range.
    """
    try:
        return isinstance(value, str) and activation_named(gpuback_activation(value)) is not None
    except UnknownActivationError:
        return False


def _number(expected: str, holds: Callable[[Any], bool]) -> Check:
    return expected, lambda value: isinstance(value, Real) and holds(value)


COUNT: Check = "an integer ≥ 1", lambda value: isinstance(value, Integral) and int(value) >= 1
FLAG: Check = "True or False", lambda value: isinstance(value, (bool, np.bool_))
AT_LEAST_0 = _number("a finite number ≥ 0", lambda value: 0 <= value < math.inf)
ABOVE_0 = _number("a finite number > 0", lambda value: 0 < value < math.inf)
BELOW_1 = _number("a number ≥ 0 and < 1", lambda value: 0 <= value < 1)

CHECKS: dict[str, Check] = {
    "loss": _one_of("squared_error", "poisson"),
    "activation": (f"one of {', '.join((*ACTIVATION_NAMES, *ACTIVATIONS, *examples()))}", _is_activation),
    "solver": _one_of("adam", "sgd", "lbfgs"),
    "alpha": AT_LEAST_0,
    "batch_size": ("'auto' or an integer ≥ 1", lambda value: _is(value, "auto") or COUNT[1](value)),
    "learning_rate": _one_of("constant", "invscaling", "adaptive"),
    "learning_rate_init": ABOVE_0,
    "power_t": AT_LEAST_0,
    "max_iter": COUNT,
    "shuffle": FLAG,
    "tol": AT_LEAST_0,
    "verbose": ("True, False or an integer ≥ 0", lambda value: FLAG[1](value) or value == 0 or COUNT[1](value)),
    "warm_start": FLAG,
    "momentum": BELOW_1,
    "nesterovs_momentum": FLAG,
    "early_stopping": FLAG,
    "validation_fraction": BELOW_1,
    "beta_1": BELOW_1,
    "beta_2": BELOW_1,
    "epsilon": ABOVE_0,
    "n_iter_no_change": ("an integer ≥ 1 or infinity", lambda value: _is(value, math.inf) or COUNT[1](value)),
    "max_fun": COUNT,
}
"""For each parameter: the expected values in words, and the test. `MLP` checks backend and dtype."""


def _is(value: Any, special: object) -> bool:
    return isinstance(value, type(special)) and value == special
