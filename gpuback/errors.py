"""The errors of gpuback. Every one is a `GpubackError` and also the built-in kind that NumPy would have raised.

A message names what was expected, what came and, where there is one, the remedy. It is one line of at most 2,000
characters. What it quotes from outside, such as a file's name, can hold no control characters: they are shown escaped.
Errors can be pickled and copied, so that they reach the caller of a process pool as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from gpuback._text import did_you_mean, listed, quoted, shown


class GpubackError(Exception):
    """Base of everything that gpuback raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(arg) if isinstance(arg, str) and len(args) == 1 else arg for arg in args))


class ShapeError(GpubackError, ValueError):
    """An array has the wrong number of axes or the wrong length along one."""


class DtypeError(GpubackError, TypeError):
    """An array or option has a kind of number that cannot be used here."""


class LabelError(GpubackError, ValueError):
    """A label or target lies outside what the loss accepts."""


class OptionError(GpubackError, ValueError):
    """A name is unknown, a hyper-parameter is out of range, or two options exclude each other."""


class UnknownActivationError(OptionError):
    """There is no activation of that name; one of a user's own is not registered in this process."""


class BackendError(GpubackError, RuntimeError):
    """The backend that was asked for cannot be used on this machine; the message says why."""


class DeviceError(GpubackError, ValueError):
    """Arrays live on different backends or devices, or on one that the network does not use."""


class DeviceMemoryError(GpubackError, MemoryError):
    """The GPU has no room for what is needed; the message says how much."""


class DataError(GpubackError, ValueError):
    """Data cannot be trained on: not finite, empty, or of the wrong kind."""


class FileFormatError(GpubackError, ValueError):
    """A file is cut short, tampered with, malformed, or was written by another program."""


class ConversionError(GpubackError, ValueError):
    """A network of one library has no equal in another; the message names the layer that has none."""


class MissingFolderError(GpubackError, FileNotFoundError):
    """A file was to be written into a folder that does not exist."""


class OutputFileError(GpubackError, OSError):
    """A file cannot be written there: no place for files, or a link or folder that another user could have changed."""


class UnknownSourceError(OptionError, FileNotFoundError):
    """A data set was asked for that is neither built in nor a file."""


class MissingExtraError(GpubackError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class EstimatorError(GpubackError, ValueError):
    """An estimator of another library cannot be made into a network: another kind, or not fitted."""


class DivergedError(GpubackError, FloatingPointError):
    """Training met a loss, a gradient or parameters that are not finite.

    Where a loss or gradient tells, network and optimizer hold the state of the last finite step.

    Attributes:
        step: how many updates had been made when it happened; with a dynamic loss scale, which leaves steps out, when
            the epoch was over.
        epoch: the epoch it happened in, counted from 0.
    """

    def __init__(self, message: str, *, step: int, epoch: int) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch

    def __reduce__(self) -> tuple[Any, ...]:
        """Give copy and pickle the keywords, too, which `args` does not hold."""
        return functools.partial(type(self), step=self.step, epoch=self.epoch), self.args, self.__dict__


def require_known(kind: str, name: object, known: Iterable[str]) -> None:
    """Raise `unknown_name` unless `name` is one of the known ones."""
    names = list(known)
    if not isinstance(name, str) or name not in names:
        raise unknown_name(kind, name, names)


SYNONYMS = {
    **dict.fromkeys(("mse", "l2", "mean_squared_error", "quadratic"), "squared_error"),
    **dict.fromkeys(("mae", "l1", "mean_absolute_error"), "absolute_error"),
    **dict.fromkeys(
        ("ce", "nll", "crossentropy", "categorical_crossentropy", "softmax_cross_entropy"), "cross_entropy"
    ),
    **dict.fromkeys(("sparse_categorical_crossentropy", "multinomial"), "cross_entropy"),
    **dict.fromkeys(("bce", "log_loss", "logloss", "binary_crossentropy", "bernoulli"), "binary_cross_entropy"),
    **dict.fromkeys(("smooth_l1", "smoothl1", "huber_loss"), "huber"),
    **dict.fromkeys(("pinball", "quantile_loss"), "quantile"),
    **{"swish": "silu", "logistic": "sigmoid", "linear": "identity", "none": "identity", "lrelu": "leaky_relu"},
    **{"leakyrelu": "leaky_relu", "hardtanh": "hard_tanh", "sin": "sine", "siren": "sine", "exp": "exponential"},
    **{"hardswish": "hard_swish", "h_swish": "hard_swish", "hardsigmoid": "hard_sigmoid", "gelu_tanh": "gelu"},
    **{"fp32": "float32", "single": "float32", "float": "float32", "fp64": "float64", "double": "float64"},
    **{"fp16": "float16", "half": "float16", "bf16": "bfloat16", "cuda": "cupy", "gpu": "cupy", "cpu": "numpy"},
    **{"momentum": "sgd", "gd": "sgd", "step": "step_decay", "exponential_decay": "step_decay", "cos": "cosine"},
}
"""What other libraries call what is here under another name."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> OptionError:
    """Make the error for a name that is in no table, with the known name that is meant or nearest as a suggestion."""
    names = sorted(known)
    meant = SYNONYMS.get(str(name).lower())
    hint = f" Did you mean {quoted(meant)}?" if meant in names else did_you_mean(str(name).lower(), names)
    return OptionError(f"unknown {kind} {quoted(name)}.{hint} Known: {listed(names, 50)}.")


def missing_extra(package: str, purpose: str, extra: str) -> MissingExtraError:
    """Make the error for an optional package that is not installed."""
    return MissingExtraError(
        f"{purpose} needs {package}, which is not installed: pip install '.[{extra}]' in gpuback's source tree"
    )
