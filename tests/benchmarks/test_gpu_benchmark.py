"""Rows of the benchmark on a GPU, without one: who is timed, who is refused, and how a row survives failures.

CuPy is `fake_cupy`; gpuback is its CUDA backend in the emulator, with the real kernels. Nothing here is timed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import fake_cupy
from support.emulated import emulated_ops
from support.gpu_cases import NET, TINY
from support.requirements import require_emulator

from benchmarks import peers
from benchmarks.cases import Case, CheckFailedError, LeftOutError, selection
from benchmarks.cases.selection import jobs
from benchmarks.harness.budget import Budget
from benchmarks.harness.rounds import Effort
from benchmarks.peers import GPU, Entry
from benchmarks.reports.results import Row, row_of


def failing(*arguments: Any) -> Any:
    raise RuntimeError("no\nluck")


@pytest.fixture
def fake() -> Iterator[None]:
    require_emulator()
    with fake_cupy.installed(emulated_ops):
        yield


def measured(case: Case) -> Row:
    measure = importlib.import_module("benchmarks.harness.gpu_measure")
    row = row_of(case)
    measure.measure((case,), (row,), measure.Run(GPU, Budget(1000.0), Effort(2, 1.0, warm_up=1)))
    return row


@pytest.mark.thorough(first=3)
@pytest.mark.parametrize("family", TINY)
def test_a_row_of_each_family(fake: None, family: str) -> None:
    row = measured(TINY[family])
    ours = {one.name for one in GPU if family in one.families and one.role != "peer"} or {"gpuback"}
    assert ours <= set(row.contestants), row.absent
    assert all(len(one.rounds) >= 1 and min(one.rounds) > 0 for one in row.contestants.values())
    assert all(why == "not installed" for name, why in row.absent.items() if name != "CuPy")
    assert ("CuPy" in row.contestants) == (family in ("layer", "loss"))


@pytest.mark.thorough
def test_the_layer_and_the_step_know_all_their_dtypes(fake: None) -> None:
    for dtype in ("float32", "tf32"):
        assert "gpuback" in measured(selection.layer((65, 33, 9), dtype)).contestants
    row = measured(selection.training(NET, "step", dtype="float32"))
    assert {"gpuback", "gpuback graph", "CuPy"} == set(row.contestants)


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("name", selection.HOST_CALLS)
def test_every_call_that_costs_the_host(fake: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.harness.gpu_measure"), "HOST_CALLS_A_TURN", 2)
    row = measured(selection.host(name))
    assert "gpuback" in row.contestants
    assert ("CuPy" in row.contestants) == (name == "fused_backward, outputs fresh")


def test_who_computes_something_else_is_not_timed(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("benchmarks.peers.gpu_gpuback")
    theirs = importlib.import_module("benchmarks.peers.gpu_cupy")
    right = ours.bound

    def wrong(case: Case, sets: Any) -> Any:
        run, setting = right(case, sets)

        def run_and_spoil(k: int) -> None:
            run(k)
            sets[k].dW[1, 1] *= 1.001

        return run_and_spoil, setting

    monkeypatch.setattr(ours, "bound", wrong)
    monkeypatch.setattr(theirs, "unfused", lambda da, h, W: (da.T @ h, da.sum(axis=0), da @ W))
    row = measured(selection.layer((40, 8, 24), "float32"))
    assert set(row.contestants) == {"gpuback.fused_backward"}
    assert row.absent["gpuback"].startswith("check failed: dW is off by")
    assert row.absent["CuPy"].startswith("check failed: da_prev is off by")


def test_what_a_call_does_not_write_shows(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("benchmarks.peers.gpu_gpuback")
    monkeypatch.setattr(ours, "bound", lambda case, sets: ((lambda k: None), ""))
    assert "is off by nan" in measured(TINY["layer"]).absent["gpuback"]


def test_a_peer_in_other_arithmetic_is_refused(fake: None) -> None:
    """TF32 in a float32 row would be fast for the wrong reason."""
    oracle = importlib.import_module("benchmarks.cases.gpu_oracle")
    ours = importlib.import_module("benchmarks.peers.gpu_gpuback")
    exact = oracle.check_of(selection.layer((40, 64, 64), "float32"))
    results = ours.contestant(selection.layer((40, 64, 64), "tf32"), "launch").check()
    with pytest.raises(CheckFailedError, match="is off by"):
        exact(results, "peer")


def test_a_row_without_room_for_the_exact_results_ends_nothing(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.cases.gpu_oracle"), "LayerOracle", failing)
    row = measured(TINY["layer"])
    assert row.absent == {"gpuback": "RuntimeError: no luck"} and not row.contestants


def test_compiling_is_left_out_when_time_is_short(fake: None) -> None:
    measure = importlib.import_module("benchmarks.harness.gpu_measure")
    one = Entry("x", "peer", "none", "numpy", ("layer",), "captured compiled")
    with pytest.raises(LeftOutError, match="left out for lack of time"):
        measure.ready(one, TINY["layer"], failing, Budget(5.0))


# ---- nvmath, of which there is a stand-in


def nvmath() -> Any:
    """Its products on NumPy: those with ReLU's mask lie by columns, and the mask knows for which product it is."""

    class Matmul:
        def __init__(self, a: Any, b: Any, *, options: Any) -> None:
            self.a, self.b = np.asarray(a), np.asarray(b)

        def plan(self, *, epilog: str, epilog_inputs: Any = None) -> None:
            self.epilog, self.inputs = epilog, epilog_inputs

        def execute(self) -> Any:
            product = self.a @ self.b
            if self.epilog == "BGRADA":
                assert self.a.flags.f_contiguous
                return product, {"bgrada": self.a.sum(axis=1)}
            return np.asfortranarray(product * self.inputs["relu_aux"])

    def matmul(a: Any, b: Any, *, epilog: str, options: Any) -> Any:
        product = np.asarray(a) @ np.asarray(b)
        return np.maximum(product, 0), {"relu_aux": product > 0}

    names = ("RELU_AUX", "BGRADA", "DRELU")
    return SimpleNamespace(
        Matmul=Matmul, matmul=matmul, MatmulOptions=SimpleNamespace,
        MatmulEpilog=SimpleNamespace(**dict(zip(names, names, strict=True))),
        MatmulComputeType=SimpleNamespace(COMPUTE_32F=1, COMPUTE_32F_FAST_TF32=2),
    )  # fmt: skip


def test_nvmath_computes_a_layer(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvmath", "nvmath.linalg", "nvmath.linalg.advanced"):
        monkeypatch.setitem(sys.modules, name, nvmath())
    monkeypatch.setattr(sys.modules["nvmath"], "__spec__", ModuleSpec("nvmath", None), raising=False)
    row = measured(selection.layer((40, 8, 24), "float32"))
    assert row.contestants["nvmath epilogs"].setting == "call after call, planned once"
    why = measured(selection.layer((40, 8, 24), "bfloat16")).absent["nvmath epilogs"]
    assert why == "takes bfloat16 as PyTorch's tensors only, and PyTorch is not installed"


# ---- Starts


def started(entries: tuple[Entry, ...], seconds: float) -> list[Row]:
    measure = importlib.import_module("benchmarks.harness.gpu_measure")
    (job,) = jobs("cuda", ["startup"])
    rows = [row_of(case) for case in job.cases]
    measure.measure(job.cases, rows, measure.Run(entries, Budget(seconds), Effort(2, 1.0)))
    return rows


@pytest.mark.thorough
def test_starts_are_of_fresh_processes(fake: None) -> None:
    """Here of the NumPy backend."""
    on_numpy = Entry("gpuback", "ours", "benchmarks.peers.gpuback_library", "gpuback json", ("startup",))
    rows = started((on_numpy, *peers.GPU_STARTS[1:2]), 1000.0)
    assert [row.case for row in rows] == ["import", "network", "first step", "first step, kernels cached"]
    for row in rows:
        assert len(row.contestants["gpuback"].rounds) == 2 and row.absent == {"PyTorch eager": "not installed"}


@pytest.mark.thorough
def test_there_may_be_no_time_for_a_start(fake: None) -> None:
    rows = started(peers.GPU_STARTS, 50.0)
    assert {row.absent["PyTorch compiled"] for row in rows} == {"left out for lack of time"}
