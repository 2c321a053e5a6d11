"""Print how far a layer's dW, db and dh lie from the exact result, with reproducible=True and without.

Errors are the largest of |C − C₆₄|/(|A||B|) over a result, in units of float32's roundoff u = 2⁻²⁴: 1 is what rounding
the exact result may cost where nothing cancels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.registry import ops_for
from gpuback._core.precision import Precision

BATCH_SIZE, N_OUT, N_IN = 2048, 128, 256

Operands = tuple[NDArray[np.float32], ...]


def mixed(rng: np.random.Generator) -> Operands:
    """Draw da, h and W of mixed signs."""
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in _shapes())


def positive(rng: np.random.Generator) -> Operands:
    return tuple(rng.random(shape, dtype=np.float32) for shape in _shapes())


def columns(rng: np.random.Generator) -> Operands:
    """Draw features, and units, of 10⁶ beside those of 10⁻⁶."""
    da, h, W = mixed(rng)
    da[:, ::2] *= 1e6
    da[:, 1::2] *= 1e-6
    h[:, ::2] *= 1e6
    h[:, 1::2] *= 1e-6
    return da, h, W


def samples(rng: np.random.Generator) -> Operands:
    """Draw samples of which every hundredth's h is 10⁶ times as large as the others'."""
    da, h, W = mixed(rng)
    h[::100] *= 1e6
    return da, h, W


def _shapes() -> tuple[tuple[int, int], ...]:
    return (BATCH_SIZE, N_OUT), (BATCH_SIZE, N_IN), (N_OUT, N_IN)


def errors(make: Callable[[np.random.Generator], Operands], reproducible: bool) -> dict[str, float]:
    """Measure the largest error of each result, in units of u."""
    da, h, W = make(np.random.default_rng(0))
    ops, precision = ops_for("numpy", reproducible=reproducible), Precision.of("float32", reproducible=reproducible)
    workspace = ops.workspace(BATCH_SIZE, (N_IN, N_OUT), precision)
    dW, db, dh = np.empty_like(W), np.empty(N_OUT, np.float32), np.empty_like(h)
    ops.bind_backward(da, W, dh, None, None, 1.0, workspace)(h, dW, db, False)
    ones = np.ones((BATCH_SIZE, 1))
    found = {}
    for name, left, right, result in (("dW", da.T, h, dW), ("db", da.T, ones, db[:, None]), ("dh", da, W, dh)):
        left, right = np.float64(left), np.float64(right)
        found[name] = float((np.abs(result - left @ right) / (np.abs(left) @ np.abs(right))).max() * 2**24)
    return found


def main() -> None:
    """Print a line per kind of data."""
    assert __doc__
    argparse.ArgumentParser(
        prog="python -m benchmarks.studies.exactness", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()  # fmt: skip
    cases = {"mixed signs": mixed, "positive": positive, "columns of 1e6 and 1e-6": columns, "samples of 1e6": samples}
    print(f"{'data':<24} {'':<12} {'dW':>9} {'db':>9} {'dh':>9}")
    for title, make in cases.items():
        for reproducible in (False, True):
            found = errors(make, reproducible)
            mode = "reproducible" if reproducible else "plain"
            print(f"{title:<24} {mode:<12} " + " ".join(f"{error:9.3g}" for error in found.values()))


if __name__ == "__main__":
    main()
