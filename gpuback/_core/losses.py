"""The losses: what users choose from, by name or with options, and functions of their own.

`LOSSES` holds one row for each name, with the default options. `Loss.outputs` leads from there to the formulas on NumPy
(`loss_formulas.py`); CUDA kernels know a loss by its number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuback._core import loss_formulas as formulas
from gpuback._core import own_loss
from gpuback._core.loss_formulas import Build, Run
from gpuback._core.own_loss import LossFunction
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array
from gpuback._core.validation import in_range, number, positive
from gpuback._text import MOST_IN_NAME, shown
from gpuback.errors import OptionError, unknown_name


class Loss:
    """One loss with its options, which do not change. Losses of one kind with the same options are equal.

    This is the type of gpuback's own losses. For another loss, write a function instead of a subclass.

    Attributes:
        name: what users write.
        kernel_id: the number by which CUDA kernels know it; None if there is no kernel.
        targets: "classes" (integer labels (B,) or probability rows), "probabilities" in [0, 1], "counts" ≥ 0, any real
            "values", or of a function its "own": B rows of whatever it reads.
        outputs: the output functions it goes with, the default first, and the formulas on NumPy.
    """

    name: str
    kernel_id: int | None
    targets: Literal["classes", "probabilities", "counts", "values", "own"]
    outputs: Mapping[str, Build]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: a loss does not change, since networks share it; make another one")

    def __delattr__(self, name: str) -> None:
        setattr(self, name, None)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that make this loss again, as JSON can hold them."""
        return {}

    @property
    def default_output(self) -> str:
        return next(iter(self.outputs))

    def check_width(self, width: int) -> None:
        """Raise OptionError if an option is for another number of outputs."""

    def parameters(self, width: int) -> NDArray[np.float64] | None:
        """Return the numbers that kernels read for an output layer of this width: rows (…, width), or None."""
        return None

    def bind(self, output: str, a: Array, losses: Array, scratch: Scratch, divisor: float) -> Run:
        """Bind the formula on NumPy to its buffers; see `gpuback._core.loss_formulas`."""
        parameters = self.parameters(a.shape[1])
        in_dtype = None if parameters is None else parameters.astype(a.dtype)
        return self.outputs[output](a, losses, scratch, divisor, in_dtype)

    def as_option(self) -> Any:
        """Return what `saved_loss` makes this loss of again, as JSON can hold it: the name alone if that is enough."""
        return self.name if self == LOSSES.get(self.name) else {"name": self.name, **self.options}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and type(self) is type(other) and self.options == other.options

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class CrossEntropy(Loss):
    """ℓ = −Σ_j t_j log ŷ_j, behind softmax, with t = e(y) for a label y, or t = y for a row of probabilities.

    With label smoothing ε and class weights c, t_j = c_j ((1 − ε) e(y)_j + ε/n_L). Without smoothing, a label's loss
    is multiplied by c_y, as by a sample weight. The divisor of the batch's mean stays B:
    `torch.nn.CrossEntropyLoss(weight=c)` divides by Σ_b c_{y_b} unless its reduction is "sum".

    Args:
        label_smoothing: ε, from 0 to below 1.
        class_weight: c, a finite number ≥ 0 for each class, not all of them 0; None for 1.

    Raises:
        OptionError: an option is out of range.

    Source: Szegedy et al., Rethinking the Inception architecture, 2016 (label smoothing).
    """

    name, targets = "cross_entropy", "classes"
    label_smoothing: float
    class_weight: tuple[float, ...] | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weight: Iterable[float] | None = None) -> None:
        smoothing, weight = in_range("label_smoothing", label_smoothing, 0.0, 1.0), None
        if class_weight is not None:
            weight = numbers("class_weight", class_weight, "a sequence of numbers, one for each class")
            if not (any(weight) and all(0.0 <= c < math.inf for c in weight)):
                raise OptionError(f"class_weight: expected finite numbers ≥ 0, not all of them 0, got {list(weight)}")
        plain = smoothing == 0.0 and weight is None
        vars(self).update(
            label_smoothing=smoothing,
            class_weight=weight,
            kernel_id=0 if plain else 7,
            outputs={"softmax": formulas.softmax_cross_entropy if plain else formulas.weighted_cross_entropy},
        )

    @property
    def options(self) -> dict[str, Any]:
        weight = None if self.class_weight is None else list(self.class_weight)
        return {"label_smoothing": self.label_smoothing, "class_weight": weight}

    def check_width(self, width: int) -> None:
        if self.class_weight is not None and len(self.class_weight) != width:
            raise OptionError(
                f"class_weight: expected {width} numbers, one for each output, got {len(self.class_weight)}"
            )

    def parameters(self, width: int) -> NDArray[np.float64] | None:
        """Return (2, n): c_j (1 − ε) and c_j ε/n; t is the first times e(y), plus the second."""
        if self.kernel_id == 0:
            return None
        weight = np.ones(width) if self.class_weight is None else np.array(self.class_weight)
        return np.stack([weight * (1.0 - self.label_smoothing), weight * (self.label_smoothing / width)])


class BinaryCrossEntropy(Loss):
    """ℓ = −Σ_j (y_j log ŷ_j + (1 − y_j) log(1 − ŷ_j)), behind sigmoid, for y_j in [0, 1]."""

    name, kernel_id, targets = "binary_cross_entropy", 1, "probabilities"
    outputs: Mapping[str, Build] = {"sigmoid": formulas.sigmoid_binary_cross_entropy}


class SquaredError(Loss):
    """ℓ = ½ Σ_j (ŷ_j − y_j)²."""

    name, kernel_id, targets = "squared_error", 2, "values"
    outputs: Mapping[str, Build] = {
        "identity": formulas.identity_squared_error,
        "softmax": formulas.softmax_squared_error,
        "sigmoid": formulas.elementwise_squared_error("sigmoid"),
        "tanh": formulas.elementwise_squared_error("tanh"),
    }


ELEMENTWISE = ("identity", "sigmoid", "tanh")
"""The output functions of losses that are a sum over the outputs, without a formula of their own for softmax."""


class AbsoluteError(Loss):
    """ℓ = Σ_j |ŷ_j − y_j|. Its derivative is the residual's sign, 0 at 0."""

    name, kernel_id, targets = "absolute_error", 3, "values"
    outputs: Mapping[str, Build] = {output: formulas.elementwise(output, formulas.absolute) for output in ELEMENTWISE}


class Huber(Loss):
    """ℓ = Σ_j c_j (r_j − c_j/2), r = ŷ − y, with c = r clipped to ±δ: ½ r² near 0, δ (|r| − δ/2) beyond δ.

    Args:
        delta: δ, more than 0.

    Raises:
        OptionError: δ is no finite number > 0.

    Source: Huber, Robust estimation of a location parameter, 1964.
    """

    name, kernel_id, targets = "huber", 4, "values"
    outputs: Mapping[str, Build] = {output: formulas.elementwise(output, formulas.huber) for output in ELEMENTWISE}
    delta: float

    def __init__(self, delta: float = 1.0) -> None:
        vars(self)["delta"] = positive("delta", delta)

    @property
    def options(self) -> dict[str, Any]:
        return {"delta": self.delta}

    def parameters(self, width: int) -> NDArray[np.float64]:
        """Return (n,), δ."""
        return np.full(width, self.delta)


class Quantile(Loss):
    """ℓ = Σ_j max(q_j r_j, (q_j − 1) r_j), r = y − ŷ, the pinball loss: ŷ_j becomes the q_j-quantile of y_j.

    With several q, targets may also be (B,) or (B, 1): then each output is another quantile of the same number.

    Args:
        q: a number between 0 and 1, or one for each output.

    Raises:
        OptionError: a q is not between 0 and 1.

    Source: Koenker and Bassett, Regression quantiles, 1978.
    """

    name, kernel_id, targets = "quantile", 5, "values"
    outputs: Mapping[str, Build] = {output: formulas.elementwise(output, formulas.quantile) for output in ELEMENTWISE}
    q: tuple[float, ...]

    def __init__(self, q: float | Iterable[float] = 0.5) -> None:
        expected = "a number between 0 and 1, or one for each output"
        values = (number(q),) if isinstance(q, (int, float, np.number)) else numbers("q", q, expected)
        if not values or not all(0.0 < one < 1.0 for one in values):
            raise OptionError(f"q: expected {expected}, got {q!r}")
        vars(self)["q"] = values

    @property
    def options(self) -> dict[str, Any]:
        return {"q": self.q[0] if len(self.q) == 1 else list(self.q)}

    def check_width(self, width: int) -> None:
        if len(self.q) not in (1, width):
            raise OptionError(f"q: expected one number, or {width}, one for each output, got {len(self.q)}")

    def parameters(self, width: int) -> NDArray[np.float64]:
        """Return (2, n), 1 − q and q."""
        q = np.broadcast_to(np.array(self.q), width)
        return np.stack([1.0 - q, q])


class Poisson(Loss):
    """ℓ = Σ_j y_j log(y_j/ŷ_j) − y_j + ŷ_j, half the Poisson deviance, behind ŷ = e^a, for counts y_j ≥ 0."""

    name, kernel_id, targets = "poisson", 6, "counts"
    outputs: Mapping[str, Build] = {"exponential": formulas.exponential_poisson}


LOSSES: dict[str, Loss] = {
    row.name: row
    for row in (
        CrossEntropy(),
        BinaryCrossEntropy(),
        SquaredError(),
        AbsoluteError(),
        Huber(),
        Quantile(),
        Poisson(),
    )
}


class OwnLoss(Loss):
    """A function of the user's as a loss; of a file without its function, only the name.

    Args:
        function: see `LossFunction`; None if it is not there.
        name: of the function; by default its own.
    """

    kernel_id, targets, outputs, default_output = None, "own", {}, "identity"
    function: LossFunction | None

    def __init__(self, function: LossFunction | None, name: str | None = None) -> None:
        vars(self).update(function=function, name=_name_of(function) if name is None else name)

    @property
    def options(self) -> dict[str, Any]:
        return {"function": self.name}

    def bind(self, output: str, a: Array, losses: Array, scratch: Scratch, divisor: float) -> Run:
        return own_loss.bind(self.function, self.name, output, a, losses, scratch, divisor)

    def as_option(self) -> Any:
        return self.options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnLoss) and (self.function, self.name) == (other.function, other.name)

    __hash__ = Loss.__hash__

    def __repr__(self) -> str:
        return shown(self.name, MOST_IN_NAME)


KINDS = (*map(type, LOSSES.values()), OwnLoss)
"""The types of losses there are."""


def _name_of(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def loss_of(option: object) -> Loss:
    """Make a loss of a name, of an object of `gpuback.losses`, or of a function.

    Raises:
        OptionError: an unknown name, or none of these.
    """
    if isinstance(option, str):
        if option not in LOSSES:
            raise unknown_name("loss", option, LOSSES)
        return LOSSES[option]
    if isinstance(option, Loss) and type(option) in KINDS:
        return option
    got = repr(option)
    if isinstance(option, type):
        got = f"the class {option.__name__}"
    elif callable(option):
        return OwnLoss(option)
    elif isinstance(option, Loss):
        got = f"an object of {type(option).__name__}, a subclass that gpuback does not know"
    raise OptionError(
        f"loss: expected a name ({', '.join(LOSSES)}), an object of gpuback.losses or a function of (ŷ, y), got {got}"
    )


def saved_loss(option: object) -> Loss:
    """Make a loss of what `Loss.as_option` returned.

    Raises:
        OptionError: it is nothing of the kind.
    """
    if not isinstance(option, Mapping):
        return loss_of(option)
    if set(option) == {"function"}:
        return OwnLoss(None, str(option["function"]))
    if not isinstance(option.get("name"), str):
        raise OptionError(f"loss: expected a name with options, got {dict(option)}")
    row = loss_of(option["name"])
    try:
        return type(row)(**{name: value for name, value in option.items() if name != "name"})
    except TypeError:
        raise OptionError(f"loss {row.name!r}: expected options {list(row.options)}, got {dict(option)}") from None


def numbers(name: str, values: Iterable[float], expected: str) -> tuple[float, ...]:
    """Return one or more numbers as Python floats, NaN for what is no number.

    Args:
        name, expected: of the option, for the message.

    Raises:
        OptionError: it is no sequence. Mappings and sets have no order of outputs.
    """
    try:
        if not isinstance(values, (str, bytes, Mapping, Set)):
            return tuple(number(value) for value in values)
    except TypeError:
        pass
    raise OptionError(f"{name}: expected {expected}, got {values!r}")
