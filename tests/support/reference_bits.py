"""The fingerprints of θ that reproducible networks come to, on every machine and backend.

Run as a script it trains a small network on handwritten digits and prints its fingerprint. With `--reproducible` it is
the same one under every BLAS kernel and thread count, for every order of the rows in a batch, and on every backend.
`python tests/support/reference_bits.py` goes through them all, with and without.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import gpuback
import gpuback._backends.registry
import gpuback.datasets
from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._core.parameters import permutation
from gpuback.testing import fingerprint

STEPS = 5
DIGITS_AFTER_200_STEPS = "81b87c78dc50916f"
KNOWN = {
    # dtype, activations, loss, output, optimizer: the fingerprint of θ
    ("float32", "relu", "cross_entropy", "softmax", "sgd"): "780e5ea672502230",
    ("float32", "gelu", "binary_cross_entropy", "sigmoid", "adam"): "5e8031a201d508d5",
    ("float32", "elu", "squared_error", "softmax", "adamw"): "c3f354795cedc607",
    ("bfloat16", "tanh", "cross_entropy", "softmax", "adam"): "061f8d6e2d0a96c8",
    ("bfloat16", "silu", "squared_error", "identity", "adamw"): "9c8dcdbfc44591c4",
    ("bfloat16", "leaky_relu", "squared_error", "tanh", "sgd"): "ae61c7ef17b2d736",
    ("float16", "softplus", "cross_entropy", "softmax", "adamw"): "892b055118fe5950",
    ("float16", "sigmoid", "squared_error", "sigmoid", "sgd"): "dc37c997b9156162",
    ("float16", "identity", "binary_cross_entropy", "sigmoid", "adam"): "a3a748041f4ffa56",
}


def trained(dtype: str, activation: str, loss: str, output: str, optimizer: str, backend: str = "auto") -> MLP:
    """A network after a few clipped and weighted steps on data from a stream that NumPy promises."""
    kinds = {
        "sgd": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        "adam": lambda: Adam(0.01),
        "adamw": lambda: AdamW(0.01, weight_decay=0.1),
    }
    net = MLP(
        (13, 33, 20, 5),
        activation=activation,
        dtype=dtype,
        loss=loss,
        output=output,
        backend=backend,
        seed=1,
        reproducible=True,
    )
    step = TrainStep(net, kinds[optimizer](), clip_norm=0.5)
    uniform = np.random.PCG64(0).random_raw(STEPS * 40 * 18).reshape(STEPS, 40, 18) / 2.0**64
    for batch in uniform:
        x, y = 4.0 * batch[:, :13] - 2.0, batch[:, 13:]
        step(x, np.argmax(y, axis=1) if loss == "cross_entropy" else y, np.arange(40) / 20.0)
    return net


# ---- Digits

SIZES, ACTIVATIONS, BATCH_SIZE = (64, 48, 32, 10), ("gelu", "tanh"), 100


def core_types() -> tuple[str | None, ...]:
    """Of OpenBLAS, as far as this processor can run them: each has matrix products of its own, which add in an order of
    their own. None: what suits the processor.
    """
    has_avx512 = any(
        "AVX512" in name or name == "X86_V4" for name in np.show_config("dicts")["SIMD Extensions"]["found"]
    )
    return (None, "Haswell", *(["SkylakeX"] if has_avx512 else []))


def use_emulator() -> None:
    """Makes backend="emulated" the CUDA backend, run on the CPU."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.emulated import emulated_ops

    gpuback._backends.registry.BACKENDS["emulated"] = Backend(emulated_ops, lambda: BackendStatus(True, "the emulator"))


def train(backend: str, *, steps: int, reproducible: bool, row_order: int, dtype: str = "float32") -> MLP:
    """A network after so many steps of Adam; `row_order` other than 0 shuffles the rows within each batch."""
    digits = gpuback.datasets.load("digits")
    x, y = digits.x.astype(np.float32), digits.y
    net = MLP(SIZES, activation=ACTIVATIONS, dtype=dtype, backend=backend, reproducible=reproducible, seed=0)
    step = TrainStep(net, Adam(3e-3), clip_norm=1.0)
    for number in range(steps):
        rows = permutation(len(x), 0, number)[:BATCH_SIZE]
        if row_order:
            rows = rows[permutation(BATCH_SIZE, row_order, number)]
        step(x[rows], y[rows])
    return net


def in_a_process(
    arguments: Sequence[str], *, core_type: str | None = None, threads: int = 1, wide_vectors: bool = True
) -> str:
    """The fingerprint that another Python comes to, with OpenBLAS and NumPy's own loops set up like that."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES")
    }
    environment["OPENBLAS_NUM_THREADS"] = str(threads)
    if core_type is not None:
        environment["OPENBLAS_CORETYPE"] = core_type
    if not wide_vectors:
        environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(np.show_config("dicts")["SIMD Extensions"]["found"])
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.strip()


def all_of_them(steps: int) -> None:
    backends = ["numpy", "emulated"] + ["cupy"] * gpuback.backends()["cupy"].available
    for mode in ("--reproducible", "--plain"):
        found = set()
        for backend, core_type, threads, wide, order in itertools.product(
            backends, core_types(), (1, 2), (True, False), (0, 1)
        ):
            if backend != "numpy" and (order, threads, wide) != (1, 2, True):
                continue  # what does not matter there, and takes a while
            started = time.perf_counter()
            arguments = ["--backend", backend, "--steps", str(steps), "--row-order", str(order), mode]
            bits = in_a_process(arguments, core_type=core_type, threads=threads, wide_vectors=wide)
            found.add(bits)
            print(
                f"{mode[2:]:12}  {backend:8}  OpenBLAS for {core_type or 'this CPU':8}  threads {threads}  "
                f"{'all SIMD' if wide else 'no SIMD ':8}  row order {order}  {bits}  "
                f"{time.perf_counter() - started:6.1f} s",
                flush=True,
            )
        print(f"{mode[2:]}: {len(found)} fingerprint{'s' * (len(found) > 1)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="one run on this backend; all runs without")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--row-order", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--reproducible", action="store_true", default=True)
    mode.add_argument("--plain", action="store_false", dest="reproducible")
    chosen = parser.parse_args()
    if chosen.backend is None:
        all_of_them(chosen.steps)
        return
    if chosen.backend == "emulated":
        use_emulator()
    net = train(
        chosen.backend,
        steps=chosen.steps,
        reproducible=chosen.reproducible,
        row_order=chosen.row_order,
        dtype=chosen.dtype,
    )
    print(fingerprint(net))


if __name__ == "__main__":
    main()
