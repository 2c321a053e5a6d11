"""The benchmark on a GPU without one: what is measured and in which order, what is refused, what a run leaves behind.

CuPy is `fake_cupy`; gpuback is its CUDA backend in the emulator, with the real kernels. Nothing here is timed.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import fake_cupy
from support.emulated import emulated_ops
from support.requirements import require_emulator, require_gpu

from benchmarks import gpu_cases, gpu_run, peers
from benchmarks.budget import Budget
from benchmarks.cases import Case, Network
from benchmarks.compare import compare
from benchmarks.gpu_cases import FIRST, GUESSES, USUAL, Job, jobs
from benchmarks.gpu_contest import Contest, Effort
from benchmarks.markdown import page
from benchmarks.oracle import CheckFailedError
from benchmarks.peers import GPU, Entry, LeftOutError
from benchmarks.report import report
from benchmarks.results import Environment, Results, ResultsError, Row, load, row_of, save

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results"

NET = Network("n", (16, 8, 5), 32)
TINY = {
    "layer": gpu_cases.layer((40, 8, 24), "bfloat16"),
    "step": gpu_cases.step(NET, "bfloat16"),
    "host": gpu_cases.host("one bound launch"),
    "loss": gpu_cases.loss(NET),
    "device-memory": gpu_cases.step(NET, "float32", "device-memory"),
    "reproducible": gpu_cases.step(NET, "float32", "reproducible"),
}


# ---- What is measured


def test_rows_come_in_the_order_of_their_importance() -> None:
    every = jobs()
    assert [job.level for job in every] == sorted(job.level for job in every)
    assert {job.family for job in every} == set(gpu_cases.FAMILIES)
    assert {job.family for job in jobs(quick=True)} == set(gpu_cases.FAMILIES) - {"startup"}
    assert all(job.level == FIRST for job in jobs(quick=True))
    assert {job.family for job in jobs(["loss", "host"])} == {"loss", "host"}


def test_layers_are_of_widths_64_to_8192_and_batches_256_to_262144() -> None:
    layers = [case for job in jobs(["layer"]) for case in job.cases]
    widths, batches = {n for case in layers for n in case.sizes}, {case.batch_size for case in layers}
    assert {min(widths), max(widths), min(batches), max(batches)} == {64, 8192, 256, 262144}
    assert {case.dtype for case in layers} == {"bfloat16", "float32", "tf32"}


def test_no_row_is_there_twice() -> None:
    keys = [(row.family, row.case, row.label, row.dtype) for job in jobs() for row in map(row_of, job.cases)]
    assert len(keys) == len(set(keys))


def test_everyone_has_an_adapter() -> None:
    folder = Path(peers.__file__).parent
    for one in (*GPU, *peers.GPU_STARTS):
        assert (folder / f"{one.adapter.rpartition('.')[2]}.py").exists()
        assert set(one.families) <= set(gpu_cases.FAMILIES)
    names = [(one.name, family) for one in GPU for family in one.families]
    assert len(names) == len(set(names))


# ---- Time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_remembers_what_things_take() -> None:
    clock = Clock()
    budget = Budget(100.0, {"a": 30.0, "b": 60.0}, clock)
    assert budget.fits("a") and budget.fits("b") and budget.fits("a", share=0.1)
    for seconds in (50.0, 5.0, 7.0):
        with budget.spending("a"):
            clock.now += seconds
    assert budget.left == pytest.approx(38.0)
    assert budget.expected("a") == pytest.approx(6.0)  # of the last two
    assert budget.fits("a") and not budget.fits("b")
    assert budget.fits("a", share=0.63) and not budget.fits("a", share=0.62)
    clock.now += 33.0
    assert not budget.fits("a")


def made(planned: list[Job], seconds: float, folder: Path) -> tuple[Results, list[Job]]:
    """A run in which every row takes ten seconds, by a clock of its own."""
    clock, kept = Clock(), []

    def measure(cases: tuple[Case, ...]) -> list[Row]:
        clock.now += 10.0
        if (folder / "x.json").exists():
            kept.append(len(load(folder / "x.json").rows))
        row = row_of(cases[0])
        row.absent["nvmath epilogs"] = "not installed"
        return [row]

    results = Results(ENVIRONMENT, {}, [])
    left_out = gpu_run.run(planned, measure, Budget(seconds, GUESSES, clock), results, folder / "x.json")
    assert kept == list(range(1, len(results.rows)))  # each row was in the file before the next was measured
    return results, left_out


ENVIRONMENT = Environment("A GPU", "gpu", 7, None, "2026-01-02T03:04:05+00:00", {"gpuback": "0.1"}, "cuBLAS 130200")


def test_a_run_ends_in_time_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [Job(USUAL, (gpu_cases.layer((256, 64, 64), dtype),)) for dtype in gpu_cases.LAYER_DTYPES]
    results, left_out = made(planned, 25.0, tmp_path)
    assert [row.dtype for row in results.rows] == ["bfloat16", "float32"] and left_out == planned[2:]
    printed = capsys.readouterr().out
    assert "left out for lack of time: layer 256 × 64 × 64 (B × nO × nI), tf32" in printed
    assert printed.count("without nvmath epilogs: not installed") == 1


def test_a_short_row_may_follow_one_that_was_left_out(tmp_path: Path) -> None:
    planned = [Job(USUAL, (TINY["step"],)), Job(USUAL, (TINY["host"],))]
    _, left_out = made(planned, 12.0, tmp_path)
    assert left_out == planned[:1]


# ---- Contestants


def contest() -> tuple[Contest, list[int]]:
    recovered: list[int] = []
    return Contest(row_of(TINY["layer"]), lambda: recovered.append(1)), recovered


def turns(figures: Iterator[float]) -> Callable[[], Any]:
    return lambda: (lambda: next(figures), "call after call")


def failing(*arguments: Any) -> Any:
    raise RuntimeError("no\nluck")


def test_contestants_take_turns_after_a_warm_up() -> None:
    one, _ = contest()
    one.enter("a", "ours", turns(iter([9.0, 1.0, 2.0, 3.0])))
    one.enter("b", "peer", turns(iter([9.0, 4.0, 5.0, 6.0])))
    one.run(Effort(3, 1000.0))
    assert {name: x.rounds for name, x in one.row.contestants.items()} == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert one.row.contestants["b"].setting == "call after call"


def test_a_peer_that_raises_is_absent_and_ends_nothing() -> None:
    one, recovered = contest()
    one.enter("a", "ours", turns(itertools.repeat(1.0)))
    one.enter("b", "peer", failing)
    one.enter("c", "peer", turns(iter([1.0, 1.0])))
    row = one.row

    def gone() -> Any:
        raise LeftOutError("not installed")

    one.enter("d", "peer", gone)
    one.run(Effort(5, 1000.0))
    assert row.absent == {"b": "RuntimeError: no luck", "c": "StopIteration", "d": "not installed"}
    assert {name: len(x.rounds) for name, x in row.contestants.items()} == {"a": 5} and len(recovered) == 3


def test_rounds_end_when_a_row_has_had_its_time() -> None:
    one, _ = contest()
    one.enter("a", "ours", turns(itertools.repeat(1.0)))
    one.run(Effort(50, 0.0))
    assert len(one.row.contestants["a"].rounds) == 3


# ---- All of it, on a GPU that is none


@pytest.fixture
def fake() -> Iterator[None]:
    require_emulator()
    with fake_cupy.installed(emulated_ops):
        yield


def measured(case: Case, **options: Any) -> Row:
    measure = importlib.import_module("benchmarks.gpu_measure")
    (row,) = measure.rows_of((case,), measure.Run(Budget(1000.0, GUESSES), Effort(2, 1.0), **options))
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


def test_the_layer_and_the_step_know_all_their_dtypes(fake: None) -> None:
    for dtype in ("float32", "tf32"):
        assert "gpuback" in measured(gpu_cases.layer((65, 33, 9), dtype)).contestants
    row = measured(gpu_cases.step(NET, "float32"))
    assert {"gpuback", "gpuback graph", "CuPy"} == set(row.contestants)


@pytest.mark.parametrize("name", gpu_cases.HOST_CALLS)
def test_every_call_that_costs_the_host(fake: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.gpu_measure"), "HOST_CALLS_A_TURN", 2)
    row = measured(gpu_cases.host(name))
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
    row = measured(gpu_cases.layer((40, 8, 24), "float32"))
    assert set(row.contestants) == {"gpuback.fused_backward"}
    assert row.absent["gpuback"].startswith("CheckFailedError: check failed: dW is off by")
    assert row.absent["CuPy"].startswith("CheckFailedError: check failed: da_prev is off by")


def test_what_a_call_does_not_write_shows(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("benchmarks.peers.gpu_gpuback")
    monkeypatch.setattr(ours, "bound", lambda case, sets: ((lambda k: None), ""))
    assert "is off by nan" in measured(TINY["layer"]).absent["gpuback"]


def test_a_peer_in_other_arithmetic_is_refused(fake: None) -> None:
    """TF32 in a float32 row would be fast for the wrong reason."""
    oracle = importlib.import_module("benchmarks.gpu_oracle")
    ours = importlib.import_module("benchmarks.peers.gpu_gpuback")
    exact = oracle.check_of(gpu_cases.layer((40, 64, 64), "float32"))
    results = ours.contestant(gpu_cases.layer((40, 64, 64), "tf32"), "launch").check()
    with pytest.raises(CheckFailedError, match="is off by"):
        exact(results, "peer")


def test_a_row_without_room_for_the_exact_results_ends_nothing(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.gpu_oracle"), "LayerOracle", failing)
    row = measured(TINY["layer"])
    assert row.absent == {"gpuback": "RuntimeError: no luck"} and not row.contestants


def test_compiling_is_left_out_of_a_quick_run_and_when_time_is_short(fake: None) -> None:
    measure = importlib.import_module("benchmarks.gpu_measure")
    one = Entry("x", "peer", "none", "numpy", ("layer",), "captured compiled", graph="torch")
    for budget, compiled, why in ((1e6, False, "left out of a quick run"), (5.0, True, "left out for lack of time")):
        run = measure.Run(Budget(budget, GUESSES), Effort(1, 1.0), compiled=compiled)
        with pytest.raises(LeftOutError, match=why):
            measure.ready(one, TINY["layer"], failing, run)


def test_who_is_not_wanted_is_not_there(fake: None) -> None:
    assert "CuPy" not in measured(TINY["layer"], without=["CuPy"]).contestants


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
    row = measured(gpu_cases.layer((40, 8, 24), "float32"))
    assert row.contestants["nvmath epilogs"].setting == "call after call, planned once"
    why = measured(gpu_cases.layer((40, 8, 24), "bfloat16")).absent["nvmath epilogs"]
    assert why == "takes bfloat16 as PyTorch's tensors only, and PyTorch is not installed"


# ---- Starts


def started(entries: tuple[Entry, ...], seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    measure = importlib.import_module("benchmarks.gpu_measure")
    monkeypatch.setattr(measure, "GPU_STARTS", entries)
    (job,) = jobs(["startup"])
    return measure.rows_of(job.cases, measure.Run(Budget(seconds, GUESSES), Effort(2, 1.0)))


def test_starts_are_of_fresh_processes(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of the NumPy backend."""
    on_numpy = Entry("gpuback", "ours", "benchmarks.peers.gpuback_library", "gpuback json", ("startup",))
    rows = started((on_numpy, *peers.GPU_STARTS[1:2]), 1000.0, monkeypatch)
    assert [row.case for row in rows] == ["import", "network", "first step", "first step, kernels cached"]
    for row in rows:
        assert len(row.contestants["gpuback"].rounds) == 2 and row.absent == {"PyTorch eager": "not installed"}


def test_there_may_be_no_time_for_a_start(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = started(peers.GPU_STARTS, 50.0, monkeypatch)
    assert {row.absent["PyTorch compiled"] for row in rows} == {"left out for lack of time"}


# ---- What a run leaves behind


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[int, Path]]]:
    """Runs `main` on one tiny row of some families."""
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)

    def run(*families: str) -> tuple[int, Path]:
        monkeypatch.setattr(gpu_run, "jobs", lambda names, quick: [Job(FIRST, (TINY[name],)) for name in names])
        path = tmp_path / "gpu.json"
        return gpu_run.main(["--quick", "--families", ",".join(families), "--json", str(path)]), path

    with fake_cupy.installed():
        yield run


def test_a_run_leaves_figures_tables_and_plots(whole: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    status, path = whole("loss", "reproducible")
    printed = capsys.readouterr().out
    assert status == 0 and printed.splitlines()[-1].startswith("best peer ÷ gpuback: loss float32")
    found = load(path)
    assert found.environment.kind == "gpu" and found.environment.device == "A fake GPU"
    assert found.ceilings == fake_cupy.CEILINGS
    assert {row.family for row in found.rows} == {"loss", "reproducible"}
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "A fake GPU, 7 multiprocessors" in text and "![" in text and "PyTorch eager: not installed" in text
    assert compare(path, path) == 0
    report(path)
    assert "![" not in path.with_suffix(".md").read_text(encoding="utf-8")


def test_gpuback_failing_is_the_exit_status(whole: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.peers.gpu_gpuback"), "loss", failing)
    status, path = whole("loss")
    assert status == 1 and load(path).rows[0].absent["gpuback"] == "RuntimeError: no luck"
    assert "FAILED: loss n: 5 classes, B = 32, float32: gpuback: RuntimeError: no luck" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_what_it_has(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = importlib.import_module("benchmarks.gpu_measure")
    first = measure.rows_of

    def stopped(cases: Any, run: Any) -> Any:
        return first(cases, run) if cases[0].family == "loss" else gpu_run._stop()

    monkeypatch.setattr(measure, "rows_of", stopped)
    with pytest.raises(SystemExit):
        whole("loss", "step")
    assert [row.family for row in load(tmp_path / "gpu.json").rows] == ["loss"]
    assert "5 classes" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_gpu_that_broke_down_ends_the_run(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.peers.gpu_cupy"), "loss", failing)
    monkeypatch.setattr(importlib.import_module("benchmarks.gpu_clock"), "synchronize", failing)
    with pytest.raises(RuntimeError, match="luck"):
        whole("loss")
    assert load(tmp_path / "gpu.json").rows == []


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status = SimpleNamespace(available=False, reason="there is none")
    monkeypatch.setattr(gpu_run.gpuback, "backends", lambda: {"cupy": status})
    assert gpu_run.main([]) == 2
    assert capsys.readouterr().err == "there is none\n"


@pytest.mark.parametrize("option", [["--families", "steps"], ["--without", "Torch"], ["--seconds", "soon"]])
def test_unknown_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_run.main(option)
    assert option[1] in capsys.readouterr().err


def test_neither_typer_nor_rich_nor_matplotlib_is_needed(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules |= dict.fromkeys(("typer", "rich", "matplotlib"))
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from support import fake_cupy
import test_gpu_benchmark as these
from benchmarks import gpu_run
gpu_run.jobs = lambda names, quick: [these.Job(0, (these.TINY["loss"],))]
with fake_cupy.installed():
    sys.exit(gpu_run.main(["--quick", "--json", {str(tmp_path / "x.json")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no plots: matplotlib is not installed" in done.stdout and (tmp_path / "x.md").exists()


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", gpu_cases.FAMILIES)
def test_a_quick_run(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """One small row of a family, with whoever is installed; a start of two."""
    require_gpu()
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)
    planned = [Job(FIRST, (TINY[family],))] if family in TINY else jobs([family])
    monkeypatch.setattr(gpu_run, "jobs", lambda names, quick: planned)
    without = ["--without", "JAX jit,PyTorch compiled"] if family == "startup" else []
    assert gpu_run.main(["--quick", "--families", family, *without, "--json", str(tmp_path / "x.json")]) == 0
    found = load(tmp_path / "x.json")
    assert {row.family for row in found.rows} == {family} and found.ceilings["copy"] > 0
    for row in found.rows:
        assert min(row.contestants["gpuback"].rounds) > 0
    assert "| gpuback |" in (tmp_path / "x.md").read_text(encoding="utf-8")


# ---- Figures that are kept


def test_kept_pages_are_those_of_the_kept_figures() -> None:
    for path in KEPT.glob("*.json"):
        if "format" in json.loads(path.read_text(encoding="utf-8")):
            text = path.with_suffix(".md").read_text(encoding="utf-8")
            assert text == page(load(path), re.findall(r"!\[(.*)\]\((.*)\)", text))


def test_figures_of_before_there_was_a_format_are_refused_in_a_line() -> None:
    with pytest.raises(ResultsError, match=r"h200\.json: format: expected 1, got null"):
        load(KEPT / "h200.json")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", str(KEPT / "h200.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_round_trip(tmp_path: Path) -> None:
    rows = [row for job in jobs() for row in map(row_of, job.cases)]
    save(tmp_path / "x.json", Results(ENVIRONMENT, {"copy": 4e12}, rows))
    assert load(tmp_path / "x.json") == Results(ENVIRONMENT, {"copy": 4e12}, rows)
    assert gpu_run.in_short(load(tmp_path / "x.json")) == "no row has gpuback and a peer"
