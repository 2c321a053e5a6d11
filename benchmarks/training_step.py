"""Time of a training step of gpuback, with reproducible=True too, beside plain allocating NumPy and bare products.

    python -m benchmarks.training_step [--rounds N]

The contestants take turns, round by round, so that a machine that speeds up or slows down does so for all; each runs
for a while before the clock starts, so that none meets what another left behind. Figures are medians over rounds with
the 20th and 80th percentile. Before the clock starts, all steps are checked against a float64 twin.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import gpuback
from benchmarks.plain_numpy import plain_step

LEARNING_RATE = 1e-3

SETTLE, TURN = 0.15, 0.03
"""Seconds that a contestant runs before the clock starts, and while it runs: OpenBLAS's threads go on spinning for a
tenth of a second after another contestant's products, and take a core from whoever comes next."""


@dataclass(frozen=True)
class Family:
    """A network and a batch size."""

    name: str
    sizes: tuple[int, ...]
    batch_size: int


FAMILIES = (
    Family("tiny", (64, 64, 64, 10), 64),
    Family("small", (784, 256, 128, 10), 128),
    Family("wide", (784, 1024, 1024, 1024, 10), 1024),
    Family("narrow-deep", (64, 64, 64, 64, 64, 64, 64, 10), 16384),
)


def bare_products(net: gpuback.MLP, x: np.ndarray) -> Callable[[], None]:
    """Only the matrix products that a training step cannot do without, on buffers made beforehand."""
    hs = [x, *(np.ones((len(x), n), np.float32) for n in net.sizes[1:])]
    das = [np.ones_like(h) for h in hs]
    outs = [np.empty_like(h) for h in hs]
    grads = [np.empty_like(W) for W in net.weights]

    def run() -> None:
        for k, W in enumerate(net.weights):
            np.matmul(hs[k], W.T, out=outs[k + 1])
        for k in range(len(grads) - 1, -1, -1):
            np.matmul(das[k + 1].T, hs[k], out=grads[k])
            if k > 0:
                np.matmul(das[k + 1], net.weights[k], out=outs[k])

    return run


def check(family: Family, x: np.ndarray, y: np.ndarray) -> None:
    """Every step makes the float64 twin's update, to 1e-3 of its length.

    Rounding alone stays below 1e-5, but among millions of pre-activations float32 puts a few on the other side of
    relu's kink, each worth about 1e-4. A dropped sample would show as 1/√B or more.
    """
    ours, plain, exact_sums = (
        gpuback.MLP(family.sizes, backend="numpy", seed=0, reproducible=mode) for mode in (False, False, True)
    )
    exact = gpuback.MLP(family.sizes, dtype="float64", backend="numpy")
    exact.theta[:] = start = ours.theta.astype(np.float64)
    gpuback.TrainStep(exact, gpuback.SGD(1.0))(x, y)
    gpuback.TrainStep(ours, gpuback.SGD(1.0))(x, y)
    gpuback.TrainStep(exact_sums, gpuback.SGD(1.0))(x, y)
    plain_step(list(plain.weights), list(plain.biases), 1.0)(x, y)
    size = np.linalg.norm(exact.theta - start)
    for name, net in (("gpuback", ours), ("reproducible", exact_sums), ("plain NumPy", plain)):
        error = np.linalg.norm(net.theta - exact.theta) / size
        if error > 1e-3:
            raise SystemExit(f"{family.name}: {name}'s update differs from float64's by {error:.2g} of its length")


def run_for(seconds: float, call: Callable[[], object]) -> float:
    """Calls again and again for so long; the mean time of a call."""
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def measure(family: Family, rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step, by contestant, one figure a round."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((family.batch_size, family.sizes[0]), dtype=np.float32)
    y = rng.integers(family.sizes[-1], size=family.batch_size)
    check(family, x, y)
    step, reproducible = (
        gpuback.TrainStep(
            gpuback.MLP(family.sizes, backend="numpy", seed=0, reproducible=mode), gpuback.SGD(LEARNING_RATE)
        )
        for mode in (False, True)
    )
    other = gpuback.MLP(family.sizes, backend="numpy", seed=0)
    plain = plain_step(list(other.weights), list(other.biases), LEARNING_RATE)
    products = bare_products(other, x)
    contestants: dict[str, Callable[[], object]] = {
        "gpuback": lambda: step(x, y),
        "reproducible": lambda: reproducible(x, y),
        "plain NumPy": lambda: plain(x, y),
        "bare products": products,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            run_for(SETTLE, call)
            seconds[name].append(run_for(TURN, call))
    return {name: np.array(figures) for name, figures in seconds.items()}


def main() -> None:
    """Prints one line per family and contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    print(f"{'family':<12} {'contestant':<14} {'median µs':>10} {'p20':>9} {'p80':>9} {'÷ gpuback':>10}")
    for family in FAMILIES:
        seconds = measure(family, rounds)
        for name, figures in seconds.items():
            p20, median, p80 = np.percentile(figures, (20, 50, 80)) * 1e6
            ratio = np.median(figures / seconds["gpuback"])
            print(f"{family.name:<12} {name:<14} {median:>10.0f} {p20:>9.0f} {p80:>9.0f} {ratio:>10.2f}")


if __name__ == "__main__":
    main()
