"""One layer's backward pass on a GPU: gpuback's one launch beside PyTorch and CuPy, on the same data in the same run.

    python -m benchmarks.fused_backward [--json FILE] [--quick]

First each result is checked, gpuback's against float64 to the contract's tolerance. Then contestants take turns;
gpu_clock.py says how they are timed. Every row has the time's floor: bytes that must move over the bandwidth of a copy,
or operations over the rate of a large matrix product, both measured in the same run. Then whole training steps. With
--json the figures are kept in FILE, and as tables in a .md file beside it.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np

import gpuback
from benchmarks import gpu_clock, gpu_report, gpu_training
from benchmarks.gpu_clock import Run, Stopwatch, torch
from gpuback.activations import ACTIVATIONS
from gpuback.cuda import plans
from gpuback.errors import BackendError
from gpuback.ops import Ops, ops_for
from gpuback.precision import UNIT_ROUNDOFF, Precision
from gpuback.testing import tolerance

SHAPES = (
    *((65536, 64, 64), (65536, 128, 128), (65536, 256, 256), (8192, 1024, 1024), (8192, 4096, 4096)),
    *((1000, 72, 136), (256, 512, 512), (4096, 64, 64), (4096, 128, 128)),
)
QUICK = ((65536, 64, 64), (8192, 1024, 1024), (256, 512, 512))
PRECISIONS = ("bfloat16", "float32", "tf32")
OURS = "gpuback"
"""The one launch, in a CUDA graph, as the peers are."""

CALLS = "gpuback.fused_backward"
"""The public function, call after call."""

MOST_SETS = 200


class Buffers(NamedTuple):
    """What one call reads and writes."""

    da: Any
    h: Any
    W: Any
    dW: Any
    db: Any
    da_prev: Any


class Case(NamedTuple):
    """A layer's shape and precision."""

    batch_size: int
    n_out: int
    n_in: int
    name: str

    @property
    def precision(self) -> Precision:
        return Precision.of(self.name.replace("tf32", "float32"), allow_tf32=self.name == "tf32")

    @property
    def flops(self) -> int:
        return 4 * self.batch_size * self.n_out * self.n_in

    @property
    def bytes(self) -> int:
        """Each operand read once, each result written once."""
        B, n_out, n_in, _ = self
        operand, total = self.precision.operand.itemsize, self.precision.total.itemsize
        return operand * (B * (n_out + 2 * n_in) + n_out * n_in) + total * (n_out * n_in + n_out)

    def floor(self, ceilings: dict[str, float]) -> float | None:
        """Seconds that no way of computing it can beat on this device."""
        if self.name not in ceilings:
            return None
        return max(self.bytes / ceilings["bandwidth"], self.flops / ceilings[self.name])


class Data:
    """Random numbers on the device, of one format, from which operands are copied."""

    SIZE = 1 << 25

    def __init__(self, dtype: np.dtype[Any]) -> None:
        host = np.random.default_rng(0).standard_normal(self.SIZE + 4096, dtype=np.float32)
        self._numbers = cupy.asarray(host.astype(dtype))
        self._drawn = 0

    def draw(self, *shape: int) -> Any:
        out = cupy.empty(shape, self._numbers.dtype)
        self._drawn = (self._drawn + 1) % 256
        source = self._numbers.data + self._drawn * 16 * out.itemsize
        for start in range(0, out.nbytes, self.SIZE * out.itemsize):
            (out.data + start).copy_from_device(source, min(self.SIZE * out.itemsize, out.nbytes - start))
        return out

    def buffers(self, case: Case) -> list[Buffers]:
        """As many sets as fill the level-2 cache twice."""
        cache = int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["l2CacheSize"])
        B, n_out, n_in, _ = case
        total = case.precision.total
        return [
            Buffers(
                *(self.draw(B, n_out), self.draw(B, n_in), self.draw(n_out, n_in)),
                *(cupy.empty((n_out, n_in), total), cupy.empty(n_out, total), self.draw(B, n_in)),
            )
            for _ in range(min(math.ceil(2 * cache / case.bytes) + 1, MOST_SETS))
        ]


# ---- gpuback


def bound(ops: Ops, case: Case, sets: list[Buffers]) -> Run:
    """The layer's launch, laid out as a training step lays it out."""
    workspace = ops.workspace(case.batch_size, (case.n_in, case.n_out), case.precision)
    relu = ACTIVATIONS["relu"]
    launches = [ops.bind_backward(s.da, s.W, s.da_prev, relu, s.h, 1.0, workspace) for s in sets]

    def run(k: int) -> None:
        launches[k](sets[k].h, sets[k].dW, sets[k].db, False)

    return run


def called(case: Case, sets: list[Buffers]) -> Run:
    def run(k: int) -> None:
        s = sets[k]
        gpuback.fused_backward(
            *(s.da, s.h, s.W),
            activation_prev="relu",
            allow_tf32=case.precision.tf32,
            dW=s.dW,
            db=s.db,
            da_prev=s.da_prev,
        )

    return run


def wide(x: Any) -> Any:
    """In float64; bfloat16 by way of its bits."""
    if x.dtype.name == "bfloat16":
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def check(case: Case, s: Buffers) -> None:
    """Holds what gpuback wrote to the contract's tolerance."""
    da, h, W = wide(s.da), wide(s.h), wide(s.W)
    slope = (h > 0).astype(np.float64)

    def relative(terms: int, allow_tf32: bool = case.precision.tf32) -> float:
        return float(tolerance(1.0, terms, case.precision.operand, allow_tf32=allow_tf32))

    rounding = UNIT_ROUNDOFF[case.precision.name] if case.precision.sixteen_bit else 0.0
    for name, result, exact, limit in (
        ("dW", s.dW, da.T @ h, abs(da).T @ abs(h) * relative(case.batch_size)),
        ("db", s.db, da.sum(axis=0), abs(da).sum(axis=0) * relative(case.batch_size, False)),
        ("da_prev", s.da_prev, (da @ W) * slope, abs(da) @ abs(W) * relative(case.n_out)),
    ):
        allowed = limit + (abs(exact) * rounding if name == "da_prev" else 0.0)
        error = float((abs(wide(result) - exact) / allowed.clip(1e-300)).max())
        if not error <= 1:
            raise SystemExit(f"{case}: {name} is off by {error:.3g} times the tolerance")


# ---- Peers


def cupy_unfused(s: Buffers) -> tuple[Any, ...]:
    delta = s.da @ s.W
    delta *= s.h > 0
    return s.da.T @ s.h, s.da.sum(axis=0), delta


def torch_layer(da: Any, h: Any, W: Any) -> tuple[Any, ...]:
    """dW and da_prev come in the operands' format."""
    return da.t() @ h, da.sum(0, dtype=torch.float32), (da @ W) * (h > 0)


def check_peer(name: str, results: tuple[Any, ...], s: Buffers) -> None:
    """To 2% of the norm: that it computes the same thing."""
    for result, ours in zip(results, (s.dW, s.db, s.da_prev), strict=True):
        result = wide(cupy.asarray(result.float().contiguous()) if torch and torch.is_tensor(result) else result)
        error = float(cupy.linalg.norm(result - wide(ours)) / cupy.linalg.norm(wide(ours)))
        if not error < 0.02:
            raise RuntimeError(f"{name} differs from gpuback by {error:.2g}")


def peers(case: Case, sets: list[Buffers], compiled: bool) -> tuple[dict[str, Stopwatch], dict[str, str]]:
    """Those that work here, ready to be timed, and why others do not."""
    ready: dict[str, Callable[[], Stopwatch]] = {}
    if torch is not None:
        tensors = [tuple(map(gpu_clock.as_tensor, s[:3])) for s in sets]

        def by_torch(layer: Callable[..., Any], clock: Callable[[Run, int], Stopwatch]) -> Callable[[], Stopwatch]:
            def make() -> Stopwatch:
                check_peer("PyTorch", layer(*tensors[0]), sets[0])
                return clock(lambda k: layer(*tensors[k]), len(sets))

            return make

        ready["PyTorch eager"] = by_torch(torch_layer, gpu_clock.wall_clock)
        ready["PyTorch graph"] = by_torch(torch_layer, gpu_clock.torch_graph)
        if compiled:
            torch.compiler.reset()  # after eight shapes of a function PyTorch compiles no more
            layer = torch.compile(torch_layer, dynamic=False)
            ready["PyTorch compiled, graph"] = by_torch(layer, gpu_clock.torch_graph)

    def by_cupy() -> Stopwatch:
        check_peer("CuPy", cupy_unfused(sets[0]), sets[0])
        return gpu_clock.wall_clock(lambda k: cupy_unfused(sets[k]), len(sets))  # its cuBLAS calls cannot be captured

    if case.name != "tf32":  # CuPy takes TF32 from the environment, for the whole process
        ready["CuPy"] = by_cupy
    stopwatches, failures = {}, {}
    for name, make in ready.items():
        try:
            stopwatches[name] = make()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            gpu_clock.synchronize()
    return stopwatches, failures


# ---- All of it


def measure(case: Case, data: Data, ceilings: dict[str, float], rounds: int, compiled: bool) -> dict[str, Any]:
    """One row."""
    ops, sets = ops_for("cupy"), data.buffers(case)
    run = bound(ops, case, sets)
    with gpu_clock.tf32(case.precision.tf32):
        for once in (called(case, sets), run):
            for result in sets[0][3:]:
                result.data.memset(0xFF, result.nbytes)  # NaN: what is not written shows
            once(0)
            check(case, sets[0])
        theirs, failures = peers(case, sets, compiled)
        ours = {
            OURS: gpu_clock.cupy_graph(run, len(sets)),
            CALLS: gpu_clock.wall_clock(called(case, sets), len(sets)),
        }
        times = gpu_clock.take_turns(ours | theirs, rounds)
    plan = plans.layer_plan(*case[:3], case.precision, ops.launcher.limits)  # type: ignore[attr-defined]
    seconds, floor = times[OURS].median, case.floor(ceilings)
    best = min(theirs, key=lambda name: times[name].median, default=None)
    return {
        "precision": case.name,
        "shape": case[:3],
        "kernel": plan.launch.variant.entry,
        "why": plan.why,
        "sets": len(sets),
        "seconds": {name: spread._asdict() for name, spread in times.items()},
        "failures": failures,
        "tflops": case.flops / seconds / 1e12,
        "gbs": case.bytes / seconds / 1e9,
        "roofline": None if floor is None else floor / seconds,
        "bound_by": "bytes" if floor == case.bytes / ceilings["bandwidth"] else "operations",
        "best_peer": best,
        "ratio": None if best is None else times[best].median / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to keep the figures; tables go into a .md file beside it")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, nothing compiled by PyTorch")
    parser.add_argument("--no-training", action="store_true", help="leave whole training steps out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    try:
        ops_for("cupy")
    except BackendError as error:
        raise SystemExit(str(error)) from error
    rounds = 5 if options.quick else 15
    ceilings = gpu_clock.ceilings()
    report = gpu_report.Report(ceilings, options.json)
    for name in PRECISIONS:
        data = Data(Precision.of(name.replace("tf32", "float32")).operand)
        for shape in QUICK if options.quick else SHAPES:
            report.add_layer(measure(Case(*shape, name), data, ceilings, rounds, not options.quick))
            cupy.get_default_memory_pool().free_all_blocks()
            if torch is not None:
                torch.cuda.empty_cache()
    if not options.no_training:
        report.add_host_costs(gpu_training.host_costs())
        for row in gpu_training.measure_all(rounds):
            report.add_step(row)
    report.finish()


if __name__ == "__main__":
    main()
